"""Real vLLM on the CPU: under BROS, with RT arriving into a full pool, every request gets the tokens that vLLM's own
scheduler gives it, with and without a host store. Needs vLLM (`make test-vllm`)."""

import gc
import json
import os
import random
from itertools import count

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` installs and uses it")
# The engine in this process, and no threads that spin on cores which others use too.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
               "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import torch
from vllm import LLM, SamplingParams

from bros_ref.integrations.vllm import BROSScheduler
from bros_ref.integrations.vllm.smollm2 import write_smollm2

TIE = 1e-3  # natural logarithm; two tokens that are closer may change places when a batch is composed otherwise
BROS = {"scheduler_cls": "bros_ref.integrations.vllm.BROSScheduler", "enable_prefix_caching": False}
TINY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000, "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32", "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2")
    write_smollm2(path)
    return str(path)


def host_store(num_blocks):
    return {"kv_transfer_config": {
        "kv_connector": "HostKVConnector", "kv_connector_module_path": "bros_ref.integrations.vllm.connector",
        "kv_role": "kv_both", "kv_connector_extra_config": {"num_host_blocks": num_blocks}}}


class Engine:
    """vLLM with a clock that is a count, so that decisions do not depend on the machine. Counts computed tokens."""

    def __init__(self, folder, **options):
        self.llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=256, max_num_seqs=4,
                       block_size=32, max_num_batched_tokens=128, enforce_eager=True, disable_log_stats=True, **options)
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        ticks = count()
        self.scheduler.clock = lambda: 0.05 * next(ticks)
        self.num_tokens, self.num_preemptions, self.schedule = 0, 0, self.scheduler.schedule
        self.scheduler.schedule = self.counting

    def counting(self, *args):
        scheduled = self.schedule(*args)
        self.num_tokens += scheduled.total_num_scheduled_tokens
        if isinstance(self.scheduler, BROSScheduler):
            self.num_preemptions += len(self.scheduler.planner.output.preempted)
        return scheduled

    def add(self, request_id, prompt, params):
        self.engine.add_request(request_id, {"prompt_token_ids": prompt}, params, arrival_time=self.scheduler.clock())

    def close(self):
        """Checks that nothing is left, and ends the engine: there can be one with a KV connector in a process."""
        free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        num_blocks = self.scheduler.cache_config.num_gpu_blocks - 1
        used = self.scheduler.connector.store.num_used_blocks if self.scheduler.connector else 0
        self.engine.engine_core.shutdown()
        del self.llm, self.engine, self.scheduler, self.schedule
        gc.collect()
        assert free == num_blocks
        assert used == 0


def served(folder, requests, late, **options):
    """Id -> (tokens, of each the logarithms of the likeliest), preemptions, and computed tokens. `late`: ids that
    arrive after eight steps."""
    engine = Engine(folder, **options)
    finished, num_steps, waiting = {}, 0, dict(requests)
    while waiting or engine.engine.has_unfinished_requests():
        for request_id in list(waiting):
            if request_id not in late or num_steps >= 8:
                engine.add(request_id, *waiting.pop(request_id))
        for output in engine.engine.step():
            if output.finished:
                [result] = output.outputs
                tops = [sorted(top.logprob for top in step.values()) for step in result.logprobs]
                finished[output.request_id] = (list(result.token_ids), tops)
        num_steps += 1
    engine.close()
    return finished, engine.num_preemptions, engine.num_tokens


def test_the_same_tokens_as_under_vllms_own_scheduler(folder):
    generator = torch.Generator().manual_seed(0)
    lengths = {"be-0": 100, "be-1": 60, "be-2": 130, "rt-0": 30, "rt-1": 70}
    requests = {}
    for name, length in lengths.items():
        prompt = torch.randint(1000, 40_000, (length,), generator=generator).tolist()
        slo = {"ttft_slo_s": 2.0, "tpot_slo_s": 1.0} if name.startswith("rt") else None
        requests[name] = (prompt, SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=2,
                                                 detokenize=False, extra_args=slo))
    wanted, _, needed = served(folder, requests, ["rt-0", "rt-1"], num_gpu_blocks_override=100)
    assert needed == sum(length + 15 for length in lengths.values())
    num_tokens = []
    for num_host_blocks in (0, 1, 20):  # no store, one that is soon full, and one that holds everything
        store = host_store(num_host_blocks) if num_host_blocks else {}
        found, preemptions, computed = served(folder, requests, ["rt-0", "rt-1"], num_gpu_blocks_override=12,
                                              **BROS, **store)
        assert preemptions > 0
        assert found.keys() == wanted.keys() == lengths.keys()
        for name, (tokens, _) in found.items():
            expected, tops = wanted[name]
            if tokens != expected:
                at = next(index for index, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) == 2)
                assert tops[at][-1] - tops[at][-2] < TIE, f"{name} differs at token {at}: {tokens} {expected}"
        num_tokens.append(computed)
    assert num_tokens[0] == num_tokens[1] + 32 > num_tokens[2] == needed  # with enough blocks, nothing is recomputed


@pytest.mark.parametrize("num_host_blocks", [3, 100])
def test_no_host_block_leaks_in_500_requests_with_aborts(tmp_path, num_host_blocks):
    """vLLM's engine and worker on a tiny random model; `test_vllm_scheduler.py` checks the tokens of such lives."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    engine = Engine(str(tmp_path), load_format="dummy", num_gpu_blocks_override=12, **BROS,
                    **host_store(num_host_blocks))
    rng, num_used, live = random.Random(3), set(), set()
    for number in range(500):
        slo = {"ttft_slo_s": 2.0, "tpot_slo_s": 1.0} if rng.random() < 0.3 else None
        engine.add(str(number), [rng.randrange(3, 1000) for _ in range(rng.choice([1, 33, 150]))], SamplingParams(
            max_tokens=rng.choice([1, 20]), temperature=0, ignore_eos=True, detokenize=False, extra_args=slo))
        live.add(str(number))
        live -= {output.request_id for output in engine.engine.step() if output.finished}
        num_used.add(engine.scheduler.connector.store.num_used_blocks)
        if live and rng.random() < 0.6:
            victim = rng.choice(sorted(live))
            engine.engine.abort_request([victim])
            live.discard(victim)
    while engine.engine.has_unfinished_requests():
        engine.engine.step()
    engine.close()
    assert engine.num_preemptions > 0
    assert 0 < max(num_used) <= num_host_blocks
    assert (max(num_used) == num_host_blocks) == (num_host_blocks == 3)  # the small store was full

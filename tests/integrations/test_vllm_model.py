"""Real vLLM on the CPU with SmolLM2: under BROS, with RT arriving into a full pool, every request gets the tokens that
vLLM's own scheduler gives it. Needs vLLM (`make test-vllm`)."""

import gc
import json
import os
from itertools import count

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` installs and uses it")
# The engine in this process, and no threads that spin on cores which others use too.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
               "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

from bros_ref.integrations.vllm import BROSScheduler
from bros_ref.model.weights.load import load_model_config, load_weights
from bros_ref.model.weights.parameters import fused_rows

PARTS = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn_out": ("self_attn.o_proj",),
         "mlp_in": ("mlp.gate_proj", "mlp.up_proj"), "mlp_out": ("mlp.down_proj",), "attn_norm": ("input_layernorm",),
         "mlp_norm": ("post_attention_layernorm",)}
TIE = 1e-3  # natural logarithm; two tokens that are closer may change places when a batch is composed otherwise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SmolLM2 as a Hugging Face folder, which is what vLLM reads."""
    config, weights = load_model_config("smollm2"), load_weights("smollm2")
    tensors = {"model.embed_tokens.weight": weights["embed.weight"], "model.norm.weight": weights["final_norm.weight"]}
    for name, tensor in weights.items():
        if name.startswith("layers."):
            _, layer, part, kind = name.split(".")
            for target, rows in zip(PARTS[part], tensor.split(fused_rows(config, name)), strict=True):
                tensors[f"model.layers.{layer}.{target}.{kind}"] = rows.contiguous()
    path = tmp_path_factory.mktemp("smollm2")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "rms_norm_eps": config.norm_eps, "hidden_act": "silu",
        "rope_theta": config.rope_theta, "tie_word_embeddings": True, "torch_dtype": "float32",
        "max_position_embeddings": config.max_context_tokens, "bos_token_id": 1, "eos_token_id": 2}))
    return str(path)


def served(folder, requests, late, **options):
    """Id -> (tokens, of each the logarithms of the likeliest). `late`: ids that arrive after eight steps. The clock
    is a count, so that decisions do not depend on the machine."""
    llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=256, max_num_seqs=4, block_size=32,
              max_num_batched_tokens=128, enforce_eager=True, disable_log_stats=True, **options)
    engine = llm.llm_engine
    scheduler, ticks = engine.engine_core.engine_core.scheduler, count()
    scheduler.clock = lambda: 0.05 * next(ticks)
    finished, num_steps, preemptions = {}, 0, 0
    waiting = dict(requests)
    while waiting or engine.has_unfinished_requests():
        for request_id in list(waiting):
            if request_id not in late or num_steps >= 8:
                prompt, params = waiting.pop(request_id)
                engine.add_request(request_id, {"prompt_token_ids": prompt}, params, arrival_time=scheduler.clock())
        for output in engine.step():
            if output.finished:
                [result] = output.outputs
                tops = [sorted(top.logprob for top in step.values()) for step in result.logprobs]
                finished[output.request_id] = (list(result.token_ids), tops)
        num_steps += 1
        preemptions += len(scheduler.planner.output.preempted) if isinstance(scheduler, BROSScheduler) else 0
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == scheduler.cache_config.num_gpu_blocks - 1
    del llm, engine, scheduler
    gc.collect()
    return finished, preemptions


def test_the_same_tokens_as_under_vllms_own_scheduler(folder):
    generator = torch.Generator().manual_seed(0)
    lengths = {"be-0": 100, "be-1": 60, "be-2": 130, "rt-0": 30, "rt-1": 70}
    requests = {}
    for name, length in lengths.items():
        prompt = torch.randint(1000, 40_000, (length,), generator=generator).tolist()
        slo = {"ttft_slo_s": 2.0, "tpot_slo_s": 1.0} if name.startswith("rt") else None
        requests[name] = (prompt, SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, logprobs=2,
                                                 detokenize=False, extra_args=slo))
    wanted, _ = served(folder, requests, ["rt-0", "rt-1"], num_gpu_blocks_override=100)
    found, preemptions = served(folder, requests, ["rt-0", "rt-1"], num_gpu_blocks_override=12,
                                enable_prefix_caching=False,
                                scheduler_cls="bros_ref.integrations.vllm.BROSScheduler")
    assert preemptions > 0
    assert found.keys() == wanted.keys() == lengths.keys()
    for name, (tokens, _) in found.items():
        expected, tops = wanted[name]
        if tokens != expected:
            at = next(index for index, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) == 2)
            assert tops[at][-1] - tops[at][-2] < TIE, f"{name} differs at token {at}: {tokens} {expected}"

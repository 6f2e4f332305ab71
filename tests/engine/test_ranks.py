"""Ranks as processes: the same tokens as one process, and what happens when a rank dies, hangs or cannot load."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bros_ref import LLM, SLO, SamplingParams
from bros_ref.engine import StepFailed
from bros_ref.engine import ranks as module
from bros_ref.engine.build import LiveSettings, load_model, make_engine, make_runner
from bros_ref.engine.ranks import RankFailed, Ranks
from bros_ref.model.attention import paged_attention
from bros_ref.model.parallel import expected_bytes
from bros_ref.request import Request, RequestClass

PROMPTS = [[(11 * i + 5 * j) % 250 for j in range(9 + 7 * i)] for i in range(6)]


@pytest.fixture
def ranks_to_end():
    """Ends every split model that a test loads, and sees that no process is left."""
    loaded = []
    yield loaded
    for ranks in loaded:
        ranks.close()
        assert not any(process.is_alive() for process in ranks._processes)
    assert not dist.is_initialized()


def tokens_of(llm):
    """RT and BE in a pool too small for all of them."""
    slos = [SLO(0.5, 0.2) if i % 2 else None for i in range(len(PROMPTS))]
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=20, ignore_eos=True), slo=slos, use_tqdm=False)
    return [output.token_ids for output in outputs]


def test_a_split_model_gives_the_same_tokens_under_memory_pressure(ranks_to_end):
    options = {"kv_blocks": 24, "block_size": 4, "seed": 5, "latency": "online", "max_num_seqs": 6}
    expected = tokens_of(LLM("random:llama", policy="bros", **options))
    llm = LLM("random:llama", policy="bros", tp=2, **options)
    ranks = llm.engine.runner.ranks
    ranks_to_end.append(ranks)
    assert tokens_of(llm) == expected
    moved = sum(sum(step.copied.values()) for step in llm.trace.steps)
    assert moved > 0, "no pressure: checkpoints were not tried on several ranks"
    llm.engine.scheduler.kv.check_integrity()
    parallel = ranks.model._parallel
    config = parallel.config
    assert parallel.exchanged_bytes == sum(
        expected_bytes(config, sum(step.scheduled.values()), len(step.emitted), 2, 4) for step in llm.trace.steps)
    assert ranks.progress[0] == ranks.progress[1] == parallel.num_exchanges


def step_to_the_end(engine):
    while engine.has_unfinished:
        engine.step()


def engine_of_two(ranks_to_end, timeout_s):
    ranks = Ranks("random:llama", 2, timeout_s=timeout_s)
    ranks_to_end.append(ranks)
    loaded = replace(load_model("random:llama", device="cpu"), model=ranks.model, ranks=ranks)
    settings = LiveSettings(kv_blocks=16)
    return ranks, make_engine("bros", loaded, make_runner(loaded, settings), settings)


@pytest.mark.parametrize(("sign", "said"), [(signal.SIGKILL, "rank 1 ended with exit code -9"),
                                            (signal.SIGSTOP, "rank 1 did not answer within 5 s")])
def test_a_rank_that_dies_or_hangs_is_named_and_nobody_waits_for_ever(ranks_to_end, sign, said):
    ranks, engine = engine_of_two(ranks_to_end, timeout_s=5.0)
    engine.add_request(Request("a", RequestClass.BEST_EFFORT, PROMPTS[0], SamplingParams(max_tokens=50)))
    engine.step()
    os.kill(ranks._processes[0].pid, sign)
    start_s = time.monotonic()
    with pytest.raises(StepFailed, match=said) as caught:
        step_to_the_end(engine)
    assert time.monotonic() - start_s < 60
    assert isinstance(caught.value.__cause__, RankFailed)
    assert not engine.has_unfinished
    engine.scheduler.kv.check_integrity()


def test_a_rank_that_cannot_load_its_part_is_told(monkeypatch):
    monkeypatch.setattr(module, "attention_backend", lambda *_: paged_attention)  # here only: rank 1 asks the real one
    with pytest.raises(RankFailed, match=r"rank 1 could not load its part: ValueError: .*no-such-backend"):
        Ranks("random:llama", 2, backend="no-such-backend", timeout_s=5.0)
    assert not dist.is_initialized()


def test_a_part_that_rank_0_cannot_load_leaves_no_process():
    with pytest.raises(ValueError, match="no-such-backend"):
        Ranks("random:llama", 2, backend="no-such-backend", timeout_s=5.0)
    assert not dist.is_initialized()
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("bros-ref")]


def test_ranks_end_when_rank_0_is_killed():
    """Nothing of rank 0's own clean-up runs then."""
    source = ("import os, signal\n"
              "from bros_ref.engine.ranks import Ranks\n"
              "if __name__ == '__main__':\n"
              "    ranks = Ranks('random:llama', 2)\n"
              "    print(ranks._processes[0].pid, flush=True)\n"
              "    os.kill(os.getpid(), signal.SIGKILL)\n")
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    pid, deadline_s = int(run.stdout), time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_two_split_models_in_one_process_are_refused(ranks_to_end):
    ranks_to_end.append(Ranks("random:llama", 2, timeout_s=20.0))
    with pytest.raises(ValueError, match="already"):
        Ranks("random:llama", 2)


def test_a_model_that_does_not_divide_starts_no_process():
    with pytest.raises(ValueError, match="tp can be one of"):
        Ranks("random:llama", 4)
    with pytest.raises(ValueError, match="checksum"):
        load_model("checksum", tp=2)


def test_threads_are_given_back(ranks_to_end):
    before = torch.get_num_threads()
    Ranks("random:llama", 2).close()
    assert torch.get_num_threads() == before


def test_smollm2_on_three_ranks_says_what_it_says_on_one(ranks_to_end):
    """9 query heads and 3 KV heads: the default model divides by 3."""
    prompts = ["The capital of France is", "Water boils at a temperature of"]
    options = {"kv_blocks": 16, "latency": "online", "device": "cpu"}
    params = SamplingParams(max_tokens=8)
    expected = [output.text for output in LLM("smollm2", **options).generate(prompts, params, use_tqdm=False)]
    llm = LLM("smollm2", tp=3, **options)
    ranks_to_end.append(llm.engine.runner.ranks)
    assert [output.text for output in llm.generate(prompts, params, use_tqdm=False)] == expected
    held = sum(tensor.numel() for tensor in llm.engine.runner.ranks.parameters.values())
    config = llm.engine.runner.ranks.model._parallel.config
    embeddings = config.vocab_size * config.hidden_size  # replicated
    assert held - embeddings < 0.36 * (134_515_008 - embeddings)

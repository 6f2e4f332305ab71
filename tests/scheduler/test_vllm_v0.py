"""vLLM V0's rules: prompts in steps of their own, whole, before decodes; the newest gives way; 1 % of blocks stay free.
The watermark of V1's priority scheduler is tested here too."""

import pytest
from decisions import Decider
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_lives import V0Oracle, run_beside

from bros_ref.scheduler.baselines.vllm_v0 import leaves_watermark
from bros_ref.trace import NO_BLOCKS


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(4, 16), block_size=st.sampled_from([1, 2, 4]),
       seats=st.integers(1, 6), budget=st.sampled_from([3, 8, 64]))
def test_v0_decides_as_the_oracle_in_every_step(seed, num_blocks, block_size, seats, budget):
    run_beside(V0Oracle, "vllm-v0", seed, num_blocks=num_blocks, block_size=block_size, seats=seats, budget=budget)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), num_blocks=st.sampled_from([99, 100, 101, 199, 300]))
def test_v0_keeps_the_watermark_as_the_oracle_does(seed, num_blocks):
    run_beside(V0Oracle, "vllm-v0", seed, num_blocks=num_blocks, block_size=1, seats=4, budget=400, arrivals=0.8)


def test_the_oracle_lives_meet_shortage():
    sizes = {"num_blocks": 8, "block_size": 2, "seats": 4, "budget": 64}
    assert sum(run_beside(V0Oracle, "vllm-v0", seed, **sizes)[0] for seed in range(10)) > 20


def test_v0_computes_whole_prompts_while_all_decodes_wait():
    decider = Decider("vllm-v0", max_num_batched_tokens=12, chunked_prefill=True)
    decider.add("be0", prompt_tokens=5)
    decider.step()
    for name in ("be1", "rt0", "rt1"):
        decider.add(name, prompt_tokens=6)
    assert [decider.step() for _ in range(3)] == [
        {"be1": 6, "rt0": 6}, {"rt1": 6}, {"be0": 1, "be1": 1, "rt0": 1, "rt1": 1}]


def test_v0_preempts_the_newest_and_tries_it_first_again():
    decider = Decider("vllm-v0", num_blocks=3)
    requests = [decider.add(f"be{i}", prompt_tokens=4, max_tokens=4) for i in range(3)]
    decider.step()
    decider.add("rt0", prompt_tokens=1)
    assert decider.step() == {"be0": 1}  # it takes be2's block; then be1 asks, and is the newest itself
    assert decider.output.preempted == {"be2": "recompute", "be1": "recompute"}
    assert requests[1].num_computed_tokens == 0
    while "be0" in decider.scheduler.requests:
        assert list(decider.step()) == ["be0"], "be1 stands first again, and everybody waits behind it"
    assert next(iter(decider.step())) == "be1"


@pytest.mark.parametrize(("num_blocks", "num_free_needed"), [
    (50, 0), (99, 0), (100, 1), (199, 1), (200, 2), (3213, 32)])
def test_the_watermark_is_one_per_cent_of_the_pool_rounded_down(num_blocks, num_free_needed):
    assert leaves_watermark(10, 10 + num_free_needed, num_blocks)
    assert num_free_needed == 0 or not leaves_watermark(10, 9 + num_free_needed, num_blocks)


@pytest.mark.parametrize(("policy", "prompt_tokens", "admitted"), [
    ("vllm-v0", 97, True), ("vllm-v0", 98, False), ("vllm-priority-watermark", 97, True),
    ("vllm-priority-watermark", 98, False), ("vllm-priority", 98, True), ("vllm-priority", 99, False)])
def test_a_newcomer_must_leave_the_watermark_free(policy, prompt_tokens, admitted):
    """Of 100 blocks of one token, be0 holds two once it decodes with be1 (v0: one, while the prompt is computed)."""
    decider = Decider(policy, num_blocks=100, block_size=1, max_num_batched_tokens=400, chunked_prefill=True)
    decider.add("be0", prompt_tokens=2 if policy == "vllm-v0" else 1)
    decider.step()
    decider.add("be1", prompt_tokens=prompt_tokens, max_tokens=1)
    assert ("be1" in decider.step()) == admitted
    assert admitted or decider.output.left_out["be1"] == NO_BLOCKS


@pytest.mark.parametrize("policy", ["vllm-v0", "vllm-priority-watermark"])
def test_nobody_keeps_blocks_free_for_nobody(policy):
    decider = Decider(policy, num_blocks=100, block_size=1, max_num_batched_tokens=400, chunked_prefill=True)
    decider.add("be0", prompt_tokens=100, max_tokens=1)
    assert decider.step() == {"be0": 100}

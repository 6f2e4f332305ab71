"""The bounds bound: exact packing against brute force, the clairvoyant against every policy, greedy never above."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.bounds import (
    Candidate,
    LinearCost,
    PackingProblem,
    clairvoyant_be_tokens,
    iteration_gaps,
    served_be_tokens,
    small_instance,
    solve_packing,
)
from bros_ref.request import SLO, RequestClass
from bros_ref.simulate import SimulationSettings
from bros_ref.workload import WorkloadItem

candidates = st.builds(Candidate, st.integers(1, 50), st.integers(1, 40).map(float), st.integers(0, 5))
problems = st.builds(PackingProblem, st.lists(candidates, max_size=7).map(tuple), st.integers(0, 5),
                     st.integers(0, 10), st.integers(0, 120), st.integers(0, 100).map(float))


@given(problems)
@settings(max_examples=60, deadline=None)
def test_packing_is_what_brute_force_finds(problem):
    best = 0
    for size in range(min(problem.seats, len(problem.candidates)) + 1):
        for chosen in combinations(problem.candidates, size):
            if (sum(c.blocks for c in chosen) <= problem.blocks and sum(c.cost_s for c in chosen) <= problem.spare_s
                    and sum(c.tokens for c in chosen) <= problem.tokens):
                best = max(best, sum(c.tokens for c in chosen))
    assert solve_packing(problem) == best


def test_greedy_is_compared_with_an_optimum_that_it_can_reach_but_not_exceed():
    setting = SimulationSettings("a100-80gb", "llama-2-7b", 1, kv_tokens=8_000, max_num_seqs=32)
    gaps = iteration_gaps(setting, 3.0, 3.0)
    assert gaps["states"] > 20
    assert 0 < gaps["p5"] <= gaps["mean"] <= 1
    assert gaps["share_optimal"] > 0


def test_the_clairvoyant_of_a_hand_made_instance():
    """Steps of 20 ms + 1 ms a token. One BE of 10 + 3 tokens alone: 30 ms, then 21 ms each."""
    be = [WorkloadItem(0.0, RequestClass.BEST_EFFORT, 10, 3)]
    assert [clairvoyant_be_tokens(be, horizon_s, LinearCost(), 4) for horizon_s in (0.029, 0.051, 0.0721)] == [0, 2, 3]
    rt = WorkloadItem(0.0, RequestClass.REAL_TIME, 10, 1, SLO(0.031, 1.0))
    assert clairvoyant_be_tokens([*be, rt], 0.0811, LinearCost(), 4) == 2, "the RT's 30 ms come first"
    late = WorkloadItem(0.0, RequestClass.REAL_TIME, 10, 1, SLO(0.029, 1.0))
    assert clairvoyant_be_tokens([*be, late], 0.0721, LinearCost(), 4) is None, "no schedule has it on time"


@pytest.mark.parametrize("seed", range(3))
def test_no_policy_that_is_on_time_beats_the_clairvoyant(seed):
    items, cost = small_instance(seed), LinearCost()
    optimum = clairvoyant_be_tokens(items, 0.26, cost, 4)
    assert optimum is not None
    for policy in ("vllm-priority", "bros"):  # bros-plus cuts prompts, which the clairvoyant may not
        tokens, on_time = served_be_tokens(policy, items, 0.26, cost, 4)
        assert tokens <= optimum or not on_time

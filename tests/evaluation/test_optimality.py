"""The bounds bound: exact packing against brute force, the clairvoyant against every policy, greedy never above."""

import ctypes
from dataclasses import replace
from itertools import combinations

import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.evaluation.optimality import (
    Candidate,
    LinearCost,
    PackingProblem,
    clairvoyant_be_tokens,
    distribution,
    iteration_gaps,
    recorded_gaps,
    rt_work_share,
    served_be_tokens,
    small_instance,
    solve_packing,
)
from bros_ref.request import SLO, RequestClass
from bros_ref.simulator.runner import fit_to
from bros_ref.simulator.simulate import SimulationSettings
from bros_ref.workload import WorkloadItem
from bros_ref.workload.paper import PaperWorkload, be_batch_for

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
    gaps = distribution(iteration_gaps(setting, PaperWorkload(3.0, 3.0, be_batch_for(8_000))))
    assert gaps["states"] > 20
    assert 0 < gaps["p5"] <= gaps["mean"] <= 1
    assert gaps["share_optimal"] > 0


def test_what_the_optimum_does_not_see_is_counted():
    """A pool so small that KV moves and requests give way, and more newcomers than the program is offered."""
    setting = SimulationSettings("a100-80gb", "llama-2-7b", 1, kv_tokens=4_000, max_num_seqs=32)
    ratios, omitted = recorded_gaps(setting, PaperWorkload(6.0, 5.0, 60))
    assert ratios
    assert omitted.keys() <= {"states_with_copies", "states_with_preemption", "states_with_offloaded_be",
                              "states_with_more_newcomers"}
    assert omitted["states_with_copies"] > 0
    assert 0 < omitted["states_with_more_newcomers"] <= len(ratios)
    assert ratios == iteration_gaps(setting, PaperWorkload(6.0, 5.0, 60))
    ample = recorded_gaps(SimulationSettings("a100-80gb", "llama-2-7b", 1), PaperWorkload(3.0, 3.0, 8))[1]
    assert not ample, "with memory to spare and few newcomers nothing is omitted"


def test_a_distribution_counts_every_state():
    assert distribution([])["states"] == 0
    found = distribution([0.05, 0.55, 1.0, 1.0])
    assert (found["states"], found["share_optimal"], found["mean"]) == (4, 0.5, pytest.approx(0.65))
    assert found["histogram"] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 2]


def test_what_rt_leaves_is_counted_token_by_token():
    setting = SimulationSettings("a100-80gb", "llama-2-7b", 1)
    workload = PaperWorkload(2.0, 10.0, 0, rt_lengths=((30, 4),))
    latency, arrived = fit_to(setting.cost), len(workload.build(0).due(10.0))
    each_s = latency.cost_s(30, 0) + sum(latency.cost_s(1, 30 + token) for token in (1, 2, 3))
    assert rt_work_share(setting, workload) == pytest.approx(arrived * each_s / 10.0)
    assert rt_work_share(setting, replace(workload, rt_rate_per_s=0.0)) == 0


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


def test_what_the_solver_prints_past_python_reaches_nobody(monkeypatch, capfd):
    def chatty(*arguments, **options):
        ctypes.CDLL(None).puts(b"a line of debugging")
        return scipy.optimize.milp(*arguments, **options)

    monkeypatch.setattr("bros_ref.evaluation.optimality.milp", chatty)
    assert solve_packing(PackingProblem((Candidate(5, 1.0, 1),) * 4, 2, 9, 100, 9.0)) == 10
    print("heard")
    assert capfd.readouterr().out == "heard\n"

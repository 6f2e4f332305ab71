"""`rt-only` and `be-only` are what they say: no form of BROS serves one class alone better, nor beside the other."""

import pytest

from bros_ref.engine.build import load_model
from bros_ref.evaluation.bench.hybrid import bench_hybrid
from bros_ref.request import SLO
from bros_ref.scheduler import REFERENCE_FORMS, REFERENCE_POLICIES
from bros_ref.simulator.simulate import SimulationSettings, reference_rank, run
from bros_ref.workload.paper import PaperWorkload

SETTINGS = SimulationSettings("a100-80gb", "llama-3-8b", 1, kv_tokens=60_000)
LONG = tuple((prompt, 20) for prompt in (200, 500, 4_000, 7_000))  # whole, the longest take most of a second
MIXED = PaperWorkload(2.5, 12.0, 24, SLO(1.0, 0.05), LONG)


@pytest.mark.parametrize("policy", REFERENCE_POLICIES)
def test_a_reference_is_the_better_of_both_forms(policy):
    best, trace = run(policy, SETTINGS, MIXED)
    assert (best["policy"], trace.policy) == (policy, policy)
    alone = {"rt-only": PaperWorkload(2.5, 12.0, 0, SLO(1.0, 0.05), LONG),
             "be-only": PaperWorkload(0.0, 12.0, 24, SLO(1.0, 0.05), LONG)}[policy]
    ranks = [reference_rank(run(form, SETTINGS, alone)[0] | {"policy": policy}) for form in REFERENCE_FORMS]
    assert policy == "be-only" or len(set(ranks)) == 2, "the forms differ on long prompts"
    assert reference_rank(best) == min(ranks)


def test_no_policy_with_best_effort_work_beside_serves_real_time_better_than_the_floor():
    """Better: more on time, or as many at a lower latency. A policy late for many may be fast for the others."""
    floor = reference_rank(run("rt-only", SETTINGS, MIXED)[0])
    for policy in ("bros", "bros-plus", "vllm-priority"):
        assert reference_rank(run(policy, SETTINGS, MIXED)[0] | {"policy": "rt-only"}) >= floor


def test_the_rank_prefers_users_on_time_then_speed_then_work():
    def summary(policy, on_time, latency, be):
        return {"policy": policy, "classes": {"rt": {"slo_attainment": on_time,
                                                     "normalized_latency_ms_per_token": latency},
                                              "be": {"output_throughput": be}}}

    ranks = [reference_rank(summary("rt-only", *values)) for values in (
        (1.0, 30.0, 0.0), (1.0, 40.0, 9.0), (0.9, 20.0, 9.0), (0.0, 20.0, 9.0), (None, None, 0.0))]
    assert ranks == sorted(ranks)
    assert reference_rank(summary("be-only", None, None, 9.0)) < reference_rank(summary("be-only", None, None, 8.0))


def test_the_live_bench_tries_both_forms_too():
    runs, [trace] = bench_hybrid(load_model("random:llama", "cpu"), ["rt-only"], rounds=1, num_be=1, num_rt=4)
    assert (runs[0]["policy"], trace.policy) == ("rt-only", "rt-only")
    forms, _ = bench_hybrid(load_model("random:llama", "cpu"), REFERENCE_FORMS, rounds=1, num_be=1, num_rt=4)
    assert reference_rank(runs[0])[0] <= min(reference_rank(run_)[0] for run_ in forms)

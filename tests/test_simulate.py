"""The simulator: a live run's decisions, a full trace's numbers from a streamed one, defined answers at the edges."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.clock import VirtualClock
from bros_ref.config import KVCacheConfig, SchedulerConfig
from bros_ref.cost_model import CostModel, gpu_named, model_named
from bros_ref.engine import LLMEngine
from bros_ref.metrics import StreamedTrace, summarise
from bros_ref.model.checksum import ChecksumModel
from bros_ref.model_runner import ModelRunner
from bros_ref.paper import PaperWorkload, be_batch_for
from bros_ref.request import SLO, RequestClass
from bros_ref.scheduler import POLICIES, make_scheduler
from bros_ref.serving import serve
from bros_ref.simulate import Job, SimulationSettings, interval, request_of_length, run, run_all
from bros_ref.simulated_runner import SimulatedRunner, fit_to
from bros_ref.trace import Trace
from bros_ref.workload import Workload, WorkloadItem

COST = CostModel(gpu_named("a100-80gb"), model_named("llama-2-7b"))
SMALL = SimulationSettings("a100-80gb", "llama-2-7b", 1, kv_tokens=4_000, max_num_seqs=32)


class TimedModelRunner:
    """A live runner (ChecksumModel on tensors) that takes the time the cost model says."""

    def __init__(self, kv_config, clock):
        self.live = ModelRunner(ChecksumModel(), kv_config, dtype=torch.int64)
        self.simulated = SimulatedRunner(COST, clock)

    def execute(self, output):
        tokens = self.live.execute(output)
        assert [token is None for token in tokens] == [token is None for token in self.simulated.execute(output)]
        return tokens


def items_of(seed):
    rng = np.random.default_rng(seed)
    items = [WorkloadItem(float(rng.uniform(0, 0.3)), RequestClass.BEST_EFFORT, int(rng.integers(1, 90)),
                          int(rng.integers(1, 30))) for _ in range(8)]
    return items + [WorkloadItem(float(rng.uniform(0, 0.5)), RequestClass.REAL_TIME, int(rng.integers(1, 60)),
                                 int(rng.integers(1, 12)), SLO(0.1, 0.05)) for _ in range(6)]


def decisions(policy, seed, make_runner, trace_type=Trace, chunked=True):
    clock, kv_config = VirtualClock(), KVCacheConfig(14, 16, 6)
    config = SchedulerConfig(6, 128, chunked)
    trace = trace_type(policy, "any", "any", 14, 16, 1, seed)
    engine = LLMEngine(make_scheduler(policy, config, kv_config, fit_to(COST)), make_runner(kv_config, clock), clock,
                       trace=trace)
    serve(engine, Workload(items_of(seed)), request_of_length)
    return engine.trace


def without_cpu_time(steps):
    return [asdict(replace(step, schedule_s=0.0)) for step in steps]


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 10_000), chunked=st.booleans())
@settings(max_examples=8, deadline=None)
def test_a_live_run_and_a_simulated_one_decide_alike_step_by_step(policy, seed, chunked):
    live = decisions(policy, seed, TimedModelRunner, chunked=chunked)
    simulated = decisions(policy, seed, lambda _, clock: SimulatedRunner(COST, clock), chunked=chunked)
    assert without_cpu_time(live.steps) == without_cpu_time(simulated.steps)
    assert live.steps


@given(seed=st.integers(0, 10_000), policy=st.sampled_from(list(POLICIES)))
@settings(max_examples=25, deadline=None)
def test_streamed_metrics_are_those_of_the_full_trace(seed, policy):
    full = summarise(decisions(policy, seed, lambda _, clock: SimulatedRunner(COST, clock)))
    streamed = decisions(policy, seed, lambda _, clock: SimulatedRunner(COST, clock), StreamedTrace)
    assert streamed.steps == []
    result = summarise(streamed)
    for run_ in (full, result):
        del run_["scheduler"]  # CPU time differs from run to run
    assert result == full


@pytest.mark.parametrize("policy", ["vllm-priority", "bros", "bros-plus", "rt-only", "be-only"])
def test_the_same_seed_gives_the_same_run_in_this_process_and_in_another(policy):
    arrivals = PaperWorkload(3.0, 4.0, be_batch_for(4_000))
    jobs = [Job(str(seed), policy, replace(SMALL, seed=seed), arrivals) for seed in (0, 0, 1)]
    first, again, other = (run_["classes"] for run_ in run_all(jobs, processes=2))
    assert first == again == run(policy, SMALL, arrivals)[0]["classes"]
    assert first != other


def test_bounds_serve_one_class_with_the_very_same_arrivals():
    arrivals = PaperWorkload(5.0, 6.0, 8)
    both = run("bros", SMALL, arrivals)[0]["classes"]
    rt, be = (run(policy, SMALL, arrivals)[0]["classes"] for policy in ("rt-only", "be-only"))
    assert rt["rt"]["arrived"] == both["rt"]["arrived"] > 0 == rt["be"]["arrived"]
    assert be["rt"]["arrived"] == 0 < be["be"]["arrived"]
    assert be["be"]["output_throughput"] >= both["be"]["output_throughput"]


def test_edges_are_defined():
    assert run("bros", SMALL, ())[0]["classes"]["rt"]["slo_attainment"] is None, "nothing arrived"
    idle = run("bros", SMALL, PaperWorkload(0.0, 1.0, 0))[0]
    assert idle["scheduler"]["steps"] == 0
    too_long = WorkloadItem(0.0, RequestClass.BEST_EFFORT, 4_000, 100)
    fine = WorkloadItem(0.0, RequestClass.BEST_EFFORT, 100, 10)
    summary, trace = run("bros", SMALL, (too_long, fine))
    assert (summary["classes"]["be"]["completed"], len(trace.rejected)) == (1, 1)
    for wrong in ({"rt_rate_per_s": -1.0}, {"rt_rate_per_s": float("nan")}, {"duration_s": 0.0}, {"be_batch": -1}):
        with pytest.raises(ValueError, match=r"rate|duration"):
            PaperWorkload(**{"rt_rate_per_s": 1.0, "duration_s": 1.0, "be_batch": 1} | wrong)
    with pytest.raises(ValueError, match="no block"):
        run("bros", replace(SMALL, kv_tokens=15), ())


def test_intervals_are_students():
    assert interval([3.0]) == (3.0, None)
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.30 / 3**0.5)


@pytest.mark.parametrize("seed", range(3))
def test_bros_plus_cuts_prompts_where_whole_ones_miss_deadlines(seed):
    """At an SLO that no whole BE prompt fits, `bros` keeps them out while RT run; `bros-plus` takes them in chunks."""
    config = replace(SMALL, seed=seed, kv_tokens=40_000, max_num_seqs=64)
    workload = PaperWorkload(4.0, 20.0, 40, SLO(0.2, 0.04))
    whole, cut = (run(policy, config, workload)[0]["classes"] for policy in ("bros", "bros-plus"))
    assert cut["be"]["output_throughput"] > 2 * whole["be"]["output_throughput"]
    assert cut["rt"]["slo_attainment"] >= whole["rt"]["slo_attainment"] - 0.02


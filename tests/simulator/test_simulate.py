"""The simulator: a live run's decisions, a full trace's numbers from a streamed one, defined answers at the edges."""

import cProfile
import pstats
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.clock import VirtualClock
from bros_ref.config import KVCacheConfig, SchedulerConfig
from bros_ref.engine import LLMEngine
from bros_ref.engine.assemble import RunnerFacts, assemble_engine
from bros_ref.engine.model_runner import ModelRunner
from bros_ref.engine.serve import serve
from bros_ref.model.checksum import ChecksumModel
from bros_ref.request import SLO, RequestClass
from bros_ref.scheduler import POLICIES, make_scheduler
from bros_ref.simulator.cost_model import CostModel, gpu_named, model_named
from bros_ref.simulator.runner import SimulatedRunner, fit_to
from bros_ref.simulator.simulate import (
    HOST_STORE_BYTES,
    Job,
    SimulationSettings,
    Zeros,
    request_of_length,
    run,
    run_all,
    simulated_engine,
)
from bros_ref.trace import Trace
from bros_ref.trace.metrics import StreamedTrace, summarise
from bros_ref.workload import Workload, WorkloadItem, merge
from bros_ref.workload.files import read_lengths, read_workload
from bros_ref.workload.paper import PaperWorkload, be_batch_for

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"

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


@given(length=st.integers(1, 40), start=st.integers(-50, 50), stop=st.integers(-50, 50))
def test_a_prompt_of_zeros_is_the_list_that_it_stands_for(length, start, stop):
    zeros, listed = Zeros(length), [0] * length
    assert (len(zeros), list(zeros), list(zeros[start:stop])) == (length, listed, listed[start:stop])
    assert zeros[-1] == 0
    with pytest.raises(IndexError):
        zeros[length]


def test_requests_that_wait_take_no_memory_for_their_prompts():
    """Ten thousand prompts of 3,000 tokens at once: 240 MB if each were a list."""
    tracemalloc.start()
    engine = simulated_engine("bros-plus", SMALL)
    for index in range(10_000):
        engine.add_request(request_of_length(WorkloadItem(0.0, RequestClass.BEST_EFFORT, 3_000, 10,
                                                          request_id=f"be-{index}")))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10_000 * 2_000


def test_cost_is_linear_in_work():
    """Counted, not timed: a request-step of a run four times as long makes about as many calls."""
    calls = []
    for duration_s in (6.0, 24.0):
        profile = cProfile.Profile()
        profile.enable()
        summary = run("bros-plus", SMALL, PaperWorkload(3.0, duration_s, be_batch_for(4_000)))[0]
        profile.disable()
        total_calls = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
        calls.append(total_calls / summary["scheduler"]["request_steps"])
    assert calls[1] < 1.3 * calls[0]


def test_rt_lengths_are_a_datasets_own_pairs_when_given():
    pairs = ((10, 3), (20, 5))
    items = PaperWorkload(20.0, 5.0, 0, rt_lengths=pairs).build(0).due(5.0)
    assert {(item.prompt_tokens, item.output_tokens) for item in items} == set(pairs)
    fitted = PaperWorkload(20.0, 5.0, 0).build(0).due(5.0)
    assert [item.arrival_s for item in items] == [item.arrival_s for item in fitted]


SHAREGPT = PUBLIC / "sharegpt_vllmfilter_smollm2.csv.gz"


@pytest.mark.skipif(not SHAREGPT.exists(), reason="the public length files are not at hand")
def test_the_fitted_sharegpt_lengths_are_near_the_real_ones():
    """As `paper.py` states: medians within a quarter, means within a fifth."""
    real = np.array(read_lengths(SHAREGPT, 2048))
    fitted = np.array([(item.prompt_tokens, item.output_tokens)
                       for item in PaperWorkload(50.0, 100.0, 0).build(0).due(100.0)])
    assert np.median(fitted, axis=0) == pytest.approx(np.median(real, axis=0), rel=0.25)
    assert fitted.mean(axis=0) == pytest.approx(real.mean(axis=0), rel=0.2)


@pytest.mark.skipif(not PUBLIC.exists(), reason="the public traces are not at hand")
def test_real_traces_are_merged_and_simulated():
    rt = [item for item in read_workload(PUBLIC / "azure2023_code.csv.gz", RequestClass.REAL_TIME, SLO(1.0, 0.2))
          if item.arrival_s < 20.0]
    lengths = read_lengths(PUBLIC / "arxiv_summarization_llama2tok_vidur.csv.gz", 4_096)
    be = [WorkloadItem(0.0, RequestClass.BEST_EFFORT, *pair) for pair in lengths[:20]]
    summary = run("bros-plus", SimulationSettings("a100-80gb", "llama-3-8b", 1), tuple(merge(rt, be)))[0]
    assert summary["classes"]["rt"]["completed"] == len(rt) > 0
    assert summary["classes"]["be"]["completed"] == 20


def test_real_time_alone_beyond_the_pool_does_not_thrash_under_bros_plus():
    """A pool that RT alone overflow: the paper's form moves requests over PCIe in every step, bros-plus seldom does."""
    small = replace(SMALL, kv_tokens=2_500)
    arrivals = PaperWorkload(8.0, 6.0, 4)
    paper, plus = (run(policy, small, arrivals)[0] for policy in ("bros", "bros-plus"))
    assert plus["kv"]["restored_slots"] < 0.5 * paper["kv"]["restored_slots"]
    assert plus["classes"]["rt"]["slo_attainment"] >= paper["classes"]["rt"]["slo_attainment"]


@pytest.mark.parametrize("seed", range(3))
def test_bros_plus_cuts_prompts_where_whole_ones_miss_deadlines(seed):
    """At an SLO that no whole BE prompt fits, `bros` keeps them out while RT run; `bros-plus` takes them in chunks."""
    config = replace(SMALL, seed=seed, kv_tokens=40_000, max_num_seqs=64)
    workload = PaperWorkload(4.0, 20.0, 40, SLO(0.2, 0.04))
    whole, cut = (run(policy, config, workload)[0]["classes"] for policy in ("bros", "bros-plus"))
    assert cut["be"]["output_throughput"] > 2 * whole["be"]["output_throughput"]
    assert cut["rt"]["slo_attainment"] >= whole["rt"]["slo_attainment"] - 0.02


@pytest.mark.parametrize("policy", ["bros", "bros-plus"])
def test_without_a_latency_model_deadlines_count_after_the_first_steps(policy):
    """Six RT per second with targets that only the deadlines' bound on the iteration keeps."""
    settings = SimulationSettings("a100-40gb", "opt-13b", 2, seed=1)
    workload = PaperWorkload(6.0, 40.0, 66, SLO(0.2, 0.05))

    def on_time(latency, learns=True):
        cost, clock = settings.cost, VirtualClock()
        facts = RunnerFacts(settings.model, "simulated", cost.model.kv_bytes_per_token, cost.model.max_context_tokens)
        engine = assemble_engine(policy, SimulatedRunner(cost, clock), facts, settings.kv_config, settings, clock,
                                 latency=latency, trace_type=StreamedTrace)
        if not learns:
            engine.scheduler.latency.observe = lambda features, actual_s: None
        serve(engine, workload.build(1), request_of_length, 40.0)
        return summarise(engine.trace)["classes"]["rt"]["slo_attainment"]

    never, online, fitted = on_time(None, learns=False), on_time(None), on_time(fit_to(settings.cost))
    assert fitted > never + 0.3
    assert online > fitted - 0.1


@pytest.mark.parametrize(("model", "gpu", "tp"), [("opt-13b", "a100-40gb", 2), ("llama-3-70b", "a100-80gb", 8)])
def test_the_host_store_is_four_pools_within_its_bound(model, gpu, tp):
    settings = SimulationSettings(gpu, model, tp)
    config, bytes_per_block = settings.kv_config, settings.cost.model.kv_bytes_per_token * settings.block_size
    assert config.host_blocks in (4 * config.num_blocks, int(HOST_STORE_BYTES // bytes_per_block))
    assert config.host_blocks * bytes_per_block <= HOST_STORE_BYTES
    trace = simulated_engine("bros", settings).trace
    assert trace.environment["host_blocks"] == config.host_blocks

"""The live comparison: fair rounds, and a modelled clock on which every machine and every model gives one result."""

import json
import subprocess
import sys

import pytest

from bros_ref.engine.build import load_model
from bros_ref.evaluation.bench.hybrid import (
    MODELLED_STEP,
    SETTINGS,
    bench_hybrid,
    hybrid_items,
    parse_clock,
    parse_step,
)
from bros_ref.request import SLO

TOY = load_model("random:llama", "cpu")
POLICIES = ("rt-only", "vllm-priority", "bros")


def decisions(trace):
    return [(step.start_s, step.end_s, step.scheduled) for step in trace.steps]


def figures(run):
    return {key: value for key, value in run.items() if key not in ("scheduler", "model")}


def test_no_two_requests_arrive_at_once():
    items = hybrid_items(3, SLO(0.6, 0.4))
    assert len({item.arrival_s for item in items}) == len(items) == 28
    assert [(item.prompt_tokens, item.output_tokens) for item in items if item.slo is None] == [(512, 128)] * 16
    assert max(item.arrival_s for item in items if item.slo is None) < 1e-3
    assert max(item.arrival_s for item in hybrid_items(3, SLO(0.6, 0.4), 8, 6)) < 10, "half the requests, half the time"


def test_a_modelled_step_takes_what_it_is_said_to_take():
    _, [trace] = bench_hybrid(TOY, ["bros"], rounds=1, num_be=3, num_rt=2)
    step_s, token_s = MODELLED_STEP
    assert trace.steps
    for step in trace.steps:
        assert step.end_s - step.start_s == pytest.approx(step_s + token_s * sum(step.scheduled.values()))
    assert "modelled" in trace.device


def test_the_modelled_figures_do_not_depend_on_the_model_or_the_machine():
    """Each model computes its own tokens; when a request is served follows from lengths and modelled time alone."""
    checksum = load_model("checksum")
    assert checksum.config.vocab_size != TOY.config.vocab_size
    ours, [ours_trace] = bench_hybrid(TOY, ["vllm-priority"], rounds=1, num_be=3, num_rt=2)
    theirs, [their_trace] = bench_hybrid(checksum, ["vllm-priority"], rounds=1, num_be=3, num_rt=2)
    assert decisions(ours_trace) == decisions(their_trace)
    assert [figures(run) for run in ours] == [figures(run) for run in theirs]


@pytest.mark.parametrize("clock", ["modelled", "wall"])
def test_policies_alternate_within_rounds_and_share_their_arrivals(clock, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where a measured latency model is kept
    order = []
    runs, traces = bench_hybrid(TOY, POLICIES, clock=clock, rounds=2, seed=4, num_be=1, num_rt=1,
                                on_run=lambda policy, round_: order.append((round_, policy)))
    assert order == [*((0, policy) for policy in POLICIES), *((1, policy) for policy in reversed(POLICIES))]
    assert [(run["policy"], run["seed"]) for run in runs] == [(policy, seed) for policy in POLICIES for seed in (4, 5)]
    assert [trace.policy for trace in traces] == list(POLICIES)
    arrivals = {trace.requests["rt-0"].arrival_s for trace in traces}
    assert len(arrivals) == 1
    assert "be-0" not in traces[0].requests, "rt-only is the floor"
    assert all(run["classes"]["rt"]["completed"] == 1 for run in runs)


def test_every_policy_has_the_same_pool_and_limits():
    _, traces = bench_hybrid(TOY, POLICIES, rounds=1, num_be=2, num_rt=1)
    for trace in traces:
        assert (trace.num_blocks, trace.block_size) == (200, 16)
        assert max(sum(step.scheduled.values()) for step in trace.steps) <= SETTINGS.max_num_batched_tokens


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "-1,2", "0,0", "nan,1", "inf,1", "1;2"])
def test_a_modelled_step_needs_two_durations(text):
    with pytest.raises(ValueError, match="modelled-step"):
        parse_step(text)
    assert parse_step("0.1, 0") == (0.1, 0.0)


def test_an_unknown_clock_is_refused():
    with pytest.raises(ValueError, match="wall or modelled"):
        parse_clock("sundial")


def test_the_command_gives_rows_with_intervals():
    done = subprocess.run([
        sys.executable, "-m", "bros_ref", "bench", "hybrid", "--clock", "modelled", "--model", "random:llama",
        "--policies", "vllm-priority,bros", "--be-requests", "2", "--rt-requests", "2", "--seeds", "3",
        "--modelled-step", "0.02,0.001", "--json", "-"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["clock"], report["modelled_step"], len(report["runs"])) == ("modelled", [0.02, 0.001], 6)
    assert [(row["policy"], row["seeds"], row["clock"]) for row in report["rows"]] == [
        ("vllm-priority", 3, "modelled"), ("bros", 3, "modelled")]
    for row in report["rows"]:
        low, high = row["interval95"]["be.output_throughput"]
        assert low <= row["be.output_throughput"][0] <= high
        assert row["median"]["rt.median_ttft_ms"] > 0
    assert "no prefix cache" in done.stderr, "what vLLM would have by default is said beside the comparison"

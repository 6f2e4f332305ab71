"""The numbers of a run: by hand on a trace of six steps, and against a slow, obvious recount on any trace."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.environment import environment_stamp
from bros_ref.trace import RequestRecord, StepRecord, Trace
from bros_ref.trace.metrics import StreamedTrace, measure, request_timings, summarise
from tests.viz.factory import make_trace

CLASS_KEYS = {
    "completed", "failed", "request_throughput", "output_throughput", "total_token_throughput",
    "normalized_latency_ms_per_token", "ttft_attainment", "tpot_attainment", "tpot_token_attainment",
    "slo_attainment", "request_goodput", "max_wait_s",
    *(f"{statistic}_{name}_ms" for statistic in ("mean", "median", "p99", "std")
      for name in ("ttft", "tpot", "itl", "e2el"))}
KV_KEYS = {"num_blocks", "block_size", "peak_usage", "preempted_requests", "recomputed_tokens", "overwritten_slots",
           "checkpointed_slots", "restored_slots", "relocated_slots", "d2h_bytes", "h2d_bytes"}
SCHEDULER_KEYS = {"steps", "request_steps", "mean_us_per_step", "p99_us_per_step", "us_per_request_step",
                  "share_of_iteration"}


def step(index: int, start_s: float, duration_s: float, **changes: Any) -> StepRecord:
    defaults: dict[str, Any] = {
        "schedule_s": 0.01, "predicted_s": None, "step_budget_s": None, "binding": None, "scheduled": {}, "emitted": [],
        "finished": {}, "preempted": {}, "slack_s": {}, "left_out": {}, "num_behind": 0, "block_changes": [],
        "offloaded": [], "copied": {}, "recomputed_tokens": 0, "num_waiting": 0, "num_running": 0, "used_blocks": 0}
    return StepRecord(index, start_s, duration_s, **(defaults | changes))


@pytest.fixture
def trace() -> Trace:
    """rt-a meets both targets; rt-b is slow between tokens; rt-c is refused, rt-d aborted, rt-e never served."""
    trace = Trace("hand", "none", "cpu", 10, 4, slot_bytes=100, seed=5)
    for name, arrival_s, prompt in (("a", 1.0, 4), ("b", 1.0, 8), ("c", 2.0, 99), ("d", 2.0, 4), ("e", 5.0, 4)):
        trace.requests[f"rt-{name}"] = RequestRecord(f"rt-{name}", "rt", arrival_s, prompt, 3, 1.0, 0.5)
    trace.requests["be-a"] = RequestRecord("be-a", "be", 1.0, 10, 2)
    trace.rejected["rt-c"] = "too long"
    trace.ended_outside["rt-d"] = [4.5, "aborted"]
    trace.steps = [
        step(0, 1.5, 0.5, scheduled={"rt-a": 4, "rt-b": 8}, emitted=["rt-a", "rt-b"], used_blocks=3, predicted_s=0.25),
        step(1, 2.0, 0.5, scheduled={"rt-a": 1, "rt-d": 4}, emitted=["rt-a", "rt-d"], used_blocks=5, predicted_s=0.5),
        step(2, 2.5, 0.5, scheduled={"rt-a": 1}, emitted=["rt-a"], finished={"rt-a": "length"}, used_blocks=7,
             copied={"checkpoint": 3, "restore": 0}, offloaded=[["be-a", 0, 3]]),
        step(3, 3.0, 1.0, scheduled={"rt-b": 1, "be-a": 10}, emitted=["rt-b", "be-a"], finished={"rt-b": "stop"},
             copied={"restore": 3, "relocate": 1}, offloaded=[["be-a", 0, 0]], used_blocks=6),
        step(4, 4.0, 1.0, scheduled={"be-a": 1}, emitted=["be-a"], finished={"be-a": "length"}, used_blocks=4,
             preempted={"rt-d": "recompute"}, recomputed_tokens=4)]
    return trace


def test_real_time_by_hand(trace: Trace) -> None:
    rt = summarise(trace)["classes"]["rt"]
    assert (rt["arrived"], rt["completed"], rt["failed"], rt["unfinished"]) == (5, 2, 2, 1)
    # First tokens: a and b at 2.0 (1.0 s after arrival, just in time), d at 2.5.
    assert (rt["mean_ttft_ms"], rt["median_ttft_ms"]) == pytest.approx((2500 / 3, 1000))
    assert rt["std_ttft_ms"] == pytest.approx(statistics.pstdev([1000, 1000, 500]))
    # Tokens: a at 2.0, 2.5, 3.0; b at 2.0, 4.0; d at 2.5 only.
    assert (rt["mean_tpot_ms"], rt["p99_tpot_ms"]) == pytest.approx(((500 + 2000) / 2, 500 + 0.99 * 1500))
    assert rt["mean_itl_ms"] == pytest.approx((500 + 500 + 2000) / 3)
    assert rt["mean_e2el_ms"] == pytest.approx((2000 + 3000) / 2)
    assert rt["normalized_latency_ms_per_token"] == pytest.approx((2000 / 3 + 3000 / 2) / 2)
    # d had its first token in time but never completed: of five arrivals, a and b meet TTFT, only a meets TPOT.
    assert (rt["ttft_attainment"], rt["tpot_attainment"], rt["slo_attainment"]) == (0.4, 0.2, 0.2)
    assert rt["tpot_token_attainment"] == pytest.approx(2 / 3)
    # From the first arrival, 1.0, to the last event, 5.0.
    assert rt["request_throughput"] == 2 / 4
    assert rt["request_goodput"] == 1 / 4
    assert rt["output_throughput"] == 6 / 4
    assert rt["total_token_throughput"] == (6 + 4 + 8 + 4) / 4
    assert rt["max_wait_s"] == 2.0  # d: from 2.5 to its abort at 4.5


def test_best_effort_by_hand(trace: Trace) -> None:
    be = summarise(trace)["classes"]["be"]
    assert (be["arrived"], be["completed"], be["failed"], be["unfinished"]) == (1, 1, 0, 0)
    assert (be["output_throughput"], be["total_token_throughput"], be["max_wait_s"]) == (2 / 4, 12 / 4, 2.0)
    for key in ("ttft_attainment", "tpot_attainment", "tpot_token_attainment", "slo_attainment", "request_goodput"):
        assert be[key] is None


def test_rates_until_a_moment_leave_out_what_came_later_and_nothing_else(trace: Trace) -> None:
    run, whole = summarise(trace, until_s=3.0), summarise(trace)
    rt, be = run["classes"]["rt"], run["classes"]["be"]
    assert (run["throughput_s"], run["duration_s"], whole["throughput_s"]) == (2.0, 4.0, 4.0)
    # By 3.0: five RT tokens of a, b and d; a has ended on time, b ends at 4.0; BE has not begun to emit.
    assert (rt["request_throughput"], rt["output_throughput"], rt["request_goodput"]) == (1 / 2, 5 / 2, 1 / 2)
    assert (be["output_throughput"], be["total_token_throughput"], be["request_throughput"]) == (0, 0, 0)
    for name in ("rt", "be"):
        for key, value in whole["classes"][name].items():
            if not key.endswith(("throughput", "goodput")):
                assert run["classes"][name][key] == value


@given(seed=st.integers(0, 1000), share=st.floats(0.01, 1.2))
@settings(max_examples=25, deadline=None)
def test_tokens_until_a_moment_are_those_of_the_steps_that_ended_by_then(seed: int, share: float) -> None:
    trace = make_trace("bros", seed=seed)
    until_s = trace.start_s + share * (trace.end_s - trace.start_s)
    run = summarise(trace, until_s)
    emitted = sum(len(step.emitted) for step in trace.steps if step.end_s <= until_s)
    counted = sum(run["classes"][name]["output_throughput"] * run["throughput_s"] for name in ("rt", "be"))
    assert counted == pytest.approx(emitted)


def test_kv_scheduler_and_prediction_by_hand(trace: Trace) -> None:
    run = summarise(trace)
    assert run["duration_s"] == 4.0
    assert run["kv"] == {
        "num_blocks": 10, "block_size": 4, "peak_usage": 0.7, "preempted_requests": 1, "recomputed_tokens": 4,
        "overwritten_slots": 3, "checkpointed_slots": 3, "restored_slots": 3, "relocated_slots": 1,
        "d2h_bytes": 300, "h2d_bytes": 300}
    scheduler = run["scheduler"]
    assert (scheduler["steps"], scheduler["mean_us_per_step"]) == (5, pytest.approx(10_000))
    assert scheduler["us_per_request_step"] == pytest.approx(50_000 / 8)
    assert scheduler["share_of_iteration"] == pytest.approx(0.05 / (0.05 + 3.5))
    assert run["prediction"] == {"steps": 2, "median_actual_over_predicted": 1.5,
                                 "p95_actual_over_predicted": pytest.approx(1.95)}


def test_overwritten_slots_leave_out_whole_swaps_and_forget_dropped_tables() -> None:
    trace = Trace("hand", "none", "cpu", 10, 4, 1, 0)
    trace.requests = {"b": RequestRecord("b", "be", 0.0, 8, 2)}
    trace.steps = [step(0, 0.0, 1.0, offloaded=[["b", 1, 2]]),  # 2 overwritten
                   step(1, 1.0, 1.0, offloaded=[["b", 1, 3]]),  # 1 more
                   step(2, 2.0, 1.0, offloaded=[["b", 1, 4], ["b", 0, 4]], preempted={"b": "swap"}),
                   step(3, 3.0, 1.0, block_changes=[["b", -1, -1]]),
                   step(4, 4.0, 1.0, offloaded=[["b", 1, 2]])]  # a new life: 2 overwritten
    assert summarise(trace)["kv"]["overwritten_slots"] == 5


def test_a_trace_that_keeps_no_steps_is_summarised_as_one_that_does(trace: Trace) -> None:
    streamed = StreamedTrace("hand", "none", "cpu", 10, 4, 100, 5)
    streamed.requests, streamed.rejected, streamed.ended_outside = trace.requests, trace.rejected, trace.ended_outside
    for record in trace.steps:
        streamed.append(record)
    assert not streamed.steps
    for until_s in (3.0, math.inf):
        assert summarise(streamed, until_s) == summarise(trace, until_s)


@pytest.mark.parametrize("policy", ["bros", "vllm"])
def test_every_key_is_there_and_the_json_is_strict(policy: str) -> None:
    for trace in (make_trace(policy), Trace(policy, "none", "cpu", 1, 1, 1, 0)):
        run = json.loads(json.dumps(summarise(trace), allow_nan=False))
        assert set(run) == {"policy", "model", "device", "seed", "duration_s", "throughput_s", "classes", "kv",
                            "scheduler", "prediction"}
        assert set(run["classes"]) == {"rt", "be"}
        for summary in run["classes"].values():
            assert set(summary) >= CLASS_KEYS
        assert (set(run["kv"]), set(run["scheduler"])) == (KV_KEYS, SCHEDULER_KEYS)


def test_what_has_no_sample_is_none_and_never_a_number() -> None:
    run = summarise(Trace("hand", "none", "cpu", 1, 1, 1, 0))
    for summary in run["classes"].values():
        statistics_and_shares = {key: value for key, value in summary.items() if key.endswith(("_ms", "attainment"))}
        assert len(statistics_and_shares) == 20
        assert set(statistics_and_shares.values()) == {None}
        assert (summary["arrived"], summary["output_tokens"], summary["request_throughput"]) == (0, 0, None)
    assert run["scheduler"]["share_of_iteration"] is None


def test_the_json_is_the_typed_result_under_the_same_names() -> None:
    trace = make_trace("bros")
    metrics, run = measure(trace), summarise(trace)
    assert metrics.as_json() == run
    assert (metrics.kv.peak_usage, metrics.scheduler.steps) == (run["kv"]["peak_usage"], run["scheduler"]["steps"])
    for name, counts in metrics.classes.items():
        assert vars(counts) == run["classes"][name]
        assert counts.arrived == counts.completed + counts.failed + counts.unfinished
    refused = metrics.classes["rt"]
    assert (refused.refused, refused.first_refusal) == (1, f"rt-refused: {trace.rejected['rt-refused']}")
    assert metrics.classes["be"].first_refusal is None


def test_a_request_of_one_token_has_no_tpot_and_meets_it() -> None:
    trace = Trace("hand", "none", "cpu", 1, 1, 1, 0)
    trace.requests = {"r": RequestRecord("r", "rt", 0.0, 1, 1, 0.5, 0.001)}
    trace.steps = [step(0, 0.0, 0.5, scheduled={"r": 1}, emitted=["r"], finished={"r": "length"})]
    rt = summarise(trace)["classes"]["rt"]
    assert (rt["mean_tpot_ms"], rt["tpot_attainment"], rt["slo_attainment"]) == (None, 1.0, 1.0)


# -- against a slow, obvious recount ----------------------------------------------------------------------------------


def obvious(trace: Trace, name: str) -> dict[str, Any]:
    """The same definitions, one request at a time, each with a full pass over the steps."""
    duration_s = trace.end_s - trace.start_s
    ttft, tpot, itl, e2el, normalized, ok_ttft, ok_tpot, ok_both, waits, tokens = ([] for _ in range(10))
    for request_id, record in trace.requests.items():
        if record.request_class != name:
            continue
        times = [step.end_s for step in trace.steps for emitted in step.emitted if emitted == request_id]
        why = [step.finished[request_id] for step in trace.steps if request_id in step.finished]
        done = why in (["length"], ["stop"])
        tokens += times
        first_ok = done and times[0] - record.arrival_s <= (record.ttft_slo_s or np.inf)
        mean_gap = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
        gap_ok = done and (mean_gap is None or mean_gap <= (record.tpot_slo_s or np.inf))
        ok_ttft.append(first_ok)
        ok_tpot.append(gap_ok)
        ok_both.append(first_ok and gap_ok)
        ttft += [time_s - record.arrival_s for time_s in times[:1]]
        tpot += [] if mean_gap is None else [mean_gap]
        itl += [times[i] - times[i - 1] for i in range(1, len(times))]
        if done:
            e2el.append(times[-1] - record.arrival_s)
            normalized.append(e2el[-1] / len(times))
        if request_id not in trace.rejected:
            ran = [(step.start_s, step.end_s) for step in trace.steps if request_id in step.scheduled]
            over = [step.end_s for step in trace.steps if request_id in step.finished]
            over += [trace.ended_outside[request_id][0]] if request_id in trace.ended_outside else []
            starts = [start for start, _ in ran] + (over or [trace.end_s])
            ends = [record.arrival_s] + [end for _, end in ran]
            waits.append(max(start - end for start, end in zip(starts, ends, strict=True)))
    return {"ttft": ttft, "tpot": tpot, "itl": itl, "e2el": e2el, "normalized": normalized, "waits": waits,
            "ttft_attainment": ok_ttft, "tpot_attainment": ok_tpot, "slo_attainment": ok_both,
            "output_throughput": len(tokens) / duration_s, "request_throughput": len(e2el) / duration_s}


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), policy=st.sampled_from(["bros", "vllm"]), num_rt=st.integers(0, 7),
       num_be=st.integers(1, 6), num_blocks=st.integers(4, 40))
def test_any_trace_agrees_with_the_recount(seed: int, policy: str, num_rt: int, num_be: int, num_blocks: int) -> None:
    trace = make_trace(policy, seed, num_rt=num_rt, num_be=num_be, num_blocks=num_blocks)
    classes = summarise(trace)["classes"]
    for name in ("rt", "be"):
        got, expected = classes[name], obvious(trace, name)
        for key in ("ttft", "tpot", "itl", "e2el"):
            samples = 1e3 * np.array(expected[key])
            statistic = {"mean": samples.mean(), "median": np.median(samples), "std": samples.std(),
                         "p99": np.quantile(samples, 0.99)} if len(samples) else {}
            for word in ("mean", "median", "std", "p99"):
                assert got[f"{word}_{key}_ms"] == (pytest.approx(statistic[word]) if statistic else None)
        normalized = expected["normalized"]
        assert got["normalized_latency_ms_per_token"] == (
            pytest.approx(1e3 * sum(normalized) / len(normalized)) if normalized else None)
        assert got["max_wait_s"] == (pytest.approx(max(expected["waits"])) if expected["waits"] else None)
        for key in ("output_throughput", "request_throughput"):
            assert got[key] == pytest.approx(expected[key])
        for key in ("ttft_attainment", "tpot_attainment", "slo_attainment"):
            met = expected[key]
            assert got[key] == (pytest.approx(sum(met) / len(met)) if name == "rt" else None)
        assert got["arrived"] == got["completed"] + got["failed"] + got["unfinished"] == len(expected["slo_attainment"])


def test_timings_keep_the_order_of_arrival_and_cover_everyone() -> None:
    trace = make_trace()
    timings = request_timings(trace)
    assert list(timings) == list(trace.requests)
    assert timings["rt-refused"].ended == "rejected"
    assert timings["rt-3"].ended == "aborted"


def test_the_environment_stamp_is_strict_json_and_says_where() -> None:
    stamp = json.loads(json.dumps(environment_stamp(), allow_nan=False))
    assert set(stamp) == {"python", "bros_ref", "torch", "numpy", "platform", "cpu_model", "cores", "gpu", "commit",
                          "date"}
    assert stamp["cores"] >= 1
    assert stamp["numpy"] == np.__version__
    assert stamp["date"].endswith("+00:00")

"""The numbers of a run, from its trace alone, with the names that vLLM's serving benchmark uses.

It knows no engine: a live run, a simulated one and a file give the same numbers for the same records. Definitions:

    token times    the end of each step that emitted a token for the request
    TTFT           first token time - arrival
    TPOT           (last token time - first token time) / (tokens - 1), for two tokens or more
    ITL            each gap between two consecutive tokens
    E2EL           last token time - arrival, of completed requests
    duration_s     from the first arrival to the last event of the trace
    completed      ended by length or by a stop; failed: refused, aborted or failed; the rest is unfinished
    attainment     of *all* arrived real-time requests, the fraction that completed and met the target; a completed
                   request of one token has no TPOT and so meets it
    throughput     per second of duration_s; tokens count when emitted, whether or not their request completed

Invariant: strict JSON. What has no sample is None, never NaN.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from bros_ref.trace import RequestRecord, StepRecord, Trace

CLASSES = ("rt", "be")
COMPLETED = ("length", "stop")


@dataclass(slots=True)
class Timing:
    """When one request was served.

    Attributes:
        token_times_s: end of the steps that emitted its tokens, ascending.
        ended: why it ended: "length" | "stop" | "aborted" | "failed" | "rejected"; None if it had not.
        max_wait_s: the longest stretch between its arrival and its end (or the trace's) in which it did not run.
    """

    record: RequestRecord
    token_times_s: list[float] = field(default_factory=list)
    ended: str | None = None
    max_wait_s: float = 0.0

    @property
    def completed(self) -> bool:
        return self.ended in COMPLETED

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] - self.record.arrival_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    @property
    def e2el_s(self) -> float | None:
        return self.token_times_s[-1] - self.record.arrival_s if self.completed and self.token_times_s else None

    @property
    def itl_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.token_times_s)]

    @property
    def met_ttft(self) -> bool:
        target = self.record.ttft_slo_s
        return self.completed and (target is None or (self.ttft_s is not None and self.ttft_s <= target))

    @property
    def met_tpot(self) -> bool:
        target = self.record.tpot_slo_s
        return self.completed and (target is None or self.tpot_s is None or self.tpot_s <= target)


def summarise(trace: Trace) -> dict[str, Any]:
    """One element of "runs" in the result JSON: the header's names, then classes, kv, scheduler and prediction."""
    duration_s = trace.end_s - trace.start_s
    timings = list(request_timings(trace).values())
    return {
        "policy": trace.policy, "model": trace.model, "device": trace.device, "seed": trace.seed,
        "duration_s": duration_s,
        "classes": {name: _class_summary([timing for timing in timings if timing.record.request_class == name],
                                         duration_s) for name in CLASSES},
        "kv": _kv_summary(trace),
        "scheduler": _scheduler_summary(trace.steps),
        "prediction": _prediction_summary(trace.steps),
    }


def request_timings(trace: Trace) -> dict[str, Timing]:
    """Every arrived request's times, by id, in the order of `trace.requests`."""
    timings = {request_id: Timing(record) for request_id, record in trace.requests.items()}
    idle_since_s = {request_id: record.arrival_s for request_id, record in trace.requests.items()}
    ends_s: dict[str, float] = {}
    for step in trace.steps:
        for request_id in step.scheduled:
            timing = timings[request_id]
            timing.max_wait_s = max(timing.max_wait_s, step.start_s - idle_since_s[request_id])
            idle_since_s[request_id] = step.end_s
        for request_id in step.emitted:
            timings[request_id].token_times_s.append(step.end_s)
        for request_id, why in step.finished.items():
            timings[request_id].ended, ends_s[request_id] = why, step.end_s
    for request_id, (time_s, why) in trace.ended_outside.items():
        timings[request_id].ended, ends_s[request_id] = why, float(time_s)
    trace_end_s = trace.end_s
    for request_id, timing in timings.items():
        if request_id in trace.rejected:
            timing.ended = "rejected"
            continue
        waited_s = ends_s.get(request_id, trace_end_s) - idle_since_s[request_id]
        timing.max_wait_s = max(timing.max_wait_s, waited_s)
    return timings


def _class_summary(timings: Sequence[Timing], duration_s: float) -> dict[str, Any]:
    """All keys of one class; the attainments and the goodput only mean something for real-time requests."""
    completed = [timing for timing in timings if timing.completed]
    num_output = sum(len(timing.token_times_s) for timing in timings)
    num_prompt = sum(timing.record.prompt_tokens for timing in timings if timing.token_times_s)
    rated = [timing for timing in timings if timing.record.ttft_slo_s is not None]
    met_both = [timing.met_ttft and timing.met_tpot for timing in rated]
    summary: dict[str, Any] = {
        "arrived": len(timings),
        "completed": len(completed),
        "failed": sum(timing.ended is not None for timing in timings) - len(completed),
        "unfinished": sum(timing.ended is None for timing in timings),
        "output_tokens": num_output,
        "request_throughput": _per_second(len(completed), duration_s),
        "output_throughput": _per_second(num_output, duration_s),
        "total_token_throughput": _per_second(num_prompt + num_output, duration_s),
    }
    summary |= _statistics("ttft", (timing.ttft_s for timing in timings))
    summary |= _statistics("tpot", (timing.tpot_s for timing in timings))
    summary |= _statistics("itl", (gap for timing in timings for gap in timing.itl_s))
    summary |= _statistics("e2el", (timing.e2el_s for timing in timings))
    return summary | {
        "normalized_latency_ms_per_token": _mean(
            1e3 * timing.e2el_s / len(timing.token_times_s) for timing in timings if timing.e2el_s is not None),
        "ttft_attainment": _mean(timing.met_ttft for timing in rated),
        "tpot_attainment": _mean(timing.met_tpot for timing in rated),
        "tpot_token_attainment": _mean(gap <= timing.record.tpot_slo_s for timing in rated
                                       if timing.record.tpot_slo_s is not None for gap in timing.itl_s),
        "slo_attainment": _mean(met_both),
        "request_goodput": _per_second(sum(met_both), duration_s) if rated else None,
        "max_wait_s": max((timing.max_wait_s for timing in timings if timing.ended != "rejected"), default=None),
    }


def _kv_summary(trace: Trace) -> dict[str, Any]:
    """Slots are tokens. `preempted_requests` counts preemptions, so a request hit twice counts twice."""
    copied = {kind: sum(step.copied.get(kind, 0) for step in trace.steps)
              for kind in ("checkpoint", "restore", "relocate")}
    return {
        "num_blocks": trace.num_blocks,
        "block_size": trace.block_size,
        "peak_usage": max((step.used_blocks for step in trace.steps), default=0) / trace.num_blocks,
        "preempted_requests": sum(len(step.preempted) for step in trace.steps),
        "recomputed_tokens": sum(step.recomputed_tokens for step in trace.steps),
        "overwritten_slots": _overwritten_slots(trace.steps),
        "checkpointed_slots": copied["checkpoint"],
        "restored_slots": copied["restore"],
        "relocated_slots": copied["relocate"],
        "d2h_bytes": copied["checkpoint"] * trace.slot_bytes,
        "h2d_bytes": copied["restore"] * trace.slot_bytes,
    }


def _overwritten_slots(steps: Sequence[StepRecord]) -> int:
    """Tokens that lost their slot to another request while theirs kept the rest: every rise of `lost`, except those
    of a request that was swapped out as a whole in that step."""
    lost: defaultdict[str, dict[int, int]] = defaultdict(dict)
    total = 0
    for step in steps:
        for request_id, index, num_lost in step.lost:
            if request_id not in step.preempted:
                total += max(0, num_lost - lost[request_id].get(index, 0))
            lost[request_id][index] = num_lost
        for request_id, index, _ in step.block_changes:
            if index < 0:
                lost.pop(request_id, None)
    return total


def _scheduler_summary(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """What deciding costs. A request-step is one request scheduled in one step; an iteration is decision + run."""
    decision_us = [1e6 * step.schedule_s for step in steps]
    num_request_steps = sum(len(step.scheduled) for step in steps)
    iteration_us = sum(decision_us) + sum(1e6 * step.duration_s for step in steps)
    return {
        "steps": len(steps),
        "mean_us_per_step": _mean(decision_us),
        "p99_us_per_step": _percentile(decision_us, 99),
        "us_per_request_step": sum(decision_us) / num_request_steps if num_request_steps else None,
        "share_of_iteration": sum(decision_us) / iteration_us if iteration_us > 0 else None,
    }


def _prediction_summary(steps: Sequence[StepRecord]) -> dict[str, Any]:
    """How the latency model did: actual / predicted duration, over the steps that had a prediction."""
    ratios = [step.duration_s / step.predicted_s for step in steps if step.predicted_s]
    return {"steps": len(ratios), "median_actual_over_predicted": _percentile(ratios, 50),
            "p95_actual_over_predicted": _percentile(ratios, 95)}


def _statistics(name: str, samples_s: Iterable[float | None]) -> dict[str, float | None]:
    """mean, median, p99 and std of the samples that exist, seconds in, milliseconds out."""
    samples_ms = [1e3 * sample for sample in samples_s if sample is not None]
    return {f"mean_{name}_ms": _mean(samples_ms), f"median_{name}_ms": _percentile(samples_ms, 50),
            f"p99_{name}_ms": _percentile(samples_ms, 99),
            f"std_{name}_ms": float(np.std(samples_ms)) if samples_ms else None}


def _mean(samples: Iterable[float]) -> float | None:
    values = list(samples)
    return float(np.mean(values)) if values else None


def _percentile(samples: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(samples, percent)) if samples else None


def _per_second(amount: float, duration_s: float) -> float | None:
    return amount / duration_s if duration_s > 0 else None

"""The numbers of a run, from its trace alone, with the names that vLLM's serving benchmark uses.

It knows no engine: a live run, a simulated one and a file give the same numbers for the same records. Definitions:

    token times    the end of each step that emitted a token for the request
    TTFT           first token time - arrival
    TPOT           (last token time - first token time) / (tokens - 1), for two tokens or more
    ITL            each gap between two consecutive tokens
    E2EL           last token time - arrival, of completed requests
    duration_s     from the first arrival to the last event of the trace
    completed      ended by length or by a stop; failed: refused, aborted or failed; the rest is unfinished
    first_refusal  the first refused request and why it was refused; None if none was
    attainment     of *all* arrived real-time requests, the fraction that completed and met the target; a completed
                   request of one token has no TPOT and so meets it
    throughput     per second of duration_s; tokens count when emitted, whether or not their request completed. With
                   `until_s`, what happened by then, per second until then: a run that goes on until its last users
                   are served would otherwise credit a policy that serves them late with the quiet time at the end

Invariant: strict JSON. What has no sample is None, never NaN.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bros_ref.trace.records import RequestRecord, StepRecord
from bros_ref.trace.results import ClassMetrics, KVMetrics, PredictionMetrics, RunMetrics, SchedulerMetrics
from bros_ref.trace.trace import Trace

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
    token_times_s: array[float] = field(default_factory=lambda: array("d"))  # 8 bytes a token: runs have millions
    ended: str | None = None
    max_wait_s: float = 0.0
    idle_since_s: float = field(init=False)
    ended_s: float | None = None

    def __post_init__(self) -> None:
        self.idle_since_s = self.record.arrival_s

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
    def itl_s(self) -> npt.NDArray[np.float64]:
        """[tokens - 1]; empty for fewer than two tokens."""
        return np.diff(np.frombuffer(self.token_times_s))

    @property
    def met_ttft(self) -> bool:
        target = self.record.ttft_slo_s
        return self.completed and (target is None or (self.ttft_s is not None and self.ttft_s <= target))

    @property
    def met_tpot(self) -> bool:
        target = self.record.tpot_slo_s
        return self.completed and (target is None or self.tpot_s is None or self.tpot_s <= target)


def measure(trace: Trace, until_s: float = math.inf) -> RunMetrics:
    """The numbers of a run. Throughputs are those until `until_s` on the run's clock; everything else is of the whole
    run."""
    meter = trace.meter if isinstance(trace, StreamedTrace) else _metered(trace)
    until_s = min(until_s, meter.end_s)
    rated_s, timings = until_s - trace.start_s, list(meter.finished_timings().values())
    return RunMetrics(
        trace.policy, trace.model, trace.device, trace.seed, meter.end_s - trace.start_s, rated_s,
        {name: _class_metrics([timing for timing in timings if timing.record.request_class == name], until_s, rated_s,
                              trace.rejected) for name in CLASSES},
        meter.kv_metrics(), meter.scheduler_metrics(), meter.prediction_metrics())


def summarise(trace: Trace, until_s: float = math.inf) -> dict[str, Any]:
    """`measure` as JSON: one element of "runs" in the result, as tables and reports take it."""
    return measure(trace, until_s).as_json()


def request_timings(trace: Trace) -> dict[str, Timing]:
    """Every arrived request's times, by id, in the order of `trace.requests`."""
    return _metered(trace).finished_timings()


def _metered(trace: Trace) -> Meter:
    meter = Meter(trace)
    for step in trace.steps:
        meter.observe(step)
    return meter


class Meter:
    """Reads a run step by step and keeps what the summary needs: per request its times, and sums. Memory grows with
    requests and tokens (8 bytes per token), not with steps times requests.

    Attributes:
        trace: the header; its requests are read as they come, its steps are not.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._timings: dict[str, Timing] = {}
        self._last_end_s = -math.inf
        self._totals: Counter[str] = Counter()
        self._peak_blocks = 0
        self._decision_us, self._ratios = array("d"), array("d")
        self._running_s = 0.0
        self._offloaded: dict[str, dict[int, int]] = {}

    def observe(self, step: StepRecord) -> None:
        """Takes in one step; steps come in order."""
        start_s, end_s, timings = step.start_s, step.end_s, self._timings
        for request_id in step.scheduled:
            timing = timings.get(request_id)
            if timing is None:
                timing = timings[request_id] = Timing(self.trace.requests[request_id])
            if start_s - timing.idle_since_s > timing.max_wait_s:
                timing.max_wait_s = start_s - timing.idle_since_s
            timing.idle_since_s = end_s
        for request_id in step.emitted:
            timings[request_id].token_times_s.append(end_s)
        for request_id, why in step.finished.items():
            timings[request_id].ended, timings[request_id].ended_s = why, end_s
        self._last_end_s = end_s
        self._decision_us.append(1e6 * step.schedule_s)
        self._running_s += step.duration_s
        if step.predicted_s:
            self._ratios.append(step.duration_s / step.predicted_s)
        self._observe_kv(step)

    def _observe_kv(self, step: StepRecord) -> None:
        """Tokens that lost their slot to another request while theirs kept the rest are every rise of `lost`, except
        those of a request that was swapped out as a whole in that step."""
        totals = self._totals
        totals["request_steps"] += len(step.scheduled)
        totals["preempted"] += len(step.preempted)
        totals["recomputed"] += step.recomputed_tokens
        totals.update(step.copied)
        self._peak_blocks = max(self._peak_blocks, step.used_blocks)
        for request_id, index, num_offloaded in step.offloaded:
            offloaded = self._offloaded.setdefault(request_id, {})
            if request_id not in step.preempted:
                totals["overwritten"] += max(0, num_offloaded - offloaded.get(index, 0))
            offloaded[index] = num_offloaded
        for request_id, index, _ in step.block_changes:
            if index < 0:
                self._offloaded.pop(request_id, None)

    @property
    def end_s(self) -> float:
        """The last event so far, arrivals included."""
        return max(self.trace.end_s, self._last_end_s)

    def finished_timings(self) -> dict[str, Timing]:
        """Every arrived request's times, in order of arrival; ends outside a step and last waits filled in."""
        timings, end_s = self._timings, self.end_s
        result = {request_id: timings.get(request_id) or Timing(record)
                  for request_id, record in self.trace.requests.items()}
        for request_id, (time_s, why) in self.trace.ended_outside.items():
            result[request_id].ended, result[request_id].ended_s = why, float(time_s)
        for request_id, timing in result.items():
            if request_id in self.trace.rejected:
                timing.ended = "rejected"
                continue
            waited_s = (end_s if timing.ended_s is None else timing.ended_s) - timing.idle_since_s
            timing.max_wait_s = max(timing.max_wait_s, waited_s)
        return result

    def kv_metrics(self) -> KVMetrics:
        """What happened in the pool so far."""
        totals, trace = self._totals, self.trace
        return KVMetrics(
            num_blocks=trace.num_blocks, block_size=trace.block_size, peak_usage=self._peak_blocks / trace.num_blocks,
            preempted_requests=totals["preempted"], recomputed_tokens=totals["recomputed"],
            overwritten_slots=totals["overwritten"], checkpointed_slots=totals["checkpoint"],
            restored_slots=totals["restore"], relocated_slots=totals["relocate"],
            d2h_bytes=totals["checkpoint"] * trace.slot_bytes, h2d_bytes=totals["restore"] * trace.slot_bytes)

    def scheduler_metrics(self) -> SchedulerMetrics:
        """What deciding cost so far."""
        decision_us, request_steps = self._decision_us, self._totals["request_steps"]
        spent_us = sum(decision_us)
        iteration_us = spent_us + 1e6 * self._running_s
        return SchedulerMetrics(
            len(decision_us), request_steps, _mean(decision_us), _percentile(decision_us, 99),
            us_per_request_step=spent_us / request_steps if request_steps else None,
            share_of_iteration=spent_us / iteration_us if iteration_us > 0 else None)

    def prediction_metrics(self) -> PredictionMetrics:
        """How good predictions were so far."""
        return PredictionMetrics(len(self._ratios), _percentile(self._ratios, 50), _percentile(self._ratios, 95))


class StreamedTrace(Trace):
    """A trace that keeps its header and requests, and measures its steps instead of keeping them: for runs of a
    hundred thousand requests. `summarise` gives what it would give for the full trace."""

    def __init__(self, *header: Any) -> None:
        super().__init__(*header)
        self.meter = Meter(self)

    def append(self, step: StepRecord) -> None:
        self.meter.observe(step)


def _class_metrics(timings: Sequence[Timing], until_s: float, rated_s: float, rejected: Mapping[str, str],
                   ) -> ClassMetrics:
    """Rates are of what happened by `until_s`, per second of `rated_s`. `rejected`: request id -> why it was so."""
    completed = [timing for timing in timings if timing.completed]
    completed_by_then = [timing for timing in completed if timing.ended_s is not None and timing.ended_s <= until_s]
    tokens_by_then = sum(bisect_right(timing.token_times_s, until_s) for timing in timings)
    prompts_by_then = sum(timing.record.prompt_tokens for timing in timings
                          if timing.token_times_s and timing.token_times_s[0] <= until_s)
    rated = [timing for timing in timings if timing.record.ttft_slo_s is not None]
    refused = [timing.record.request_id for timing in timings if timing.ended == "rejected"]
    gaps_s = np.concatenate([timing.itl_s for timing in timings]) if timings else np.empty(0)
    return ClassMetrics(
        arrived=len(timings),
        completed=len(completed),
        failed=sum(timing.ended is not None for timing in timings) - len(completed),
        refused=len(refused),
        first_refusal=f"{refused[0]}: {rejected[refused[0]]}" if refused else None,
        unfinished=sum(timing.ended is None for timing in timings),
        output_tokens=sum(len(timing.token_times_s) for timing in timings),
        request_throughput=_per_second(len(completed_by_then), rated_s),
        output_throughput=_per_second(tokens_by_then, rated_s),
        total_token_throughput=_per_second(prompts_by_then + tokens_by_then, rated_s),
        **_statistics("ttft", (timing.ttft_s for timing in timings)),
        **_statistics("tpot", (timing.tpot_s for timing in timings)),
        **_statistics("itl", gaps_s),
        **_statistics("e2el", (timing.e2el_s for timing in timings)),
        normalized_latency_ms_per_token=_mean(
            1e3 * timing.e2el_s / len(timing.token_times_s) for timing in timings if timing.e2el_s is not None),
        ttft_attainment=_mean(timing.met_ttft for timing in rated),
        tpot_attainment=_mean(timing.met_tpot for timing in rated),
        tpot_token_attainment=_mean(np.concatenate([timing.itl_s <= timing.record.tpot_slo_s for timing in rated
                                                    if timing.record.tpot_slo_s is not None])) if rated else None,
        slo_attainment=_mean(timing.met_ttft and timing.met_tpot for timing in rated),
        request_goodput=_per_second(sum(timing.met_ttft and timing.met_tpot for timing in completed_by_then
                                        if timing.record.ttft_slo_s is not None), rated_s) if rated else None,
        max_wait_s=max((timing.max_wait_s for timing in timings if timing.ended != "rejected"), default=None))


def _statistics(name: str, samples_s: Iterable[float | None] | npt.NDArray[np.float64]) -> dict[str, float | None]:
    """mean, median, p99 and std of the samples that exist, seconds in, milliseconds out."""
    if not isinstance(samples_s, np.ndarray):
        samples_s = np.array([sample for sample in samples_s if sample is not None], dtype=float)
    samples_ms = 1e3 * samples_s
    return {f"mean_{name}_ms": _mean(samples_ms), f"median_{name}_ms": _percentile(samples_ms, 50),
            f"p99_{name}_ms": _percentile(samples_ms, 99),
            f"std_{name}_ms": float(np.std(samples_ms)) if len(samples_ms) else None}


def _mean(samples: Iterable[float] | npt.NDArray[Any]) -> float | None:
    values = samples if isinstance(samples, np.ndarray) else list(samples)
    return float(np.mean(values)) if len(values) else None


def _percentile(samples: Sequence[float] | npt.NDArray[np.float64], percent: float) -> float | None:
    return float(np.percentile(samples, percent)) if len(samples) else None


def _per_second(amount: float, rated_s: float) -> float | None:
    return amount / rated_s if rated_s > 0 else None

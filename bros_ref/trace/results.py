"""The numbers of a run, typed: one field for each key of the result JSON. `metrics.py` defines and computes them.

Times end in `_s` or `_ms`, throughputs are per second, attainments are fractions from 0 to 1. A value without
samples is None, never NaN, so that `as_json` is strict JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ClassMetrics:
    """One class of requests. Attainments and goodput only mean something for real-time requests.

    Attributes:
        arrived: all of them: completed + failed + unfinished. `failed` includes the `refused`.
        first_refusal: the first refused request and why it was refused.
        max_wait_s: the longest stretch in which a request did not run.
    """

    arrived: int
    completed: int
    failed: int
    refused: int
    first_refusal: str | None
    unfinished: int
    output_tokens: int
    request_throughput: float | None
    output_throughput: float | None
    total_token_throughput: float | None
    mean_ttft_ms: float | None
    median_ttft_ms: float | None
    p99_ttft_ms: float | None
    std_ttft_ms: float | None
    mean_tpot_ms: float | None
    median_tpot_ms: float | None
    p99_tpot_ms: float | None
    std_tpot_ms: float | None
    mean_itl_ms: float | None
    median_itl_ms: float | None
    p99_itl_ms: float | None
    std_itl_ms: float | None
    mean_e2el_ms: float | None
    median_e2el_ms: float | None
    p99_e2el_ms: float | None
    std_e2el_ms: float | None
    normalized_latency_ms_per_token: float | None
    ttft_attainment: float | None
    tpot_attainment: float | None
    tpot_token_attainment: float | None
    slo_attainment: float | None
    request_goodput: float | None
    max_wait_s: float | None


@dataclass(frozen=True)
class KVMetrics:
    """The KV pool. Slots are tokens; `preempted_requests` counts preemptions, so a request hit twice counts twice."""

    num_blocks: int
    block_size: int
    peak_usage: float
    preempted_requests: int
    recomputed_tokens: int
    overwritten_slots: int
    checkpointed_slots: int
    restored_slots: int
    relocated_slots: int
    d2h_bytes: int
    h2d_bytes: int


@dataclass(frozen=True)
class SchedulerMetrics:
    """What deciding costs. A request-step is one request scheduled in one step; an iteration is decision + run."""

    steps: int
    request_steps: int
    mean_us_per_step: float | None
    p99_us_per_step: float | None
    us_per_request_step: float | None
    share_of_iteration: float | None


@dataclass(frozen=True)
class PredictionMetrics:
    """How the latency model did: actual / predicted duration, over the steps that had a prediction."""

    steps: int
    median_actual_over_predicted: float | None
    p95_actual_over_predicted: float | None


@dataclass(frozen=True)
class RunMetrics:
    """One element of "runs" in the result JSON. Throughputs are over `throughput_s`, of the run's `duration_s`."""

    policy: str
    model: str
    device: str
    seed: int
    duration_s: float
    throughput_s: float
    classes: dict[str, ClassMetrics]  # "rt" and "be"
    kv: KVMetrics
    scheduler: SchedulerMetrics
    prediction: PredictionMetrics

    def as_json(self) -> dict[str, Any]:
        """Nested dictionaries with these names as keys."""
        return asdict(self)

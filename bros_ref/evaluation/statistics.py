"""Means with 95 % confidence intervals, over runs that differ by their seed, and differences between paired runs.

Runs are paired by seed: both policies met the same arrivals, so what the arrivals add to both cancels in the
difference. Every interval is Student's t with one degree of freedom less than there are seeds; a single seed gives no
interval. Reads summaries (`trace.metrics.summarise`) and knows no policy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student_t

CONFIDENCE = 0.95
METRICS = {"rt": ("slo_attainment", "ttft_attainment", "tpot_attainment", "median_ttft_ms", "p99_ttft_ms",
                  "median_tpot_ms", "normalized_latency_ms_per_token"),
           "be": ("output_throughput", "request_throughput")}

Run = dict[str, Any]


class Interval(NamedTuple):
    """An estimate and the half width of its 95 % confidence interval; None where one sample cannot give it."""

    mean: float
    half: float | None

    @property
    def low(self) -> float:
        return -math.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        return math.inf if self.half is None else self.mean + self.half

    @property
    def bounds(self) -> list[float] | None:
        """[low, high] for JSON, which has no infinity; None without an interval."""
        return None if self.half is None else [self.low, self.high]


def interval(samples: Sequence[float]) -> Interval:
    """The mean of independent samples.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("an interval needs at least one sample")
    return Interval(statistics.fmean(samples), _half_width(samples))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of ours - theirs; both lists are in the order of the seeds."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval | None:
    """The ratio of the means, ours / theirs, with the ratio estimator's linearised error (Cochran, Sampling
    Techniques, 6.3): a seed in which theirs is near zero does not dominate it, as it would a mean of ratios. None if
    theirs is zero throughout."""
    base = statistics.fmean(theirs)
    if base <= 0:
        return None
    ratio = statistics.fmean(ours) / base
    half = _half_width([a - ratio * b for a, b in zip(ours, theirs, strict=True)])
    return Interval(ratio, None if half is None else half / base)


def _half_width(samples: Sequence[float]) -> float | None:
    if len(samples) < 2:
        return None
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(samples) - 1))
    return quantile * statistics.stdev(samples) / math.sqrt(len(samples))


def metric_samples(runs: Sequence[Run], metric: str) -> list[float]:
    """The values of "rt.slo_attainment" and the like, of the runs that have one."""
    name, key = metric.split(".")
    return [run["classes"][name][key] for run in runs if run["classes"][name][key] is not None]


def interval_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per policy over its runs: "policy", "seeds", for "rt.slo_attainment" and the like [mean, half width or
    None], or None without a sample, and under "median" and "interval95" the medians and the [low, high] of the
    means."""
    rows = []
    for policy in dict.fromkeys(run["policy"] for run in runs):
        own = [run for run in runs if run["policy"] == policy]
        row: dict[str, Any] = {"policy": policy, "seeds": len(own), "median": {}, "interval95": {}}
        for metric in (f"{name}.{key}" for name, keys in METRICS.items() for key in keys):
            samples = metric_samples(own, metric)
            found = interval(samples) if samples else None
            row[metric] = found and list(found)
            row["median"][metric] = statistics.median(samples) if samples else None
            row["interval95"][metric] = found and found.bounds
        rows.append(row)
    return rows

"""The live runs of `bros-ref bench hybrid --clock modelled --model checksum`: their table and figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from results_runs import BE, ON_TIME, Results, Runs, reduced
from results_shown import Shown, row

from bros_ref.engine.build import load_model
from bros_ref.evaluation.bench.hybrid import bench_hybrid
from bros_ref.evaluation.dominance import values
from bros_ref.evaluation.statistics import Interval, interval, paired_ratio

HYBRID = "hybrid"  # the section
POLICIES, ROUNDS = ("vllm-priority", "bros", "bros-plus"), 8
TTFT = "rt.median_ttft_ms"
METRICS = {ON_TIME: (100, 0), TTFT: (1, 0), "rt.p99_ttft_ms": (1, 0), "rt.median_tpot_ms": (1, 0), BE: (1, 1)}
README_SENTENCES = (
    "Under `bros`, {hybrid_bros:±0} % of RT are on time, against {hybrid_priority:±0} % under `vllm-priority`. "
    "Median TTFT is {hybrid_ttft:0} ms against {hybrid_priority_ttft:0} ms, and BE throughput is "
    "{hybrid_more_be:±1} % higher.",
)
SENTENCES = ("Paired by round, `bros` serves {hybrid_more_be:±1} % more BE tokens per second than `vllm-priority`.",)


def measure_hybrid(policies: Sequence[str] = POLICIES, rounds: int = ROUNDS) -> Runs:
    """The runs of each policy, one per round."""
    runs, _ = bench_hybrid(load_model("checksum", "cpu", 0), policies, rounds=rounds, clock="modelled")
    return {policy: [reduced(own, METRICS) for own in runs if own["policy"] == policy] for policy in policies}


def table(results: Results) -> list[str]:
    """The median of the rounds, and the interval of the mean."""
    rows = []
    for policy in POLICIES:
        cells = []
        for metric, (scale, digits) in METRICS.items():
            samples = [scale * sample for sample in values(results[HYBRID][policy], metric)]
            mean = interval(samples)
            cells.append(f"{statistics.median(samples):,.{digits}f} [{mean.low:,.{digits}f}, {mean.high:,.{digits}f}]")
        rows.append(row(policy, *cells))
    return rows


def figures(results: Results) -> dict[str, Shown]:
    """What the sentences name."""
    bros, priority = (results[HYBRID][policy] for policy in ("bros", "vllm-priority"))

    def median(runs: Sequence[dict[str, Any]]) -> Shown:
        return Shown(statistics.median(values(runs, TTFT)))

    more = paired_ratio(values(bros, BE), values(priority, BE))
    assert more is not None
    return {"hybrid_bros": Shown(interval(values(bros, ON_TIME)), 100),
            "hybrid_priority": Shown(interval(values(priority, ON_TIME)), 100),
            "hybrid_ttft": median(bros), "hybrid_priority_ttft": median(priority),
            "hybrid_more_be": Shown(Interval(more.mean - 1, more.half), 100)}

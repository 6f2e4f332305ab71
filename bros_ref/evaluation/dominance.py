"""`bros-plus` against every baseline in every cell, over paired seeds; and how far it is from the bounds.

A verdict rests on 95 % intervals of the paired differences in RT on time and in BE tokens/s:

    ahead      of no baseline can it be said that it has more of either, and each interval excludes a loss beyond
               the margin: one point of RT on time, 2 % of BE tokens/s
    trade      some baseline has more of one, beyond its interval and the margin, and less of the other
    behind     some baseline has more of one, beyond its interval and the margin, and not less of the other
    undecided  an interval is too wide for any of these; a single seed decides nothing
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bros_ref.evaluation.optimality import rt_work_share
from bros_ref.evaluation.statistics import Interval, paired_difference
from bros_ref.evaluation.sweeps import BASELINES, SYSTEMS, run_name
from bros_ref.simulator.simulate import Job
from bros_ref.workload.paper import RT_LENGTHS, PaperWorkload

RT_MARGIN, BE_MARGIN = 0.01, 0.02  # of an attainment; relative, of a throughput: less than this is no difference
VERDICTS = ("behind", "trade", "undecided", "ahead")  # the worst over the baselines is a cell's

Summary = dict[str, Any]
Runs = dict[str, list[Summary]]  # job name -> one summary per seed, in the order of the seeds


def value(run: Summary, metric: str) -> float:
    """A metric such as "rt.slo_attainment" of one run; 0 where it has no sample."""
    name, key = metric.split(".")
    return float(run["classes"][name][key] or 0.0)


def values(runs: Sequence[Summary], metric: str) -> list[float]:
    """A metric of every seed."""
    return [value(run, metric) for run in runs]


def mean(runs: Sequence[Summary], metric: str) -> float:
    """A metric, mean over the seeds."""
    return statistics.fmean(values(runs, metric))


def cells(runs: Runs) -> dict[str, dict[str, list[Summary]]]:
    """Setting -> policy -> summaries, of the settings in which bros-plus and a baseline met both classes."""
    found: dict[str, dict[str, list[Summary]]] = {}
    for name, own in runs.items():
        cell, _, policy = name.rpartition("/")
        if not name.startswith("ablation/") and "-rt/" not in cell:
            found.setdefault(cell, {})[policy] = own
    return found


def dominance(runs: Runs) -> list[dict[str, Any]]:
    """One row per cell. It shows the baseline that decides the verdict, or else the one with most RT on time; under
    "each" every other policy, with its own verdict."""
    rows = []
    for cell, policies in cells(runs).items():
        ours = policies["bros-plus"]
        each = {name: judge(ours, theirs) for name, theirs in policies.items() if name != "bros-plus"}
        judged = [(*each[name], name) for name in BASELINES if name in policies]
        verdict, rt_gain, be_gain, against = min(judged, key=lambda row: (VERDICTS.index(row[0]), row[1].mean))
        theirs = policies[against]
        base = max(mean(theirs, "be.output_throughput"), 1e-9)
        fewer = 1 - mean(theirs, "rt.output_throughput") / max(mean(ours, "rt.output_throughput"), 1e-9)
        rows.append({"cell": cell, "against": against, "verdict": verdict, "seeds": len(ours),
                     "rt": mean(ours, "rt.slo_attainment"), "be": mean(ours, "be.output_throughput"),
                     "rt_gain": rt_gain.mean, "be_gain": be_gain.mean, "be_change": be_gain.mean / base,
                     "interval95": {"rt_gain": rt_gain.bounds, "be_gain": be_gain.bounds}, "fewer_rt_tokens": fewer,
                     "each": [_told(name, policies[name], *found) for name, found in each.items()]})
    return rows


def _told(policy: str, runs: Sequence[Summary], verdict: str, rt_gain: Interval, be_gain: Interval) -> dict[str, Any]:
    return {"policy": policy, "verdict": verdict, "rt": mean(runs, "rt.slo_attainment"),
            "be": mean(runs, "be.output_throughput"), "rt_gain": rt_gain.mean, "be_gain": be_gain.mean,
            "interval95": {"rt_gain": rt_gain.bounds, "be_gain": be_gain.bounds}}


def judge(ours: Sequence[Summary], theirs: Sequence[Summary]) -> tuple[str, Interval, Interval]:
    """Verdict, gain in RT attainment, gain in BE tokens/s."""
    rt, be = (paired_difference(values(ours, metric), values(theirs, metric))
              for metric in ("rt.slo_attainment", "be.output_throughput"))
    be_margin = BE_MARGIN * mean(theirs, "be.output_throughput")
    margins = ((rt, RT_MARGIN), (be, be_margin))
    less = any(gain.high < 0 and gain.mean < -margin for gain, margin in margins)
    more = any(gain.low > 0 and gain.mean > margin for gain, margin in margins)
    if less:
        return "trade" if more else "behind", rt, be
    return "ahead" if all(gain.low >= -margin for gain, margin in margins) else "undecided", rt, be


# -- how far from the bounds ------------------------------------------------------------------------------------------


def coverage(runs: Runs, rates: Iterable[float]) -> dict[str, Any]:
    """How much of the distance from vllm-priority to the bounds a policy covers: median over the sweep's cells in
    which there is a distance. RT: attainment up, and normalized latency down, to rt-only's. BE: output tokens/s up to
    be-only's, which serves no RT at all."""
    targets = {"rt_attainment": ("rt.slo_attainment", "rt-only"),
               "rt_latency": ("rt.normalized_latency_ms_per_token", "rt-only"),
               "be": ("be.output_throughput", "be-only")}
    shares: dict[str, dict[str, list[float]]] = {policy: {name: [] for name in targets}
                                                 for policy in ("bros", "bros-plus")}
    for cell in (run_name(system, dataset, rate, "") for system in SYSTEMS for dataset in RT_LENGTHS for rate in rates):
        for name, (metric, bound) in targets.items():
            start, end = (mean(runs[cell + policy], metric) for policy in ("vllm-priority", bound))
            if abs(start - end) < 0.02 * end:
                continue
            for policy, covered in shares.items():
                covered[name].append((mean(runs[cell + policy], metric) - start) / (end - start))
    return {policy: {name: statistics.median(found) if found else None for name, found in covered.items()}
            for policy, covered in shares.items()}


def be_of_reference(jobs: dict[str, Job], runs: Runs) -> dict[str, Any]:
    """BE tokens/s as a share of what serving RT leaves of the ceiling (`rt_work_share`), over the paper's sweep: median
    and least."""
    shares: dict[str, list[float]] = {policy: [] for policy in ("vllm-priority", "bros", "bros-plus")}
    for name, job in jobs.items():
        cell, _, policy = name.rpartition("/")
        if name.startswith("paper/") and policy == "be-only" and isinstance(job.arrivals, PaperWorkload):
            left = 1 - rt_work_share(job.settings, job.arrivals)
            ceiling = mean(runs[name], "be.output_throughput")
            for other, found in shares.items():
                found.append(mean(runs[f"{cell}/{other}"], "be.output_throughput") / (ceiling * left))
    return {policy: {"median": statistics.median(found), "least": min(found)} for policy, found in shares.items()}

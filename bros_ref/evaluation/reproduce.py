"""The paper's evaluation (its section 4), simulated, with our numbers beside the paper's.

The paper reports the best case of each comparison ("up to"), over rates of which it names only one. So each of its
numbers is set beside the best case over our sweep, with both absolute values, and a verdict that a rule gives:

    same            within 25 % of the paper's gain (of its ratio less one, or of its percentage)
    better, worse   for BROS, beyond that
    undecided       the verdict is not the same at both ends of the 95 % interval; a single seed decides nothing
    not comparable  the baseline's absolute value is so near zero that a ratio means nothing

The paper does not say which vLLM scheduler it used. Its numbers are compared with both: `vllm-fcfs` (V1) and `vllm-v0`,
the one in use when it was written.

Beyond the paper, `bros-plus` is set beside every baseline in every cell of all sweeps (`dominance.py`), and beside
every policy on traces and long prompts on which nothing was tuned (`traces.py`). Every figure rests on several seeds,
and policies are compared on the same arrivals, seed by seed (`statistics.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bros_ref.evaluation.dominance import Runs, Summary, be_of_reference, coverage, dominance, mean, values
from bros_ref.evaluation.optimality import distribution, recorded_gaps, small_instance_gaps
from bros_ref.evaluation.statistics import Interval, interval, metric_samples, paired_ratio
from bros_ref.evaluation.sweeps import PARTS, POLICIES, RATES, SYSTEMS, Lengths, all_jobs, run_name
from bros_ref.simulator.simulate import Job, run_all
from bros_ref.workload.paper import PaperWorkload

__all__ = ["AGAINST_V0", "FIGURES", "POLICIES", "RATES", "SYSTEMS", "PaperFigure", "compare", "reproduce_paper",
           "verdict"]

SHORTEST_CONTEXT_TOKENS = 2048  # of its models, OPT's: what a dataset of lengths must fit
MAX_RECORDED_S = 120.0  # of each run whose states are solved exactly
NEAR_ZERO = 0.05  # an attainment below this is no basis for a ratio
PAPER_OVERHEAD = (0.076, 0.095)  # the paper's scheduler, of the time of an iteration
PROBE_S, PROBE_JOBS = 5.0, 16  # what a budget of time is estimated from
SHORTEST_S = 10.0  # simulated seconds below which a run says nothing
BUDGET_SHARE = 0.6  # of the time left: long runs of overloaded policies cost more per second than the probe says
WHY = {  # what a comparison rests on, whatever its verdict
    "vllm-fcfs/rt.normalized_latency_ms_per_token": "the queue that FCFS builds, which load and length of run decide",
    "vllm-fcfs/rt.ttft_attainment": "how near zero FCFS comes, which the load decides",
    "vllm-fcfs/rt.tpot_attainment": "vLLM V1's rules let running requests decode in every step; older ones paused them",
    "vllm-fcfs/be.request_throughput": "what FCFS leaves RT waiting for, it spends on BE",
    "bros-rr/rt.normalized_latency_ms_per_token": "a class gets every other iteration, whatever waits",
    "bros-rr/rt.ttft_attainment": "how near zero the rotation comes, which the load decides",
    "bros-rr/rt.tpot_attainment": "two iterations a token fit the target until a BE prompt is one of them",
    "bros-rr/be.request_throughput": "small batches of one class waste iterations, so mixing gains",
    "bros-recompute/rt.ttft_attainment": "how often RT meet a full pool, so on the BE demand (1.1 pools here)",
    "bros-recompute/rt.tpot_attainment": "recomputed prompts lengthen iterations; the deadlines absorb most of it",
    "vllm-fcfs/rt.normalized_latency_ms_per_token/rt": "one class with one SLO: slack order is order of arrival",
    "vllm-fcfs/rt.request_throughput/rt": "what arrives is served: arrivals are the limit, not the scheduler",
    "vllm-v0/rt.normalized_latency_ms_per_token": "the queue, and decodes that wait for every prompt",
    "vllm-v0/rt.ttft_attainment": "how near zero FCFS comes, which the load decides",
    "vllm-v0/rt.tpot_attainment": "decodes wait while prompts run, so how many prompts arrive in a row",
    "vllm-v0/be.request_throughput": "prompts and decodes in steps of their own: more steps for the same tokens",
    "vllm-v0/rt.normalized_latency_ms_per_token/rt": "prompts and decodes share steps, against steps of one kind",
    "vllm-v0/rt.request_throughput/rt": "what arrives is served: arrivals are the limit, not the scheduler",
}


@dataclass(frozen=True)
class PaperFigure:
    """One number of the paper: how BROS compares with `baseline` on `metric`, in the best case over a sweep.

    `kind`: "ratio" is ours / baseline, more is better; "reduction" is the relative change in per cent, less is better.
    """

    name: str
    metric: str
    baseline: str
    paper: float
    kind: str
    dataset: str = "sharegpt"
    systems: tuple[str, ...] = tuple(SYSTEMS)
    rates: tuple[float, ...] = RATES
    only: str = ""

    @property
    def why(self) -> str:
        """What the comparison rests on."""
        return WHY["/".join(filter(None, (self.baseline, self.metric, self.only)))]


def _overall(dataset: str, baseline: str, latency: float, ttft: float, tpot: float, be: float) -> list[PaperFigure]:
    name = f"{'ShareGPT' if dataset == 'sharegpt' else 'LMSYS'} against {baseline}"
    return [PaperFigure(name, "rt.normalized_latency_ms_per_token", baseline, latency, "reduction", dataset),
            PaperFigure(name, "rt.ttft_attainment", baseline, ttft, "ratio", dataset),
            PaperFigure(name, "rt.tpot_attainment", baseline, tpot, "ratio", dataset),
            PaperFigure(name, "be.request_throughput", baseline, be, "loss", dataset)]


FIGURES = (
    *_overall("sharegpt", "vllm-fcfs", -74.20, 36.38, 1.73, -11.29),
    *_overall("sharegpt", "bros-rr", -54.31, 11.75, 1.47, -8.80),
    *_overall("lmsys", "vllm-fcfs", -69.61, 21.42, 2.62, -17.67),
    *_overall("lmsys", "bros-rr", -25.77, 14.23, 2.28, -15.18),
    PaperFigure("Bidirectional KV against none", "rt.ttft_attainment", "bros-recompute", 1.23, "ratio",
                systems=("opt-30b",), rates=(10.0,)),
    PaperFigure("Bidirectional KV against none", "rt.tpot_attainment", "bros-recompute", 1.63, "ratio",
                systems=("opt-30b",), rates=(10.0,)),
    PaperFigure("Real-time requests only", "rt.normalized_latency_ms_per_token", "vllm-fcfs", -29.36, "reduction",
                only="rt"),
    PaperFigure("Real-time requests only", "rt.request_throughput", "vllm-fcfs", 1.08, "ratio", only="rt"),
)
# The same numbers of the paper against vLLM V0, in which prompts go before decodes.
AGAINST_V0 = tuple(replace(figure, name=f"{figure.name.removesuffix(' against vllm-fcfs')} against vllm-v0",
                           baseline="vllm-v0") for figure in FIGURES if figure.baseline == "vllm-fcfs")


def reproduce_paper(duration_s: float, seed: int, *, seeds: int = 5, minutes: float | None = None, quick: bool = False,
                    processes: int = 0, sharegpt: Lengths = "sharegpt",
                    parts: Sequence[str] = PARTS, traces: Path | None = None,
                    on_progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Runs everything with the seeds seed, seed + 1, ...; `sharegpt` stands for the lengths of that name.

    Args:
        parts: which of PARTS to run; what rests on others is left empty.
        traces: a folder of traces to be served, too, in the part "unseen".
        minutes: a budget of wall time. Runs are then as long as the budget allows, at most `duration_s`, and no seed
            is begun that would exceed it.

    Returns:
        "figures", "overhead" and "bounds" (both None without the part "paper"), "dominance", and the absolute values of
        every run: "systems" (the paper's sweep), "sweeps" (beyond the paper, and unseen) and "ablation" (the options of
        bros-plus); "duration_s" and "seeds" are what was run; all JSON.

    Raises:
        ValueError: an unknown part, or traces without the part "unseen"; the budget does not suffice for one seed of
            SHORTEST_S, and it says how much would.
    """
    started_s = time.monotonic()
    advance = on_progress or (lambda _: None)
    rates = RATES[::2] if quick else RATES
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    if traces is not None and "unseen" not in parts:
        raise ValueError("traces are served in the part unseen; name it, too, or name no parts")
    choice: dict[str, Any] = {"quick": quick, "sharegpt": sharegpt, "parts": parts, "traces": traces}
    if minutes is not None:
        probe = list(all_jobs(PROBE_S, rates, **choice).values())
        duration_s = min(duration_s, _affordable_s(probe, 60 * minutes, seeds, processes))
    jobs = all_jobs(duration_s, rates, **choice)
    runs: Runs = {name: [] for name in jobs}
    for done in range(seeds):
        spent_s = time.monotonic() - started_s
        if minutes is not None and done and spent_s * (done + 1) / done > 60 * minutes:
            break
        seeded = [replace(job, settings=replace(job.settings, seed=seed + done)) for job in jobs.values()]
        for name, summary in zip(jobs, run_all(
                seeded, processes, lambda _: advance(0.95 / len(jobs) / seeds)), strict=True):
            runs[name].append(summary)
    has_paper = "paper" in parts
    bounds = {"coverage": coverage(runs, rates), "be_of_reference": be_of_reference(jobs, runs),
              "iteration_optimum": _iteration_optimum(jobs),
              "clairvoyant": small_instance_gaps(seed)} if has_paper else None
    figures = [compare(figure, runs, rates) for figure in (*FIGURES, *AGAINST_V0)] if has_paper else []
    finished = len(next(iter(runs.values())))
    advance(0.05 + 0.95 * (1 - finished / seeds))
    return {"duration_s": duration_s, "seeds": finished,
            "figures": figures, "overhead": _overhead(runs) if has_paper else None, "bounds": bounds,
            "dominance": dominance(runs),
            **{group: [_row(name, own) for name, own in runs.items() if name.partition("/")[0] in own_parts]
               for group, own_parts in (("systems", ["paper"]), ("sweeps", ["sweep", "unseen"]),
                                        ("ablation", ["ablation"]))}}


def _affordable_s(jobs: Sequence[Job], budget_s: float, seeds: int, processes: int) -> float:
    """Simulated seconds per run such that all jobs of all seeds fit the budget, estimated from some of them."""
    started_s = time.monotonic()
    chosen = jobs[::max(1, len(jobs) // PROBE_JOBS)]
    run_all(chosen, processes)
    probed_s = time.monotonic() - started_s
    round_s = probed_s / PROBE_S * len(jobs) / len(chosen)  # wall time of one seed, per simulated second
    affordable_s = BUDGET_SHARE * (budget_s - probed_s) / seeds / round_s
    if affordable_s < SHORTEST_S:
        enough = (SHORTEST_S * round_s * seeds / BUDGET_SHARE + probed_s) / 60
        raise ValueError(f"--minutes {budget_s / 60:g} is too short for {seeds} seeds of {SHORTEST_S:g} simulated "
                         f"seconds a run: this machine needs about {enough:.1f}; ask for more minutes or fewer seeds")
    return affordable_s


def _iteration_optimum(jobs: dict[str, Job]) -> dict[str, Any]:
    """States under loose targets, under tight ones and in a small pool: nothing binds, time does, memory does."""
    ratios: list[float] = []
    omitted: Counter[str] = Counter()
    for label in ("SLO/1 s, 0.2 s", "SLO/0.4 s, 0.1 s", "KV pool/24,000 tokens"):
        job = jobs.get(f"sweep/{label}/bros")  # the quick sweep has fewer
        if job is not None and isinstance(job.arrivals, PaperWorkload):
            found, left_out = recorded_gaps(job.settings, replace(
                job.arrivals, duration_s=min(job.arrivals.duration_s, MAX_RECORDED_S)))
            ratios += found
            omitted += left_out
    return {**distribution(ratios), "omitted": dict(omitted)}


# -- what is said about it --------------------------------------------------------------------------------------------

ROW_METRICS = {"ttft_attainment": "rt.ttft_attainment", "tpot_attainment": "rt.tpot_attainment",
               "slo_attainment": "rt.slo_attainment", "median_ttft_ms": "rt.median_ttft_ms",
               "p99_ttft_ms": "rt.p99_ttft_ms",
               "normalized_latency_ms_per_token": "rt.normalized_latency_ms_per_token",
               "rt_tokens_per_s": "rt.output_throughput", "be_requests_per_s": "be.request_throughput",
               "be_tokens_per_s": "be.output_throughput"}


def _row(name: str, runs: Sequence[Summary]) -> dict[str, Any]:
    """Absolute values of one job: means over the seeds, and under "interval95" the [low, high] of each."""
    row: dict[str, Any] = {"name": name, "policy": runs[0]["policy"], "seeds": len(runs), "interval95": {}}
    for key, metric in ROW_METRICS.items():
        samples = metric_samples(runs, metric)
        row[key] = interval(samples).mean if samples else None
        row["interval95"][key] = interval(samples).bounds if samples else None
    for group, key in (("kv", "restored_slots"), ("kv", "recomputed_tokens")):
        row[key] = interval([run[group][key] for run in runs]).mean
    row["decision_share_of_iteration"] = interval([run["scheduler"]["share_of_iteration"] or 0.0 for run in runs]).mean
    return row


def compare(figure: PaperFigure, runs: Runs, rates: Iterable[float]) -> dict[str, Any]:
    """The best case for BROS over the sweep (of a loss: the worst), with its absolute values and a verdict. Runs are
    paired by seed."""
    cases: list[tuple[Interval, str, float]] = []
    chosen = set(rates)
    for system in figure.systems:
        for rate in (rate for rate in figure.rates if rate in chosen):
            ours, theirs = (runs[run_name(system, figure.dataset, rate, policy, figure.only)]
                            for policy in ("bros", figure.baseline))
            ratio = paired_ratio(values(ours, figure.metric), values(theirs, figure.metric))
            if ratio is not None and ratio.mean > 0:
                cases.append((ratio if figure.kind == "ratio" else _percent(ratio), system, rate))
    entry: dict[str, Any] = {"name": figure.name, "metric": figure.metric, "baseline": figure.baseline,
                             "paper": figure.paper, "kind": figure.kind, "why": figure.why}
    if not cases:
        return entry | {"setting": None, "ours": None, "interval95": None, "absolute": {}, "verdict": "not comparable"}
    gain, system, rate = (max if figure.kind == "ratio" else min)(cases, key=lambda case: case[0].mean)
    absolute = {policy: mean(runs[run_name(system, figure.dataset, rate, policy, figure.only)], figure.metric)
                for policy in ("bros", figure.baseline)}
    found = {verdict(figure, bound, absolute[figure.baseline]) for bound in (gain.low, gain.mean, gain.high)}
    return entry | {"setting": f"{system}, {figure.dataset}, {rate:g} RT/s", "ours": gain.mean,
                    "interval95": gain.bounds, "absolute": absolute,
                    "verdict": found.pop() if len(found) == 1 else "undecided"}


def _percent(ratio: Interval) -> Interval:
    """A relative change in per cent."""
    return Interval(100 * (ratio.mean - 1), None if ratio.half is None else 100 * ratio.half)


def verdict(figure: PaperFigure, ours: float, theirs: float) -> str:
    """By the rule of the module's docstring."""
    if "attainment" in figure.metric and theirs < NEAR_ZERO:
        return "not comparable"
    gain, expected = (ours - 1, figure.paper - 1) if figure.kind == "ratio" else (-ours, -figure.paper)
    if abs(gain - expected) <= 0.25 * abs(expected):
        return "same"
    more = gain > expected
    return "better" if more != (figure.kind == "loss") else "worse"


def _overhead(runs: Runs) -> dict[str, Any]:
    """The share of an iteration that BROS's decisions take: CPU time here over the simulated time of the iteration."""
    shares = [run["scheduler"]["share_of_iteration"] for name, own in runs.items() for run in own
              if name.startswith("paper/") and name.endswith("/bros")]
    return {"paper": list(PAPER_OVERHEAD), "ours": [min(shares), max(shares)]}

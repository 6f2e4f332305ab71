"""The paper's evaluation (its section 4), simulated, with our numbers beside the paper's.

The paper reports the best case of each comparison ("up to"), over rates of which it names only one. So each of its
numbers is set beside the best case over our sweep, with both absolute values, and a verdict that a rule gives:

    same            within 25 % of the paper's gain (of its ratio less one, or of its percentage)
    better, worse   for BROS, beyond that
    not comparable  the baseline's absolute value is so near zero that a ratio means nothing

Nothing is tuned per figure: one SLO, one demand of BE work, one set of scheduler limits for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from bros_ref.bounds import iteration_gaps, small_instance_gaps
from bros_ref.paper import BE_LENGTHS, RT_LENGTHS, PaperWorkload, be_batch_for
from bros_ref.request import SLO
from bros_ref.simulate import Job, SimulationSettings, run_all

SYSTEMS = {"opt-13b": SimulationSettings("a100-40gb", "opt-13b", 2),
           "opt-30b": SimulationSettings("a100-40gb", "opt-30b", 4),
           "llama-3-70b": SimulationSettings("a100-80gb", "llama-3-70b", 8)}
RATES = (2.0, 4.0, 6.0, 8.0, 10.0)
POLICIES = ("vllm-fcfs", "vllm-priority", "sglang-priority", "bros-rr", "bros", "bros-plus", "rt-only", "be-only")
CONTENDERS = ("vllm-priority", "bros", "bros-plus")
BASE_RATE = 6.0  # of the sweeps beyond the paper, OPT-13B
MAX_BE_BATCH = 512  # Llama-3-70B's pool would ask for more than its seats can serve
NEAR_ZERO = 0.05  # an attainment below this is no basis for a ratio

Runs = dict[str, dict[str, Any]]  # job name -> summary


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
    PaperFigure("Ablation: bidirectional KV against none", "rt.ttft_attainment", "bros-recompute", 1.23, "ratio",
                systems=("opt-30b",), rates=(10.0,)),
    PaperFigure("Ablation: bidirectional KV against none", "rt.tpot_attainment", "bros-recompute", 1.63, "ratio",
                systems=("opt-30b",), rates=(10.0,)),
    PaperFigure("Real-time requests only", "rt.normalized_latency_ms_per_token", "vllm-fcfs", -29.36, "reduction",
                only="rt"),
    PaperFigure("Real-time requests only", "rt.request_throughput", "vllm-fcfs", 1.08, "ratio", only="rt"),
)


def reproduce_paper(duration_s: float, seed: int, *, quick: bool = False, processes: int = 0,
                    on_progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Runs everything. Returns "figures", "bounds", "systems" (absolute values of every run of the paper's sweep) and
    "sweeps" (beyond the paper), all JSON."""
    rates = RATES[::2] if quick else RATES
    jobs = {job.name: job for job in (*_paper_jobs(duration_s, seed, rates), *_sweep_jobs(duration_s, seed, quick))}
    share = 0.95 / len(jobs)
    summaries = run_all(list(jobs.values()), processes,
                        lambda _: on_progress(share) if on_progress is not None else None)
    runs: Runs = dict(zip(jobs, summaries, strict=True))
    gaps = iteration_gaps(replace(SYSTEMS["opt-13b"], seed=seed), BASE_RATE, min(duration_s, 30.0))
    bounds = {"coverage": _coverage(runs, rates), "iteration_optimum": gaps, "clairvoyant": small_instance_gaps(seed)}
    if on_progress is not None:
        on_progress(0.05)
    return {"duration_s": duration_s, "figures": [_compare(figure, runs, rates) for figure in FIGURES],
            "bounds": bounds, "systems": [_row(name, run) for name, run in runs.items() if name.startswith("paper/")],
            "sweeps": [_row(name, run) for name, run in runs.items() if name.startswith("sweep/")]}


# -- what is run ------------------------------------------------------------------------------------------------------


def _batch(settings: SimulationSettings, lengths: str = "paper") -> int:
    return min(MAX_BE_BATCH, be_batch_for(settings.num_blocks * settings.block_size, lengths))


def _paper_jobs(duration_s: float, seed: int, rates: Iterable[float]) -> Iterable[Job]:
    for system, settings in SYSTEMS.items():
        settings = replace(settings, seed=seed)
        for dataset in RT_LENGTHS:
            for rate in rates:
                arrivals = PaperWorkload(rate, duration_s, _batch(settings), rt_lengths=dataset)
                for policy in POLICIES:
                    yield Job(_name(system, dataset, rate, policy), policy, settings, arrivals)
                if dataset == "sharegpt":
                    alone = replace(arrivals, be_batch=0)
                    for policy in ("vllm-fcfs", "tgi", "bros"):
                        yield Job(_name(system, dataset, rate, policy, "rt"), policy, settings, alone)
    settings = replace(SYSTEMS["opt-30b"], seed=seed)
    arrivals = PaperWorkload(10.0, duration_s, _batch(settings))
    for policy in ("bros-recompute", "bros-swap-request", "bros-swap-block"):
        yield Job(_name("opt-30b", "sharegpt", 10.0, policy), policy, settings, arrivals)


def _name(system: str, dataset: str, rate: float, policy: str, only: str = "") -> str:
    return f"paper/{system}/{dataset}{'-' + only if only else ''}/{rate:g}/{policy}"


def _sweep_jobs(duration_s: float, seed: int, quick: bool) -> Iterable[Job]:
    """Beyond the paper, OPT-13B at BASE_RATE unless said otherwise: one thing changed at a time."""
    base = replace(SYSTEMS["opt-13b"], seed=seed)
    workload = PaperWorkload(BASE_RATE, duration_s, _batch(base))
    points: list[tuple[str, SimulationSettings, PaperWorkload]] = []
    for ttft_s, tpot_s in ((0.2, 0.05), (0.4, 0.1), (0.4, 0.2), (1.0, 0.2), (2.0, 0.5)):
        points.append((f"SLO/{ttft_s:g} s, {tpot_s:g} s", base, replace(workload, slo=SLO(ttft_s, tpot_s))))
    for tokens in (12_000, 16_000, 24_000, 40_000, 66_000):
        small = replace(base, kv_tokens=tokens)
        points.append((f"KV pool/{tokens:,} tokens", small, replace(workload, be_batch=_batch(small))))
    for size in (16, 32, 64, 128, 256):
        points.append((f"block size/{size}", replace(base, block_size=size, kv_tokens=24_000), replace(
            workload, be_batch=_batch(replace(base, kv_tokens=24_000)))))
    for batch in (8, 16, 32, 64):
        points.append((f"BE outstanding/{batch}", base, replace(workload, be_batch=batch)))
    points.append(("arrivals/gamma, CV 4", base, replace(workload, cv=4.0)))
    points.append(("BE lengths/arXiv", base, replace(workload, be_batch=_batch(base, "arxiv"), be_lengths="arxiv")))
    control = SimulationSettings("a100-80gb", "llama-3-8b", 1, seed=seed)
    points.append(("negative control/Llama-3-8B, no memory pressure", control, replace(workload, be_batch=64)))
    assert set(BE_LENGTHS) == {"paper", "arxiv"}
    for label, settings, arrivals in points[::3] if quick else points:
        for policy in CONTENDERS:
            yield Job(f"sweep/{label}/{policy}", policy, settings, arrivals)


# -- what is said about it --------------------------------------------------------------------------------------------


def _row(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """Absolute values of one run."""
    rt, be = run["classes"]["rt"], run["classes"]["be"]
    return {"name": name, "policy": run["policy"],
            **{key: rt[key] for key in ("ttft_attainment", "tpot_attainment", "slo_attainment", "median_ttft_ms",
                                        "p99_ttft_ms", "normalized_latency_ms_per_token")},
            "be_requests_per_s": be["request_throughput"], "be_tokens_per_s": be["output_throughput"],
            "restored_slots": run["kv"]["restored_slots"], "recomputed_tokens": run["kv"]["recomputed_tokens"],
            "decision_share_of_iteration": run["scheduler"]["share_of_iteration"]}


def _value(run: dict[str, Any], metric: str) -> float:
    name, key = metric.split(".")
    return float(run["classes"][name][key] or 0.0)


def _compare(figure: PaperFigure, runs: Runs, rates: Iterable[float]) -> dict[str, Any]:
    """The best case for BROS over the sweep (of a loss: the worst), with its absolute values and a verdict."""
    cases = []
    for system in figure.systems:
        for rate in (rate for rate in figure.rates if rate in tuple(rates)):
            ours = _value(runs[_name(system, figure.dataset, rate, "bros", figure.only)], figure.metric)
            theirs = _value(runs[_name(system, figure.dataset, rate, figure.baseline, figure.only)], figure.metric)
            if theirs > 0 and ours > 0:
                gain = ours / theirs if figure.kind == "ratio" else 100 * (ours / theirs - 1)
                cases.append((gain, system, rate, ours, theirs))
    entry: dict[str, Any] = {"name": figure.name, "metric": figure.metric, "baseline": figure.baseline,
                             "paper": figure.paper, "kind": figure.kind}
    if not cases:
        return entry | {"setting": None, "ours": None, "absolute": {}, "verdict": "not comparable"}
    gain, system, rate, ours, theirs = max(cases) if figure.kind == "ratio" else min(cases)
    return entry | {"setting": f"{system}, {figure.dataset}, {rate:g} RT/s", "ours": gain,
                    "absolute": {"bros": ours, figure.baseline: theirs}, "verdict": verdict(figure, gain, theirs)}


def verdict(figure: PaperFigure, ours: float, theirs: float) -> str:
    """By the rule of the module's docstring."""
    if "attainment" in figure.metric and theirs < NEAR_ZERO:
        return "not comparable"
    gain, expected = (ours - 1, figure.paper - 1) if figure.kind == "ratio" else (-ours, -figure.paper)
    if abs(gain - expected) <= 0.25 * abs(expected):
        return "same"
    more = gain > expected
    return "better" if more != (figure.kind == "loss") else "worse"


def _coverage(runs: Runs, rates: Iterable[float]) -> dict[str, Any]:
    """How much of the distance from vllm-priority to the bounds a policy covers: median over the sweep's cells in
    which there is a distance. RT: normalized latency down to rt-only's. BE: output tokens/s up to be-only's."""
    shares: dict[str, dict[str, list[float]]] = {policy: {"rt": [], "be": []} for policy in ("bros", "bros-plus")}
    for system in SYSTEMS:
        for dataset in RT_LENGTHS:
            for rate in rates:
                for name, metric, bound in (("rt", "rt.normalized_latency_ms_per_token", "rt-only"),
                                            ("be", "be.output_throughput", "be-only")):
                    start, end = (_value(runs[_name(system, dataset, rate, policy)], metric)
                                  for policy in ("vllm-priority", bound))
                    if abs(start - end) < 0.02 * end:
                        continue
                    for policy, covered in shares.items():
                        ours = _value(runs[_name(system, dataset, rate, policy)], metric)
                        covered[name].append((ours - start) / (end - start))
    return {policy: {name: statistics.median(values) if values else None for name, values in covered.items()}
            for policy, covered in shares.items()}

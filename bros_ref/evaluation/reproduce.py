"""The paper's evaluation (its section 4), simulated, with our numbers beside the paper's.

The paper reports the best case of each comparison ("up to"), over rates of which it names only one. So each of its
numbers is set beside the best case over our sweep, with both absolute values, and a verdict that a rule gives:

    same            within 25 % of the paper's gain (of its ratio less one, or of its percentage)
    better, worse   for BROS, beyond that
    not comparable  the baseline's absolute value is so near zero that a ratio means nothing

Beyond the paper, `bros-plus` is set beside every baseline in every cell of all sweeps:

    ahead    no baseline has more RT on time or more BE tokens/s, beyond noise
    trade    some baseline has more of one and less of the other
    behind   some baseline has more of one and no less of the other

Nothing is tuned per figure: one SLO, one demand of BE work, one set of scheduler limits for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from bros_ref.evaluation.optimality import distribution, iteration_gaps, rt_work_share, small_instance_gaps
from bros_ref.request import SLO
from bros_ref.scheduler import PLUS
from bros_ref.simulator.simulate import Job, SimulationSettings, run_all
from bros_ref.workload.paper import RT_LENGTHS, PaperWorkload, be_batch_for

SYSTEMS = {"opt-13b": SimulationSettings("a100-40gb", "opt-13b", 2),
           "opt-30b": SimulationSettings("a100-40gb", "opt-30b", 4),
           "llama-3-70b": SimulationSettings("a100-80gb", "llama-3-70b", 8)}
RATES = (2.0, 4.0, 6.0, 8.0, 10.0)
POLICIES = ("vllm-fcfs", "vllm-priority", "sglang-priority", "bros-rr", "bros", "bros-plus", "rt-only", "be-only")
BASELINES = ("vllm-fcfs", "vllm-priority", "sglang-priority", "bros-rr")
CONTENDERS = ("vllm-priority", "sglang-priority", "bros", "bros-plus")
PLUS_ABLATION = ("bros", *(f"bros+{option}" for option in PLUS), "bros-plus")
BASE_RATE = 6.0  # of the sweeps beyond the paper, OPT-13B
SHORTEST_CONTEXT_TOKENS = 2048  # of its models, OPT's: what a dataset of lengths must fit
MAX_BE_BATCH = 512  # Llama-3-70B's pool would ask for more than its seats can serve
MAX_RECORDED_S = 120.0  # of each run whose states are solved exactly
NEAR_ZERO = 0.05  # an attainment below this is no basis for a ratio
RT_NOISE, BE_NOISE = 0.01, 0.02  # of an attainment; relative, of a throughput: seeds differ by as much
PAPER_OVERHEAD = (0.076, 0.095)  # the paper's scheduler, of the time of an iteration
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
}

Lengths = str | tuple[tuple[int, int], ...]
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


def reproduce_paper(duration_s: float, seed: int, *, quick: bool = False, processes: int = 0,
                    sharegpt: Lengths = "sharegpt", on_progress: Callable[[float], None] | None = None,
                    ) -> dict[str, Any]:
    """Runs everything; `sharegpt` stands for the lengths of that name.

    Returns:
        "figures", "overhead", "bounds", "dominance", and the absolute values of every run: "systems" (the paper's
        sweep), "sweeps" (beyond the paper) and "ablation" (the options of bros-plus); all JSON.
    """
    rates = RATES[::2] if quick else RATES
    jobs = {job.name: _with_lengths(job, sharegpt)
            for job in (*_paper_jobs(duration_s, seed, rates), *_sweep_jobs(duration_s, seed, quick),
                        *_ablation_jobs(duration_s, seed, quick))}
    share = 0.95 / len(jobs)
    summaries = run_all(list(jobs.values()), processes,
                        lambda _: on_progress(share) if on_progress is not None else None)
    runs: Runs = dict(zip(jobs, summaries, strict=True))
    bounds = {"coverage": _coverage(runs, rates), "be_of_reference": _be_of_reference(jobs, runs),
              "iteration_optimum": distribution(_all_gaps(jobs)),
              "clairvoyant": small_instance_gaps(seed)}
    if on_progress is not None:
        on_progress(0.05)
    return {"duration_s": duration_s, "figures": [compare(figure, runs, rates) for figure in FIGURES],
            "overhead": _overhead(runs), "bounds": bounds, "dominance": _dominance(runs),
            **{group: [_row(name, run) for name, run in runs.items() if name.startswith(prefix)]
               for group, prefix in (("systems", "paper/"), ("sweeps", "sweep/"), ("ablation", "ablation/"))}}


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


Point = tuple[str, SimulationSettings, PaperWorkload]


def _sweep_jobs(duration_s: float, seed: int, quick: bool) -> Iterable[Job]:
    for label, settings, arrivals in sweep_points(duration_s, seed)[::3 if quick else 1]:
        for policy in CONTENDERS:
            yield Job(f"sweep/{label}/{policy}", policy, settings, arrivals)


def _ablation_jobs(duration_s: float, seed: int, quick: bool) -> Iterable[Job]:
    """The options of bros-plus, one at a time, where it matters: tight targets, little memory, bursts, many seats."""
    points = {label: (label, settings, arrivals) for label, settings, arrivals in sweep_points(duration_s, seed)}
    chosen = [points["SLO/0.2 s, 0.05 s"], points["KV pool/12,000 tokens"], points["arrivals/gamma, CV 4"]]
    large = replace(SYSTEMS["llama-3-70b"], seed=seed)
    chosen.append(("Llama-3-70B/10 RT per s", large, PaperWorkload(10.0, duration_s, _batch(large))))
    for label, settings, arrivals in chosen[:1] if quick else chosen:
        for policy in PLUS_ABLATION:
            yield Job(f"ablation/{label}/{policy}", policy, settings, arrivals)


def sweep_points(duration_s: float, seed: int) -> list[Point]:
    """Beyond the paper, OPT-13B at BASE_RATE unless said otherwise: one thing changed at a time."""
    base = replace(SYSTEMS["opt-13b"], seed=seed)
    workload = PaperWorkload(BASE_RATE, duration_s, _batch(base))
    points: list[Point] = []
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
    return points


def _with_lengths(job: Job, sharegpt: Lengths) -> Job:
    """The same job with a dataset's own lengths in the place of the fitted ones."""
    assert isinstance(job.arrivals, PaperWorkload)
    return replace(job, arrivals=replace(job.arrivals, rt_lengths=sharegpt)) if (
        job.arrivals.rt_lengths == "sharegpt") else job


def _all_gaps(jobs: dict[str, Job]) -> list[float]:
    """States under loose targets, under tight ones and in a small pool: nothing binds, time does, memory does."""
    ratios: list[float] = []
    for label in ("SLO/1 s, 0.2 s", "SLO/0.4 s, 0.1 s", "KV pool/24,000 tokens"):
        job = jobs.get(f"sweep/{label}/bros")  # the quick sweep has fewer
        if job is not None and isinstance(job.arrivals, PaperWorkload):
            ratios += iteration_gaps(job.settings, replace(
                job.arrivals, duration_s=min(job.arrivals.duration_s, MAX_RECORDED_S)))
    return ratios


# -- what is said about it --------------------------------------------------------------------------------------------


def _row(name: str, run: dict[str, Any]) -> dict[str, Any]:
    """Absolute values of one run."""
    rt, be = run["classes"]["rt"], run["classes"]["be"]
    return {"name": name, "policy": run["policy"],
            **{key: rt[key] for key in ("ttft_attainment", "tpot_attainment", "slo_attainment", "median_ttft_ms",
                                        "p99_ttft_ms", "normalized_latency_ms_per_token")},
            "rt_tokens_per_s": rt["output_throughput"],
            "be_requests_per_s": be["request_throughput"], "be_tokens_per_s": be["output_throughput"],
            "restored_slots": run["kv"]["restored_slots"], "recomputed_tokens": run["kv"]["recomputed_tokens"],
            "decision_share_of_iteration": run["scheduler"]["share_of_iteration"]}


def _value(run: dict[str, Any], metric: str) -> float:
    name, key = metric.split(".")
    return float(run["classes"][name][key] or 0.0)


def compare(figure: PaperFigure, runs: Runs, rates: Iterable[float]) -> dict[str, Any]:
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
                             "paper": figure.paper, "kind": figure.kind, "why": figure.why}
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


def _overhead(runs: Runs) -> dict[str, Any]:
    """What BROS's decisions take of an iteration: CPU time here, against the simulated time of the iteration."""
    shares = [run["scheduler"]["share_of_iteration"] for name, run in runs.items()
              if name.startswith("paper/") and name.endswith("/bros")]
    return {"paper": list(PAPER_OVERHEAD), "ours": [min(shares), max(shares)]}


def _cells(runs: Runs) -> dict[str, dict[str, dict[str, Any]]]:
    """Setting -> policy -> summary, of the settings in which bros-plus and a baseline met both classes."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for name, run in runs.items():
        cell, _, policy = name.rpartition("/")
        if not name.startswith("ablation/") and "-rt/" not in cell:
            cells.setdefault(cell, {})[policy] = run
    return cells


def _dominance(runs: Runs) -> list[dict[str, Any]]:
    """bros-plus against every baseline in every cell, by the rule of the module's docstring; told is the baseline that
    decides the verdict, or else the one that has most RT on time."""
    rows = []
    for cell, policies in _cells(runs).items():
        ours = policies["bros-plus"]
        judged = [(*_judge(ours, policies[name]), name) for name in BASELINES if name in policies]
        verdict_, rt_gain, be_change, against = min(
            judged, key=lambda row: (("behind", "trade", "ahead").index(row[0]), row[1]))
        fewer = 1 - _value(policies[against], "rt.output_throughput") / _value(ours, "rt.output_throughput")
        rows.append({"cell": cell, "against": against, "verdict": verdict_, "rt_gain": rt_gain, "be_change": be_change,
                     "rt": _value(ours, "rt.slo_attainment"), "be": _value(ours, "be.output_throughput"),
                     "fewer_rt_tokens": fewer})
    return rows


def _judge(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[str, float, float]:
    """Verdict, gain in RT attainment, relative change of BE tokens/s."""
    rt_gain = _value(ours, "rt.slo_attainment") - _value(theirs, "rt.slo_attainment")
    be_change = _value(ours, "be.output_throughput") / max(_value(theirs, "be.output_throughput"), 1e-9) - 1
    more = rt_gain > RT_NOISE or be_change > BE_NOISE
    less = rt_gain < -RT_NOISE or be_change < -BE_NOISE
    return ("trade" if more else "behind") if less else "ahead", rt_gain, be_change


def _coverage(runs: Runs, rates: Iterable[float]) -> dict[str, Any]:
    """How much of the distance from vllm-priority to the bounds a policy covers: median over the sweep's cells in
    which there is a distance. RT: attainment up, and normalized latency down, to rt-only's. BE: output tokens/s up to
    be-only's, which serves no RT at all."""
    targets = {"rt_attainment": ("rt.slo_attainment", "rt-only"),
               "rt_latency": ("rt.normalized_latency_ms_per_token", "rt-only"),
               "be": ("be.output_throughput", "be-only")}
    shares: dict[str, dict[str, list[float]]] = {policy: {name: [] for name in targets}
                                                 for policy in ("bros", "bros-plus")}
    for system in SYSTEMS:
        for dataset in RT_LENGTHS:
            for rate in rates:
                for name, (metric, bound) in targets.items():
                    start, end = (_value(runs[_name(system, dataset, rate, policy)], metric)
                                  for policy in ("vllm-priority", bound))
                    if abs(start - end) < 0.02 * end:
                        continue
                    for policy, covered in shares.items():
                        ours = _value(runs[_name(system, dataset, rate, policy)], metric)
                        covered[name].append((ours - start) / (end - start))
    return {policy: {name: statistics.median(values) if values else None for name, values in covered.items()}
            for policy, covered in shares.items()}


def _be_of_reference(jobs: dict[str, Job], runs: Runs) -> dict[str, Any]:
    """BE tokens/s as a share of what serving RT leaves of the ceiling (`rt_work_share`), over the paper's sweep: median
    and least."""
    shares: dict[str, list[float]] = {policy: [] for policy in ("vllm-priority", "bros", "bros-plus")}
    for name, job in jobs.items():
        cell, _, policy = name.rpartition("/")
        if name.startswith("paper/") and policy == "be-only" and isinstance(job.arrivals, PaperWorkload):
            left = 1 - rt_work_share(job.settings, job.arrivals)
            ceiling = _value(runs[name], "be.output_throughput")
            for other, values in shares.items():
                values.append(_value(runs[f"{cell}/{other}"], "be.output_throughput") / (ceiling * left))
    return {policy: {"median": statistics.median(values), "least": min(values)} for policy, values in shares.items()}

"""What `reproduce` runs, in parts: the paper's sweep (its section 4), sweeps beyond it, the options of bros-plus, and
settings on which nothing was tuned (`traces.py`).

Nothing is tuned per run: one SLO, one demand of best-effort work and one set of scheduler limits for all, unless they
are what is varied. A job's name is "group/.../policy"; runs that differ by the seed alone have the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from bros_ref.evaluation.traces import unseen_points
from bros_ref.request import SLO
from bros_ref.scheduler import PLUS
from bros_ref.simulator.simulate import Job, SimulationSettings
from bros_ref.workload.paper import MAX_BE_BATCH, RT_LENGTHS, PaperWorkload, be_batch_for

SYSTEMS = {"opt-13b": SimulationSettings("a100-40gb", "opt-13b", 2),
           "opt-30b": SimulationSettings("a100-40gb", "opt-30b", 4),
           "llama-3-70b": SimulationSettings("a100-80gb", "llama-3-70b", 8)}
RATES = (2.0, 4.0, 6.0, 8.0, 10.0)
POLICIES = ("vllm-fcfs", "vllm-priority", "sglang-priority", "bros-rr", "bros", "bros-plus", "rt-only", "be-only")
BASELINES = ("vllm-fcfs", "vllm-v0", "vllm-priority", "vllm-priority-watermark", "sglang-priority", "scorpio",
             "qoserve", "xllm", "bros-rr")
CONTENDERS = ("vllm-priority", "vllm-priority-watermark", "sglang-priority", "scorpio", "qoserve", "xllm", "bros",
              "bros-plus")
PLUS_ABLATION = ("bros", *(f"bros+{option}" for option in PLUS), "bros-plus")
BASE_RATE = 6.0  # of the sweeps beyond the paper, OPT-13B
PARTS = ("paper", "sweep", "ablation", "unseen")

Lengths = str | tuple[tuple[int, int], ...]
Point = tuple[str, SimulationSettings, PaperWorkload]


def all_jobs(duration_s: float, rates: Iterable[float] = RATES, *, quick: bool = False,
             sharegpt: Lengths = "sharegpt", parts: Sequence[str] = PARTS,
             traces: Path | None = None) -> dict[str, Job]:
    """Every job of some parts by its name. `sharegpt` stands for the RT lengths of that name; `quick` leaves most
    sweeps out; `traces` is the folder of `unseen_points`."""
    jobs: dict[str, Callable[[], Iterable[Job]]] = {
        "paper": lambda: _paper_jobs(duration_s, tuple(rates)), "sweep": lambda: _sweep_jobs(duration_s, quick),
        "ablation": lambda: _ablation_jobs(duration_s, quick),
        "unseen": lambda: _unseen_jobs(duration_s, quick, traces)}
    return {job.name: _with_lengths(job, sharegpt) for part in PARTS if part in parts for job in jobs[part]()}


def run_name(system: str, dataset: str, rate: float, policy: str, only: str = "") -> str:
    """The name of a run of the paper's sweep; `only` is "rt" for real-time requests alone."""
    return f"paper/{system}/{dataset}{'-' + only if only else ''}/{rate:g}/{policy}"


def _batch(settings: SimulationSettings, lengths: str = "paper") -> int:
    return min(MAX_BE_BATCH, be_batch_for(settings.num_blocks * settings.block_size, lengths))


def _paper_jobs(duration_s: float, rates: tuple[float, ...]) -> Iterable[Job]:
    for system, settings in SYSTEMS.items():
        for dataset in RT_LENGTHS:
            for rate in rates:
                arrivals = PaperWorkload(rate, duration_s, _batch(settings), rt_lengths=dataset)
                for policy in (*POLICIES, "vllm-v0"):
                    yield Job(run_name(system, dataset, rate, policy), policy, settings, arrivals)
                if dataset == "sharegpt":
                    alone = replace(arrivals, be_batch=0)
                    for policy in ("vllm-fcfs", "vllm-v0", "tgi", "bros"):
                        yield Job(run_name(system, dataset, rate, policy, "rt"), policy, settings, alone)
    settings = SYSTEMS["opt-30b"]
    arrivals = PaperWorkload(10.0, duration_s, _batch(settings))
    for policy in ("bros-recompute", "bros-swap-request", "bros-swap-block"):
        yield Job(run_name("opt-30b", "sharegpt", 10.0, policy), policy, settings, arrivals)


def _sweep_jobs(duration_s: float, quick: bool) -> Iterable[Job]:
    for label, settings, arrivals in sweep_points(duration_s)[::3 if quick else 1]:
        for policy in CONTENDERS:
            yield Job(f"sweep/{label}/{policy}", policy, settings, arrivals)


def _ablation_jobs(duration_s: float, quick: bool) -> Iterable[Job]:
    """The options of bros-plus, one at a time, where it matters: tight targets, little memory, bursts, many seats."""
    points = {label: (label, settings, arrivals) for label, settings, arrivals in sweep_points(duration_s)}
    chosen = [points["SLO/0.2 s, 0.05 s"], points["KV pool/12,000 tokens"], points["arrivals/gamma, CV 4"]]
    large = SYSTEMS["llama-3-70b"]
    chosen.append(("Llama-3-70B/10 RT per s", large, PaperWorkload(10.0, duration_s, _batch(large))))
    for label, settings, arrivals in chosen[:1] if quick else chosen:
        for policy in PLUS_ABLATION:
            yield Job(f"ablation/{label}/{policy}", policy, settings, arrivals)


def _unseen_jobs(duration_s: float, quick: bool, traces: Path | None) -> Iterable[Job]:
    for label, settings, arrivals in unseen_points(duration_s, traces)[::3 if quick else 1]:
        for policy in (*BASELINES, "bros", "bros-plus"):
            yield Job(f"unseen/{label}/{policy}", policy, settings, arrivals)


def sweep_points(duration_s: float) -> list[Point]:
    """Beyond the paper, OPT-13B at BASE_RATE unless said otherwise: one thing changed at a time."""
    base = SYSTEMS["opt-13b"]
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
    for rate in (4.0, 10.0):
        points.append((f"RT per s/{rate:g}", base, replace(workload, rt_rate_per_s=rate)))
    points.append(("arrivals/gamma, CV 4", base, replace(workload, cv=4.0)))
    points.append(("BE lengths/arXiv", base, replace(workload, be_batch=_batch(base, "arxiv"), be_lengths="arxiv")))
    control = SimulationSettings("a100-80gb", "llama-3-8b", 1)
    points.append(("negative control/Llama-3-8B, no memory pressure", control, replace(workload, be_batch=64)))
    return points


def _with_lengths(job: Job, sharegpt: Lengths) -> Job:
    """The same job with a dataset's own lengths in the place of the fitted ones."""
    assert isinstance(job.arrivals, PaperWorkload)
    return replace(job, arrivals=replace(job.arrivals, rt_lengths=sharegpt)) if (
        job.arrivals.rt_lengths == "sharegpt") else job

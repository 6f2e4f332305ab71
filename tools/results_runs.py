"""What `tools/results.py` measures, and docs/results.json, which keeps it.

That file also keeps a digest of what every policy decides in short runs. When a rule changes, a digest changes, the
tests say so, and everything has to be measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bros_ref.evaluation.reproduce import AGAINST_V0, FIGURES
from bros_ref.evaluation.sweeps import SYSTEMS, all_jobs, run_name
from bros_ref.request import SLO
from bros_ref.scheduler import known_policies
from bros_ref.simulator.simulate import Job, SimulationSettings, run, run_all
from bros_ref.workload.paper import PaperWorkload, be_batch_for

KEPT = Path(__file__).resolve().parents[1] / "docs" / "results.json"
SEEDS = 5

Runs = dict[str, list[dict[str, Any]]]  # job -> one summary per seed, reduced to the section's metrics
Results = dict[str, Runs]  # section -> its runs
ON_TIME, BE, LATENCY = "rt.slo_attainment", "be.output_throughput", "rt.normalized_latency_ms_per_token"


# -- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """Runs that are published together. `jobs` maps the folder of traces, or None, to the jobs by their names."""

    metrics: tuple[str, ...]
    jobs: Callable[[Path | None], dict[str, Job]]


def _paper(settings: SimulationSettings, rate: float, duration_s: float) -> PaperWorkload:
    """The workload of `--workload paper`."""
    return PaperWorkload(rate, duration_s, be_batch_for(settings.num_blocks * settings.block_size))


def _named(cell: str, policies: Iterable[str], settings: SimulationSettings, rate: float,
           duration_s: float) -> dict[str, Job]:
    arrivals = _paper(settings, rate, duration_s)
    return {f"{cell}/{policy}": Job(f"{cell}/{policy}", policy, settings, arrivals) for policy in policies}


HEADLINE = {"OPT-13B, 4 RT/s": ("opt-13b", 4.0), "OPT-13B, 10 RT/s": ("opt-13b", 10.0),
            "Llama-3-70B, 4 RT/s": ("llama-3-70b", 4.0)}
HEADLINE_POLICIES = ("vllm-fcfs", "vllm-priority", "bros", "bros-plus", "be-only")
TIERS = "OPT-13B, 4 RT/s"
PAPER_S, PAPER_RATES = 600.0, (2.0, 6.0, 10.0)
OVERLOADED = [run_name(system, "sharegpt", 10.0, "bros-plus") for system in ("opt-13b", "opt-30b")]
SLOWDOWNS = (1.1, 1.25, 1.5, 2.0, None)


def _headline_jobs(_: Path | None) -> dict[str, Job]:
    jobs: dict[str, Job] = {}
    for cell, (system, rate) in HEADLINE.items():
        more = ("xllm",) if cell == "OPT-13B, 10 RT/s" else ()
        jobs |= _named(cell, (*HEADLINE_POLICIES, *more), SYSTEMS[system], rate, 100.0)
    return jobs


def _paper_jobs(_: Path | None) -> dict[str, Job]:
    """The runs of the paper's sweep, as long as the paper's, on which one of its figures rests, and `bros-plus` where
    the paper's form is overloaded."""
    needed = {run_name(system, figure.dataset, rate, policy, figure.only)
              for figure in (*FIGURES, *AGAINST_V0) for system in figure.systems for rate in PAPER_RATES
              if rate in figure.rates for policy in ("bros", figure.baseline)} | set(OVERLOADED)
    return {name: job for name, job in all_jobs(PAPER_S, PAPER_RATES, parts=["paper"]).items() if name in needed}


def _unseen_jobs(traces: Path | None) -> dict[str, Job]:
    return all_jobs(60.0, parts=["unseen"], traces=traces)


def _slowdown_jobs(_: Path | None) -> dict[str, Job]:
    jobs: dict[str, Job] = {}
    for cell, (system, rate) in HEADLINE.items():
        for slowdown in SLOWDOWNS:
            settings = replace(SYSTEMS[system], rt_slowdown=slowdown)
            name = f"{cell}/{slowdown or 'none'}"
            jobs[name] = Job(name, "bros-plus", settings, _paper(settings, rate, 60.0))
        jobs |= _named(cell, ("rt-only",), SYSTEMS[system], rate, 60.0)
    return jobs


def _tier_jobs(_: Path | None) -> dict[str, Job]:
    """Each class on one GPU of its own, against `bros-plus` on both ("headline")."""
    both = SYSTEMS["opt-13b"]
    workload = PaperWorkload(4.0, 100.0, be_batch_for(both.num_blocks * both.block_size))
    return {f"{TIERS}/{policy}": Job(f"{TIERS}/{policy}", policy, replace(both, tp=1), workload)
            for policy in ("rt-only", "be-only")}


SECTIONS = {
    "headline": Section((ON_TIME, BE, "kv.preempted_requests", "kv.recomputed_tokens"), _headline_jobs),
    "paper": Section((LATENCY, "rt.ttft_attainment", "rt.tpot_attainment", "rt.request_throughput",
                      "be.request_throughput"), _paper_jobs),
    "unseen": Section((ON_TIME, BE, "rt.p99_ttft_ms"), _unseen_jobs),
    "slowdown": Section((LATENCY, BE), _slowdown_jobs),
    "tiers": Section((ON_TIME, BE), _tier_jobs),
}


def reduced(summary: dict[str, Any], metrics: Iterable[str]) -> dict[str, Any]:
    """A summary with nothing in it but some metrics, to nine significant digits."""
    kept: dict[str, Any] = {"classes": {"rt": {}, "be": {}}, "kv": {}}
    for metric in metrics:
        group, key = metric.split(".")
        source, target = (summary["kv"], kept["kv"]) if group == "kv" else (
            summary["classes"][group], kept["classes"][group])
        target[key] = None if source[key] is None else float(f"{source[key]:.9g}")
    return kept


def measure(section: str, traces: Path | None) -> Runs:
    """All runs of a section."""
    chosen = SECTIONS[section]
    jobs = chosen.jobs(traces)
    found: Runs = {name: [] for name in jobs}
    for seed in range(SEEDS):
        seeded = [replace(job, settings=replace(job.settings, seed=seed)) for job in jobs.values()]
        for name, summary in zip(jobs, run_all(seeded), strict=True):
            found[name].append(reduced(summary, chosen.metrics))
    return found


# -- what every policy decides ----------------------------------------------------------------------------------------

SHORT_RUNS = (  # chats that fill a pool by themselves, and long prompts that cannot all be on time
    (SimulationSettings(kv_tokens=5_000, max_num_seqs=64), PaperWorkload(
        20.0, 2.0, 8, SLO(0.4, 0.08))),
    (SimulationSettings("h100-80gb", "qwen3-32b", 2, kv_tokens=48_000), PaperWorkload(
        4.0, 2.0, 40, SLO(3.0, 0.2), "long-8k")),
)


def decisions(policy: str, rt_slowdown: float | None = None) -> str:
    """A digest of every step of the short runs: who ran with how many tokens, who was preempted, what was copied, and
    when the step began."""
    digest = hashlib.sha256()
    for settings, arrivals in SHORT_RUNS:
        _, trace = run(policy, replace(settings, rt_slowdown=rt_slowdown), arrivals, keep_steps=True)
        for step in trace.steps:
            digest.update(repr((f"{step.start_s:.6f}", sorted(step.scheduled.items()), sorted(step.preempted.items()),
                                sorted(step.copied.items()))).encode())
    return digest.hexdigest()[:16]


def all_decisions() -> dict[str, str]:
    """The digest of each policy, and of `bros-plus` with a bound on how much BE slows RT."""
    return {policy: decisions(policy) for policy in known_policies()} | {
        "bros-plus, rt_slowdown 1.5": decisions("bros-plus", 1.5)}


# -- the file ---------------------------------------------------------------------------------------------------------


def read_kept(path: Path = KEPT) -> tuple[dict[str, str], Results]:
    """The digests, and the runs of all sections, of docs/results.json."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    results: Results = {}
    for section, jobs in kept["sections"].items():
        results[section] = {}
        for name, columns in jobs.items():
            runs: list[dict[str, Any]] = [{"classes": {"rt": {}, "be": {}}, "kv": {}}
                                          for _ in next(iter(columns.values()))]
            for metric, column in columns.items():
                group, key = metric.split(".")
                for own, sample in zip(runs, column, strict=True):
                    (own["kv"] if group == "kv" else own["classes"][group])[key] = sample
            results[section][name] = runs
    return kept["decisions"], results


def write_kept(digests: dict[str, str], results: Results, path: Path = KEPT) -> None:
    """One line per run, so that a change is easy to see."""
    lines = [f' "decisions": {json.dumps(digests)},', ' "sections": {']
    for place, (section, jobs) in enumerate(results.items()):
        lines.append(f'  "{section}": {{')
        entries = []
        for name, runs in jobs.items():
            columns = {f"{group}.{key}": [(own["kv"] if group == "kv" else own["classes"][group])[key] for own in runs]
                       for group, keys in (*runs[0]["classes"].items(), ("kv", runs[0]["kv"])) for key in keys}
            entries.append(f"   {json.dumps(name)}: {json.dumps(columns)}")
        lines += [",\n".join(entries), "  }" + "," * (place < len(results) - 1)]
    path.write_text("\n".join(["{", *lines, " }", "}"]) + "\n", encoding="utf-8")

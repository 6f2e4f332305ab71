"""The simulated figures of README.md and docs/results.md: measures them, keeps them, and writes them into the pages.

    python tools/results.py                   # measures everything (an hour of one core) and updates the pages
    python tools/results.py headline hybrid   # measures these sections only
    python tools/results.py --pages           # measures nothing: writes the kept figures into the pages

docs/results.json keeps, for each run of each section, the values of every seed. From them this file writes the tables
of the pages, which it finds by their header line, and the figures in the sentences of `SENTENCES`. It also keeps a
digest of what every policy decides in short runs: when a rule changes, a digest changes, the tests say so, and all
sections have to be measured again. `tests/evaluation/test_published.py` checks all of this.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bros_ref.evaluation.dominance import mean, value, values
from bros_ref.evaluation.reproduce import AGAINST_V0, FIGURES, PaperFigure, compare
from bros_ref.evaluation.statistics import Interval, interval, paired_difference, paired_ratio
from bros_ref.evaluation.sweeps import RATES, SYSTEMS, all_jobs, run_name
from bros_ref.request import SLO
from bros_ref.scheduler import known_policies
from bros_ref.simulator.simulate import Job, SimulationSettings, run, run_all
from bros_ref.workload.paper import PaperWorkload, be_batch_for

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "results.json"
PAGES = {"readme": ROOT / "README.md", "results": ROOT / "docs" / "results.md"}
SEEDS = 5

Runs = dict[str, list[dict[str, Any]]]  # job -> one summary per seed, reduced to the section's metrics
Results = dict[str, Runs]  # section -> its runs
ON_TIME, BE = "rt.slo_attainment", "be.output_throughput"


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
SLOWDOWNS = (1.1, 1.25, 1.5, 2.0, None)


def _headline_jobs(_: Path | None) -> dict[str, Job]:
    jobs = {}
    for cell, (system, rate) in HEADLINE.items():
        more = ("xllm",) if cell == "OPT-13B, 10 RT/s" else ()
        jobs |= _named(cell, (*HEADLINE_POLICIES, *more), SYSTEMS[system], rate, 100.0)
    return jobs


def _paper_jobs(_: Path | None) -> dict[str, Job]:
    """The runs of `reproduce --quick --parts paper` on which a figure of the paper rests."""
    rates = RATES[::2]
    needed = {run_name(system, figure.dataset, rate, policy, figure.only)
              for figure in (*FIGURES, *AGAINST_V0) for system in figure.systems for rate in rates
              if rate in figure.rates for policy in ("bros", figure.baseline)}
    return {name: job for name, job in all_jobs(60.0, rates, quick=True, parts=["paper"]).items() if name in needed}


def _note_jobs(_: Path | None) -> dict[str, Job]:
    """Regimes beyond the paper's sweep, in which some of its figures are reached."""
    jobs = {}
    for rate in (14.0, 18.0):
        jobs |= _named(f"Llama-3-70B, {rate:g} RT/s", ("bros", "bros-rr"), SYSTEMS["llama-3-70b"], rate, 60.0)
    small = replace(SYSTEMS["opt-30b"], kv_tokens=24_000)
    return jobs | _named("OPT-30B, 24,000 tokens", ("bros", "bros-recompute"), small, 10.0, 60.0)


def _unseen_jobs(traces: Path | None) -> dict[str, Job]:
    return all_jobs(60.0, parts=["unseen"], traces=traces)


def _slowdown_jobs(_: Path | None) -> dict[str, Job]:
    jobs = {}
    for cell, (system, rate) in HEADLINE.items():
        for slowdown in SLOWDOWNS:
            settings = replace(SYSTEMS[system], rt_slowdown=slowdown)
            name = f"{cell}/{slowdown or 'none'}"
            jobs[name] = Job(name, "bros-plus", settings, _paper(settings, rate, 60.0))
        jobs |= _named(cell, ("rt-only",), SYSTEMS[system], rate, 60.0)
    return jobs


def _tier_jobs(_: Path | None) -> dict[str, Job]:
    """Each class on one GPU of its own, against `bros-plus` on both ("headline")."""
    one = replace(SYSTEMS["opt-13b"], tp=1)
    jobs: dict[str, Job] = {}
    for rate in (4.0, 10.0):
        batch = be_batch_for(SYSTEMS["opt-13b"].num_blocks * one.block_size)
        for policy in ("rt-only", "be-only"):
            name = f"OPT-13B, {rate:g} RT/s/{policy}"
            jobs[name] = Job(name, policy, one, PaperWorkload(rate, 100.0, batch))
    return jobs


LATENCY = "rt.normalized_latency_ms_per_token"
SECTIONS = {
    "headline": Section((ON_TIME, BE, "kv.preempted_requests", "kv.recomputed_tokens"), _headline_jobs),
    "paper": Section((LATENCY, "rt.ttft_attainment", "rt.tpot_attainment", "rt.request_throughput",
                      "be.request_throughput"), _paper_jobs),
    "notes": Section(("rt.ttft_attainment", "rt.tpot_attainment"), _note_jobs),
    "unseen": Section((ON_TIME, BE, "rt.p99_ttft_ms"), _unseen_jobs),
    "slowdown": Section((LATENCY, BE), _slowdown_jobs),
    "tiers": Section((ON_TIME, BE), _tier_jobs),
}
HYBRID_METRICS = (ON_TIME, "rt.median_ttft_ms", "rt.p99_ttft_ms", "rt.median_tpot_ms", BE)
HYBRID_POLICIES, HYBRID_ROUNDS = ("vllm-priority", "bros", "bros-plus"), 8
ALL_SECTIONS = (*SECTIONS, "hybrid")


def reduced(summary: dict[str, Any], metrics: Iterable[str]) -> dict[str, Any]:
    """A summary with nothing in it but some metrics, to six significant digits."""
    kept: dict[str, Any] = {"classes": {"rt": {}, "be": {}}, "kv": {}}
    for metric in metrics:
        group, key = metric.split(".")
        source, target = (summary["kv"], kept["kv"]) if group == "kv" else (
            summary["classes"][group], kept["classes"][group])
        target[key] = None if source[key] is None else float(f"{source[key]:.6g}")
    return kept


def measure(section: str, traces: Path | None) -> Runs:
    """All runs of a section."""
    if section == "hybrid":
        return measure_hybrid(HYBRID_POLICIES, HYBRID_ROUNDS)
    chosen = SECTIONS[section]
    jobs = chosen.jobs(traces)
    found: Runs = {name: [] for name in jobs}
    for seed in range(SEEDS):
        seeded = [replace(job, settings=replace(job.settings, seed=seed)) for job in jobs.values()]
        for name, summary in zip(jobs, run_all(seeded), strict=True):
            found[name].append(reduced(summary, chosen.metrics))
    return found


def measure_hybrid(policies: Sequence[str], rounds: int) -> Runs:
    """`bench hybrid --clock modelled --model checksum`."""
    from bros_ref.engine.build import load_model
    from bros_ref.evaluation.bench.hybrid import bench_hybrid

    runs, _ = bench_hybrid(load_model("checksum", "cpu", 0), policies, rounds=rounds, clock="modelled")
    return {policy: [reduced(own, HYBRID_METRICS) for own in runs if own["policy"] == policy] for policy in policies}


# -- what every policy decides ----------------------------------------------------------------------------------------

SHORT_RUNS = (  # chats that fill a pool by themselves, and long prompts that cannot all be on time
    (SimulationSettings(kv_tokens=5_000, max_num_seqs=64), PaperWorkload(20.0, 2.0, 8)),
    (SimulationSettings("h100-80gb", "qwen3-32b", 2, kv_tokens=48_000), PaperWorkload(
        4.0, 2.0, 40, SLO(1.5, 0.2), "long-8k")),
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


def read_kept() -> tuple[dict[str, str], Results]:
    """The digests, and the runs of all sections, of docs/results.json."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
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


def write_kept(digests: dict[str, str], results: Results) -> None:
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
    KEPT.write_text("\n".join(["{", *lines, " }", "}"]) + "\n", encoding="utf-8")


# -- tables -----------------------------------------------------------------------------------------------------------


class Shown:
    """A figure with its interval, or a plain number. Format: "1" the mean to one digit, "±1" with the interval,
    "+±1" with a sign, "~2" the mean to two significant digits."""

    def __init__(self, figure: Interval | float, scale: float = 1.0) -> None:
        figure = figure if isinstance(figure, Interval) else Interval(figure, None)
        self.mean, self.half = figure.mean * scale, (figure.half or 0.0) * scale

    def __format__(self, spec: str) -> str:
        sign, with_interval, digits = re.fullmatch(r"(\+?)(±|~|)(\d)", spec).groups()  # type: ignore[union-attr]
        if with_interval == "~":
            return f"{float(f'{self.mean:.{digits}g}'):,.0f}"
        text = f"{self.mean:{sign},.{digits}f}"
        if not float(text.replace(",", "")):
            text = text.lstrip("+-")  # no signed zero
        return f"{text} ± {self.half:,.{digits}f}" if with_interval else text


def _shown(runs: Sequence[dict[str, Any]], metric: str, scale: float = 1.0) -> Shown:
    return Shown(interval(values(runs, metric)), scale)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def headline_table(results: Results) -> list[str]:
    """RT on time and BE tokens/s."""
    rows = []
    for cell in HEADLINE:
        runs = {policy: results["headline"][f"{cell}/{policy}"] for policy in HEADLINE_POLICIES}
        rows.append(_row(cell, *(f"{_shown(own, ON_TIME, 100):±0} %, {_shown(own, BE):±0}"
                                 for policy, own in runs.items() if policy != "be-only"),
                         f"{_shown(runs['be-only'], BE):±0}"))
    return rows


METRIC_NAMES = {LATENCY: "latency", "rt.ttft_attainment": "TTFT attained", "rt.tpot_attainment": "TPOT attained",
                "be.request_throughput": "BE requests", "rt.request_throughput": "RT requests"}
BASELINE_NAMES = {"vllm-fcfs": "vLLM", "bros-rr": "BROS-RR"}
NOTES = {("vllm-fcfs", "rt.tpot_attainment"): 1, ("vllm-fcfs", "be.request_throughput"): 2,
         ("bros-rr", "rt.ttft_attainment"): 3, ("bros-recompute", "rt.ttft_attainment"): 4,
         ("bros-recompute", "rt.tpot_attainment"): 4, ("vllm-fcfs", LATENCY, "rt"): 5,
         ("vllm-fcfs", "rt.request_throughput", "rt"): 5}


def paper_table(results: Results) -> list[str]:
    """The paper's figures beside ours, against both of vLLM's schedulers where the paper says vLLM."""
    v0 = iter(AGAINST_V0)
    rows = []
    for figure in FIGURES:
        versions = [figure, next(v0)] if figure.baseline == "vllm-fcfs" else [figure]
        entries = [compare(version, results["paper"], RATES[::2]) for version in versions]
        ours = ", ".join(f"{version} {_gain(figure, entry)}".strip() for version, entry in zip(
            ("V1", "V0") if len(entries) > 1 else ("",), entries, strict=True))
        verdicts = list(dict.fromkeys(entry["verdict"] for entry in entries))
        note = NOTES.get((figure.baseline, figure.metric, *filter(None, (figure.only,))))
        note = note if "worse" in verdicts else None
        rows.append(_row(_row_name(figure), _paper_gain(figure), ours, _absolute(figure, entries),
                         ", ".join(verdicts) + (f" ({note})" if note else "")))
    return rows


def _row_name(figure: PaperFigure) -> str:
    metric = METRIC_NAMES[figure.metric]
    if figure.only:
        return f"RT alone, vLLM: {metric}"
    if figure.baseline == "bros-recompute":
        return f"KV blocks with two owners: {metric}"
    return f"{'ShareGPT' if figure.dataset == 'sharegpt' else 'LMSYS'}, {BASELINE_NAMES[figure.baseline]}: {metric}"


def _paper_gain(figure: PaperFigure) -> str:
    if figure.kind == "ratio":
        return f"{figure.paper:.1f}×" if figure.paper >= 10 else f"{figure.paper:.2f}×"
    return f"{figure.paper:.1f} %"


def _gain(figure: PaperFigure, entry: dict[str, Any]) -> str:
    low, high = entry["interval95"]
    shown = Shown(Interval(entry["ours"], (high - low) / 2))
    if figure.kind == "ratio":
        return f"{shown:±0}×" if entry["ours"] >= 10 else f"{shown:±2}×"
    return f"{shown:+±1} %"


def _absolute(figure: PaperFigure, entries: Sequence[dict[str, Any]]) -> str:
    """BROS / baseline, of each version of it; what does not change between versions is told once."""
    def told(number: float) -> str:
        if "attainment" in figure.metric:
            return f"{100 * number:.1f}".removesuffix(".0") + " %"
        return f"{number:.1f}" if "throughput" in figure.metric or number < 100 else f"{number:.0f}"

    pairs = [(told(entry["absolute"]["bros"]), told(entry["absolute"][entry["baseline"]])) for entry in entries]
    text = " / ".join(pairs[0])
    for ours, theirs in pairs[1:]:
        text += f", {theirs}" if ours == pairs[0][0] else f", {ours} / {theirs}"
    unit = {LATENCY: " ms per token", "rt.request_throughput": " per second", "be.request_throughput": " per second"}
    return text + unit.get(figure.metric, "")


UNSEEN_POLICIES = ("bros-plus", "qoserve", "xllm", "vllm-priority", "scorpio", "sglang-priority", "bros", "vllm-fcfs")
RIVALS = ("qoserve", "xllm", "vllm-priority")


def unseen_cells(results: Results) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Cell -> policy -> runs."""
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, runs in results["unseen"].items():
        cell, _, policy = name.removeprefix("unseen/").rpartition("/")
        cells.setdefault(cell, {})[policy] = runs
    return cells


def _cell_name(cell: str) -> str:
    name, load = cell.split("/")
    return f"`{name}`, {load}"


def unseen_table(results: Results) -> list[str]:
    """RT on time and BE tokens/s on what nothing was tuned on."""
    return [_row(_cell_name(cell), *(f"{_shown(policies[name], ON_TIME, 100):0}, {_shown(policies[name], BE):0}"
                                     for name in UNSEEN_POLICIES)) for cell, policies in unseen_cells(results).items()]


def leads_table(results: Results) -> list[str]:
    """The paired lead of bros-plus in both."""
    def lead(policies: dict[str, list[dict[str, Any]]], rival: str, metric: str, scale: float) -> Shown:
        return Shown(paired_difference(values(policies["bros-plus"], metric), values(policies[rival], metric)), scale)

    return [_row(_cell_name(cell), *(
        f"{lead(policies, rival, ON_TIME, 100):+±1}; {lead(policies, rival, BE, 1):+±0}" for rival in RIVALS))
        for cell, policies in unseen_cells(results).items()]


def slowdown_table(results: Results) -> list[str]:
    """RT latency as a multiple of rt-only's, and the share of BE."""
    rows = []
    for place, slowdown in enumerate(SLOWDOWNS):
        cells = []
        for cell in HEADLINE:
            own, free, floor = (results["slowdown"][f"{cell}/{name}"]
                                for name in (slowdown or "none", "none", "rt-only"))
            latency = mean(own, LATENCY) / mean(floor, LATENCY)
            share = Shown(paired_ratio(values(own, BE), values(free, BE)) or 0.0, 100)
            cells.append(f"{'' if place else 'latency '}{latency:.2f}, {'' if place else 'BE '}"
                         + (f"{share:±0} %" if slowdown else "100 %"))
        rows.append(_row(str(slowdown or "none").removesuffix(".0"), *cells))
    return rows


def tiers_table(results: Results) -> list[str]:
    """RT on time and BE tokens/s, and the paired lead of bros-plus."""
    rows = []
    for cell in ("OPT-13B, 4 RT/s", "OPT-13B, 10 RT/s"):
        rt, be = (values(results["tiers"][f"{cell}/{policy}"], metric) for policy, metric in (
            ("rt-only", ON_TIME), ("be-only", BE)))
        ours = [values(results["headline"][f"{cell}/bros-plus"], metric) for metric in (ON_TIME, BE)]
        rows.append(_row(cell, *(f"{Shown(interval(on_time), 100):±0} %, {Shown(interval(tokens)):±0}"
                                 for on_time, tokens in ((rt, be), ours)),
                         f"{Shown(paired_difference(ours[0], rt), 100):+±1}; "
                         f"{Shown(paired_difference(ours[1], be)):+±0}"))
    return rows


def hybrid_table(results: Results) -> list[str]:
    """The median of the rounds, and the interval of the mean."""
    rows = []
    for policy in HYBRID_POLICIES:
        cells = []
        for metric in HYBRID_METRICS:
            scale, digits = (100, 0) if metric == ON_TIME else (1, 1) if metric == BE else (1, 0)
            samples = sorted(scale * value(own, metric) for own in results["hybrid"][policy])
            middle = (samples[(len(samples) - 1) // 2] + samples[len(samples) // 2]) / 2
            found = interval(samples)
            cells.append(f"{middle:,.{digits}f} [{found.low:,.{digits}f}, {found.high:,.{digits}f}]")
        rows.append(_row(policy, *cells))
    return rows


TABLES: tuple[tuple[str, str, Callable[[Results], list[str]]], ...] = (  # page, beginning of the header line, rows
    ("readme", "| simulated, on time % and BE tokens/s |", headline_table),
    ("results", "| simulated, on time % and BE tokens/s |", headline_table),
    ("results", "| comparison | paper |", paper_table),
    ("results", "| RT on time %, BE tokens/s |", unseen_table),
    ("results", "| paired lead of bros-plus", leads_table),
    ("results", "| x | OPT-13B", slowdown_table),
    ("results", "| on time % and BE tokens/s | one GPU for each class |", tiers_table),
    ("results", "| modelled clock |", hybrid_table),
)


# -- sentences --------------------------------------------------------------------------------------------------------


def figures(results: Results) -> dict[str, Shown]:
    """What the sentences name."""
    headline, paper, notes, hybrid = (results[name] for name in ("headline", "paper", "notes", "hybrid"))

    def at(runs: Sequence[dict[str, Any]], metric: str, scale: float = 1.0) -> Shown:
        return Shown(interval(values(runs, metric)), scale)

    def times(runs: Runs, cell: str, baseline: str, metric: str) -> Shown:
        return Shown(mean(runs[f"{cell}/bros"], metric) / mean(runs[f"{cell}/{baseline}"], metric))

    found = {
        "bros_at_10": at(headline["OPT-13B, 10 RT/s/bros"], ON_TIME, 100),
        "priority_on_llama": at(headline["Llama-3-70B, 4 RT/s/vllm-priority"], ON_TIME, 100),
        "xllm_be": at(headline["OPT-13B, 10 RT/s/xllm"], BE),
        "xllm_on_time": at(headline["OPT-13B, 10 RT/s/xllm"], ON_TIME, 100),
        "xllm_drops": Shown(statistics.fmean(own["kv"]["preempted_requests"] for own in headline[
            "OPT-13B, 10 RT/s/xllm"])),
        "xllm_twice": Shown(statistics.fmean(own["kv"]["recomputed_tokens"] for own in headline[
            "OPT-13B, 10 RT/s/xllm"])),
        "v0_at_10": at(paper[run_name("llama-3-70b", "sharegpt", 10.0, "vllm-v0")], "rt.tpot_attainment", 100),
        "rr_at_10": times(paper, "paper/llama-3-70b/sharegpt/10", "bros-rr", "rt.ttft_attainment"),
        "rr_at_14": times(notes, "Llama-3-70B, 14 RT/s", "bros-rr", "rt.ttft_attainment"),
        "rr_at_18": times(notes, "Llama-3-70B, 18 RT/s", "bros-rr", "rt.ttft_attainment"),
        "hybrid_bros": at(hybrid["bros"], ON_TIME, 100),
        "hybrid_priority": at(hybrid["vllm-priority"], ON_TIME, 100),
        "hybrid_ttft": Shown(_median(hybrid["bros"], "rt.median_ttft_ms")),
        "hybrid_priority_ttft": Shown(_median(hybrid["vllm-priority"], "rt.median_ttft_ms")),
        "hybrid_more_be": _percent_more(hybrid["bros"], hybrid["vllm-priority"]),
    }
    cells = unseen_cells(results)
    fewer = [1 - mean(cells[cell]["bros-plus"], BE) / mean(cells[cell]["vllm-priority"], BE) for cell in (
        "long-8k/high load", "long-14k/high load", "chat-and-30k/high load")]
    half = cells["long-8k/half load"]
    found |= {
        "fewer_be_least": Shown(min(fewer), 100), "fewer_be_most": Shown(max(fewer), 100),
        "more_at_half": Shown(mean(half["vllm-priority"], BE) / mean(half["bros-plus"], BE) - 1, 100),
        "qoserve_p99": Shown(min(mean(policies["qoserve"], "rt.p99_ttft_ms") / mean(
            policies["bros-plus"], "rt.p99_ttft_ms") for cell, policies in cells.items() if "high" in cell)),
        "up_8k": Shown(mean(cells["long-8k/high load"]["bros-plus"], BE)),
        "up_14k": Shown(mean(cells["long-14k/high load"]["bros-plus"], BE)),
        "up_30k": Shown(mean(cells["chat-and-30k/high load"]["bros-plus"], BE)),
    }
    for system in ("opt-13b", "llama-3-70b"):
        for rate in RATES[::2]:
            ours, theirs = (mean(paper[run_name(system, "sharegpt", rate, policy)], "be.request_throughput")
                            for policy in ("bros", "vllm-fcfs"))
            found[f"{system}_loss_{rate:g}"] = Shown(1 - ours / theirs, 100)
    for metric in ("ttft", "tpot"):
        cell, key = "OPT-30B, 24,000 tokens", f"rt.{metric}_attainment"
        found[f"pool_{metric}"] = times(notes, cell, "bros-recompute", key)
        for policy in ("bros", "bros-recompute"):
            found[f"pool_{metric}_{policy}"] = at(notes[f"{cell}/{policy}"], key, 100)
    return found


def _median(runs: Sequence[dict[str, Any]], metric: str) -> float:
    return statistics.median(values(runs, metric))


def _percent_more(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Shown:
    ratio = paired_ratio(values(ours, BE), values(theirs, BE))
    assert ratio is not None
    return Shown(Interval(ratio.mean - 1, ratio.half), 100)


SENTENCES = {
    "readme": (
        "Under `bros`, {hybrid_bros:±0} % of RT are on time, against {hybrid_priority:±0} % under `vllm-priority`. "
        "Median TTFT is {hybrid_ttft:0} ms against {hybrid_priority_ttft:0} ms, and BE throughput is "
        "{hybrid_more_be:±1} % higher.",
    ),
    "results": (
        "`bros`, the paper's form, has {bros_at_10:±1} % of RT on time",
        "and has all RT on time instead of {priority_on_llama:0} %.",
        "`xllm` serves {xllm_be:±0} BE tokens per second at 10 RT per second, with {xllm_on_time:±1} % of RT on time.",
        "This happens about {xllm_drops:~1} times in 100 s, and {xllm_twice:~2} tokens are computed twice.",
        "At 10 RT per second V0 attains {v0_at_10:0} %.",
        "On OPT-13B the loss is {opt-13b_loss_2:0}, {opt-13b_loss_6:0} and {opt-13b_loss_10:0} % at 2, 6 and 10 RT per "
        "second; on Llama-3-70B it is {llama-3-70b_loss_2:0}, {llama-3-70b_loss_6:0} and {llama-3-70b_loss_10:0} %.",
        "the gain is {rr_at_10:1}× at 10 RT per second, {rr_at_14:1}× at 14 and {rr_at_18:1}× at 18",
        "the gain is {pool_ttft:2}× in TTFT ({pool_ttft_bros:0} against {pool_ttft_bros-recompute:0} %) and "
        "{pool_tpot:2}× in TPOT ({pool_tpot_bros:0} against {pool_tpot_bros-recompute:0} %)",
        "`vllm-priority` also has all RT on time and serves {more_at_half:1} % more BE.",
        "At high load its p99 TTFT is therefore at least {qoserve_p99:1} times that of `bros-plus`",
        "`bros-plus` serves {fewer_be_least:0} to {fewer_be_most:0} % fewer BE tokens per second than `vllm-priority`",
        "from 361 to {up_8k:0} tokens per second in `long-8k` at high load, from 403 to {up_14k:0} in `long-14k`, and "
        "from 400 to {up_30k:0} in `chat-and-30k`.",
        "Paired by round, `bros` serves {hybrid_more_be:±1} % more BE tokens per second than `vllm-priority`.",
    ),
}
A_FIGURE = r"([-+]?[\d,.]*\d(?:\s±\s[\d,.]*\d)?)"


def with_figures(page: str, text: str, results: Results) -> str:
    """The text of a page with its tables and sentences as the results have them.

    Raises:
        ValueError: a table or a sentence is not in the page exactly once.
    """
    lines = text.split("\n")
    for where, header, rows in TABLES:
        if where == page:
            found = [index for index, line in enumerate(lines) if line.startswith(header)]
            if len(found) != 1:
                raise ValueError(f"{PAGES[page].name}: expected one table that begins with {header!r}, "
                                 f"found {len(found)}")
            first = end = found[0] + 2
            while end < len(lines) and lines[end].startswith("|"):
                end += 1
            lines[first:end] = rows(results)
    text, named = "\n".join(lines), figures(results)
    for sentence in SENTENCES[page]:
        text = with_sentence(page, text, sentence, named)
    return text


def with_sentence(page: str, text: str, sentence: str, named: dict[str, Shown]) -> str:
    parts = list(string.Formatter().parse(sentence))
    pattern = "".join(r"\s+".join(map(re.escape, re.split(r"\s+", literal))) + (A_FIGURE if field else "")
                      for literal, field, _, _ in parts)
    matches = list(re.finditer(pattern, text))
    if len(matches) != 1:
        raise ValueError(f"{PAGES[page].name}: expected once, but for its figures, found {len(matches)} times: "
                         f"{sentence}")
    wanted = [format(named[field], spec) for _, field, spec, _ in parts if field]
    for group, figure in reversed(list(enumerate(wanted, 1))):
        start, end = matches[0].span(group)
        if re.sub(r"\s+", " ", text[start:end]) != figure:
            text = text[:start] + figure + text[end:]
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(ALL_SECTIONS)}; default: all")
    parser.add_argument("--pages", action="store_true", help="measure nothing")
    parser.add_argument("--traces", type=Path, help="the folder of traces; needed for the section unseen")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(ALL_SECTIONS):
        parser.error(f"unknown section {min(unknown)!r}; known are {', '.join(ALL_SECTIONS)}")
    chosen = [] if options.pages else options.sections or list(ALL_SECTIONS)
    if "unseen" in chosen and options.traces is None:
        parser.error("the section unseen needs --traces FOLDER; name other sections to leave it out")
    digests, results = read_kept()
    for section in chosen:
        results[section] = measure(section, options.traces)
    if set(chosen) == set(ALL_SECTIONS):
        digests = all_decisions()
    write_kept(digests, results)
    for page, path in PAGES.items():
        path.write_text(with_figures(page, path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()

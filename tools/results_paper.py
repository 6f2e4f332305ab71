"""The table of docs/results.md that sets the paper's figures beside ours, and the sentences of its notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from results_runs import LATENCY, PAPER_RATES, Results
from results_shown import Shown, row

from bros_ref.evaluation.dominance import mean, values
from bros_ref.evaluation.reproduce import AGAINST_V0, FIGURES, PaperFigure, compare
from bros_ref.evaluation.statistics import Interval, paired_ratio
from bros_ref.evaluation.sweeps import run_name

METRICS = {LATENCY: "latency", "rt.ttft_attainment": "TTFT attained", "rt.tpot_attainment": "TPOT attained",
           "be.request_throughput": "BE requests", "rt.request_throughput": "RT requests"}
BASELINES = {"vllm-fcfs": "vLLM", "bros-rr": "BROS-RR"}
NOTES = {("vllm-fcfs", "rt.tpot_attainment"): 1, ("vllm-fcfs", "be.request_throughput"): 2,
         ("bros-rr", "be.request_throughput"): 2, ("vllm-fcfs", LATENCY, "rt"): 3,
         ("vllm-fcfs", "rt.request_throughput", "rt"): 3}
SENTENCES = (
    "At 10 RT per second V0 attains {v0_at_10:0} %.",
    "`bros` attains {opt-13b_tpot:0} and {opt-30b_tpot:0} % of the TPOT targets there",
    "On OPT-13B, `bros` completes {opt-13b_be_2:+0}, {opt-13b_be_6:+0} and {opt-13b_be_10:+0} % BE requests compared "
    "with V1 at 2, 6 and 10 RT per second; on Llama-3-70B {llama-3-70b_be_2:+0}, {llama-3-70b_be_6:+0} and "
    "{llama-3-70b_be_10:+0} %.",
    "BROS-RR completes more BE requests on Llama-3-70B, where it attains {rr_ttft:0} % of the TTFT targets at 10 RT "
    "per second.",
    "`bros-plus` attains {plus_opt-13b_tpot:0} and {plus_opt-30b_tpot:0} % of the TPOT targets and "
    "{plus_opt-13b_ttft:0} and {plus_opt-30b_ttft:0} % of the TTFT targets there, and completes {plus_opt-13b_be:+±0} "
    "and {plus_opt-30b_be:+±0} % BE requests compared with V1.",
)
README_SENTENCES = (
    "In runs of 600 s at 10 RT per second, `bros` attains {opt-13b_tpot:0} % of the TPOT targets on OPT-13B, and "
    "`bros-plus` {plus_opt-13b_tpot:0} %.",
)


def table(results: Results) -> list[str]:
    """The paper's figures beside ours, against both of vLLM's schedulers where the paper says vLLM."""
    v0 = iter(AGAINST_V0)
    rows = []
    for figure in FIGURES:
        versions = [figure, next(v0)] if figure.baseline == "vllm-fcfs" else [figure]
        entries = [compare(version, results["paper"], PAPER_RATES) for version in versions]
        ours = ", ".join(f"{version} {_gain(figure, entry)}".strip() for version, entry in zip(
            ("V1", "V0") if len(entries) > 1 else ("",), entries, strict=True))
        verdicts = list(dict.fromkeys(entry["verdict"] for entry in entries))
        note = NOTES.get((figure.baseline, figure.metric, *filter(None, (figure.only,))))
        note = note if "worse" in verdicts else None
        rows.append(row(_name(figure), _paper_gain(figure), ours, _absolute(figure, entries),
                        ", ".join(verdicts) + (f" ({note})" if note else "")))
    return rows


def _name(figure: PaperFigure) -> str:
    metric = METRICS[figure.metric]
    if figure.only:
        return f"RT alone, vLLM: {metric}"
    if figure.baseline == "bros-recompute":
        return f"KV blocks with two owners: {metric}"
    return f"{'ShareGPT' if figure.dataset == 'sharegpt' else 'LMSYS'}, {BASELINES[figure.baseline]}: {metric}"


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


def figures(results: Results) -> dict[str, Shown]:
    """What the notes name, in per cent."""
    paper, at_10 = results["paper"], {}
    for name, system, policy, metric in (
            ("v0_at_10", "llama-3-70b", "vllm-v0", "tpot"), ("opt-13b_tpot", "opt-13b", "bros", "tpot"),
            ("opt-30b_tpot", "opt-30b", "bros", "tpot"), ("rr_ttft", "llama-3-70b", "bros-rr", "ttft")):
        runs = paper[run_name(system, "sharegpt", 10.0, policy)]
        at_10[name] = Shown(mean(runs, f"rt.{metric}_attainment"), 100)
    more_be = {}
    for system in ("opt-13b", "llama-3-70b"):
        for rate in PAPER_RATES:
            ours, theirs = (mean(paper[run_name(system, "sharegpt", rate, policy)], "be.request_throughput")
                            for policy in ("bros", "vllm-fcfs"))
            more_be[f"{system}_be_{rate:g}"] = Shown(ours / theirs - 1, 100)
    plus = {}
    for system in ("opt-13b", "opt-30b"):
        own, v1 = (paper[run_name(system, "sharegpt", 10.0, policy)] for policy in ("bros-plus", "vllm-fcfs"))
        for metric in ("ttft", "tpot"):
            plus[f"plus_{system}_{metric}"] = Shown(mean(own, f"rt.{metric}_attainment"), 100)
        ratio = paired_ratio(*(values(runs, "be.request_throughput") for runs in (own, v1)))
        assert ratio is not None
        plus[f"plus_{system}_be"] = Shown(Interval(ratio.mean - 1, ratio.half), 100)
    return at_10 | more_be | plus

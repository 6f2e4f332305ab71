"""The simulated figures of README.md and docs/results.md: measures them, keeps them, and writes them into the pages.

    python tools/results.py --traces FOLDER   # measures everything (two hours of one core) and updates the pages
    python tools/results.py headline tiers    # measures these sections only
    python tools/results.py --pages           # measures nothing: writes the kept figures into the pages

docs/results.json keeps the values of every seed of each run (`results_runs.py`). From them this file writes the tables
of the pages, which it finds by their header line, and the figures in the sentences of `SENTENCES`.
`tests/evaluation/test_published.py` checks that the pages have these figures, and that the code still gives them.
"""

from __future__ import annotations

import argparse
import re
import statistics
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import results_hybrid
import results_paper
from results_hybrid import HYBRID, measure_hybrid
from results_runs import (
    BE,
    HEADLINE,
    HEADLINE_POLICIES,
    LATENCY,
    ON_TIME,
    SECTIONS,
    SLOWDOWNS,
    TIERS,
    Results,
    all_decisions,
    measure,
    read_kept,
    write_kept,
)
from results_shown import Shown, mean_shown, row

from bros_ref.evaluation.dominance import mean, values
from bros_ref.evaluation.statistics import interval, paired_difference, paired_ratio

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"readme": ROOT / "README.md", "results": ROOT / "docs" / "results.md"}


# -- tables -----------------------------------------------------------------------------------------------------------


def headline_table(results: Results) -> list[str]:
    """RT on time and BE tokens/s."""
    rows = []
    for cell in HEADLINE:
        runs = {policy: results["headline"][f"{cell}/{policy}"] for policy in HEADLINE_POLICIES}
        rows.append(row(cell, *(f"{mean_shown(own, ON_TIME, 100):±0} %, {mean_shown(own, BE):±0}"
                                 for policy, own in runs.items() if policy != "be-only"),
                         f"{mean_shown(runs['be-only'], BE):±0}"))
    return rows


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
    return [row(_cell_name(cell), *(f"{mean_shown(policies[name], ON_TIME, 100):0}, {mean_shown(policies[name], BE):0}"
                                     for name in UNSEEN_POLICIES)) for cell, policies in unseen_cells(results).items()]


def leads_table(results: Results) -> list[str]:
    """The paired lead of bros-plus in both."""
    def lead(policies: dict[str, list[dict[str, Any]]], rival: str, metric: str, scale: float) -> Shown:
        return Shown(paired_difference(values(policies["bros-plus"], metric), values(policies[rival], metric)), scale)

    return [row(_cell_name(cell), *(
        f"{lead(policies, rival, ON_TIME, 100):+±1}; {lead(policies, rival, BE, 1):+±0}" for rival in RIVALS))
        for cell, policies in unseen_cells(results).items()]


def slowdown_table(results: Results) -> list[str]:
    """RT latency as a multiple of rt-only's, and the share of BE."""
    rows = []
    for place, slowdown in enumerate(SLOWDOWNS):
        cells = []
        for column, cell in enumerate(HEADLINE):
            own, free, floor = (results["slowdown"][f"{cell}/{name}"]
                                for name in (slowdown or "none", "none", "rt-only"))
            latency = mean(own, LATENCY) / mean(floor, LATENCY)
            share = Shown(paired_ratio(values(own, BE), values(free, BE)) or 0.0, 100)
            words = ("", "") if place or column else ("latency ", "BE ")
            cells.append(f"{words[0]}{latency:.2f}, {words[1]}" + (f"{share:±0} %" if slowdown else "100 %"))
        rows.append(row(str(slowdown or "none").removesuffix(".0"), *cells))
    return rows


def tiers_table(results: Results) -> list[str]:
    """RT on time and BE tokens/s, and the paired lead of bros-plus."""
    theirs = [values(results["tiers"][f"{TIERS}/{policy}"], metric) for policy, metric in (
        ("rt-only", ON_TIME), ("be-only", BE))]
    ours = [values(results["headline"][f"{TIERS}/bros-plus"], metric) for metric in (ON_TIME, BE)]
    on_time, tokens = (paired_difference(*pair) for pair in zip(ours, theirs, strict=True))
    return [row(TIERS, *(f"{Shown(interval(share), 100):±0} %, {Shown(interval(rate)):±0}"
                          for share, rate in (theirs, ours)), f"{Shown(on_time, 100):+±1}; {Shown(tokens):+±0}")]


TABLES: tuple[tuple[str, str, Callable[[Results], list[str]]], ...] = (  # page, beginning of the header line, rows
    ("readme", "| simulated, on time % and BE tokens/s |", headline_table),
    ("results", "| simulated, on time % and BE tokens/s |", headline_table),
    ("results", "| comparison | paper |", results_paper.table),
    ("results", "| RT on time %, BE tokens/s |", unseen_table),
    ("results", "| paired lead of bros-plus", leads_table),
    ("results", "| x | OPT-13B", slowdown_table),
    ("results", "| on time % and BE tokens/s | one GPU for each class |", tiers_table),
    ("results", "| modelled clock |", results_hybrid.table),
)


# -- sentences --------------------------------------------------------------------------------------------------------


def figures(results: Results) -> dict[str, Shown]:
    """What the sentences name."""
    headline = results["headline"]

    def at(runs: Sequence[dict[str, Any]], metric: str, scale: float = 1.0) -> Shown:
        return Shown(interval(values(runs, metric)), scale)

    found = {
        "bros_at_10": at(headline["OPT-13B, 10 RT/s/bros"], ON_TIME, 100),
        "priority_on_llama": at(headline["Llama-3-70B, 4 RT/s/vllm-priority"], ON_TIME, 100),
        "xllm_be": at(headline["OPT-13B, 10 RT/s/xllm"], BE),
        "xllm_on_time": at(headline["OPT-13B, 10 RT/s/xllm"], ON_TIME, 100),
        "xllm_drops": Shown(statistics.fmean(own["kv"]["preempted_requests"] for own in headline[
            "OPT-13B, 10 RT/s/xllm"])),
        "xllm_twice": Shown(statistics.fmean(own["kv"]["recomputed_tokens"] for own in headline[
            "OPT-13B, 10 RT/s/xllm"])),
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
        "tiers_more": Shown(mean(headline[f"{TIERS}/bros-plus"], BE) / mean(results["tiers"][f"{TIERS}/be-only"], BE)),
        "up_8k": Shown(mean(cells["long-8k/high load"]["bros-plus"], BE)),
        "up_14k": Shown(mean(cells["long-14k/high load"]["bros-plus"], BE)),
        "up_30k": Shown(mean(cells["chat-and-30k/high load"]["bros-plus"], BE)),
    }
    return found | results_paper.figures(results) | results_hybrid.figures(results)


SENTENCES = {
    "readme": (*results_paper.README_SENTENCES, *results_hybrid.README_SENTENCES),
    "results": (
        "`bros`, the paper's form, has {bros_at_10:±1} % of RT on time",
        "and has all RT on time instead of {priority_on_llama:0} %.",
        "`xllm` serves {xllm_be:±0} BE tokens per second at 10 RT per second, with {xllm_on_time:±1} % of RT on time.",
        "This happens about {xllm_drops:~2} times in 100 s, and {xllm_twice:~2} tokens are computed twice.",
        "`vllm-priority` also has all RT on time and serves {more_at_half:1} % more BE.",
        "At high load, its p99 TTFT is therefore at least {qoserve_p99:1} times that of `bros-plus`",
        "`bros-plus` serves {fewer_be_least:0} to {fewer_be_most:0} % fewer BE tokens per second than `vllm-priority`",
        "from 361 to {up_8k:0} tokens per second in `long-8k` at high load, from 403 to {up_14k:0} in `long-14k`, and "
        "from 400 to {up_30k:0} in `chat-and-30k`.",
        "`bros-plus` serves {tiers_more:1} times as many BE tokens with all RT on time.",
        *results_paper.SENTENCES, *results_hybrid.SENTENCES,
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
    for sentence in SENTENCES.get(page, ()):
        text = with_sentence(page, text, sentence, named)
    return text


def with_sentence(page: str, text: str, sentence: str, named: dict[str, Shown]) -> str:
    """The text with the figures of one sentence replaced; its line breaks stay."""
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
    known = [*SECTIONS, HYBRID]
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--pages", action="store_true", help="measure nothing")
    parser.add_argument("--traces", type=Path, help="the folder of traces; needed for the section unseen")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(known):
        parser.error(f"unknown section {min(unknown)!r}; known are {', '.join(known)}")
    chosen = [] if options.pages else options.sections or known
    if "unseen" in chosen and options.traces is None:
        parser.error("the section unseen needs --traces FOLDER; name other sections to leave it out")
    digests, results = read_kept()
    for section in chosen:
        results[section] = measure_hybrid() if section == HYBRID else measure(section, options.traces)
    if set(chosen) == set(known):
        digests = all_decisions()
    write_kept(digests, results)
    for page, path in PAGES.items():
        path.write_text(with_figures(page, path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()

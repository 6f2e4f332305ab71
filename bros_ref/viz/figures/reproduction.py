"""The page of `bros-ref reproduce`: the paper's numbers beside ours, the frontier of all policies, bounds, sweeps.

Reads the result's dictionary alone. Invariant: no ratio without its absolute values.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from bros_ref.files import write_text
from bros_ref.viz.figures import page
from bros_ref.viz.figures.page import Cell
from bros_ref.viz.figures.style import INK, PLAIN_COLOUR, dress, policy_look

Row = dict[str, Any]
METRICS = {"rt.normalized_latency_ms_per_token": "RT latency, ms/token", "rt.ttft_attainment": "TTFT attainment",
           "rt.tpot_attainment": "TPOT attainment", "be.request_throughput": "BE requests/s",
           "rt.request_throughput": "RT requests/s"}


VERDICTS = {"ahead": "no baseline has more of either, and a loss beyond the margin is excluded",
            "undecided": "an interval is too wide to tell", "trade": "more of one, less of the other",
            "behind": "a baseline has more of one and no less of the other"}
LINE_SWEEPS = ("SLO", "KV pool", "BE outstanding")  # sweeps whose points make a line


def write_reproduction(path: Path | str, result: dict[str, Any]) -> None:
    """Writes one self-contained HTML page that opens offline."""
    places = {policy: place for place, policy in enumerate(dict.fromkeys(
        row["policy"] for row in (*result["systems"], *result["sweeps"])))}
    sections = _sections(result, places)
    nav = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name, *_ in sections)
    parts = [page.section(anchor, heading, lead, *content) for anchor, _, heading, lead, content in sections]
    title = "BROS, reproduced in simulation"
    seeds = result["seeds"]
    lead = (f"The paper's evaluation on a virtual clock: {seeds} seed{'s' if seeds > 1 else ''} of "
            f"{result['duration_s']:,.0f} simulated seconds for each policy and setting; ± is a 95 % interval. The "
            "scheduler and the KV accounting are those of the live engine; the time of an iteration comes from a cost "
            "model fitted to public profiles. No figure here was measured on a GPU by us.")
    body = (f"<header><div><h1>{escape(title)}</h1><p>{escape(lead)}</p></div></header>"
            f'<nav aria-label="Sections"><ul>{nav}</ul></nav><main>{"".join(parts)}</main>'
            "<footer>Made by bros_ref.</footer>")
    write_text(path, page.document(title, body, get_plotlyjs()))


def _sections(result: dict[str, Any], places: dict[str, int]) -> list[tuple[str, str, str, str, list[str]]]:
    """(anchor, name, heading, lead, content) of each section that has content: a run may have left parts out."""
    sections = (
        ("paper", "Paper", "The paper's numbers beside ours", "Each row is a best case over rates and models, as the "
         "paper reports them; absolute values stand beside every ratio. A verdict holds at both ends of the 95 % "
         "interval, or it is undecided. vllm-fcfs is vLLM V1, vllm-v0 the scheduler of its time.",
         [_paper_table(result["figures"]), _overhead(result["overhead"])] if result["figures"] else []),
        ("frontier", "Frontier", "What each policy makes of the same load", "A point is the mean over the seeds. High "
         "and far to the right is good: users on time, and much batch work done. A line joins the points of one "
         "policy, in the order of what is varied.",
         [page.chart(f"frontier-{place}", frontier(rows, places), setting, note) for place, (setting, rows, note) in
          enumerate((*_settings(result["systems"]), *_swept(result["sweeps"])))]),
        ("cells", "Every cell", "bros-plus against every baseline", _verdict_counts(result["dominance"]),
         [_dominance_table(result["dominance"])]),
        ("bounds", "Bounds", "How far from optimal", "Greedy packing against the exact optimum of an iteration, "
         "policies against a clairvoyant on tiny instances, and the share of the distance from vllm-priority to the "
         "bounds that is covered.",
         _bounds(result["bounds"]) if result["bounds"] else []),
        ("runs", "All runs", "The paper's sweep in numbers", "Means behind the figures above, with 95 % intervals; "
         "real-time requests alone at the end.", _run_tables([_by_system(row) for row in result["systems"]])),
        ("options", "Options", "What each option of bros-plus gives", "bros is the paper's form; then each option "
         "alone, then all of them.", _run_tables(result["ablation"])),
        ("sweeps", "Sweeps", "Beyond the paper", "OPT-13B on two A100-40GB unless said otherwise; one thing is changed "
         "at a time.", _run_tables([row for row in result["sweeps"] if not row["name"].startswith("unseen/")])),
        ("unseen", "Unseen", "Traces and long prompts on which nothing was tuned", "RT load, targets and system follow "
         "from each trace by one rule, and the best-effort batches are the paper's.",
         _run_tables([row for row in result["sweeps"] if row["name"].startswith("unseen/")])))
    return [section for section in sections if section[-1]]


def _bounds(bounds: dict[str, Any]) -> list[str]:
    optimum = bounds["iteration_optimum"]
    return [_bounds_table(bounds), page.chart(
        "gaps", gap_histogram(optimum), "Greedy against the exact 0/1 optimum",
        "Iterations in which nobody gives way. Greedy takes BE by the KV they must get back and newcomers by arrival; "
        "the program takes whichever fit best, and counts a prompt's tokens as work. " + _omitted(optimum))]


# -- the frontier -----------------------------------------------------------------------------------------------------


def _settings(rows: list[Row]) -> list[tuple[str, list[Row], str]]:
    """The paper's sweep: (model and dataset, rows, caption), of runs with both classes."""
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        _, system, dataset, _, _ = row["name"].split("/")
        if not dataset.endswith("-rt"):
            found[f"{system}, {dataset} lengths, RT per second varied"].append(row)
    return [(setting, own, "rt-only gives the best attainment there is, be-only the most batch work.")
            for setting, own in found.items()]


def _swept(rows: list[Row]) -> list[tuple[str, list[Row], str]]:
    """The sweeps beyond the paper whose points make a line."""
    return [(f"opt-13b, {sweep} varied", own, "Of the strong baselines and BROS; the tables below have the numbers.")
            for sweep in LINE_SWEEPS if (own := [row for row in rows if row["name"].split("/")[1] == sweep])]


def frontier(rows: list[Row], places: dict[str, int]) -> go.Figure:
    """RT attainment of both targets against BE tokens/s: one line per policy, one point per run. `places`: policy ->
    its place among all policies of the page, so that it looks the same in every figure."""
    figure = go.Figure()
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        look = policy_look(places[policy])
        figure.add_scatter(
            x=[row["be_tokens_per_s"] or 0.0 for row in own], name=policy, mode="lines+markers",
            y=[1.0 if row["slo_attainment"] is None else row["slo_attainment"] for row in own],
            text=[row["name"].split("/")[-2] for row in own], cliponaxis=False,
            line={"color": look.colour, "dash": look.dash, "width": 1.5},
            marker={"color": look.colour, "symbol": look.marker, "size": 10, "line": {"color": INK, "width": 0.5}},
            hovertemplate=f"{policy}, %{{text}}: %{{y:.1%}} on time, %{{x:,.0f}} BE tokens/s<extra></extra>")
    figure.update_xaxes(title_text="best-effort output, tokens/s", rangemode="tozero")
    figure.update_yaxes(title_text="real-time on time", range=[-0.04, 1.06], tickformat=".0%")
    dress(figure, 440)
    return figure.update_layout(margin_t=88)


# -- tables -----------------------------------------------------------------------------------------------------------


def _paper_table(figures: list[Row]) -> str:
    rows = []
    for figure in figures:
        unit = "×" if figure["kind"] == "ratio" else " %"
        ours = "none" if figure["ours"] is None else f"{figure['ours']:,.2f}{unit}"
        cells = [Cell(METRICS[figure["metric"]]), Cell(f"{figure['paper']:,.2f}{unit}"),
                 Cell(ours, _plus_minus(figure["interval95"], 2, unit=unit)),
                 Cell(" / ".join(f"{_absolute(value, figure['metric'])}" for value in figure["absolute"].values()),
                      figure["setting"] or ""),
                 Cell(figure["verdict"]), Cell(figure["why"], prose=True)]
        rows.append((figure["name"], cells))
    return page.table("BROS against its baselines", ["comparison", "metric", "paper, up to", "ours",
                                                     "absolute, bros / baseline", "verdict", "what it rests on"], rows)


def _absolute(value: float, metric: str) -> str:
    return f"{value:.1%}" if "attainment" in metric else f"{value:,.2f}"


def _overhead(overhead: Row) -> str:
    low, high = overhead["ours"]
    return page.table("What deciding takes of an iteration", ["", "paper", "ours", "verdict", "what it rests on"], [(
        "scheduling overhead of BROS", [
            Cell(" to ".join(f"{share:.1%}" for share in overhead["paper"])), Cell(f"{low:.1%} to {high:.1%}"),
            Cell("not comparable"),
            Cell("our CPU time on the machine that ran the simulation, against simulated iterations", prose=True)])])


def _verdict_counts(rows: list[Row]) -> str:
    counts = Counter(row["verdict"] for row in rows)
    told = "; ".join(f"{counts[verdict]} {verdict} ({meaning})" for verdict, meaning in VERDICTS.items())
    return (f"Of {len(rows)} cells: {told}. The baseline told is the one that decides the verdict, else the one with "
            "the most RT on time.")


def _dominance_table(rows: list[Row]) -> str:
    table = []
    for row in sorted(rows, key=lambda row: list(VERDICTS).index(row["verdict"]), reverse=True):
        reason = ""
        if row["verdict"] == "undecided":
            reason = "the seeds differ too much"
        elif row["verdict"] != "ahead":
            fewer = row["fewer_rt_tokens"]
            reason = (f"{row['against']} served {fewer:.1%} fewer RT tokens in that time" if fewer > 0.005 else
                      "iterations kept short enough for the targets carry less batch work")
        group, _, cell = row["cell"].partition("/")
        table.append((cell.replace("/", ", ") + (" RT per s" if group == "paper" else ""), [
            Cell(row["verdict"]), Cell(row["against"]),
            Cell(f"{row['rt']:.1%}",
                 f"{100 * row['rt_gain']:+.1f}{_plus_minus(row['interval95']['rt_gain'], 1, 100)} points"),
            Cell(f"{row['be']:,.0f}",
                 f"{row['be_gain']:+,.0f}{_plus_minus(row['interval95']['be_gain'])} ({row['be_change']:+.1%})"),
            Cell(reason, prose=True)]))
    return page.table("RT on time and BE tokens/s of bros-plus, and its lead over the baseline", [
        "cell", "verdict", "baseline", "RT on time", "BE tokens/s", "why not ahead"], table)


def _bounds_table(bounds: dict[str, Any]) -> str:
    greedy = bounds["iteration_optimum"]
    facts = [("greedy / optimal BE tokens of one iteration", greedy["mean"], f"{greedy['states']:,} states, p5 "
              f"{_share(greedy['p5'])}, exactly optimal in {_share(greedy['share_optimal'])}")]
    clairvoyant = bounds["clairvoyant"]
    for policy, share in clairvoyant.items():
        if policy != "instances":
            facts.append((f"{policy} / clairvoyant BE tokens", share["mean_be_share"],
                          f"{clairvoyant['instances']} tiny instances; all RT on time in "
                          f"{_share(share['all_rt_on_time'])} (the clairvoyant: all)"))
    for policy, share in bounds["be_of_reference"].items():
        facts.append((f"{policy}: BE tokens/s of what serving RT leaves of the ceiling", share["median"],
                      f"median over the sweep; least {_share(share['least'])}"))
    for policy, covered in bounds["coverage"].items():
        facts += [(f"{policy}: RT on time, from vllm-priority to rt-only", covered["rt_attainment"],
                   "median over the cells with a distance"),
                  (f"{policy}: RT latency, from vllm-priority to rt-only", covered["rt_latency"],
                   "a loose bound: an iteration without BE is shorter than any with BE"),
                  (f"{policy}: BE tokens/s, from vllm-priority to be-only", covered["be"],
                   "a loose bound: be-only serves no RT")]
    return page.table("Bounds", ["comparison", "share"], [(name, [Cell(_share(value), note)])
                                                         for name, value, note in facts])


def gap_histogram(gaps: Row) -> go.Figure:
    """Histogram of the share of its optimum that each iteration reached."""
    edges = [f"{tenth / 10:.0%} to {(tenth + 1) / 10:.0%}" for tenth in range(10)]
    figure = go.Figure(go.Bar(x=edges, y=gaps["histogram"], marker={"color": PLAIN_COLOUR},
                              hovertemplate="%{x}: %{y:,} iterations<extra></extra>"))
    figure.update_xaxes(title_text="greedy / optimal BE tokens of an iteration")
    figure.update_yaxes(title_text="iterations")
    return dress(figure, 320).update_layout(margin_t=20)


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def _by_system(row: Row) -> Row:
    """A run of the paper's sweep, named as the tables expect: group/table/point/policy."""
    group, system, dataset, rate, policy = row["name"].split("/")
    dataset, alone, _ = dataset.partition("-rt")
    table = f"Real-time requests alone, {dataset} lengths" if alone else f"{system}, {dataset} lengths"
    return row | {"name": f"{group}/{table}/{f'{system}, ' if alone else ''}{rate} RT per s/{policy}"}


def _run_tables(rows: list[Row]) -> list[str]:
    tables: defaultdict[str, list[tuple[str, list[Cell]]]] = defaultdict(list)
    for row in rows:
        _, sweep, point, policy = row["name"].split("/")
        bounds = row["interval95"]
        cells = [Cell(policy), Cell(_share(row["slo_attainment"]), _plus_minus(bounds["slo_attainment"], 0, 100))]
        cells += [Cell(_number(row[key]), _plus_minus(bounds[key])) for key in (
            "median_ttft_ms", "p99_ttft_ms", "normalized_latency_ms_per_token", "be_tokens_per_s")]
        cells += [Cell(_number(row[key])) for key in ("restored_slots", "recomputed_tokens")]
        tables[sweep].append((point, cells))
    heads = ["", "policy", "RT on time", "TTFT median, ms", "TTFT p99, ms", "latency, ms/token", "BE tokens/s",
             "restored slots", "recomputed tokens"]
    return [page.table(sweep, heads, cells) for sweep, cells in tables.items()]


def _plus_minus(bounds: list[float] | None, digits: int = 0, scale: float = 1.0, unit: str = "") -> str:
    """Half the width of an interval [low, high]; nothing where one seed gave none."""
    return "" if bounds is None else f" ± {scale * (bounds[1] - bounds[0]) / 2:,.{digits}f}{unit}"


def _omitted(gaps: Row) -> str:
    told = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in gaps["omitted"].items())
    return f"Not solved, or not offered to it: {told or 'nothing'}."


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f}"

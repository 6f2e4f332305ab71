"""The page of `bros-ref reproduce`: the paper's numbers beside ours, the frontier of all policies, bounds, sweeps.

Reads the result's dictionary alone. Invariant: no ratio without its absolute values.
"""

from __future__ import annotations

from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from bros_ref.viz import page
from bros_ref.viz.page import Cell
from bros_ref.viz.style import INK, dress, policy_look

Row = dict[str, Any]
METRICS = {"rt.normalized_latency_ms_per_token": "RT latency, ms/token", "rt.ttft_attainment": "TTFT attainment",
           "rt.tpot_attainment": "TPOT attainment", "be.request_throughput": "BE requests/s",
           "rt.request_throughput": "RT requests/s"}


def write_reproduction(path: Path | str, result: dict[str, Any]) -> None:
    """Writes one self-contained HTML page that opens offline."""
    settings = _by_setting(result["systems"])
    parts = [page.section("paper", "The paper's numbers beside ours", "Each row is a best case over rates and models, "
                          "as the paper reports them; absolute values stand beside every ratio.",
                          _paper_table(result["figures"])),
             page.section("frontier", "What each policy makes of the same load", "A point is a run at one rate. High "
                          "and far to the right is good: users on time, and much batch work done.",
                          *(page.chart(f"frontier-{place}", frontier(rows), setting,
                                       "rt-only gives the best attainment there is, be-only the most batch work.")
                            for place, (setting, rows) in enumerate(settings.items()))),
             page.section("bounds", "How far from optimal", "Greedy packing against the exact optimum of an iteration, "
                          "policies against a clairvoyant on tiny instances, and the share of the distance from "
                          "vllm-priority to the bounds that is covered.", _bounds_table(result["bounds"])),
             page.section("sweeps", "Beyond the paper", "OPT-13B on two A100-40GB unless said otherwise; one thing is "
                          "changed at a time.", *_sweep_tables(result["sweeps"]))]
    nav = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name in (
        ("paper", "Paper"), ("frontier", "Frontier"), ("bounds", "Bounds"), ("sweeps", "Sweeps")))
    title = "BROS, reproduced in simulation"
    lead = (f"The paper's evaluation on a virtual clock: {result['duration_s']:g} simulated seconds a run. The "
            "scheduler and the KV accounting are those of the live engine; the time of an iteration comes from a cost "
            "model fitted to public profiles. No figure here was measured on a GPU by us.")
    body = (f"<header><div><h1>{escape(title)}</h1><p>{escape(lead)}</p></div></header>"
            f'<nav aria-label="Sections"><ul>{nav}</ul></nav><main>{"".join(parts)}</main>'
            "<footer>Made by bros_ref.</footer>")
    Path(path).write_text(page.document(title, body, get_plotlyjs()), encoding="utf-8")


def _by_setting(rows: list[Row]) -> dict[str, list[Row]]:
    """"model, dataset" -> its rows, those with both classes only."""
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        _, system, dataset, _, _ = row["name"].split("/")
        if not dataset.endswith("-rt"):
            found[f"{system}, {dataset} lengths"].append(row)
    return dict(found)


def frontier(rows: list[Row]) -> go.Figure:
    """RT attainment of both targets against BE tokens/s: one line a policy, one point a rate."""
    figure, policies = go.Figure(), list(dict.fromkeys(row["policy"] for row in rows))
    for place, policy in enumerate(policies):
        own = [row for row in rows if row["policy"] == policy]
        look = policy_look(place)
        figure.add_scatter(
            x=[row["be_tokens_per_s"] or 0.0 for row in own], name=policy, mode="lines+markers",
            y=[1.0 if row["slo_attainment"] is None else row["slo_attainment"] for row in own],
            text=[row["name"].split("/")[3] for row in own], cliponaxis=False,
            line={"color": look.colour, "dash": look.dash, "width": 1.5},
            marker={"color": look.colour, "symbol": look.marker, "size": 10, "line": {"color": INK, "width": 0.5}},
            hovertemplate=f"{policy}, %{{text}} RT/s: %{{y:.1%}} on time, %{{x:,.0f}} BE tokens/s<extra></extra>")
    figure.update_xaxes(title_text="best-effort output, tokens/s", rangemode="tozero")
    figure.update_yaxes(title_text="real-time on time", range=[-0.04, 1.06], tickformat=".0%")
    dress(figure, 440)
    return figure.update_layout(margin_t=88)


def _paper_table(figures: list[Row]) -> str:
    rows = []
    for figure in figures:
        unit = "×" if figure["kind"] == "ratio" else " %"
        cells = [Cell(METRICS[figure["metric"]]), Cell(f"{figure['paper']:,.2f}{unit}"),
                 Cell("none" if figure["ours"] is None else f"{figure['ours']:,.2f}{unit}"),
                 Cell(" / ".join(f"{_absolute(value, figure['metric'])}" for value in figure["absolute"].values()),
                      " / ".join(figure["absolute"])),
                 Cell(figure["verdict"], figure["setting"] or "")]
        rows.append((figure["name"], cells))
    return page.table("BROS against its baselines", ["comparison", "metric", "paper, up to", "ours", "absolute values",
                                                     "verdict"], rows)


def _absolute(value: float, metric: str) -> str:
    return f"{value:.1%}" if "attainment" in metric else f"{value:,.2f}"


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
    for policy, covered in bounds["coverage"].items():
        facts += [(f"{policy}: RT latency, from vllm-priority to rt-only", covered["rt"], "median over the sweep"),
                  (f"{policy}: BE tokens/s, from vllm-priority to be-only", covered["be"], "median over the sweep")]
    return page.table("Bounds", ["comparison", "share"], [(name, [Cell(_share(value), note)])
                                                         for name, value, note in facts])


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


def _sweep_tables(rows: list[Row]) -> list[str]:
    tables: defaultdict[str, list[tuple[str, list[Cell]]]] = defaultdict(list)
    for row in rows:
        _, sweep, point, policy = row["name"].split("/")
        cells = [Cell(policy), Cell(_share(row["slo_attainment"])), Cell(_number(row["median_ttft_ms"])),
                 Cell(_number(row["p99_ttft_ms"])), Cell(_number(row["normalized_latency_ms_per_token"])),
                 Cell(_number(row["be_tokens_per_s"])), Cell(_number(row["restored_slots"])),
                 Cell(_number(row["recomputed_tokens"]))]
        tables[sweep].append((point, cells))
    heads = ["", "policy", "RT on time", "TTFT median, ms", "TTFT p99, ms", "latency, ms/token", "BE tokens/s",
             "restored slots", "recomputed tokens"]
    return [page.table(sweep, heads, cells) for sweep, cells in tables.items()]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f}"

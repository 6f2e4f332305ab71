"""Comparisons: latency distributions, the trade-off between the classes, why requests waited, predicted step times.

Pure functions from traces or summaries to plotly figures; numbers come from `metrics`. Invariant: a request that was
never served still counts in every share, so no curve looks better for having dropped its worst cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bros_ref.config import cdiv
from bros_ref.trace import BEHIND, REASONS, Trace
from bros_ref.trace.metrics import request_timings
from bros_ref.viz.figures.style import (
    ALARM_COLOUR,
    CLASS_LABELS,
    INK,
    LOG_TICKS,
    MUTED,
    REASON_LABELS,
    TOOLBAR_PX,
    dress,
    policy_look,
)

MAX_CURVE_POINTS = 600  # an ECDF of more samples is drawn through this many of them
MAX_SCATTER_POINTS = 1500
MAX_LABELLED = 3  # points with their name beside them; more would overlap, and get a legend
CELLS = (("rt", "ttft_s"), ("rt", "tpot_s"), ("be", "ttft_s"), ("be", "tpot_s"))  # row by row
METRIC_TITLES = {"ttft_s": "time to first token", "tpot_s": "time per output token"}


def latency_ecdf(traces: Sequence[Trace]) -> go.Figure:
    """For each class (row) and metric (column): which share of *all arrived* requests had at most this latency.

    If a curve ends below 100 %, the rest were never served, or never got a second token. Dashed verticals are SLOs.
    """
    figure = make_subplots(rows=2, cols=2, horizontal_spacing=0.16, vertical_spacing=0.2, subplot_titles=[
        f"{CLASS_LABELS[name]}: {METRIC_TITLES[metric]}" for name, metric in CELLS])
    for place, trace in enumerate(traces):
        timings = request_timings(trace).values()
        for cell, (name, metric) in enumerate(CELLS):
            mine = [timing for timing in timings if timing.record.request_class == name]
            samples = [getattr(timing, metric) for timing in mine]
            _add_ecdf(figure, trace.policy, place, [s for s in samples if s is not None], len(mine), cell)
    for cell, (name, metric) in enumerate(CELLS):
        row, col = cell // 2 + 1, cell % 2 + 1
        targets = {getattr(record, metric.replace("_s", "_slo_s")) for trace in traces
                   for record in trace.requests.values() if record.request_class == name}
        for target in sorted(targets - {None}):
            figure.add_vline(target, line={"color": ALARM_COLOUR, "dash": "dash", "width": 1.5}, row=row, col=col)
            figure.add_annotation(text=f"SLO {target:g} s", x=np.log10(target), y=0.04, xanchor="left", showarrow=False,
                                  font={"color": ALARM_COLOUR, "size": 12}, row=row, col=col)  # log axis: x in decades
        figure.update_xaxes(type="log", title_text="seconds", tickvals=LOG_TICKS, row=row, col=col)
        figure.update_yaxes(range=[0, 1.04], tickformat=".0%", title_text="share of requests", row=row, col=col)
    return dress(figure, 660)


def _add_ecdf(figure: go.Figure, policy: str, place: int, samples: list[float], num_arrived: int, cell: int) -> None:
    if not samples:
        return
    times = np.sort(samples)
    shares = np.arange(1, len(times) + 1) / num_arrived
    if len(times) > MAX_CURVE_POINTS:
        kept = np.unique(np.linspace(0, len(times) - 1, MAX_CURVE_POINTS).round().astype(int))
        times, shares = times[kept], shares[kept]
    look = policy_look(place)
    figure.add_scatter(
        x=[times[0], *times], y=[0.0, *shares], mode="lines", name=policy, legendgroup=policy, showlegend=cell == 0,
        line={"shape": "hv", "color": look.colour, "dash": look.dash, "width": 2.5}, row=cell // 2 + 1,
        col=cell % 2 + 1, hovertemplate=f"{policy}: %{{y:.1%}} within %{{x:.3f}} s<extra></extra>")


def trade_off(summaries: Sequence[dict[str, Any]]) -> go.Figure:
    """One point per policy: best-effort tokens/s against the share of real-time requests that met both SLOs."""
    figure = go.Figure()
    labelled = len(summaries) <= MAX_LABELLED
    highest = 0.0
    for place, run in enumerate(summaries):
        throughput = run["classes"]["be"]["output_throughput"] or 0.0
        attainment = run["classes"]["rt"]["slo_attainment"] or 0.0
        highest = max(highest, throughput)
        look = policy_look(place)
        figure.add_scatter(
            x=[throughput], y=[attainment], mode="markers+text" if labelled else "markers", name=run["policy"],
            text=[f"  {run['policy']}  "], textposition=("top center", "bottom center", "middle right")[place % 3],
            showlegend=not labelled, textfont={"size": 14, "color": look.colour}, cliponaxis=False,
            marker={"size": 17, "symbol": look.marker, "color": look.colour, "line": {"color": INK, "width": 1}},
            hovertemplate=f"{run['policy']}: %{{y:.1%}} of real-time on time, %{{x:.1f}} best-effort tokens/s"
                          "<extra></extra>")
    figure.add_annotation(text="better on both ↗", x=1, y=1, xref="paper", yref="paper", xanchor="right",
                          yanchor="bottom", showarrow=False, font={"color": MUTED, "size": 12})
    figure.update_xaxes(title_text="best-effort output, tokens/s", range=[0, 1.2 * highest or 1.0])
    figure.update_yaxes(title_text="real-time on time", range=[-0.06, 1.1], tickformat=".0%",
                        tickvals=[0, 0.25, 0.5, 0.75, 1])
    dress(figure, 392 if labelled else 460)
    return figure.update_layout(margin_t=TOOLBAR_PX + (24 if labelled else 90))


def slowdown_frontier(floor: dict[str, Any], unbounded: dict[str, Any],
                      bounded: Mapping[float, dict[str, Any]]) -> go.Figure:
    """What `rt_slowdown` costs and gives: RT latency per token as a multiple of the floor's, against BE tokens/s as a
    share of the run without the knob. A dotted line stands at each x, the latency that it allows. The title names the
    policy.

    Args:
        floor: summary of `rt-only` on the same arrivals.
        unbounded: summary of the policy without the knob.
        bounded: x -> summary of the policy with `rt_slowdown` x.

    Raises:
        ValueError: nothing to divide by: no RT was served under `floor`, or no BE under `unbounded`.
    """
    least = floor["classes"]["rt"]["normalized_latency_ms_per_token"]
    most = unbounded["classes"]["be"]["output_throughput"]
    if not least or not most:
        raise ValueError("a frontier needs real-time requests served under the floor, and best-effort ones without the "
                         f"knob; got {least!r} ms per token and {most!r} tokens/s")
    runs = [(f"x = {x:g}", summary) for x, summary in sorted(bounded.items())] + [("no knob", unbounded)]
    slowed = [run["classes"]["rt"]["normalized_latency_ms_per_token"] / least for _, run in runs]
    shares = [run["classes"]["be"]["output_throughput"] / most for _, run in runs]
    look, figure = policy_look(1), go.Figure()
    for x in sorted(bounded):
        figure.add_vline(x, line={"color": MUTED, "dash": "dot", "width": 1})
    figure.add_scatter(x=slowed, y=shares, mode="lines+markers+text", text=[f"  {name}" for name, _ in runs],
                       textposition=["bottom right"] * len(bounded) + ["top left"],  # the last stands at the edge
                       textfont={"color": INK, "size": 13}, cliponaxis=False,
                       line={"color": look.colour, "width": 2}, marker={"color": look.colour, "size": 11},
                       hovertemplate="%{text}: RT latency %{x:.2f} times the floor, %{y:.0%} of BE<extra></extra>")
    figure.update_xaxes(title_text="RT latency per token, as a multiple of rt-only's", rangemode="normal")
    figure.update_yaxes(title_text="BE tokens/s, of those without the knob", range=[0, 1.1], tickformat=".0%")
    dress(figure, 430, f"rt_slowdown under {escape(unbounded['policy'])}")
    return figure.update_layout(margin_t=TOOLBAR_PX + 24, showlegend=False)


def reasons(traces: Sequence[Trace]) -> go.Figure:
    """How often a runnable request sat out a step, by the reason given; one bar for each policy and reason that
    occurs under any of them."""
    figure = go.Figure()
    all_counts = [count_reasons(trace) for trace in traces]
    given = [reason for reason in REASONS if any(counts[reason] for counts in all_counts)]
    for place, (trace, counts) in enumerate(zip(traces, all_counts, strict=True)):
        look = policy_look(place)
        figure.add_bar(
            y=[REASON_LABELS[reason] for reason in given], x=[counts[reason] for reason in given],
            orientation="h", name=trace.policy, textposition="outside", cliponaxis=False,
            text=[f"{counts[reason]:,}" for reason in given],
            marker={"color": look.colour, "pattern": {"shape": look.pattern, "bgcolor": look.colour,
                                                      "fgcolor": "#ffffff", "size": 6}},
            hovertemplate=f"{trace.policy}: %{{x:,}} times %{{y}}<extra></extra>")
    figure.update_xaxes(title_text="times a request was left out of a step", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", title_text="reason")
    dress(figure, 176 + max(1, len(given)) * (22 + 20 * len(traces)))
    return figure.update_layout(bargap=0.3, margin_l=150, margin_r=60)


def count_reasons(trace: Trace) -> Counter[str]:
    """Requests left out, over all steps, by reason. A step's unlisted requests count as behind the listed ones."""
    counts: Counter[str] = Counter()
    for step in trace.steps:
        counts.update(step.left_out.values())
        counts[BEHIND] += step.num_behind
    return counts


def predicted_steps(traces: Sequence[Trace]) -> go.Figure:
    """Predicted against measured duration of each step, both in ms; on the diagonal the prediction was exact."""
    figure = go.Figure()
    low, high = np.inf, 0.0
    for place, trace in enumerate(traces):
        pairs = np.array([(step.predicted_s, step.duration_s) for step in trace.steps
                          if step.predicted_s and step.duration_s > 0]) * 1e3
        if not len(pairs):
            continue
        pairs = pairs[:: cdiv(len(pairs), MAX_SCATTER_POINTS)]
        low, high = min(low, float(pairs.min())), max(high, float(pairs.max()))
        look = policy_look(place)
        figure.add_scatter(x=pairs[:, 0], y=pairs[:, 1], mode="markers", name=trace.policy,
                           marker={"color": look.colour, "symbol": f"{look.marker}-open", "size": 7, "opacity": 0.65},
                           hovertemplate="predicted %{x:.1f} ms, measured %{y:.1f} ms<extra></extra>")
    if high:
        figure.add_scatter(x=[low, high], y=[low, high], mode="lines", name="exact", hoverinfo="skip",
                           line={"color": INK, "dash": "dash", "width": 1})
    figure.update_xaxes(title_text="predicted, ms", type="log", tickvals=LOG_TICKS)
    figure.update_yaxes(title_text="measured, ms", type="log", tickvals=LOG_TICKS)
    return dress(figure, 440)

"""The schedule: one row for each request, time to the right; its class is shown by colour, its phase by pattern.

A pure function of a trace (`Trace.phases`). Real-time rows are on top, in order of arrival, then best-effort rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from bros_ref.trace import Trace
from bros_ref.trace.metrics import request_timings
from bros_ref.viz.figures.style import (
    ALARM_COLOUR,
    CLASS_LABELS,
    INK,
    PHASE_LABELS,
    TOOLBAR_PX,
    dress,
    phase_fill,
)

ROW_PX = 17


def schedule(trace: Trace, max_requests: int = 40, end_s: float | None = None) -> go.Figure:
    """A Gantt chart of up to `max_requests` requests, real-time and best-effort in equal parts while there are any.

    Args:
        end_s: where the time axis ends, so that two policies can be compared by eye; None: where the last row ends.
    """
    rows = shown_requests(trace, max_requests)
    kinds = [trace.requests[request_id].request_class for request_id in rows]
    figure = go.Figure()
    for request_class in CLASS_LABELS:
        _add_phases(figure, trace, request_class, [row for row, kind in zip(rows, kinds, strict=True)
                                                   if kind == request_class])
    _add_first_tokens(figure, trace, rows)
    _mark_classes(figure, kinds.count("rt"), len(rows))
    names = [escape(request_id) for request_id in rows]  # plotly reads tags in what it shows
    figure.update_yaxes(categoryorder="array", categoryarray=names, range=[len(rows) - 0.4, -0.6],
                        showgrid=False, tickfont={"size": 11}, tickmode="array", tickvals=names, title_text="request")
    figure.update_xaxes(title_text="seconds",
                        range=[trace.start_s, end_s if end_s is not None else shown_end_s(trace, max_requests)])
    dress(figure, 180 + ROW_PX * max(4, len(rows)), f"schedule under {escape(trace.policy)}")
    return figure.update_layout(barmode="overlay", bargap=0.22, barcornerradius=0, margin_t=TOOLBAR_PX + 68,
                                margin_r=44)


def _add_phases(figure: go.Figure, trace: Trace, request_class: str, rows: Sequence[str]) -> None:
    """Bars of one class, a trace for each phase that occurs."""
    spans = trace.phases()
    for phase, label in PHASE_LABELS.items():
        bars = [(request_id, span) for request_id in rows for span in spans[request_id] if span.phase == phase]
        if not bars:
            continue
        fill = phase_fill(request_class, phase)
        figure.add_bar(
            y=[escape(request_id) for request_id, _ in bars], base=[span.start_s for _, span in bars],
            x=[span.end_s - span.start_s for _, span in bars], orientation="h",
            name=f"{request_class.upper()} {phase}",
            customdata=[(span.start_s, span.end_s, span.steps, span.tokens) for _, span in bars],
            hovertemplate=f"%{{y}}: {label}<br>%{{customdata[0]:.3f}} to %{{customdata[1]:.3f}} s, "
                          "%{customdata[2]} steps, %{customdata[3]} tokens<extra></extra>",
            marker={"color": fill.colour, "line": {"width": 0},
                    "pattern": {"shape": fill.mark, "bgcolor": fill.colour, "fgcolor": fill.mark_colour, "size": 5,
                                "solidity": 0.25}})


def shown_requests(trace: Trace, max_requests: int) -> list[str]:
    """Ids in order of rows: the first arrivals of each class, half of the rows each, unless one class needs fewer."""
    by_class: dict[str, list[str]] = {"rt": [], "be": []}
    for record in sorted(trace.requests.values(), key=lambda record: record.arrival_s):
        if record.request_id not in trace.rejected:
            by_class[record.request_class].append(record.request_id)
    num_rt = min(len(by_class["rt"]), max(max_requests - max_requests // 2, max_requests - len(by_class["be"])))
    return by_class["rt"][:num_rt] + by_class["be"][: max_requests - num_rt]


def shown_end_s(trace: Trace, max_requests: int) -> float:
    """When the last of the shown requests ends."""
    spans = trace.phases()
    return max((spans[request_id][-1].end_s for request_id in shown_requests(trace, max_requests)
                if spans[request_id]), default=trace.end_s)


def _mark_classes(figure: go.Figure, num_rt: int, num_rows: int) -> None:
    """A line between the classes, and their names at the right edge, short where few rows leave no room."""
    if 0 < num_rt < num_rows:
        figure.add_hline(num_rt - 0.5, line={"color": INK, "width": 1.5})
    for name, first, count in (("rt", 0, num_rt), ("be", num_rt, num_rows - num_rt)):
        if count:
            label = CLASS_LABELS[name] if count > 6 else name.upper()
            figure.add_annotation(text=f"<b>{label}</b>", x=1.0, xref="paper", xanchor="left",
                                  y=first + (count - 1) / 2, textangle=90, showarrow=False, xshift=6,
                                  font={"size": 13})


def _add_first_tokens(figure: go.Figure, trace: Trace, rows: Sequence[str]) -> None:
    """Marks the first token of each real-time request: a dot if it came in time, a cross if it came too late."""
    timings = request_timings(trace)
    marks: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
    for request_id in rows:
        timing = timings[request_id]
        if timing.ttft_s is not None and timing.record.ttft_slo_s is not None:
            marks[timing.ttft_s <= timing.record.ttft_slo_s].append((timing.token_times_s[0], request_id))
    for in_time, name, symbol, colour in ((True, "first token in time", "circle", "#ffffff"),
                                          (False, "first token late", "x", ALARM_COLOUR)):
        if not marks[in_time]:
            continue
        figure.add_scatter(x=[time_s for time_s, _ in marks[in_time]], y=[escape(row) for _, row in marks[in_time]],
                           mode="markers", name=name, hovertemplate=f"%{{y}}: {name}, %{{x:.3f}} s<extra></extra>",
                           marker={"symbol": symbol, "color": colour, "size": 8, "line": {"color": INK, "width": 1}})


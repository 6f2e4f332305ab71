"""The schedule as a player: who did what in each iteration, when they were due, and why the others were left out.

A row for each request, a column for each iteration; under it the KV pool of the chosen step, moved by the same slider
(`player.py`). Several runs of one workload share the page: a list switches the policy at the same moment. Pure
functions of a trace, and a class that shows them in one piece of HTML; `static/schedule.js` draws. Invariant: all that
is shown of a request at a step comes from the trace (`Trace.phases`, `Trace.reason_for`).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from bros_ref.trace import PHASES, REASONS, Trace
from bros_ref.trace.metrics import request_timings
from bros_ref.viz.figures.gantt import (
    CLASS_MARKS,
    HEAD_H,
    LABEL_W,
    MARK_LABELS,
    MAX_CELL_W,
    MIN_CELL_W,
    PHASE_FILLS,
    ROW_H,
    first_token_marks,
    gantt_svg,
    phase_steps,
    stands_behind,
    step_position,
)
from bros_ref.viz.figures.kv_blocks import busiest_step
from bros_ref.viz.figures.style import MUTED, PHASE_LABELS, REASON_LABELS
from bros_ref.viz.figures.timeline import shown_requests
from bros_ref.viz.widgets.html import OWN_KEYS, controls_html, legend_html, notebook_output, packed_fills, widget_html
from bros_ref.viz.widgets.player import POOL_SCRIPTS, pool_data, pool_html, step_note

MARK_SIGNS = {"due": "▼", "in time": "○", "late": "✕"}
COLUMNS = {"does": "in this step", "slack": "slack", "due": "due in"}  # what is said of a row, right of the chart


def schedule_rows(trace: Trace, request_ids: Sequence[str]) -> list[dict[str, Any]]:
    """One row per request: its class, its spans, its targets, when its tokens came, when its first token was due."""
    number = {request_id: i for i, request_id in enumerate(trace.requests)}
    spans, timings, rows = phase_steps(trace), request_timings(trace), []
    for request_id in request_ids:
        record, timing = trace.requests[request_id], timings[request_id]
        slo_s = record.ttft_slo_s
        rows.append({
            "request": number[request_id], "rt": record.request_class == "rt", "arrival_s": round(record.arrival_s, 5),
            "spans": [[PHASES.index(phase), first, end] for phase, first, end in spans[request_id]],
            "emitted": [index for index, step in enumerate(trace.steps) if request_id in step.emitted],
            "ttft_slo_s": slo_s, "tpot_slo_s": record.tpot_slo_s,
            "due_at": None if slo_s is None else round(step_position(trace, record.arrival_s + slo_s), 3),
            "late": timing.ttft_s is not None and slo_s is not None and timing.ttft_s > slo_s})
    return rows


def schedule_steps(trace: Trace, request_ids: Sequence[str]) -> list[dict[str, Any]]:
    """What each step says of the rows: tokens of those that ran, slack, and the reason of those listed as left out (an
    index into REASONS); a waiting row that is not listed stands `behind` a request (its number in the trace, for an RT
    row and for a BE row; -1 if nobody was left out)."""
    row = {request_id: i for i, request_id in enumerate(request_ids)}
    number = {request_id: i for i, request_id in enumerate(trace.requests)}
    one_of = {record.request_class: request_id for request_id, record in trace.requests.items()}

    def behind(step_index: int, kind: str) -> int:
        whom = stands_behind(trace, step_index, one_of[kind]) if kind in one_of else None
        return -1 if whom is None else number[whom]

    return [{"start_s": round(step.start_s, 5), "end_s": round(step.end_s, 5),
             "ran": {row[name]: tokens for name, tokens in step.scheduled.items() if name in row},
             "slack_s": {row[name]: round(slack_s, 4) for name, slack_s in step.slack_s.items() if name in row},
             "left_out": {row[name]: REASONS.index(reason) for name, reason in step.left_out.items() if name in row},
             "behind": [behind(index, kind) for kind in ("rt", "be")]}
            for index, step in enumerate(trace.steps)]


class SchedulePlayer:
    """The schedule and the KV pool behind one slider. Several runs of one workload can be switched in place; the rows
    are requests that all of them have.

    A click on a request's name outlines its blocks and shows its block table; a click on a slot finds its request; a
    click in the chart does the former and goes to that step. A request is also found by its id, and the chart zooms.

    Args:
        traces: one run, or several of the same requests under different policies; it opens on the first.
        max_requests: rows, real-time and best-effort in equal parts while there are any.

    Raises:
        ValueError: a trace has no steps, there is no row to show, two runs have the same policy, or a request is
            real-time in one run and best-effort in another.
    """

    def __init__(self, traces: Trace | Sequence[Trace], max_requests: int = 24) -> None:
        self.traces = (traces,) if isinstance(traces, Trace) else tuple(traces)
        if not self.traces:
            raise ValueError("there is no run to play: give at least one trace")
        self.trace = trace = self.traces[0]
        self.request_ids = [name for name in shown_requests(trace, max_requests)
                            if all(name in one.requests for one in self.traces)]
        for one in self.traces:
            if not one.steps or not self.request_ids:
                raise ValueError(f"there is no schedule to play: the trace has {len(one.steps)} steps and "
                                 f"{len(one.requests)} requests, of which max_requests={max_requests} are to be shown")
        policies = [one.policy for one in self.traces]
        if len(set(policies)) < len(policies) or any(
                one.requests[name].request_class != trace.requests[name].request_class
                for one in self.traces for name in self.request_ids):
            raise ValueError("runs that are switched in place serve the same requests, each under another policy; "
                             f"got runs under {', '.join(policies)}, with a policy twice or a request in two classes")
        self.start = busiest_step(trace)

    def __repr__(self) -> str:
        trace, policies = self.trace, [one.policy for one in self.traces]
        return (f"schedule of {len(self.request_ids)} of {len(trace.requests)} requests over {len(trace.steps)} steps, "
                + (f"policy {policies[0]}" if len(policies) == 1 else f"policies {', '.join(policies)}"))

    def data(self) -> dict[str, Any]:
        """The page's data: the rooms and names of the chart, and the `runs`."""
        return {"phases": list(PHASES), "reasons": [REASON_LABELS[reason] for reason in REASONS],
                "phase_looks": packed_fills(PHASE_FILLS), "row_height": ROW_H, "head_height": HEAD_H,
                "name_width": LABEL_W, "min_cell": MIN_CELL_W, "max_cell": MAX_CELL_W,
                "runs": [self._run(trace) for trace in self.traces]}

    def _run(self, trace: Trace) -> dict[str, Any]:
        return pool_data(trace) | {"rows": schedule_rows(trace, self.request_ids),
                                   "moments": schedule_steps(trace, self.request_ids),
                                   "notes": [step_note(trace, step) for step in trace.steps]}

    def to_html(self) -> str:
        """A <div> with everything in it; works in a notebook, a static page and a file."""
        body = (f'{controls_html(len(self.trace.steps) - 1, self.start)}{self._tools()}<div role="status"></div>'
                f'{self._grid()}{self._legend()}{pool_html(*self.traces)}<div role="status"></div>')
        return widget_html("schedule", repr(self), body, self.data(), (*POOL_SCRIPTS, "schedule.js"))

    def _tools(self) -> str:
        """What is beside the slider: the policy, if there are several; a request to find; zoom."""
        options = "".join(f'<option value="{place}">{escape(one.policy)}</option>'
                          for place, one in enumerate(self.traces))
        policy = f"<label>policy <select data-policy {OWN_KEYS}>{options}</select></label>"
        zoom = "".join(f'<button type="button" data-zoom-by="{by}" {OWN_KEYS}>{label}</button>'
                       for by, label in (("0.5", "zoom out"), ("2", "zoom in")))
        return (f'<div style="display:flex;flex-wrap:wrap;gap:4px 14px;margin:4px 0">'
                f'{policy if len(self.traces) > 1 else ""}<label>find a request <input type="search" data-find '
                f'placeholder="{escape(self.request_ids[0])}, Enter" style="width:11em" {OWN_KEYS}></label>'
                f'<span style="display:flex;gap:4px">{zoom}</span></div>')

    def _legend(self) -> str:
        """Of what occurs in any of the runs: phases, each sample in the colours of the classes that have it, and marks
        of first tokens."""
        phases, marks = set[str](), set[str]()
        for trace in self.traces:
            marks |= {kind for kind, _, _ in first_token_marks(trace, self.request_ids)}
            spans = phase_steps(trace)
            phases |= {f"{trace.requests[name].request_class}-{phase}" for name in self.request_ids
                       for phase, _, _ in spans[name]}
        keys = {phase: " ".join(kind for kind in PHASE_FILLS if kind in phases and kind.endswith(f"-{phase}"))
                for phase in PHASES}
        labels = {keys[phase]: PHASE_LABELS[phase] for phase in PHASES if keys[phase]}
        said = " &nbsp; ".join(f"{MARK_SIGNS[kind]} {label}" for kind, label in MARK_LABELS.items() if kind in marks)
        return (f'{legend_html(labels)}<div style="font-size:12px;color:{MUTED};margin-bottom:8px">{said}</div>')

    def _grid(self) -> str:
        """Names as buttons, the chart over all rows, and three cells per row that the script fills."""
        cell = f"height:{ROW_H}px;line-height:{ROW_H}px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis"
        head = f"height:{HEAD_H}px;line-height:{HEAD_H}px;font-weight:600;white-space:nowrap;grid-row:1"
        bare = "border:0;margin:0;padding:0 4px;background:none;color:inherit;font:inherit;text-align:left"
        aligned = {"does": "padding-left:8px", "slack": "text-align:right", "due": "text-align:right"}
        parts = [f'<div style="{head};grid-column:1;display:flex;justify-content:space-between">request'
                 f'<span style="font-weight:400;font-size:11px;color:{MUTED};padding-right:4px">step</span></div>',
                 '<canvas data-gantt role="img" aria-label="What each request did in each iteration" '
                 f'style="grid-column:2;grid-row:1 / span {len(self.request_ids) + 1};cursor:crosshair"></canvas>']
        parts += [f'<div data-said style="{head};grid-column:{column};{aligned[kind]}">{title}</div>'
                  for column, (kind, title) in enumerate(COLUMNS.items(), start=3)]
        for row, request_id in enumerate(self.request_ids):
            name = escape(f"{CLASS_MARKS[self.trace.requests[request_id].request_class]} {request_id}")
            parts.append(f'<button type="button" data-row="{row}" aria-pressed="false" title="{name}" {OWN_KEYS} '
                         f'style="{bare};{cell};grid-row:{row + 2};grid-column:1">{name}</button>')
            parts += [f'<div data-said data-{kind}="{row}" style="{cell};{aligned[kind]};grid-row:{row + 2};'
                      f'grid-column:{column}"></div>' for column, kind in enumerate(COLUMNS, start=3)]
        return f'<div data-grid style="display:grid;font-size:12px;width:max-content">{"".join(parts)}</div>'

    def still(self) -> str:
        """The iterations around the busiest step of the first run as SVG."""
        return gantt_svg(self.trace, self.request_ids, self.start)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return notebook_output(repr(self), self.to_html(), self.still())

"""The priority race: the slack of each real-time request over time, and at one step who ran, who sat out and why.

Pure functions of a trace, and a class that shows them in one piece of HTML: `static/priority_race.js` moves a cursor
over the chart and fills the standings from the page's data, so no kernel is needed. It knows no scheduler: slack and
reasons are what the trace recorded. Invariant: each request that the trace names in a step is in that step's
standings, real-time requests by ascending slack, and those it does not name are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any

from bros_ref.trace import StepRecord, Trace
from bros_ref.viz.figures.style import (
    ALARM_COLOUR,
    CLASS_LABELS,
    FONT,
    INK,
    REASON_LABELS,
    RT_COLOUR,
    on_paper,
    round_values,
)
from bros_ref.viz.widgets.html import OWN_KEYS, controls_html, notebook_output, widget_html

WIDTH, LEFT, RIGHT, TOP, PLOT_H, BELOW = 760, 66, 14, 10, 210, 36  # of the chart, px
ROW_H, BAR_X, BAR_W, MAX_ROWS = 20, 150, 200, 14  # of the standings in the still, px
CAPTION = "in order of priority; a bar is slack, from the red mark: filled, it ran; hollow, it sat out"
HOLLOW = ' fill="#fff"'
STYLE = (f"<style>.race text{{font:11px {FONT};fill:{INK};stroke:none}}.race .faded{{opacity:.12}}"
         ".race .chosen{stroke-width:2.5}</style>")


@dataclass(frozen=True)
class Standing:
    """One request in one step. `tokens` is 0 if it sat out, and then `reason` says why.

    `slack_s` is None for best-effort requests; `waited_steps` counts the steps since the last one that it ran in, or
    since it arrived.
    """

    request_id: str
    is_rt: bool
    slack_s: float | None
    tokens: int
    reason: str | None
    waited_steps: int

    @property
    def said(self) -> str:
        """What happened to it, in words."""
        if self.reason is None:
            return f"ran, {_plural(self.tokens, 'token')}"
        return f"sat out: {REASON_LABELS[self.reason]}; {_plural(self.waited_steps, 'step')} without a turn"


def standings(trace: Trace) -> Iterator[list[Standing]]:
    """For each step all requests that it names: RT by ascending slack, then BE, those that ran first."""
    last_turn: dict[str, int] = {}  # request id -> the step it ran in last, or the one before it arrived
    arrivals = sorted(trace.requests.values(), key=lambda record: record.arrival_s, reverse=True)
    for index, step in enumerate(trace.steps):
        while arrivals and arrivals[-1].arrival_s <= step.start_s:
            last_turn[arrivals.pop().request_id] = index - 1
        named = dict.fromkeys((*step.scheduled, *step.left_out))  # refused first and taken later is once in it
        rows = [_standing(trace, step, request_id, index - last_turn.get(request_id, index - 1))
                for request_id in named]
        yield sorted(rows, key=lambda row: (not row.is_rt, math.inf if row.slack_s is None else row.slack_s))
        last_turn.update(dict.fromkeys(step.scheduled, index))


def _standing(trace: Trace, step: StepRecord, request_id: str, waited_steps: int) -> Standing:
    tokens = step.scheduled.get(request_id, 0)
    return Standing(request_id, trace.requests[request_id].request_class == "rt", step.slack_s.get(request_id), tokens,
                    None if tokens else step.left_out[request_id], waited_steps)


def race_note(step: StepRecord) -> str:
    """One step in words: when it was decided, how long it may take and how long it is expected to take."""
    bound = "no deadline bounds it" if step.step_budget_s is None else f"it may take {1e3 * step.step_budget_s:.0f} ms"
    predicted = "" if step.predicted_s is None else f", predicted {1e3 * step.predicted_s:.0f} ms"
    behind = f"; {step.num_behind} more stand behind these" if step.num_behind else ""
    return f"{step.start_s:.3f} s: {bound}{predicted}{behind}"


def most_telling_step(trace: Trace) -> int:
    """Where to start: the step in which most real-time requests sat out, then most are named; the first of equals."""
    def tells(index: int) -> tuple[int, int, int]:
        step = trace.steps[index]
        return len(step.slack_s.keys() - step.scheduled.keys()), len(step.slack_s) + len(step.left_out), -index

    return max(range(len(trace.steps)), key=tells)


class PriorityRace:
    """Slider, play, speed, and one request to follow.

    Raises:
        ValueError: the trace has no steps, or its policy recorded no slack.
    """

    def __init__(self, trace: Trace) -> None:
        if not trace.steps:
            raise ValueError("the trace has no steps: there is no race to show")
        self.trace = trace
        seen = {request_id for step in trace.steps for request_id in step.slack_s}
        self.runners = [request_id for request_id in trace.requests if request_id in seen]
        if not self.runners:
            raise ValueError(f"the trace of policy {trace.policy!r} records no slack: the race needs a policy that "
                             "looks at deadlines (bros, bros-plus), and a real-time request")
        self.start = most_telling_step(trace)
        slacks_s = [slack_s - ran_s for step in trace.steps for slack_s in step.slack_s.values()
                    for ran_s in (0.0, step.duration_s)]
        self._low_s, self._high_s = min(0.0, *slacks_s), max(1e-9, *slacks_s)  # the axis always shows zero
        self._from_s, self._to_s = trace.steps[0].start_s, max(trace.steps[-1].end_s, trace.steps[0].start_s + 1e-9)

    def __repr__(self) -> str:
        return (f"priority race of {len(self.runners)} real-time requests over {len(self.trace.steps)} steps, policy "
                f"{self.trace.policy}")

    # -- drawing --------------------------------------------------------------------------------------------------

    def _x(self, time_s: float) -> float:
        return LEFT + (time_s - self._from_s) / (self._to_s - self._from_s) * (WIDTH - LEFT - RIGHT)

    def _y(self, slack_s: float) -> float:
        return TOP + (self._high_s - slack_s) / (self._high_s - self._low_s) * PLOT_H

    def _share(self, slack_s: float) -> float:
        """Where a slack lies on a bar's axis, 0 to 1."""
        return (slack_s - self._low_s) / (self._high_s - self._low_s)

    def chart(self, step_index: int) -> str:
        """The chart's parts as SVG; below the dashed line not even an average iteration is left."""
        bottom, right, zero = TOP + PLOT_H, WIDTH - RIGHT, self._y(0)
        parts = [f'<rect x="{LEFT}" y="{zero:.1f}" width="{right - LEFT}" height="{bottom - zero:.1f}" fill="#fbe3e2"/>'
                 f'<path d="M{LEFT} {zero:.1f}H{right}" stroke="{ALARM_COLOUR}" stroke-dasharray="5 3"/>']
        parts += [self._line(request_id) for request_id in self.runners]
        labels = {round(self._y(slack_s), 1): f"{slack_s:.2f} s" for slack_s in (self._low_s, self._high_s, 0.0)}
        parts += [f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>' for y, label in labels.items()]
        parts += [f'<path d="M{self._x(time_s):.1f} {bottom}v4" stroke="{INK}"/><text x="{self._x(time_s):.1f}" '
                  f'y="{bottom + 15}" text-anchor="middle">{time_s:g}</text>'
                  for time_s in round_values(self._from_s, self._to_s, 8)]
        parts += [f'<text x="{(LEFT + right) / 2}" y="{bottom + 31}" text-anchor="middle">seconds; filled dot: it ran, '
                  "white dot: it sat out</text>",
                  f'<text x="12" y="{TOP + PLOT_H / 2}" text-anchor="middle" transform="rotate(-90 12 '
                  f'{TOP + PLOT_H / 2})">slack</text>',
                  f'<text x="{right}" y="{TOP + 8}" text-anchor="end" font-weight="600">'
                  f"{escape(self.trace.policy)}</text>"]
        at = self._x(self.trace.steps[step_index].start_s)
        return "".join(parts) + (f'<path data-cursor="" d="M0 {TOP}V{bottom}" transform="translate({at:.1f} 0)" '
                                 f'stroke="{INK}" stroke-width="1.5"/>')

    def _line(self, request_id: str) -> str:
        """Slack falls by one second per second; it starts anew at the end of a step that gave the request a token."""
        path, dots = "", ""
        for step in self.trace.steps:
            slack_s = step.slack_s.get(request_id)
            if slack_s is None:
                continue
            x, y = self._x(step.start_s), self._y(slack_s)
            path += f"{'L' if path else 'M'}{x:.1f} {y:.1f}"
            dots += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"{"" if request_id in step.scheduled else HOLLOW}/>'
            if request_id in step.emitted:
                path += f"L{self._x(step.end_s):.1f} {self._y(slack_s - step.duration_s):.1f}"
        name = escape(request_id)
        return (f'<g data-line="{name}" stroke="{RT_COLOUR}" fill="{RT_COLOUR}"><title>{name}</title>'
                f'<path d="{path}" fill="none"/>{dots}</g>')

    def still(self) -> str:
        """Chart and standings of the step it starts at, as SVG."""
        rows = next(islice(standings(self.trace), self.start, None))
        top, parts = TOP + PLOT_H + BELOW + 24, []
        for place, row in enumerate(rows[:MAX_ROWS]):
            parts.append(self._still_row(row, top + place * ROW_H))
        hidden = len(rows) - MAX_ROWS
        note = f"step {self.start + 1} of {len(self.trace.steps)}, {race_note(self.trace.steps[self.start])}"
        if hidden > 0:
            note += f"; {hidden} more rows"
        height = top + min(len(rows), MAX_ROWS) * ROW_H + 4
        svg = (f'<svg class="race" viewBox="0 0 {WIDTH} {height}" role="img" style="max-width:{WIDTH}px" '
               f'aria-label="{escape(repr(self))}" '
               f'xmlns="http://www.w3.org/2000/svg">{STYLE}{self.chart(self.start)}'
               f'<text x="{LEFT}" y="{top - 8}">{escape(note)}</text>{"".join(parts)}</svg>')
        return on_paper(svg)

    def _still_row(self, row: Standing, y: float) -> str:
        middle, zero = y + ROW_H / 2 + 4, BAR_X + self._share(0.0) * BAR_W
        text = f'<text x="4" y="{middle}">{escape(row.request_id)}</text>'
        if row.slack_s is not None:
            end = BAR_X + self._share(row.slack_s) * BAR_W
            fill = f'fill="{RT_COLOUR}"' if row.reason is None else f'fill="#fff" stroke="{RT_COLOUR}"'
            text += (f'<rect x="{min(zero, end):.1f}" y="{y + 4}" width="{abs(end - zero):.1f}" height="12" {fill}/>'
                     f'<path d="M{zero:.1f} {y}v{ROW_H}" stroke="{ALARM_COLOUR}"/>'
                     f'<text x="{BAR_X - 8}" y="{middle}" text-anchor="end">{1e3 * row.slack_s:.0f} ms</text>')
        return text + f'<text x="{BAR_X + BAR_W + 14}" y="{middle}">{escape(row.said)}</text>'

    # -- the page -------------------------------------------------------------------------------------------------

    def data(self) -> dict[str, Any]:
        """The page's data. A row: request, slack in ms or null, 1 if it ran, index of its description."""
        number = {request_id: i for i, request_id in enumerate(self.trace.requests)}
        said: dict[str, int] = {}
        steps = [[[number[row.request_id], None if row.slack_s is None else round(1e3 * row.slack_s, 1),
                   int(row.reason is None), said.setdefault(row.said, len(said))] for row in rows]
                 for rows in standings(self.trace)]
        return {"requests": list(self.trace.requests), "steps": steps, "said": list(said),
                "classes": [CLASS_LABELS[record.request_class] for record in self.trace.requests.values()],
                "x": [round(self._x(step.start_s), 1) for step in self.trace.steps],
                "low_ms": 1e3 * self._low_s, "high_ms": 1e3 * self._high_s,
                "notes": [race_note(step) for step in self.trace.steps],
                "colours": {"rt": RT_COLOUR, "late": ALARM_COLOUR}}

    def to_html(self) -> str:
        """A <div> with everything in it; works in a notebook, a static page and a file."""
        followed = "".join(f"<option>{escape(request_id)}</option>" for request_id in self.runners)
        head = "".join(f'<th scope="col" style="text-align:left">{name}</th>'
                       for name in ("request", "class", "slack", "bar", "this step"))
        body = (f'{controls_html(len(self.trace.steps) - 1, self.start, speed=2)} <label>follow <select data-follow '
                f'{OWN_KEYS}><option value="">all</option>{followed}</select></label>'
                '<div role="status" aria-live="polite"></div>'
                f'<svg class="race" viewBox="0 0 {WIDTH} {TOP + PLOT_H + BELOW}" role="img" style="display:block;'
                f'max-width:{WIDTH}px" aria-label="slack over time of {len(self.runners)} real-time requests" '
                f'xmlns="http://www.w3.org/2000/svg">{STYLE}{self.chart(self.start)}</svg>'
                f'<table style="font-size:13px;width:100%;max-width:{WIDTH}px"><caption style="text-align:left">'
                f"{CAPTION}</caption><thead><tr>{head}</tr></thead><tbody></tbody></table>")
        return widget_html("race", repr(self), body, self.data(), ("controls.js", "priority_race.js"))

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return notebook_output(repr(self), self.to_html(), self.still())


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"

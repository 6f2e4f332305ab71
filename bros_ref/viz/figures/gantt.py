"""The schedule by iteration: what each request did in every step, and a still of the steps around one of them.

Pure functions of a trace (`Trace.phases`, `Trace.reason_for`). `timeline.py` draws the same against time. Invariant: a
request runs in exactly those steps whose records schedule it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from html import escape

from bros_ref.trace import BEHIND, DECODE, PENDING, PREFILL, RESTORING, WAITING, Trace
from bros_ref.trace.metrics import request_timings
from bros_ref.viz.figures.kv_blocks import MAX_SCALE
from bros_ref.viz.figures.style import (
    FONT,
    INK,
    LOST_COLOUR,
    MUTED,
    PHASE_LOOKS,
    REASON_LABELS,
    Fill,
    on_paper,
    svg_pattern,
)

MARK_COLOURS = {WAITING: "#7b8796", PREFILL: "#ffffff", DECODE: "", PENDING: "#a8701a", RESTORING: "#ffffff"}
PHASE_FILLS = {phase: Fill(look.colour, look.pattern, MARK_COLOURS[phase]) for phase, look in PHASE_LOOKS.items()}
PHASE_LABELS = {phase: look.label for phase, look in PHASE_LOOKS.items()}
CLASS_MARKS = {"rt": "◆ RT", "be": "■ BE"}
ROW_H, LABEL_W, CHART_W, HEAD_H = 18, 110, 470, 22  # pixels, in the page and in the still
MIN_CELL_W, MAX_CELL_W, SAID_W, KEY_W = 5, 24, 250, 164


def phase_steps(trace: Trace) -> dict[str, list[tuple[str, int, int]]]:
    """What each request was doing, by iteration: request id -> (phase, first step, step after the last)."""
    starts = [step.start_s for step in trace.steps]
    result: dict[str, list[tuple[str, int, int]]] = {}
    for request_id, spans in trace.phases().items():
        runs: list[tuple[str, int, int]] = []
        for span in spans:
            first = max(bisect_left(starts, span.start_s), runs[-1][2] if runs else 0)
            end = bisect_left(starts, span.end_s)
            if end > first:
                runs.append((span.phase, first, end))
        result[request_id] = runs
    return result


def step_position(trace: Trace, time_s: float) -> float:
    """A time on the axis of iterations: 2.5 is halfway between the starts of the steps with index 2 and 3."""
    starts = [step.start_s for step in trace.steps]
    index = bisect_right(starts, time_s) - 1
    if index < 0:
        return 0.0
    end_s = starts[index + 1] if index + 1 < len(starts) else trace.steps[-1].end_s
    return index + (min(1.0, (time_s - starts[index]) / (end_s - starts[index])) if end_s > starts[index] else 1.0)


def shown_steps(num_steps: int, step_index: int) -> tuple[int, int, float]:
    """First step, step after the last, and width of a step in pixels: all that fit, around the given one."""
    cell = max(MIN_CELL_W, min(MAX_CELL_W, CHART_W / num_steps))
    count = min(num_steps, int(CHART_W // cell))
    first = max(0, min(num_steps - count, step_index - count // 2))
    return first, first + count, cell


def gantt_svg(trace: Trace, request_ids: Sequence[str], step_index: int) -> str:
    """The schedule around one step as an SVG element; at the right, what each request does in it, or why not."""
    first, end, cell = shown_steps(len(trace.steps), step_index)
    spans, timings = phase_steps(trace), request_timings(trace)
    chart_x, height = LABEL_W + 8, HEAD_H + len(request_ids) * ROW_H
    parts = []
    for place, request_id in enumerate(request_ids):
        y, record = HEAD_H + place * ROW_H, trace.requests[request_id]
        parts.append(f'<text x="0" y="{y + 13}">{escape(f"{CLASS_MARKS[record.request_class]} {request_id}")}</text>')
        for phase, start, stop in spans[request_id]:
            start, stop = max(first, start), min(end, stop)
            if start < stop:
                parts.append(f'<rect x="{chart_x + (start - first) * cell:.1f}" y="{y + 3}" width="'
                             f'{(stop - start) * cell:.1f}" height="{ROW_H - 6}" fill="url(#gantt-{phase})"><title>'
                             f"{escape(request_id)}: {PHASE_LABELS[phase]}</title></rect>")
        if record.ttft_slo_s is not None:
            at = step_position(trace, record.arrival_s + record.ttft_slo_s)
            token_times = timings[request_id].token_times_s
            came = step_position(trace, token_times[0]) if token_times else None
            parts += [_mark(chart_x + (at - first) * cell, y, "due")] if first <= at <= end else []
            if came is not None and first <= came <= end:
                in_time = token_times[0] <= record.arrival_s + record.ttft_slo_s
                parts.append(_mark(chart_x + (came - first) * cell, y, "in time" if in_time else "late"))
        said = escape(what_it_does(trace, spans, step_index, request_id))
        parts.append(f'<text x="{chart_x + CHART_W + 8}" y="{y + 13}">{said}</text>')
    at_x = chart_x + (step_index - first) * cell
    patterns = "".join(svg_pattern(f"gantt-{phase}", fill) for phase, fill in PHASE_FILLS.items())
    title = f"schedule of {len(request_ids)} requests around step {step_index + 1}"
    width = chart_x + CHART_W + SAID_W
    svg = (f'<svg class="gantt" viewBox="0 0 {width} {height + 44}" style="max-width:{MAX_SCALE * width:.0f}px" '
           f'role="img" aria-label="{title}" xmlns="http://www.w3.org/2000/svg"><defs>'
           f"{patterns}</defs><style>.gantt text{{font:12px {FONT};fill:{INK}}}.gantt .axis{{fill:{MUTED};"
           f'font-size:11px}}</style><text class="axis" x="{at_x + cell / 2:.1f}" y="14" text-anchor="middle">step '
           f'{step_index + 1}</text>{"".join(parts)}<rect x="{at_x:.1f}" y="{HEAD_H - 2}" width="{cell:.1f}" height="'
           f'{height - HEAD_H + 1}" fill="none" stroke="{INK}" stroke-width="1.5"/>{_legend(height + 10)}</svg>')
    return on_paper(svg)


def what_it_does(trace: Trace, spans: dict[str, list[tuple[str, int, int]]], step_index: int, request_id: str) -> str:
    """One request in one step: its phase and tokens, or why it was left out; empty before it arrived or after it ended.

    Args:
        spans: `phase_steps(trace)`.
    """
    phase = next((phase for phase, first, end in spans[request_id] if first <= step_index < end), None)
    if phase is None:
        return ""
    step = trace.steps[step_index]
    if request_id in step.scheduled:
        count = step.scheduled[request_id]
        return f"{'restored, then' if phase == RESTORING else f'{phase},'} {count} token{'' if count == 1 else 's'}"
    reason = trace.reason_for(step_index, request_id)
    if reason == BEHIND and (first := stands_behind(trace, step_index, request_id)) is not None:
        return f"{phase}: behind {first}"
    return phase if reason is None else f"{phase}: {REASON_LABELS[reason]}"


def stands_behind(trace: Trace, step_index: int, request_id: str) -> str | None:
    """Whom a request that nobody asked stands behind: of those that were left out, the last one of its class, else the
    last one; None if nobody was."""
    left_out, kind = list(trace.steps[step_index].left_out), trace.requests[request_id].request_class
    return next((name for name in reversed(left_out) if trace.requests[name].request_class == kind),
                left_out[-1] if left_out else None)


def _mark(x: float, y: float, kind: str) -> str:
    """When the first token was due, and when it came."""
    if kind == "due":
        return f'<path d="M{x - 5:.1f} {y + 1}h10l-5 9z" fill="{LOST_COLOUR}" stroke="#fff"><title>due</title></path>'
    if kind == "late":
        return (f'<path d="M{x - 4:.1f} {y + 5}l8 8m0 -8l-8 8" stroke="{LOST_COLOUR}" stroke-width="2.5"><title>first '
                "token late</title></path>")
    return (f'<circle cx="{x:.1f}" cy="{y + 9}" r="3.5" fill="#fff" stroke="{INK}"><title>first token in time</title>'
            "</circle>")


def _legend(y: float) -> str:
    """Two rows: phases, then marks."""
    parts = []
    for place, (phase, label) in enumerate(PHASE_LABELS.items()):
        x = place * KEY_W
        parts.append(f'<rect x="{x}" y="{y}" width="26" height="12" fill="url(#gantt-{phase})"/>'
                     f'<text x="{x + 31}" y="{y + 10}">{label}</text>')
    for place, (kind, label) in enumerate({"due": "first token due", "in time": "first token in time",
                                           "late": "first token late"}.items()):
        x = place * KEY_W
        parts.append(f'{_mark(x + 8, y + 16, kind)}<text x="{x + 20}" y="{y + 29}">{label}</text>')
    return "".join(parts)

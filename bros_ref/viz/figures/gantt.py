"""The schedule by iteration: what each request did in every step, and a still of the steps around one of them.

Pure functions of a trace (`Trace.phases`, `Trace.reason_for`). `timeline.py` draws the same against time. Invariant: a
request runs in exactly those steps whose records schedule it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from html import escape

from bros_ref.trace import BEHIND, RESTORING, Trace
from bros_ref.trace.metrics import request_timings
from bros_ref.viz.figures.kv_blocks import MAX_SCALE
from bros_ref.viz.figures.style import (
    ALARM_COLOUR,
    CLASS_LABELS,
    FONT,
    INK,
    MUTED,
    PHASE_LABELS,
    REASON_LABELS,
    on_paper,
    phase_fill,
    svg_pattern,
)

PHASE_FILLS = {f"{kind}-{phase}": phase_fill(kind, phase) for kind in CLASS_LABELS for phase in PHASE_LABELS}
CLASS_MARKS = {"rt": "◆ RT", "be": "■ BE"}
ROW_H, LABEL_W, CHART_W, HEAD_H = 18, 110, 470, 22  # pixels, in the page and in the still
MIN_CELL_W, MAX_CELL_W, SAID_W, KEY_W, KEY_SAMPLE_W = 5, 24, 250, 164, 26
CHART_X, MIN_TICK_W = LABEL_W + 38, 40  # where the chart begins in the still; the least distance between ticks
MARK_LABELS = {"due": "first token due", "in time": "first token in time", "late": "first token late"}


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
    spans, height = phase_steps(trace), HEAD_H + len(request_ids) * ROW_H
    parts, seen = [], set[str]()
    for place, request_id in enumerate(request_ids):
        y, record = HEAD_H + place * ROW_H, trace.requests[request_id]
        parts.append(f'<text x="0" y="{y + 13}">{escape(f"{CLASS_MARKS[record.request_class]} {request_id}")}</text>')
        for phase, start, stop in spans[request_id]:
            start, stop, kind = max(first, start), min(end, stop), f"{record.request_class}-{phase}"
            if start < stop:
                seen.add(kind)
                parts.append(f'<rect x="{CHART_X + (start - first) * cell:.1f}" y="{y + 3}" width="'
                             f'{(stop - start) * cell:.1f}" height="{ROW_H - 6}" fill="url(#gantt-{kind})"><title>'
                             f"{escape(request_id)}: {PHASE_LABELS[phase]}</title></rect>")
        said = escape(what_it_does(trace, spans, step_index, request_id))
        parts.append(f'<text x="{CHART_X + CHART_W + 8}" y="{y + 13}">{said}</text>')
    for kind, at, place in first_token_marks(trace, request_ids):
        if first <= at <= end:
            seen.add(kind)
            parts.append(_mark(CHART_X + (at - first) * cell, HEAD_H + place * ROW_H, kind))
    at_x = CHART_X + (step_index - first) * cell
    patterns = "".join(svg_pattern(f"gantt-{kind}", fill) for kind, fill in PHASE_FILLS.items() if kind in seen)
    title = f"{trace.policy}: schedule of {len(request_ids)} requests around step {step_index + 1}"
    width = CHART_X + CHART_W + SAID_W
    svg = (f'<svg class="gantt" viewBox="0 0 {width} {height + 44}" style="max-width:{MAX_SCALE * width:.0f}px" '
           f'role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg"><defs>'
           f"{patterns}</defs><style>.gantt text{{font:12px {FONT};fill:{INK}}}.gantt .axis{{fill:{MUTED};"
           f'font-size:11px}}</style><text x="0" y="14" font-weight="600">{escape(trace.policy)}</text>'
           f'<text class="axis" x="{CHART_X - 6}" y="14" text-anchor="end">step</text>{_ticks(first, end, cell)}'
           f'<text x="{CHART_X + CHART_W + 8}" y="14" font-weight="600">in step {step_index + 1}</text>'
           f'{"".join(parts)}<rect x="{at_x:.1f}" y="{HEAD_H - 2}" width="{cell:.1f}" height="'
           f'{height - HEAD_H + 1}" fill="none" stroke="{INK}" stroke-width="1.5"/>{_legend(height + 10, seen)}</svg>')
    return on_paper(svg)


def first_token_marks(trace: Trace, request_ids: Sequence[str]) -> Iterator[tuple[str, float, int]]:
    """(kind, position on the axis of iterations, row): when each first token was "due", and when it came, "in time" or
    "late"; of requests that have a target."""
    timings = request_timings(trace)
    for row, request_id in enumerate(request_ids):
        record, token_times = trace.requests[request_id], timings[request_id].token_times_s
        if record.ttft_slo_s is None:
            continue
        due_s = record.arrival_s + record.ttft_slo_s
        yield "due", step_position(trace, due_s), row
        if token_times:
            yield "in time" if token_times[0] <= due_s else "late", step_position(trace, token_times[0]), row


def _ticks(first: int, end: int, cell: float) -> str:
    """Step numbers, counted from 1, where there is room."""
    every = next((every for every in (1, 2, 5, 10, 20, 50, 100) if every * cell >= MIN_TICK_W), 200)
    return "".join(f'<text class="axis" x="{CHART_X + (step - first - 0.5) * cell:.1f}" y="14" text-anchor="middle">'
                   f"{step}</text>" for step in range(-(-(first + 1) // every) * every, end + 1, every))


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
        return f'<path d="M{x - 5:.1f} {y + 1}h10l-5 9z" fill="{ALARM_COLOUR}" stroke="#fff"><title>due</title></path>'
    if kind == "late":
        return (f'<path d="M{x - 4:.1f} {y + 5}l8 8m0 -8l-8 8" stroke="{ALARM_COLOUR}" stroke-width="2.5"><title>first '
                "token late</title></path>")
    return (f'<circle cx="{x:.1f}" cy="{y + 9}" r="3.5" fill="#fff" stroke="{INK}"><title>first token in time</title>'
            "</circle>")


def _legend(y: float, seen: Collection[str]) -> str:
    """Two rows, of what is drawn: phases, each sample in the colours of the classes that have it; then marks."""
    parts, place = [], 0
    for phase, label in PHASE_LABELS.items():
        kinds = [kind for kind in (f"{name}-{phase}" for name in CLASS_LABELS) if kind in seen]
        for half, kind in enumerate(kinds):
            wide = KEY_SAMPLE_W / len(kinds)
            parts.append(f'<rect x="{place * KEY_W + half * wide:g}" y="{y}" width="{wide:g}" height="12" '
                         f'fill="url(#gantt-{kind})"/>')
        if kinds:
            parts.append(f'<text x="{place * KEY_W + KEY_SAMPLE_W + 5}" y="{y + 10}">{label}</text>')
            place += 1
    marks = {kind: label for kind, label in MARK_LABELS.items() if kind in seen}
    for place, (kind, label) in enumerate(marks.items()):
        x = place * KEY_W
        parts.append(f'{_mark(x + 8, y + 16, kind)}<text x="{x + 20}" y="{y + 29}">{label}</text>')
    return "".join(parts)

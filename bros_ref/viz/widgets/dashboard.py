"""Two runs side by side at the same moment: what each has in its KV pool, who runs, who waits and why, and what each
has achieved so far.

Times count from each run's first arrival, so two live runs compare as two simulated ones do. Pure functions of two
traces, and a class that shows them in one piece of HTML; `static/dashboard.js` draws. Invariant: what is shown at a
moment depends on nothing that happened after it, except whether a request that has finished was on time, which was
known when it finished.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from html import escape
from itertools import accumulate
from typing import Any

from bros_ref.trace import BEHIND, PENDING, REASONS, WAITING, Trace
from bros_ref.trace.metrics import request_timings
from bros_ref.viz.figures.gantt import phase_steps
from bros_ref.viz.figures.kv_blocks import MAX_SCALE, block_map
from bros_ref.viz.figures.style import FONT, INK, MUTED, REASON_LABELS, on_paper, policy_look
from bros_ref.viz.widgets.html import controls_html, legend_html, notebook_output, request_select, widget_html
from bros_ref.viz.widgets.player import POOL_SCRIPTS, pool_data, pool_labels

MAX_MOMENTS = 240
SIDE_W, CHART_H = 340, 132  # pixels; two sides of this width and the gap between them, else one below the other
CHARTS = {"on_time": "RT requests on time so far", "be_tokens": "BE tokens so far"}
FIELDS = ("step", "ran", "left_out", "arrived", "finished", "on_time", "be_tokens")  # of a moment, in the page's data
FACTS = {"ran": "running", "left": "left out", "rt": "RT on time, of finished, of arrived", "be": "BE tokens"}


class Moments:
    """The state of a run at any time after its first arrival."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.starts = [step.start_s - trace.start_s for step in trace.steps]
        self.ends = [step.end_s - trace.start_s for step in trace.steps]
        self._phases = phase_steps(trace)
        self._is_rt = {request_id: record.request_class == "rt" for request_id, record in trace.requests.items()}
        self._be_tokens = [0, *accumulate(sum(not self._is_rt[name] for name in step.emitted) for step in trace.steps)]
        timings = [timing for timing in request_timings(trace).values() if timing.record.request_class == "rt"]
        self._arrived = sorted(timing.record.arrival_s - trace.start_s for timing in timings)
        self._finished = sorted(timing.token_times_s[-1] - trace.start_s for timing in timings if timing.completed)
        self._on_time = sorted(timing.token_times_s[-1] - trace.start_s for timing in timings
                               if timing.met_ttft and timing.met_tpot)

    def step_at(self, time_s: float) -> int:
        """The index of the last step that had begun, or -1."""
        return bisect_right(self.starts, time_s) - 1

    def at(self, time_s: float) -> dict[str, Any]:
        """`step` as `step_at`; `ran` [RT, BE] in it, if it is still going on; `left_out` (reason, request ids) in the
        order of REASONS; RT requests `arrived`, `finished` and finished `on_time` so far; `be_tokens` so far."""
        step = self.step_at(time_s)
        ran, left_out = [0, 0], list[tuple[str, list[str]]]()
        if step >= 0 and time_s < self.ends[step]:
            record = self.trace.steps[step]
            num_rt = sum(self._is_rt[name] for name in record.scheduled)
            ran = [num_rt, len(record.scheduled) - num_rt]
            left_out = self._left_out(step)
        return {"step": step, "ran": ran, "left_out": left_out, "arrived": bisect_right(self._arrived, time_s),
                "finished": bisect_right(self._finished, time_s), "on_time": bisect_right(self._on_time, time_s),
                "be_tokens": self._be_tokens[bisect_right(self.ends, time_s)]}

    def _left_out(self, step: int) -> list[tuple[str, list[str]]]:
        listed, groups = self.trace.steps[step].left_out, dict[str, list[str]]()
        for request_id, runs in self._phases.items():
            if any(first <= step < end and phase in (WAITING, PENDING) for phase, first, end in runs):
                groups.setdefault(listed.get(request_id, BEHIND), []).append(request_id)
        return [(reason, groups[reason]) for reason in REASONS if reason in groups]


def seen_of_two_owners(trace: Trace) -> list[int]:
    """After each step, how many blocks are shared plus how many slots are overwritten, [steps]; O(changes)."""
    of_block, total, totals = [0] * trace.num_blocks, 0, []
    for changes in trace.pool_changes():
        for block_id, view in changes.items():
            now = (view.state == "shared") + view.overwritten
            total += now - of_block[block_id]
            of_block[block_id] = now
        totals.append(total)
    return totals


class Dashboard:
    """Two runs behind one time slider.

    Args:
        max_moments: positions of the slider; each makes the page larger.

    Raises:
        ValueError: a trace has no steps, or there is no moment to show.
    """

    def __init__(self, trace_a: Trace, trace_b: Trace, max_moments: int = MAX_MOMENTS) -> None:
        if max_moments < 1:
            raise ValueError(f"max_moments must be at least 1, got {max_moments}")
        for name, trace in (("first", trace_a), ("second", trace_b)):
            if not trace.steps:
                raise ValueError(f"the {name} trace (policy {trace.policy}) has no steps: there is nothing to compare")
        self.sides = (Moments(trace_a), Moments(trace_b))
        self.end_s = max(side.ends[-1] for side in self.sides)
        count = min(max_moments, max(len(side.starts) for side in self.sides))
        self.times_s = [self.end_s * i / count for i in range(count + 1)]
        self.start = self._most_to_see()

    @property
    def names(self) -> tuple[str, str]:
        return f"A: {self.sides[0].trace.policy}", f"B: {self.sides[1].trace.policy}"

    def __repr__(self) -> str:
        return f"{self.names[0]} beside {self.names[1]} over {self.end_s:.1f} s, {len(self.times_s)} moments"

    def data(self) -> dict[str, Any]:
        """The page's data."""
        looks = [policy_look(place).colour for place in range(2)]
        return {"times_s": [round(time_s, 3) for time_s in self.times_s], "names": self.names, "curves": looks,
                "chart_height": CHART_H, "fields": FIELDS, "reasons": [REASON_LABELS[reason] for reason in REASONS],
                "sides": [self._side_data(side) for side in self.sides]}

    def _side_data(self, side: Moments) -> dict[str, Any]:
        """One run at every moment, as lists in the order of FIELDS; requests left out are listed where they change, by
        reason and request indices."""
        moments = [side.at(time_s) for time_s in self.times_s]
        number = {request_id: i for i, request_id in enumerate(side.trace.requests)}
        before: object = None
        for moment in moments:
            left_out = [[REASONS.index(reason), *(number[name] for name in names)]
                        for reason, names in moment["left_out"]]
            moment["left_out"], before = (None if left_out == before else left_out), left_out
        real_time = [record.request_class == "rt" for record in side.trace.requests.values()]
        return {"pool": pool_data(side.trace, [moment["step"] for moment in moments]),
                "moments": [[moment[field] for field in FIELDS] for moment in moments],
                "is_rt": [int(is_rt) for is_rt in real_time], "end_s": round(side.ends[-1], 3)}

    def _most_to_see(self) -> int:
        """The moment at which most slots of either pool have two owners; the first of equals."""
        scores = [0] * len(self.times_s)
        for side in self.sides:
            seen = seen_of_two_owners(side.trace)
            for moment, time_s in enumerate(self.times_s):
                scores[moment] += seen[side.step_at(time_s)] if 0 <= time_s < side.ends[-1] else 0
        return scores.index(max(scores))

    def to_html(self) -> str:
        """A <div> with everything in it; works in a notebook, a static page and a file."""
        charts = "".join(f'<div><div style="font-weight:600">{title}</div><canvas data-chart="{kind}" role="img" '
                         f'aria-label="{title} under both policies, over time"></canvas></div>'
                         for kind, title in CHARTS.items())
        sides = "".join(self._side_html(place, name) for place, name in enumerate(self.names))
        column = f"minmax(min(100%,max({SIDE_W}px,calc(50% - 10px))),1fr)"  # at most two
        grid = f"display:grid;grid-template-columns:repeat(auto-fit,{column});column-gap:20px"
        names = list(dict.fromkeys(name for side in self.sides for name in side.trace.requests))
        body = (f'{controls_html(len(self.times_s) - 1, self.start, "moment", 30)} {request_select(names)}'
                f'<div role="status"></div><div style="{grid}">{charts}{sides}</div>'
                f"{legend_html(pool_labels(*(side.trace for side in self.sides)))}")
        return widget_html("dashboard", repr(self), body, self.data(), (*POOL_SCRIPTS, "dashboard.js"))

    def _side_html(self, place: int, name: str) -> str:
        facts = "".join(f'<span style="color:{MUTED}">{title}</span><b data-fact="{kind}"></b>'
                        for kind, title in FACTS.items())
        return (f'<div data-side="{place}" style="margin-top:8px"><b style="font-size:15px">{escape(name)}</b>'
                f'<div style="display:grid;grid-template-columns:max-content 1fr;column-gap:12px">{facts}</div>'
                f'<canvas data-pool role="img" aria-label="KV blocks of {escape(name)}" style="display:block;'
                'margin:4px 0"></canvas><div data-table></div><div data-waits style="min-height:84px"></div></div>')

    def still(self) -> str:
        """Both pools and what was achieved, at the moment the slider starts on, as SVG."""
        time_s = self.times_s[self.start]
        parts, y = [], 18
        for side, name in zip(self.sides, self.names, strict=True):
            now = side.at(time_s)
            drawn = re.sub("><title>.*?</title></rect>", "/>", block_map(side.trace, max(0, now["step"])))  # an image
            width, height = (float(size) for size in drawn.split('viewBox="0 0 ')[1].split('"')[0].split())
            text = (f"{name} at {time_s:.2f} s: {now['on_time']} RT on time of {now['finished']} finished of "
                    f"{now['arrived']} arrived; {now['be_tokens']} BE tokens")
            parts.append(f'<text x="0" y="{y}" font-weight="600">{escape(text)}</text>'
                         + drawn.replace("<svg ", f'<svg x="0" y="{y + 10}" width="{width}" height="{height}" ', 1))
            y += int(height) + 46
        svg = (f'<svg viewBox="0 0 {width} {y - 24}" style="max-width:{MAX_SCALE * width:.0f}px" role="img" '
               f'aria-label="{escape(repr(self))}" font-family="{escape(FONT)}" font-size="13" fill="{INK}" '
               f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>')
        return on_paper(svg)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return notebook_output(repr(self), self.to_html(), self.still())

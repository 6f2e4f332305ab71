"""The KV pool as a player: every block and slot at every step of a trace, in one piece of HTML.

Pure functions of a trace, and a class that shows them. The page carries what changed in each step, not the pool of each
step, so 2,000 blocks over hundreds of steps are small, and moving the slider asks no kernel. `static/player.js` draws.
Where scripts do not run, the map of the busiest step is shown (`kv_blocks.block_map`).
"""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import Any

from bros_ref.trace import BlockView, StepRecord, Trace
from bros_ref.viz.kv_blocks import SLOT_LABELS, block_map, busiest_step
from bros_ref.viz.style import BE_COLOUR, EMPTY_COLOUR, INK, LOST_COLOUR, MUTED, PAPER, RT_COLOUR

COLOURS = {"rt": RT_COLOUR, "be": BE_COLOUR, "lost": LOST_COLOUR, "free": EMPTY_COLOUR, "paper": PAPER, "ink": INK,
           "edge": MUTED}
COPY_VERBS = {"checkpoint": "saved to the host", "restore": "brought back", "relocate": "moved"}
SPEEDS = (1, 2, 4, 10, 30)  # steps a second
KEYS = {"rt": "solid", "be": "slashes", "over": "white crosses", "lost": "red crosses", "free": "pale"}


def pool_changes(trace: Trace) -> list[list[int]]:
    """For each step the blocks that changed: block id, then RT owner, its logical index and fill, BE owner, index and
    fill, and BE tokens that live on the host only. Owners are indices into `list(trace.requests)`, -1 for none."""
    number = {request_id: i for i, request_id in enumerate(trace.requests)}
    before = [BlockView() for _ in range(trace.num_blocks)]
    steps = []
    for pool in trace.pools():
        changes: list[int] = []
        for block_id, (old, new) in enumerate(zip(before, pool, strict=True)):
            if new is not old:  # untouched blocks keep their view
                changes += [block_id, number.get(new.rt_owner or "", -1), new.rt_index, new.rt_fill,
                            number.get(new.be_owner or "", -1), new.be_index, new.be_fill, new.overwritten]
        steps.append(changes)
        before = pool
    return steps


def step_note(trace: Trace, step: StepRecord) -> str:
    """One step in words: when, who ran, what was copied."""
    real_time = sum(trace.requests[request_id].request_class == "rt" for request_id in step.scheduled)
    parts = [f"{real_time} real-time and {len(step.scheduled) - real_time} best-effort requests ran",
             f"{step.used_blocks} of {trace.num_blocks} blocks in use"]
    parts += [f"{step.copied[kind]} slots {verb}" for kind, verb in COPY_VERBS.items() if step.copied[kind]]
    return f"{step.start_s:.2f} s: " + "; ".join(parts)


class BlockMapPlayer:
    """Every slot of the KV pool at every step: slider, play, speed, hover, and a click for a block table.

    Raises:
        ValueError: the trace has no steps.
    """

    def __init__(self, trace: Trace) -> None:
        if not trace.steps:
            raise ValueError("the trace has no steps: there is nothing to play")
        self.trace = trace
        self.start = busiest_step(trace)

    def __repr__(self) -> str:
        trace = self.trace
        return f"KV pool of {trace.num_blocks} blocks over {len(trace.steps)} steps, policy {trace.policy}"

    def data(self) -> dict[str, Any]:
        """What the page carries."""
        return {"block_size": self.trace.block_size, "num_blocks": self.trace.num_blocks, "colours": COLOURS,
                "owners": list(self.trace.requests), "steps": pool_changes(self.trace),
                "notes": [step_note(self.trace, step) for step in self.trace.steps]}

    def to_html(self) -> str:
        """A <div> with everything in it; works in a notebook, a static page and a file."""
        own_keys, last = 'data-lm-suppress-shortcuts="true"', len(self.trace.steps) - 1
        options = "".join(f'<option value="{speed}"{" selected" if speed == 10 else ""}>{speed}</option>'
                          for speed in SPEEDS)
        legend = "; ".join(f"{KEYS[kind]}: {label}" for kind, label in SLOT_LABELS.items())
        packed = json.dumps(self.data(), separators=(",", ":")).replace("</", "<\\/")
        script = files("bros_ref.viz").joinpath("static/player.js").read_text(encoding="utf-8")
        return (f'<div data-bros-player data-step="-1" role="group" aria-label="{escape(repr(self))}">'
                f'<button type="button" {own_keys}>play</button> '
                f'<label>step <input type="range" min="0" max="{last}" value="{self.start}" step="1" {own_keys} '
                'style="width:50%;vertical-align:middle"></label> '
                f"<label>steps a second <select {own_keys}>{options}</select></label>"
                '<div role="status" aria-live="polite"></div>'
                f'<canvas role="img" aria-label="KV blocks at this step. {legend}" style="max-width:100%"></canvas>'
                f'<div style="font-size:12px;color:{MUTED}">{legend}</div>'
                '<div role="status" aria-live="polite">click a slot to see its request\'s block table</div>'
                f'<script type="application/json">{packed}</script><script>{{{script}}}</script></div>')

    def still(self) -> str:
        """The busiest step as SVG."""
        return block_map(self.trace, self.start)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self.to_html(), "image/svg+xml": self.still()}

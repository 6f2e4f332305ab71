"""The KV pool as a player: every block and slot at every step of a trace, in one piece of HTML.

Pure functions of a trace, and a class that shows them. The page holds what changed in each step, not the pool of each
step, so 2,000 blocks over hundreds of steps are small, and the slider needs no kernel (`html.py` says why).
`static/pool.js` draws. Where scripts do not run, the map of the busiest step is shown (`kv_blocks.block_map`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from bros_ref.trace import BlockView, SlotCopies, StepRecord, Trace
from bros_ref.viz.figures.kv_blocks import (
    COPY_KINDS,
    COPY_LABELS,
    FILLS,
    SAVED,
    SLOT_LABELS,
    block_map,
    busiest_step,
)
from bros_ref.viz.figures.style import INK, LOST_COLOUR, MUTED, PAPER, Fill
from bros_ref.viz.widgets.html import (
    Looks,
    controls_html,
    legend_html,
    notebook_output,
    packed_fills,
    request_select,
    widget_html,
)

COLOURS = {"lost": LOST_COLOUR, "paper": PAPER, "ink": INK, "edge": MUTED}
COPY_VERBS = {"checkpoint": "saved to the host", "restore": "brought back", "relocate": "moved"}
POOL_LOOKS: Looks = FILLS | {SAVED: Fill(PAPER, "_", LOST_COLOUR)}  # a bar along the bottom
POOL_LABELS = SLOT_LABELS | COPY_LABELS
POOL_SCRIPTS = ("controls.js", "pool.js")
OfStep = TypeVar("OfStep")


def pool_changes(trace: Trace, moments: Sequence[int] | None = None) -> list[list[int]]:
    """For each step the blocks that changed: block id, then RT owner, its logical index and fill, BE owner, index and
    fill, and BE tokens that live on the host only. Owners are indices into `list(trace.requests)`, -1 for none.

    Args:
        moments: ascending step indices, -1 for before the first: changes from each to the next. None: every step.
    """
    number = {request_id: i for i, request_id in enumerate(trace.requests)}
    step, of_steps, steps = -1, trace.pool_changes(), []
    for moment in range(len(trace.steps)) if moments is None else moments:
        changed: dict[int, BlockView] = {}
        while step < moment:
            step, changed = step + 1, changed | next(of_steps)
        steps.append([value for block_id, view in sorted(changed.items()) for value in (
            block_id, number.get(view.rt_owner or "", -1), view.rt_index, view.rt_fill,
            number.get(view.be_owner or "", -1), view.be_index, view.be_fill, view.overwritten)])
    return steps


def pool_data(trace: Trace, moments: Sequence[int] | None = None) -> dict[str, Any]:
    """What a page needs to draw the pool at any step, or at each of `moments` (as in `pool_changes`): see
    static/pool.js. `copies` holds, for each, block id, kind (an index into `kinds`), first slot and number of slots of
    every run that the step copied."""
    kinds = list(COPY_KINDS)
    copies: list[list[int]] = []
    for runs in _at(trace.copies(), range(len(trace.steps)) if moments is None else moments, list[SlotCopies]()):
        copies.append([])
        for run in runs:
            copies[-1] += [run.block_id, kinds.index(run.kind), run.first_slot, run.num_slots]
    return {"block_size": trace.block_size, "num_blocks": trace.num_blocks, "colours": COLOURS,
            "looks": packed_fills(POOL_LOOKS), "owners": list(trace.requests), "steps": pool_changes(trace, moments),
            "copies": copies, "kinds": list(COPY_KINDS.values())}


def _at(of_steps: Iterator[OfStep], moments: Iterable[int], before: OfStep) -> Iterator[OfStep]:
    """The value at each of the ascending moments; `before` is the value at -1."""
    index, current = -1, before
    for moment in moments:
        while index < moment:
            index, current = index + 1, next(of_steps)
        yield current


def pool_html() -> str:
    """Where static/pool.js draws, and what the fills mean."""
    return (f'<canvas data-pool role="img" aria-label="KV blocks at this step" style="display:block">'
            f'</canvas>{legend_html(POOL_LABELS)}')


def step_note(trace: Trace, step: StepRecord) -> str:
    """One step in words: when, who ran, what was copied."""
    real_time = sum(trace.requests[request_id].request_class == "rt" for request_id in step.scheduled)
    parts = [f"{real_time} real-time and {len(step.scheduled) - real_time} best-effort requests ran",
             f"{step.used_blocks} of {trace.num_blocks} blocks in use"]
    parts += [f"{count} slot{'' if count == 1 else 's'} {verb}" for kind, verb in COPY_VERBS.items()
              if (count := step.copied[kind])]
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
        """The page's data."""
        return pool_data(self.trace) | {"notes": [step_note(self.trace, step) for step in self.trace.steps]}

    def to_html(self) -> str:
        """A <div> with everything in it; works in a notebook, a static page and a file."""
        body = (f'{controls_html(len(self.trace.steps) - 1, self.start)}<div role="status"></div>{pool_html()}'
                f'<div>{request_select(list(self.trace.requests))} <span role="status"></span></div>')
        return widget_html("player", repr(self), body, self.data(), (*POOL_SCRIPTS, "player.js"))

    def still(self) -> str:
        """The busiest step as SVG."""
        return block_map(self.trace, self.start)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return notebook_output(repr(self), self.to_html(), self.still())

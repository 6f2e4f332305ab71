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
    BE,
    COPY_KINDS,
    COPY_LABELS,
    FILLS,
    ONE_LOOK_EACH,
    RT,
    SAVED,
    SLOT_LABELS,
    block_map,
    busiest_step,
    one_class,
    pool_kinds,
)
from bros_ref.viz.figures.style import (
    ALARM_COLOUR,
    INK,
    MUTED,
    NUM_REQUEST_FILLS,
    PAPER,
    RT_COLOUR,
    Fill,
    request_fill,
)
from bros_ref.viz.widgets.html import (
    Looks,
    controls_html,
    legend_html,
    notebook_output,
    packed_fills,
    request_select,
    widget_html,
)

COLOURS = {"alarm": ALARM_COLOUR, "paper": PAPER, "ink": INK, "edge": MUTED,  # of the page
           "rt": RT_COLOUR, "on_rt": PAPER, "on_pale": INK, "halo": "#ffffffe0", "cell": "#18212f60",
           "cell_on_rt": "#ffffff90"}  # of a map
COPY_VERBS = {"checkpoint": "saved to the host", "restore": "brought back", "relocate": "moved"}
POOL_LOOKS: Looks = FILLS | {SAVED: Fill(PAPER, "_", INK)}  # a bar along the bottom
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
    looks = request_looks(trace)
    return {"policy": trace.policy, "block_size": trace.block_size, "num_blocks": trace.num_blocks, "colours": COLOURS,
            "looks": packed_fills({**POOL_LOOKS, **looks}), "num_looks": len(looks), "owners": list(trace.requests),
            "steps": pool_changes(trace, moments), "copies": copies, "kinds": list(COPY_KINDS.values())}


def request_looks(trace: Trace) -> Looks:
    """A fill for each request, `request-<place>`, if all requests are of one class; they repeat. Else none."""
    return {f"request-{place}": request_fill(place) for place in range(min(len(one_class(trace)), NUM_REQUEST_FILLS))}


def pool_labels(*traces: Trace) -> dict[str, str]:
    """Kind -> label of all that the maps of these traces show."""
    kinds = set[str]().union(*map(pool_kinds, traces))
    if all(one_class(trace) for trace in traces):
        kinds -= {RT, BE}
        return {"request-0": ONE_LOOK_EACH} | {kind: label for kind, label in POOL_LABELS.items() if kind in kinds}
    return {kind: label for kind, label in POOL_LABELS.items() if kind in kinds}


def _at(of_steps: Iterator[OfStep], moments: Iterable[int], before: OfStep) -> Iterator[OfStep]:
    """The value at each of the ascending moments; `before` is the value at -1."""
    index, current = -1, before
    for moment in moments:
        while index < moment:
            index, current = index + 1, next(of_steps)
        yield current


def pool_html(*traces: Trace) -> str:
    """Where static/pool.js draws, and what the fills that occur in these traces mean."""
    return (f'<canvas data-pool role="img" aria-label="KV blocks at this step" style="display:block">'
            f'</canvas>{legend_html(pool_labels(*traces))}')


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
        choice = f'<div>{request_select(list(self.trace.requests))} <span role="status"></span></div>'
        body = (f'{controls_html(len(self.trace.steps) - 1, self.start)}<div role="status"></div>'
                f"{pool_html(self.trace)}{choice}")
        return widget_html("player", repr(self), body, self.data(), (*POOL_SCRIPTS, "player.js"))

    def still(self) -> str:
        """The busiest step as SVG."""
        return block_map(self.trace, self.start)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return notebook_output(repr(self), self.to_html(), self.still())

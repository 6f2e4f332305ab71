"""The KV pool: how its blocks were used over time, and who owned every slot at one moment.

Pure functions of a trace (`Trace.pools`). In the map of one moment a block is a strip of B slots: real-time tokens
fill it from the left, best-effort tokens from the right, and what was overwritten is marked. The map is plain SVG, so
it needs no script, prints well, and says owner, request and token positions in its tooltips.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby, islice

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bros_ref.config import cdiv
from bros_ref.trace import BlockView, SlotCopies, Trace
from bros_ref.viz.figures.style import (
    BE_COLOUR,
    BLOCK_LOOKS,
    EMPTY_COLOUR,
    FONT,
    INK,
    LOST_COLOUR,
    MOVED_COLOUR,
    MUTED,
    RESTORED_COLOUR,
    RT_COLOUR,
    Fill,
    dress,
    on_paper,
    svg_pattern,
)

MAX_POINTS = 600  # steps drawn; more are thinned out evenly
MAX_BLOCKS = 192  # blocks of one map

# What a slot holds. OVER: a real-time token where a best-effort one was; LOST: nothing, its token is on the host.
FREE, RT, BE, OVER, LOST = "free", "rt", "be", "over", "lost"
# What the step did to it: brought its token back, moved it here, saved what was in it.
RESTORED, MOVED, SAVED = "restored", "moved", "saved"
SLOT_LABELS = {RT: "real-time, from the left", BE: "best-effort, from the right",
               OVER: "real-time over a saved best-effort token", LOST: "best-effort token on the host only",
               FREE: "free"}
COPY_LABELS = {RESTORED: "brought back in this step", MOVED: "moved here in this step",
               SAVED: "saved to the host in this step"}
COPY_KINDS = {"restore": RESTORED, "relocate": MOVED, "checkpoint": SAVED}  # by kind of copy
FILLS = {FREE: Fill(EMPTY_COLOUR), RT: Fill(RT_COLOUR), BE: Fill(BE_COLOUR, "/", "#8a5200"),
         OVER: Fill(RT_COLOUR, "x", "#ffffff"), LOST: Fill("#ffffff", "x", LOST_COLOUR),
         RESTORED: Fill(RESTORED_COLOUR, "+", "#14634a"), MOVED: Fill(MOVED_COLOUR, "|", "#5b2d91")}
PALE = {"be_only": "#fbe3bd", "shared": "#dccbf0", "rt_only": "#bdd3f3"}  # behind the pattern of a state
BLOCK_W, BLOCK_H, LABEL_W, GAP_X, GAP_Y, KEY_W = 112, 14, 30, 10, 6, 275  # SVG units
MAX_SCALE = 1.25  # no page draws a small map larger than this


def pool_over_time(trace: Trace, end_s: float | None = None) -> go.Figure:
    """Above: blocks by state, stacked to the size of the pool. Below, if there ever are any: tokens whose slots were
    overwritten or given away, so that they are on the host only."""
    times, counts, on_host = pool_series(trace)
    rows = 2 if any(on_host) else 1
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, row_heights=[0.72, 0.28][:rows], vertical_spacing=0.08)
    for state, look in BLOCK_LOOKS.items():
        fill = {"fillcolor": look.colour} if not look.pattern else {"fillpattern": {
            "shape": look.pattern, "fgcolor": look.colour, "bgcolor": PALE[state], "size": 7, "solidity": 0.45}}
        figure.add_scatter(
            x=times, y=[count[state] for count in counts], name=look.label, stackgroup="blocks", mode="lines",
            line={"width": 0.5, "color": look.colour, "shape": "hv"}, row=1, col=1, **fill,
            hovertemplate=f"{look.label}: %{{y}} blocks at %{{x:.2f}} s<extra></extra>")
    if rows == 2:
        figure.add_scatter(x=times, y=on_host, name="overwritten: on the host only", fill="tozeroy", mode="lines",
                           line={"width": 1.5, "color": LOST_COLOUR, "shape": "hv"}, row=2, col=1,
                           hovertemplate="%{y} tokens on the host only at %{x:.2f} s<extra></extra>")
        figure.update_yaxes(title_text="tokens", rangemode="tozero", row=2, col=1)
    figure.update_yaxes(title_text="blocks", range=[0, trace.num_blocks], row=1, col=1)
    figure.update_xaxes(range=[trace.start_s, end_s if end_s is not None else trace.end_s])
    figure.update_xaxes(title_text="seconds", row=rows, col=1)
    dress(figure, 280 + 110 * (rows - 1))
    return figure.update_layout(legend_traceorder="normal")


def pool_series(trace: Trace) -> tuple[list[float], list[Counter[str]], list[int]]:
    """Step starts, blocks by state, and tokens on the host only, of at most MAX_POINTS evenly chosen steps."""
    on_host = tokens_on_host(trace)
    times: list[float] = []
    counts: list[Counter[str]] = []
    chosen: list[int] = []
    for index, pool in _sampled_pools(trace):
        times.append(trace.steps[index].start_s)
        counts.append(Counter(view.state for view in pool))
        chosen.append(on_host[index])
    return times, counts, chosen


def tokens_on_host(trace: Trace) -> list[int]:
    """Tokens that live on the host only, after the decision of each step, [steps]."""
    offloaded: defaultdict[str, dict[int, int]] = defaultdict(dict)
    total, totals = 0, []
    for step in trace.steps:
        for request_id, index, num_offloaded in step.offloaded:
            total += num_offloaded - offloaded[request_id].get(index, 0)
            offloaded[request_id][index] = num_offloaded
        for request_id, index, _ in step.block_changes:
            if index < 0:
                total -= sum(offloaded.pop(request_id, {}).values())
        totals.append(total)
    return totals


def _sampled_pools(trace: Trace) -> Iterator[tuple[int, list[BlockView]]]:
    """Step index and pool of at most MAX_POINTS steps: looking at every block of every step would take minutes."""
    stride = max(1, cdiv(len(trace.steps), MAX_POINTS))
    return ((index, pool) for index, pool in enumerate(trace.pools()) if index % stride == 0)


def busiest_step(trace: Trace) -> int:
    """The index of the step with the most shared blocks and overwritten slots, or else the most used blocks, among
    the steps that `pool_series` looks at; the first of equals.

    Raises:
        ValueError: the trace has no steps.
    """
    if not trace.steps:
        raise ValueError("this trace has no steps: there is no moment to show")
    scores = {index: (sum((view.state == "shared") + view.overwritten for view in pool), trace.steps[index].used_blocks)
              for index, pool in _sampled_pools(trace)}
    return max(scores, key=lambda index: scores[index])


def slot_kinds(view: BlockView, block_size: int) -> list[str]:
    """What each slot of a block holds, left to right, [block_size]."""
    kinds = [FREE] * block_size
    first_be = block_size - view.be_fill
    for slot in range(first_be, block_size):
        kinds[slot] = LOST if slot < first_be + view.overwritten else BE
    for slot in range(view.rt_fill):
        kinds[slot] = OVER if kinds[slot] == LOST else RT
    return kinds


def block_map(trace: Trace, step_index: int, columns: int = 6) -> str:
    """The pool after the decision of one step, as an SVG element, with the slots that the step saved, brought back
    and moved. For a large pool: the most interesting blocks."""
    copies = next(islice(trace.copies(), step_index, None))
    return pool_svg(trace.pool_at(step_index), trace.block_size, columns,
                    f"KV pool at {trace.steps[step_index].start_s:.2f} s, policy {trace.policy}", copies)


def pool_svg(pool: Sequence[BlockView], block_size: int, columns: int = 6, title: str = "KV pool",
             copies: Sequence[SlotCopies] = ()) -> str:
    """Any pool as an SVG element; `title` is its accessible name, `copies` the slots that a step has just copied."""
    shown = _blocks_to_show(pool)
    made = {COPY_KINDS[run.kind] for run in copies}
    labels = SLOT_LABELS | {kind: label for kind, label in COPY_LABELS.items() if kind in made}
    width = max(columns * (LABEL_W + BLOCK_W + GAP_X) - GAP_X + 1, LABEL_W + 2 * KEY_W)
    top = cdiv(len(labels), width // KEY_W) * (BLOCK_H + GAP_Y) + 12
    height = cdiv(len(shown), columns) * (BLOCK_H + GAP_Y) + top
    cells = []
    for place, block_id in enumerate(shown):
        x = place % columns * (LABEL_W + BLOCK_W + GAP_X) + LABEL_W
        y = place // columns * (BLOCK_H + GAP_Y) + top
        cells.append(f'<text x="{x - 4}" y="{y + 11}" text-anchor="end" class="id">{block_id}</text>')
        cells += _block_parts(pool[block_id], block_id, block_size, x, y)
        mine = [run for run in copies if run.block_id == block_id]
        cells += _copy_parts(pool[block_id], mine, block_size, x, y)
    title, scaled = escape(title), f"max-width:{MAX_SCALE * width:.0f}px"
    patterns = "".join(svg_pattern(f"kv-{kind}", fill) for kind, fill in FILLS.items() if kind in labels)
    counts = Counter(view.state for view in pool)
    summary = ", ".join(f"{counts[state]} {look.label}" for state, look in BLOCK_LOOKS.items())
    svg = (f'<svg class="block-map" viewBox="0 0 {width} {height}" style="{scaled}" role="img" aria-label="{title}: '
           f'{escape(summary)}" xmlns="http://www.w3.org/2000/svg"><defs>{patterns}</defs>{_STYLE}'
           f'{_legend(labels, width)}{"".join(cells)}</svg>')
    return on_paper(svg)


def _blocks_to_show(pool: Sequence[BlockView]) -> list[int]:
    """All blocks of a small pool; of a large one, in order of id, first those that are shared or overwritten."""
    def dullness(block_id: int) -> tuple[bool, bool, int]:
        view = pool[block_id]
        return view.state != "shared" and not view.overwritten, view.state == "empty", block_id

    return sorted(sorted(range(len(pool)), key=dullness)[:MAX_BLOCKS])


def _block_parts(view: BlockView, block_id: int, block_size: int, x: float, y: float) -> Iterator[str]:
    """A rectangle for each run of equal slots, its tooltip, and the block's outline."""
    slot_w = BLOCK_W / block_size
    runs = groupby(enumerate(slot_kinds(view, block_size)), key=lambda entry: entry[1])
    for kind, run in runs:
        slots = [slot for slot, _ in run]
        tip = f"block {block_id}, slots {slots[0]} to {slots[-1]}: {_tip(view, kind, slots, block_size)}"
        yield (f'<rect x="{x + slots[0] * slot_w:.2f}" y="{y}" width="{len(slots) * slot_w:.2f}" height="{BLOCK_H}" '
               f'fill="url(#kv-{kind})"><title>{escape(tip)}</title></rect>')
    yield f'<rect x="{x}" y="{y}" width="{BLOCK_W}" height="{BLOCK_H}" class="edge"/>'


def _copy_parts(view: BlockView, copies: Sequence[SlotCopies], block_size: int, x: float, y: float) -> Iterator[str]:
    """Marks over a block: slots whose tokens were restored or moved there, and a bar under those that were saved."""
    slot_w = BLOCK_W / block_size
    for run in sorted(copies, key=lambda run: run.kind == "checkpoint"):  # its block may hold other tokens by now
        kind, slots = COPY_KINDS[run.kind], range(run.first_slot, run.first_slot + run.num_slots)
        tip = f"block {run.block_id}, slots {slots[0]} to {slots[-1]}: {COPY_LABELS[kind]}: {run.request_id}"
        top, tall, fill = (y + BLOCK_H - 3, 3, LOST_COLOUR) if kind == SAVED else (y, BLOCK_H, f"url(#kv-{kind})")
        yield (f'<rect x="{x + slots[0] * slot_w:.2f}" y="{top}" width="{len(slots) * slot_w:.2f}" height="{tall}" '
               f'fill="{fill}"><title>{escape(tip)}</title></rect>')


def _tip(view: BlockView, kind: str, slots: Sequence[int], block_size: int) -> str:
    """Owner, request and token positions of a run of slots."""
    if kind == FREE:
        return "free"
    rt_from = view.rt_index * block_size
    be_from = view.be_index * block_size + block_size - 1  # position of the token in slot 0: BE counts from the right
    rt = f"real-time {view.rt_owner}, tokens {rt_from + slots[0]} to {rt_from + slots[-1]}"
    be = f"best-effort {view.be_owner}, tokens {be_from - slots[-1]} to {be_from - slots[0]}"
    return {RT: rt, BE: be, LOST: f"{be}: on the host only", OVER: f"{rt}; over {be}, which are on the host"}[kind]


def _legend(labels: Mapping[str, str], width: int) -> str:
    """Rows of as many keys as there is room for."""
    parts, a_row = [], width // KEY_W
    for place, (kind, label) in enumerate(labels.items()):
        x, y = LABEL_W + place % a_row * (width - LABEL_W) / a_row, 2 + place // a_row * (BLOCK_H + GAP_Y)
        if kind == SAVED:
            parts.append(f'<rect x="{x:.1f}" y="{y + BLOCK_H - 3}" width="30" height="3" fill="{LOST_COLOUR}"/>')
        else:
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="30" height="{BLOCK_H}" fill="url(#kv-{kind})"/>')
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="30" height="{BLOCK_H}" class="edge"/>'
                     f'<text x="{x + 37:.1f}" y="{y + 11}">{label}</text>')
    return "".join(parts)


_STYLE = (f"<style>.block-map text{{font:11px {FONT};fill:{INK}}}.block-map .id{{fill:{MUTED};font-size:10px}}"
          ".block-map .edge{fill:none;stroke:#66717f;stroke-width:.8}</style>")

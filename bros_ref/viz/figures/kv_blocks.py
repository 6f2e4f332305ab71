"""The KV pool: how its blocks were used over time, and who owned every slot at one moment.

Pure functions of a trace (`Trace.pools`). In the map of one moment a block is a strip of B slots: real-time tokens
fill it from the left, best-effort tokens from the right, and what was overwritten is marked. Slots are cells that can
be counted, with the number of the token where there is room. Where all requests are of one class, each has a look of
its own. The map is plain SVG, so it needs no script, prints well, and names owners and tokens in its tooltips.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby, islice

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bros_ref.config import cdiv
from bros_ref.trace import BlockView, SlotCopies, Trace
from bros_ref.viz.figures.style import (
    BE_COLOUR,
    BLOCK_LOOKS,
    DARK_COLOURS,
    EMPTY_COLOUR,
    FONT,
    INK,
    MUTED,
    PALE_COLOURS,
    PAPER,
    RT_COLOUR,
    Fill,
    dress,
    on_paper,
    request_fill,
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
ONE_LOOK_EACH = "one look for each request"
COPY_LABELS = {RESTORED: "brought back in this step", MOVED: "moved here in this step",
               SAVED: "saved to the host in this step"}
COPY_KINDS = {"restore": RESTORED, "relocate": MOVED, "checkpoint": SAVED}  # by kind of copy
VEIL = "#ffffffb0"  # over a slot: what it holds shows through
FILLS = {FREE: Fill(EMPTY_COLOUR), RT: Fill(RT_COLOUR), BE: Fill(BE_COLOUR, "/", DARK_COLOURS["be"]),
         OVER: Fill(RT_COLOUR, "x", PAPER), LOST: Fill(PAPER, "x", DARK_COLOURS["be"]),
         RESTORED: Fill(VEIL, "+", INK), MOVED: Fill(VEIL, "|", INK)}
PALE = {"be_only": PALE_COLOURS["be"], "shared": "#dccbf0", "rt_only": PALE_COLOURS["rt"]}  # behind a state's pattern
MAP_W, BLOCK_H, LABEL_W, GAP_X, GAP_Y, KEY_W = 903, 14, 30, 10, 6, 275  # SVG units
FEW_BLOCKS, FEW_COLUMNS, COLUMNS = 32, 3, 6  # blocks of a small pool are drawn wide
MAX_SLOT_W, MAX_CELLS = 30, 32  # slots of a block that are drawn as single cells
DIGIT_W, CELL_PAD = 4.8, 2.5  # room that a digit takes, and what stays free in a cell
MAX_NAMED = 12  # requests that a legend names
MAX_SCALE = 1.25  # no page draws a small map larger than this


def pool_over_time(trace: Trace, end_s: float | None = None) -> go.Figure:
    """Above: blocks by state, stacked to the size of the pool. Below, if there ever are any: tokens whose slots were
    overwritten or given away, so that they are on the host only."""
    times, counts, on_host = pool_series(trace)
    rows = 2 if any(on_host) else 1
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, row_heights=[0.72, 0.28][:rows], vertical_spacing=0.08)
    for state, look in BLOCK_LOOKS.items():
        if not any(count[state] for count in counts):
            continue
        fill = {"fillcolor": look.colour} if not look.pattern else {"fillpattern": {
            "shape": look.pattern, "fgcolor": look.colour, "bgcolor": PALE[state], "size": 7, "solidity": 0.45}}
        figure.add_scatter(
            x=times, y=[count[state] for count in counts], name=look.label, stackgroup="blocks", mode="lines",
            line={"width": 0.5, "color": look.colour, "shape": "hv"}, row=1, col=1, **fill,
            hovertemplate=f"{look.label}: %{{y}} blocks at %{{x:.2f}} s<extra></extra>")
    if rows == 2:
        figure.add_scatter(x=times, y=on_host, name="overwritten: on the host only", fill="tozeroy", mode="lines",
                           line={"width": 1.5, "color": DARK_COLOURS["be"], "shape": "hv"}, row=2, col=1,
                           hovertemplate="%{y} tokens on the host only at %{x:.2f} s<extra></extra>")
        figure.update_yaxes(title_text="tokens", rangemode="tozero", row=2, col=1)
    figure.update_yaxes(title_text="blocks", range=[0, trace.num_blocks], row=1, col=1)
    figure.update_xaxes(range=[trace.start_s, end_s if end_s is not None else trace.end_s])
    figure.update_xaxes(title_text="seconds", row=rows, col=1)
    dress(figure, 306 + 110 * (rows - 1), f"KV pool under {escape(trace.policy)}")
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


def one_class(trace: Trace) -> list[str]:
    """The ids of all requests in their order, if all are of one class; else empty. Then colour tells requests apart."""
    return list(trace.requests) if len({record.request_class for record in trace.requests.values()}) == 1 else []


def pool_kinds(trace: Trace) -> set[str]:
    """All that a map of any step of the trace shows: what slots hold, and what steps did to them."""
    kinds = {FREE} | {COPY_KINDS[kind] for step in trace.steps for kind, count in step.copied.items() if count}
    for changes in trace.pool_changes():
        if kinds.issuperset(SLOT_LABELS):
            break
        for view in changes.values():
            kinds.update(slot_kinds(view, trace.block_size))
    return kinds


def block_map(trace: Trace, step_index: int, columns: int | None = None) -> str:
    """The pool after the decision of one step, as an SVG element, with the slots that the step saved, brought back
    and moved. For a large pool: the most interesting blocks."""
    copies = next(islice(trace.copies(), step_index, None))
    return pool_svg(trace.pool_at(step_index), trace.block_size, columns,
                    f"{trace.policy}: KV pool at {trace.steps[step_index].start_s:.2f} s", copies, one_class(trace))


def pool_svg(pool: Sequence[BlockView], block_size: int, columns: int | None = None, title: str = "",
             copies: Sequence[SlotCopies] = (), requests: Sequence[str] = ()) -> str:
    """Any pool as an SVG element.

    Args:
        columns: blocks in a row. None: three for a small pool, else six.
        title: stands above, and begins the accessible name.
        copies: the slots that a step has just copied.
        requests: if given, each of these requests has a look of its own, by its place; for pools of one class. Others
            in the pool come after them.
    """
    owners = [owner for view in pool for owner in (view.rt_owner, view.be_owner) if owner is not None]
    draw = _Drawing(block_size, list(dict.fromkeys((*requests, *owners))) if requests else [])
    shown = _blocks_to_show(pool)
    columns = columns or (FEW_COLUMNS if len(shown) <= FEW_BLOCKS else COLUMNS)
    draw.block_w = min((MAP_W + GAP_X) / columns - LABEL_W - GAP_X, MAX_SLOT_W * block_size)
    top = 22 if title else 2
    cells = []
    for place, block_id in enumerate(shown):
        x, y = place % columns * (LABEL_W + draw.block_w + GAP_X) + LABEL_W, place // columns * (BLOCK_H + GAP_Y)
        mine = [run for run in copies if run.block_id == block_id]
        cells.append(f'<g transform="translate({x:.1f} {y})"><text x="-4" y="11" class="id">{block_id}</text>'
                     f'{"".join(draw.block(pool[block_id], block_id, mine))}</g>')
    legend_h = draw.legend_rows() * (BLOCK_H + GAP_Y) + 12
    height = top + legend_h + cdiv(len(shown), columns) * (BLOCK_H + GAP_Y)
    drawn = sorted(draw.seen - {SAVED})
    patterns = draw.cells() + "".join(svg_pattern(f"kv-{kind}", draw.fill(kind)) for kind in drawn)
    counts = Counter(view.state for view in pool)
    summary = ", ".join(f"{counts[state]} {look.label}" for state, look in BLOCK_LOOKS.items())
    heading = f'<text x="0" y="14" class="title">{escape(title)}</text>' if title else ""
    svg = (f'<svg class="block-map" viewBox="0 0 {MAP_W + 1} {height}" style="max-width:{MAX_SCALE * MAP_W:.0f}px" '
           f'role="img" aria-label="{escape(title or "KV pool")}: {escape(summary)}" '
           f'xmlns="http://www.w3.org/2000/svg"><defs>{patterns}</defs>{_STYLE}{heading}'
           f'<g transform="translate(0 {top})">{draw.legend()}</g>'
           f'<g transform="translate(0 {top + legend_h})">{"".join(cells)}</g></svg>')
    return on_paper(svg)


def _blocks_to_show(pool: Sequence[BlockView]) -> list[int]:
    """All blocks of a small pool; of a large one, in order of id, first those that are shared or overwritten."""
    def dullness(block_id: int) -> tuple[bool, bool, int]:
        view = pool[block_id]
        return view.state != "shared" and not view.overwritten, view.state == "empty", block_id

    return sorted(sorted(range(len(pool)), key=dullness)[:MAX_BLOCKS])


class _Drawing:
    """Blocks as SVG, with `seen`, the kinds that were drawn, for the legend."""

    def __init__(self, block_size: int, requests: list[str]) -> None:
        self.block_size, self.requests, self.block_w = block_size, requests, 0.0
        self.seen: set[str] = set()

    def fill(self, kind: str) -> Fill:
        """By kind of slot, or by request."""
        return FILLS[kind] if kind in FILLS else request_fill(int(kind.removeprefix("request-")))

    def cells(self) -> str:
        """Patterns of one slot's width: a line between slots, for a dark and for a light ground."""
        if self.block_size > MAX_CELLS:
            return ""
        slot_w = self.block_w / self.block_size
        return "".join(f'<pattern id="{self._cells_id(on)}" width="{slot_w:.3f}" height="{BLOCK_H}" '
                       f'patternUnits="userSpaceOnUse"><path d="M{slot_w - 0.35:.2f} 0v{BLOCK_H}" stroke="{colour}" '
                       'stroke-width=".7"/></pattern>' for on, colour in (("rt", "#ffffff90"), ("pale", "#18212f60")))

    def _cells_id(self, on: str) -> str:
        """With the width in it: a page may hold maps of several widths."""
        return f"kv-cells-{on}-{1000 * self.block_w / self.block_size:.0f}"

    def block(self, view: BlockView, block_id: int, copies: Sequence[SlotCopies]) -> Iterator[str]:
        """A rectangle for each run of equal slots with its tooltip, marks of copies, lines between the slots, numbers
        of tokens, and the block's outline; from its upper left corner on."""
        slot_w, kinds = self.block_w / self.block_size, slot_kinds(view, self.block_size)
        for kind, run in groupby(enumerate(kinds), key=lambda entry: entry[1]):
            slots = [slot for slot, _ in run]
            tip = f"block {block_id}, slots {slots[0]} to {slots[-1]}: {_tip(view, kind, slots, self.block_size)}"
            yield self._rect(self._look(view, kind), slots, tip)
        for copied in sorted(copies, key=lambda copied: copied.kind == "checkpoint"):  # its block may hold others' now
            slots = list(range(copied.first_slot, copied.first_slot + copied.num_slots))
            kind = COPY_KINDS[copied.kind]
            tip = f"block {block_id}, slots {slots[0]} to {slots[-1]}: {COPY_LABELS[kind]}: {copied.request_id}"
            yield self._rect(kind, slots, tip)
        outline = [(0, self.block_size, 'class="edge"')]
        if self.block_size <= MAX_CELLS:
            dark = sum(self._look(view, kind) in (RT, OVER) for kind in kinds)
            outline = [(first, end, f'fill="url(#{self._cells_id(on)})" class="box"')
                       for on, first, end in (("rt", 0, dark), ("pale", dark, self.block_size)) if end > first]
        for first, end, look in outline:
            yield f"<rect {self._extent(first, end)} {look}/>"
        tokens = [token_at(view, kind, slot, self.block_size) for slot, kind in enumerate(kinds)]
        digits = max((len(str(token)) for token in tokens if token is not None), default=0)
        for slot, token in enumerate(tokens if slot_w >= DIGIT_W * digits + CELL_PAD else ()):
            if token is not None:
                on = "on-rt" if self._look(view, kinds[slot]) in (RT, OVER) else "on-pale"
                yield f'<text x="{(slot + 0.5) * slot_w:.1f}" y="10.5" class="token {on}">{token}</text>'

    def _look(self, view: BlockView, kind: str) -> str:
        if not self.requests or kind not in (RT, BE):
            return kind
        return f"request-{self.requests.index((view.rt_owner if kind == RT else view.be_owner) or '')}"

    def _rect(self, kind: str, slots: Sequence[int], tip: str) -> str:
        self.seen.add(kind)
        extent, fill = self._extent(slots[0], slots[-1] + 1), f"url(#kv-{kind})"
        if kind == SAVED:
            extent, fill = self._extent(slots[0], slots[-1] + 1, 3) + f' y="{BLOCK_H - 3}"', INK
        return f'<rect {extent} fill="{fill}"><title>{escape(tip)}</title></rect>'

    def _extent(self, first: int, end: int, tall: int = BLOCK_H) -> str:
        """Attributes of a rectangle over some slots."""
        slot_w = self.block_w / self.block_size
        at = f'x="{first * slot_w:.1f}" ' if first else ""
        return f'{at}width="{(end - first) * slot_w:.1f}" height="{tall}"'

    def _labels(self) -> dict[str, str]:
        """Of what was drawn, in a fixed order."""
        labels = {f"request-{place}": name for place, name in enumerate(self.requests)} | SLOT_LABELS | COPY_LABELS
        labels = {kind: label for kind, label in labels.items() if kind in self.seen}
        named = [kind for kind in labels if kind not in SLOT_LABELS | COPY_LABELS]
        if len(named) > MAX_NAMED:
            labels = {kind: label for kind, label in labels.items() if kind not in named[1:]}
            labels[named[0]] = ONE_LOOK_EACH
        return labels

    def legend_rows(self) -> int:
        """How many rows the legend has."""
        return cdiv(len(self._labels()), MAP_W // KEY_W)

    def legend(self) -> str:
        """Rows of as many keys as there is room for."""
        parts, a_row = [], MAP_W // KEY_W
        for place, (kind, label) in enumerate(self._labels().items()):
            x, y = LABEL_W + place % a_row * (MAP_W - LABEL_W) / a_row, place // a_row * (BLOCK_H + GAP_Y)
            top, tall, fill = (y + BLOCK_H - 3, 3, INK) if kind == SAVED else (y, BLOCK_H, f"url(#kv-{kind})")
            parts.append(f'<rect x="{x:.1f}" y="{top}" width="30" height="{tall}" fill="{fill}"/>'
                         f'<rect x="{x:.1f}" y="{y}" width="30" height="{BLOCK_H}" class="edge"/>'
                         f'<text x="{x + 37:.1f}" y="{y + 11}">{escape(label)}</text>')
        return "".join(parts)


def token_at(view: BlockView, kind: str, slot: int, block_size: int) -> int | None:
    """The position in its request of the token that a slot holds; None if it holds none."""
    if kind in (RT, OVER):
        return view.rt_index * block_size + slot
    return view.be_index * block_size + block_size - 1 - slot if kind == BE else None


def _tip(view: BlockView, kind: str, slots: Sequence[int], block_size: int) -> str:
    """Owner, request and token positions of a run of slots."""
    if kind == FREE:
        return "free"
    rt_from = view.rt_index * block_size
    be_from = view.be_index * block_size + block_size - 1  # position of the token in slot 0: BE counts from the right
    rt = f"real-time {view.rt_owner}, tokens {rt_from + slots[0]} to {rt_from + slots[-1]}"
    be = f"best-effort {view.be_owner}, tokens {be_from - slots[-1]} to {be_from - slots[0]}"
    return {RT: rt, BE: be, LOST: f"{be}: on the host only", OVER: f"{rt}; over {be}, which are on the host"}[kind]


_STYLE = (f"<style>.block-map text{{font:11px {FONT};fill:{INK}}}"
          f".block-map .id{{fill:{MUTED};font-size:10px;text-anchor:end}}"
          ".block-map .title{font-size:12.5px;font-weight:600}"
          ".block-map .edge{fill:none}.block-map .edge,.block-map .box{stroke:#66717f;stroke-width:.8}"
          ".block-map .token{font-size:9px;text-anchor:middle;"
          "paint-order:stroke;stroke-width:2.6px;stroke-linejoin:round}"
          f".block-map .token.on-rt{{fill:{PAPER};stroke:{RT_COLOUR}}}"
          ".block-map .token.on-pale{stroke:#ffffffe0}</style>")

"""The causal mask, interactive: what each query row sees, in logical order and in the slots where tokens lie.

Pure functions of a few numbers, and a class that shows them. `static/causal_mask.js` draws the same picture in the
page, without a kernel, from the same numbers; a browser test compares the two character by character. Invariant: which
token lies in which slot, and who sees it, are what `model/attention.py` computes (a test compares with that too).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from bros_ref.config import cdiv
from bros_ref.viz.figures.style import ALARM_COLOUR, FONT, GRID, INK, MUTED, PAPER, PLAIN_COLOUR, on_paper
from bros_ref.viz.widgets.html import notebook_output, script_json

# What a row does with a slot. The first three are right; the others happen only under a mask by column.
SEEN, LATER, OTHER, MISSED, EARLY, FOREIGN = "seen", "later", "other", "missed", "early", "foreign"
LABELS = {SEEN: "seen", LATER: "its own, but later", OTHER: "not this sequence's", MISSED: "should be seen, is not",
          EARLY: "later, but read", FOREIGN: "not its own, but read"}
BLOCK_SIZES = (4, 8, 16)
MAX_QUERY, MAX_CONTEXT = 8, 24
_LABEL = "display:inline-block;margin-right:1.2em"
_CELL, _LEFT, _TOP, _BETWEEN, _GAP, _WIDTH = 20, 132, 76, 84, 6, 812


@dataclass(frozen=True)
class MaskSetting:
    """One sequence: its last `query` of `context` tokens are new, its blocks are filled from the right if `reversed`.

    `by_column` is the wrong mask of notebook 01: the n-th column of the cache instead of the n-th token.

    Raises:
        ValueError: not 1 <= query <= context, or a block of no slots.
    """

    query: int
    context: int
    block_size: int
    reversed: bool = False
    by_column: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.query <= self.context:
            raise ValueError(f"need 1 <= query <= context, got {self.query} new of {self.context} tokens")
        if self.block_size < 1:
            raise ValueError(f"a block has at least one slot, got {self.block_size}")

    @property
    def num_slots(self) -> int:
        """Slots of the sequence's blocks, its own or not."""
        return cdiv(self.context, self.block_size) * self.block_size


def position_in(setting: MaskSetting, slot: int) -> int:
    """The logical position that this slot belongs to; from `context` on, it holds no token of this sequence."""
    block, column = divmod(slot, setting.block_size)
    return block * setting.block_size + (setting.block_size - 1 - column if setting.reversed else column)


def slot_kinds(setting: MaskSetting) -> list[list[str]]:
    """What each query row does with each slot, [query][num_slots]."""
    rows = []
    for row in range(setting.query):
        at, kinds = setting.context - setting.query + row, []
        for slot in range(setting.num_slots):
            position = position_in(setting, slot)
            own, visible = position < setting.context, position <= at
            read = slot <= at if setting.by_column else visible
            if visible:
                kinds.append(SEEN if read else MISSED)
            else:
                kinds.append((EARLY if read else LATER) if own else (FOREIGN if read else OTHER))
        rows.append(kinds)
    return rows


def mask_note(setting: MaskSetting, row: int, tokens: Sequence[str]) -> str:
    """One row in a sentence."""
    at = setting.context - setting.query + row
    kinds = slot_kinds(setting)[row]
    slots = [slot for slot, kind in enumerate(kinds) if kind in (SEEN, EARLY, FOREIGN)]
    wrong = sum(kind in (MISSED, EARLY, FOREIGN) for kind in kinds)
    end = f"; {wrong} of these slots {'is' if wrong == 1 else 'are'} wrong" if wrong else ""
    return (f"row {row} is token {at} ({tokens[at]}): it must see tokens 0 to {at}, and reads slots "
            f"{', '.join(map(str, slots))}{end}")


def mask_svg(setting: MaskSetting, row: int, tokens: Sequence[str]) -> str:
    """Both orders, one above the other, as an SVG element; `row` is outlined, and its tokens are traced to their slots.

    Raises:
        ValueError: there is no such row, or fewer tokens than the context.
    """
    if not 0 <= row < setting.query or len(tokens) < setting.context:
        raise ValueError(f"need a row of 0..{setting.query - 1} and {setting.context} tokens, got row {row} and "
                         f"{len(tokens)} tokens")
    note = escape(mask_note(setting, row, tokens))
    height = _TOP + 2 * setting.query * _CELL + _BETWEEN + 40
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" class="causal-mask" viewBox="0 0 {_WIDTH} {height}" role="img" '
           f'aria-label="{note}">{_DEFS}{picture(setting, row, [escape(token) for token in tokens])}</svg>')
    return on_paper(svg)


def picture(setting: MaskSetting, row: int, labels: Sequence[str]) -> str:
    """The inside of the SVG, without its definitions; `labels` are escaped tokens. `causal_mask.js` draws this."""
    kinds, size = slot_kinds(setting), setting.block_size
    slot_of = {position_in(setting, slot): slot for slot in range(setting.num_slots)}
    second, high = _TOP + setting.query * _CELL + _BETWEEN, setting.query * _CELL
    parts = [f'<text x="0" y="{_TOP - 22}">logical order</text><text x="0" y="{second - 42}">physical order</text>']
    for position in range(setting.context):
        x, slot = _LEFT + position * _CELL, slot_of[position]
        parts.append(f'<text x="{x + 10}" y="{_TOP - 5}" class="at">{position}</text>')
        parts += [_cell(x, _TOP + r * _CELL, kinds[r][slot], r) for r in range(setting.query)]
        if kinds[row][slot] in (SEEN, EARLY):
            parts.append(f'<path d="M{x + 10} {_TOP + high}L{_slot_x(slot, size) + 10} {second - 34}" class="way"/>')
    for slot in range(setting.num_slots):
        x, position = _slot_x(slot, size), position_in(setting, slot)
        if slot % size == 0:
            parts.append(f'<text x="{x}" y="{second + high + 15}">block {slot // size}: slots {slot} to '
                         f"{slot + size - 1}</text>")
        held = str(position) if position < setting.context else "-"
        parts.append(f'<text x="{x + 10}" y="{second - 20}" class="at">{held}</text>'
                     f'<text x="{x + 10}" y="{second - 5}" class="at">{slot}</text>')
        parts += [_cell(x, second + r * _CELL, kinds[r][slot], r) for r in range(setting.query)]
    for r in range(setting.query):
        at = setting.context - setting.query + r
        parts += [f'<text x="{_LEFT - 6}" y="{top + r * _CELL + 14}" class="row">{at} {labels[at]}</text>'
                  for top in (_TOP, second)]
    for top, wide in ((_TOP, setting.context * _CELL), (second, _slot_x(setting.num_slots - 1, size) + 20 - _LEFT)):
        parts.append(f'<rect x="{_LEFT - 2}" y="{top + row * _CELL - 2}" width="{wide + 4}" height="{_CELL + 4}" '
                     'class="chosen"/>')
    parts.append(f'<text x="{_LEFT - 6}" y="{_TOP - 5}" class="row">token</text><text x="{_LEFT - 6}" '
                 f'y="{second - 20}" class="row">holds token</text><text x="{_LEFT - 6}" y="{second - 5}" '
                 'class="row">slot</text>')
    return "".join(parts) + _legend({kind for row_kinds in kinds for kind in row_kinds})


class CausalMaskExplorer:
    """The interactive picture: query length, context, block size, direction, the wrong mask, and a row.

    Args:
        tokens: the texts of at least as many tokens as the context; at most MAX_CONTEXT are used.

    Raises:
        ValueError: fewer tokens than `start.context`, or more asked for than the picture has room for.
    """

    def __init__(self, tokens: Sequence[str], start: MaskSetting | None = None) -> None:
        self.tokens = [token.replace("\n", "\\n") for token in tokens[:MAX_CONTEXT]]
        self.start = start or MaskSetting(min(4, len(tokens)), min(10, len(tokens)), 8)
        if self.start.query > MAX_QUERY or self.start.context > len(self.tokens):
            raise ValueError(f"the picture has room for {MAX_QUERY} rows and {len(self.tokens)} tokens, asked for "
                             f"{self.start.query} and {self.start.context}")

    def __repr__(self) -> str:
        return f"causal mask of up to {len(self.tokens)} tokens, {MAX_QUERY} query rows, blocks of {BLOCK_SIZES}"

    def data(self) -> dict[str, Any]:
        """The page's data."""
        return {"labels": [escape(token) for token in self.tokens], "top": _TOP, "left": _LEFT, "cell": _CELL,
                "between": _BETWEEN, "gap": _GAP, "width": _WIDTH,
                "legend": [[kind, escape(label)] for kind, label in LABELS.items()]}

    def to_html(self) -> str:
        """A <div> with everything in it; works in a notebook, a static page and a file."""
        s, last = self.start, len(self.tokens)
        controls = (_range("new tokens", "query", 1, MAX_QUERY, s.query)
                    + _range("tokens in all", "context", 1, last, s.context)
                    + _select("slots a block", "block", [(str(size), str(size)) for size in BLOCK_SIZES],
                              str(s.block_size))
                    + _select("filled from", "reversed", [("no", "the left (real-time)"),
                                                          ("yes", "the right (best-effort)")], _yes(s.reversed))
                    + _select("mask", "column", [("no", "by position"), ("yes", "by column (wrong)")],
                              _yes(s.by_column))
                    + _range("row", "row", 0, s.query - 1, s.query - 1))
        data = script_json(self.data())
        script = files("bros_ref.viz").joinpath("static/causal_mask.js").read_text(encoding="utf-8")
        return (f'<div data-bros-mask role="group" aria-label="{escape(repr(self))}"><div>{controls}</div>'
                f'<div role="status" aria-live="polite" style="min-height:3em"></div>{self.still()}'
                f'<script type="application/json">{data}</script><script>{{{script}}}</script></div>')

    def still(self) -> str:
        """The first setting, its last row chosen, as SVG."""
        return mask_svg(self.start, self.start.query - 1, self.tokens)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return notebook_output(repr(self), self.to_html(), self.still())


def _slot_x(slot: int, block_size: int) -> int:
    return _LEFT + slot * _CELL + slot // block_size * _GAP


def _cell(x: int, y: int, kind: str, row: int) -> str:
    return f'<rect x="{x}" y="{y}" width="20" height="20" class="{kind}" data-row="{row}"/>'


def _legend(seen: Collection[str]) -> str:
    """Of the kinds that are drawn."""
    parts = []
    for place, (kind, label) in enumerate((kind, label) for kind, label in LABELS.items() if kind in seen):
        x, y = _LEFT + place % 3 * 220, 2 + place // 3 * 20
        parts.append(f'<rect x="{x}" y="{y}" width="26" height="14" class="{kind}"/><text x="{x + 32}" '
                     f'y="{y + 12}">{escape(label)}</text>')
    return "".join(parts)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _range(label: str, name: str, low: int, high: int, value: int) -> str:
    return (f'<label style="{_LABEL}">{label} <input type="range" name="{name}" min="{low}" max="{high}" '
            f'value="{value}" step="1" data-lm-suppress-shortcuts="true" style="width:110px;vertical-align:middle"> '
            f"<span>{value}</span></label> ")


def _select(label: str, name: str, options: Sequence[tuple[str, str]], chosen: str) -> str:
    listed = "".join(f'<option value="{value}"{" selected" if value == chosen else ""}>{text}</option>'
                     for value, text in options)
    return (f'<label style="{_LABEL}">{label} <select name="{name}" data-lm-suppress-shortcuts="true">'
            f"{listed}</select></label> ")


def _pattern(kind: str, fill: str, marks: str) -> str:
    return (f'<pattern id="mask-{kind}" width="10" height="10" patternUnits="userSpaceOnUse">'
            f'<rect width="10" height="10" fill="{fill}"/>{marks}</pattern>')


_CROSS = "M2 2L8 8M8 2L2 8"
_DEFS = (
    "<defs>" + _pattern(SEEN, PLAIN_COLOUR, "") + _pattern(LATER, PAPER, "")
    + _pattern(OTHER, GRID, f'<circle cx="5" cy="5" r="1.3" fill="{MUTED}"/>')
    + _pattern(MISSED, PAPER, f'<path d="M0 10L10 0" stroke="{ALARM_COLOUR}" stroke-width="2"/>')
    + _pattern(EARLY, PLAIN_COLOUR, f'<path d="{_CROSS}" stroke="#fff" stroke-width="1.6"/>')
    + _pattern(FOREIGN, GRID, f'<path d="{_CROSS}" stroke="{ALARM_COLOUR}" stroke-width="2"/>')
    + f"</defs><style>.causal-mask{{width:100%;max-width:{_WIDTH}px;height:auto}}"
      f".causal-mask text{{font:11px {FONT};fill:{INK}}}"
      f".causal-mask .at{{text-anchor:middle;font-size:10px}}.causal-mask .row{{text-anchor:end;white-space:pre}}"
    + "".join(f".causal-mask .{kind}{{fill:url(#mask-{kind});stroke:#8993a1;stroke-width:.7}}" for kind in LABELS)
    + f".causal-mask .way{{stroke:{MUTED};stroke-width:.8;fill:none}}"
      f".causal-mask .chosen{{fill:none;stroke:{INK};stroke-width:2.2}}</style>")

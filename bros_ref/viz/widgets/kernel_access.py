"""Which thread of a warp touches which address, request by request, from the accesses an emulated launch recorded.

Pure functions: recorded accesses in, requests and SVG out. A request is one instruction of one warp: what its lanes
access at once. Global memory answers in sectors of 32 bytes; shared memory has 32 banks of 4 bytes, and lanes that
want different words of one bank take turns. Lanes are told apart by number and shade.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bros_ref.config import cdiv
from bros_ref.viz.figures.style import ALARM_COLOUR, GRID, INK, MUTED, on_paper
from bros_ref.viz.widgets.frames import Frame, Frames

SECTOR_BYTES, BANKS, WORD_BYTES = 32, 32, 4
SHARED = -1
_CELL, _LEFT, _WIDTH = 11, 90, 760
_SECTORS_OF_A_ROW = 8
_MAX_ROWS = 8  # of sectors in a picture


class Recorded(Protocol):
    """An access as `kernels_cupy.proof.emulator` records it: one load or store of one thread."""

    @property
    def block(self) -> int: ...
    @property
    def warp(self) -> int: ...
    @property
    def lane(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def argument(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def line(self) -> object: ...


@dataclass(frozen=True)
class WarpRequest:
    """What the lanes of a warp ask of one argument (or of shared memory) by one instruction.

    Attributes:
        step: the index of this access among those of the first lane.
        argument: index into the launch's arguments, -1 for shared memory.
        lanes: (lane, offset in bytes, size in bytes), by lane.
    """

    step: int
    kind: str
    argument: int
    line: str
    lanes: tuple[tuple[int, int, int], ...]

    @property
    def bytes(self) -> int:
        """Bytes that the lanes asked for, each address counted once."""
        return len({at for _, offset, size in self.lanes for at in range(offset, offset + size)})

    @property
    def sectors(self) -> list[int]:
        """Numbers of the 32-byte sectors touched."""
        return sorted({sector for _, offset, size in self.lanes
                       for sector in range(offset // SECTOR_BYTES, (offset + size - 1) // SECTOR_BYTES + 1)})

    @property
    def min_sectors(self) -> int:
        """The fewest sectors that hold as many bytes."""
        return cdiv(self.bytes, SECTOR_BYTES)

    @property
    def bank_turns(self) -> int:
        """Turns the busiest bank takes; accesses wider than a word go in phases of 128 bytes, and the worst counts."""
        phases: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for lane, offset, size in self.lanes:
            phase = lane * max(size, WORD_BYTES) // (BANKS * WORD_BYTES)
            for word in range(offset // WORD_BYTES, cdiv(offset + size, WORD_BYTES)):
                phases[phase][word % BANKS].add(word)
        return max(len(words) for banks in phases.values() for words in banks.values())


def warp_requests(accesses: Iterable[Recorded], block: int = 0, warp: int = 0,
                  arguments: Sequence[int] | None = None) -> list[WarpRequest]:
    """The requests of one warp in order; of some arguments only, if they are given.

    A lane's n-th access from a line belongs to the same request as the other lanes' n-th from there: lanes that took
    another branch before have counted more or fewer steps by then.
    """
    counts: Counter[tuple[object, ...]] = Counter()
    grouped: dict[tuple[object, ...], list[Recorded]] = defaultdict(list)
    for a in accesses:
        if a.block == block and a.warp == warp and (arguments is None or a.argument in arguments):
            site = (str(a.line), a.kind, a.argument, a.size)
            counts[a.lane, site] += 1
            grouped[site, counts[a.lane, site]].append(a)
    requests = [WarpRequest(min(a.step for a in group), group[0].kind, group[0].argument, str(group[0].line),
                            tuple(sorted((a.lane, a.offset, a.size) for a in group))) for group in grouped.values()]
    return sorted(requests, key=lambda request: (request.step, request.line, request.argument))


def describe(request: WarpRequest, names: Mapping[int, str]) -> str:
    """The request in a sentence: which lanes ask for what, what it costs, which line."""
    known = {SHARED: "shared memory"} | dict(names)
    name = known.get(request.argument, f"argument {request.argument}")
    asked = f"{len(request.lanes)} lanes {request.kind} {request.lanes[0][2]} bytes each of {name}"
    if request.argument == SHARED:
        cost = f"{_count(request.bank_turns, 'turn')} of the busiest bank"
    else:
        cost = f"{_count(len(request.sectors), 'sector')} for {request.bytes} bytes, {request.min_sectors} would do"
    return f"{asked}: {cost}; {request.line}"


def request_svg(request: WarpRequest, names: Mapping[int, str] | None = None) -> str:
    """One request as a picture: the sectors (or banks) with the lane that asks for each piece."""
    names = names or {}
    body = _banks(request) if request.argument == SHARED else _sectors(request)
    height = 20 + int(body.count("<!--row-->")) * 26
    title = describe(request, names)
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
           f'style="width:100%;max-width:{_WIDTH}px" font-family="system-ui, sans-serif" font-size="9">'
           f"<title>{_escape(title)}</title>{body}</svg>")
    return on_paper(svg)


def kernel_access(accesses: Iterable[Recorded], names: Mapping[int, str], block: int = 0, warp: int = 0,
                  arguments: Sequence[int] | None = None, limit: int = 12) -> Frames:
    """The first requests of a warp, as frames.

    Raises:
        ValueError: the warp made no such request.
    """
    requests = warp_requests(accesses, block, warp, arguments)[:limit]
    return Frames([Frame(request_svg(request, names), describe(request, names)) for request in requests],
                  f"what warp {warp} of block {block} asks of memory")


def _sectors(request: WarpRequest) -> str:
    """Rows of sectors; a sector is 32 bytes wide, and bytes that no lane asked for stay white."""
    parts, sectors = [], request.sectors
    byte_width = (_WIDTH - _LEFT - 10) / (_SECTORS_OF_A_ROW * (SECTOR_BYTES + 2))
    shown = sectors[:_SECTORS_OF_A_ROW * _MAX_ROWS]
    place = {sector: (i // _SECTORS_OF_A_ROW, i % _SECTORS_OF_A_ROW) for i, sector in enumerate(shown)}
    for row in range(cdiv(len(shown), _SECTORS_OF_A_ROW)):
        first = shown[row * _SECTORS_OF_A_ROW] * SECTOR_BYTES
        parts.append(f'<!--row--><text x="4" y="{24 + 26 * row}" fill="{MUTED}">byte {first}</text>')
    for row, column in place.values():
        x = _LEFT + column * (SECTOR_BYTES + 2) * byte_width
        parts.append(f'<rect x="{x:.1f}" y="{12 + 26 * row}" width="{SECTOR_BYTES * byte_width:.1f}" height="18" '
                     f'fill="#fff" stroke="{INK}"/>')
    for lane, offset, size in request.lanes:
        at = place.get(offset // SECTOR_BYTES)
        if at is not None:
            x = _LEFT + (at[1] * (SECTOR_BYTES + 2) + offset % SECTOR_BYTES) * byte_width
            parts.append(_piece(lane, x, 13 + 26 * at[0], size * byte_width))
    if len(sectors) > len(shown):
        parts.append(f'<text x="{_WIDTH - 120}" y="10" fill="{MUTED}">and {len(sectors) - len(shown)} more</text>')
    return "".join(parts)


def _banks(request: WarpRequest) -> str:
    """One column per bank; lanes that want different words of a bank are drawn below one another. A word is fetched
    once, however many lanes want it."""
    width, parts = (_WIDTH - _LEFT - 10) / BANKS, []
    heights, seen, pieces = [0] * BANKS, set[int](), []
    for lane, offset, size in request.lanes:
        words = range(offset // WORD_BYTES, cdiv(offset + size, WORD_BYTES))
        if seen.issuperset(words):
            continue
        seen.update(words)
        row = max(heights[word % BANKS] for word in words)
        for word in words:
            heights[word % BANKS] = row + 1
        if row < _MAX_ROWS:
            pieces.append(_piece(lane, _LEFT + words[0] % BANKS * width, 13 + 26 * row, len(words) * width))
    rows, turns = min(max(heights), _MAX_ROWS), request.bank_turns
    parts.append(f'<text x="4" y="24" fill="{MUTED}">banks 0 to 31</text>' + "<!--row-->" * rows)
    parts += [f'<rect x="{_LEFT + bank * width:.1f}" y="12" width="{width:.1f}" height="{26 * rows - 8}" fill="none" '
              f'stroke="{GRID}"/>' for bank in range(BANKS)]
    colour = ALARM_COLOUR if turns > 1 else MUTED
    parts.append(f'<text x="{_LEFT}" y="9" fill="{colour}">{_count(turns, "turn")}</text>')
    return "".join(parts + pieces)


def _piece(lane: int, x: float, y: float, width: float) -> str:
    shade = 42 + lane % 8 * 5
    text = f'<text x="{x + width / 2:.1f}" y="{y + 11.5:.1f}" text-anchor="middle" fill="#fff">{lane}</text>'
    return (f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.6, 1):.1f}" height="16" '
            f'fill="hsl({210 + lane // 8 * 40},60%,{100 - shade}%)"/>') + (text if width >= _CELL else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

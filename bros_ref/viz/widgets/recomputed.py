"""Which keys and values each forward pass computes, recomputes, or finds in a cache, as frames.

Pure functions of plain numbers: for each pass, how many tokens are known and from which position on it computes. A
column is a token, and each line in it is a layer. Invariant: the counts in the captions are those of the picture.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from bros_ref.viz.figures.style import ALARM_COLOUR, FONT, INK, MUTED, PLAIN_COLOUR, on_paper
from bros_ref.viz.widgets.frames import Frame, Frames

NEW, AGAIN, REUSED = "new", "again", "reused"
# Strokes and no fill patterns: a pattern that is defined in a still which is hidden is not painted.
_LOOKS = {NEW: ("computed", PLAIN_COLOUR, 1.0, ""), AGAIN: ("computed again", ALARM_COLOUR, 1.0, "5 4"),
          REUSED: ("reused", MUTED, 0.4, "2 4")}
_LEFT, _WIDTH, _TOP, _TALL, _LABELS, _TITLE = 8, 760, 24, 120, 58, 20


@dataclass(frozen=True)
class ForwardPass:
    """One pass: of `context` known tokens it computes those from position `first` on; the others are in its cache.

    Raises:
        ValueError: it computes nothing, or tokens that are not known.
    """

    context: int
    first: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.context:
            raise ValueError(f"a pass over {self.context} tokens cannot compute from position {self.first} on")


def kinds(passes: Sequence[ForwardPass], at: int) -> list[str]:
    """What pass `at` does for each of its tokens, [context]."""
    known = max((one.context for one in passes[:at]), default=0)
    now = passes[at]
    return [REUSED if token < now.first else AGAIN if token < known else NEW for token in range(now.context)]


def pairs_so_far(passes: Sequence[ForwardPass], at: int, layers: int) -> int:
    """K/V pairs, one per token and layer, that the passes up to and including `at` have computed."""
    return layers * sum(one.context - one.first for one in passes[:at + 1])


def recomputed(variants: Mapping[str, Sequence[ForwardPass]], tokens: Sequence[str], layers: int) -> Frames:
    """A still for each pass, all variants one below the other.

    Args:
        variants: name -> its passes; every variant the same number of them.
        tokens: the texts of at least as many tokens as the longest context.

    Raises:
        ValueError: variants of different lengths, or too few tokens.
    """
    counts = {len(passes) for passes in variants.values()}
    columns = max((one.context for passes in variants.values() for one in passes), default=0)
    if len(counts) != 1 or columns > len(tokens):
        raise ValueError(f"need variants of one number of passes and {columns} tokens, got {sorted(counts)} passes "
                         f"and {len(tokens)} tokens")
    return Frames([Frame(still(variants, tokens[:columns], layers, at), _caption(variants, layers, at))
                   for at in range(counts.pop())], "keys and values: recomputed or reused")


def still(variants: Mapping[str, Sequence[ForwardPass]], tokens: Sequence[str], layers: int, at: int) -> str:
    """Pass `at` of every variant as an SVG element."""
    height = _TOP + len(variants) * (_TITLE + _TALL + _LABELS)
    seen = {kind for passes in variants.values() for kind in kinds(passes, at)}
    parts = [*_legend(seen)]
    for place, (name, passes) in enumerate(variants.items()):
        top = _TOP + place * (_TITLE + _TALL + _LABELS) + _TITLE
        title = f"{name}: {pairs_so_far(passes, at, layers):,} K/V pairs computed so far"
        parts.append(f'<text x="{_LEFT}" y="{top - 6}">{escape(title)}</text>')
        parts += _panel(kinds(passes, at), [escape(token.replace("\n", "\\n")) for token in tokens], layers, top)
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
           f'style="width:100%;max-width:{_WIDTH}px" font-family="{escape(FONT)}" font-size="11" fill="{INK}" '
           f'aria-label="{escape(_caption(variants, layers, at))}">{"".join(parts)}</svg>')
    return on_paper(svg)


def _caption(variants: Mapping[str, Sequence[ForwardPass]], layers: int, at: int) -> str:
    told = []
    for name, passes in variants.items():
        found = kinds(passes, at)
        parts = [f"{layers * found.count(kind):,} {_LOOKS[kind][0]}" for kind in _LOOKS if kind in found]
        told.append(f"{name} {', '.join(parts)}")
    return f"pass {at + 1}, K/V pairs: " + "; ".join(told)


def _panel(found: Sequence[str], labels: Sequence[str], layers: int, top: int) -> Iterator[str]:
    """Lines of layers, one stroke for each run of equal columns; then the separators and labels of the columns."""
    wide, tall = (_WIDTH - 2 * _LEFT) / len(labels), _TALL / layers
    for kind, (_, colour, share, dashes) in _LOOKS.items():
        if kind in found:
            first, count = found.index(kind), found.count(kind)  # equal columns follow one another
            lines = "".join(f"M{_LEFT + first * wide:.0f} {top + (i + 0.5) * tall:.1f}h{count * wide:.0f}"
                            for i in range(layers))
            yield (f'<path d="{lines}" fill="none" stroke="{colour}" stroke-width="{0.8 * share * tall:.1f}"'
                   + (f' stroke-dasharray="{dashes}"' if dashes else "") + "/>")
    for column, label in enumerate(labels):
        x = _LEFT + column * wide
        tip = f"token {column} ({label}): " + (_LOOKS[found[column]][0] if column < len(found) else "not there yet")
        yield (f'<rect x="{x:.0f}" y="{top}" width="{wide:.0f}" height="{_TALL}" fill="transparent" stroke="#fff" '
               f'stroke-width="3"><title>{tip}</title></rect><text x="{x + wide / 2 + 4:.0f}" y="{top + _TALL + 12}" '
               f'text-anchor="end" transform="rotate(-40 {x + wide / 2 + 4:.0f} {top + _TALL + 12})" '
               f'fill="{INK if column < len(found) else MUTED}">{label}</text>')
    yield (f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH - 2 * _LEFT}" height="{_TALL}" fill="none" '
           f'stroke="{MUTED}"/>')


def _legend(seen: Collection[str]) -> Iterator[str]:
    """Of the kinds that are drawn."""
    for place, (label, colour, share, dashes) in enumerate(look for kind, look in _LOOKS.items() if kind in seen):
        x = _LEFT + place * 150
        yield (f'<path d="M{x} 6h34M{x} 11h34M{x} 16h34" fill="none" stroke="{colour}" '
               f'stroke-width="{4 * share:.1f}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
               + f'/><text x="{x + 42}" y="15">{label}</text>')
    yield f'<text x="{_LEFT + 450}" y="15">a column: a token; a line in it: a layer</text>'

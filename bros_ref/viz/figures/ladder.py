"""The ladder of kernels as one figure: what each step loads, over the minimum, and how many instructions it takes.

A pure function of rows as `bros-ref kernels --json` writes them; a notebook may give rows that it counted itself. No
time is drawn, since the rows have none. A number that a row lacks is marked as missing, never drawn as zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from bros_ref.viz.figures.style import FONT, GRID, INK, MUTED, PLAIN_COLOUR, Fill, on_paper, svg_pattern

NAME_W, PANEL_W, NUMBER_W, ROW_H, TOP = 360, 250, 70, 26, 44  # SVG units


@dataclass(frozen=True)
class Panel:
    """One number of every row, as bars. A logarithmic panel starts at 1."""

    key: str
    title: str
    note: str
    fill: Fill
    logarithmic: bool = False


PANELS = (Panel("sectors_over_minimum", "sectors loaded / minimum", "logarithmic; 1: every byte of K and V once",
                Fill(PLAIN_COLOUR), logarithmic=True),
          Panel("warp_instructions_per_kib", "warp instructions per KiB", "of K and V, executed",
                Fill(PLAIN_COLOUR, "/", GRID)))


def ladder_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row, in the order given: `step` and `name`, then a bar for each number that the row has.

    Raises:
        ValueError: no rows, two rows for one step (choose one dtype, head size and architecture first), or fewer
            sectors than the minimum.
    """
    steps = [str(row["step"]) for row in rows]
    if not rows or len(set(steps)) < len(steps):
        raise ValueError(f"expected one row for each step, got steps {steps}: choose one dtype, head_dim and arch")
    bottom = TOP + len(rows) * ROW_H
    parts = [f'<text x="0" y="{TOP + place * ROW_H + 16}"><tspan class="head">{escape(steps[place])}</tspan> '
             f'{escape(str(row["name"]))}</text>' for place, row in enumerate(rows)]
    for place, panel in enumerate(PANELS):
        x = NAME_W + place * (PANEL_W + NUMBER_W)
        parts.append(f'<text x="{x}" y="14" class="head">{panel.title}</text><text x="{x}" y="30" class="small">'
                     f'{panel.note}</text><path d="M{x} {TOP}V{bottom}" stroke="{MUTED}"/>')
        parts += _bars(panel, x, [row.get(panel.key) for row in rows])
    width = NAME_W + len(PANELS) * (PANEL_W + NUMBER_W)
    label = "; ".join(f"step {row['step']}: " + ", ".join(
        f"{panel.title} {_number(row.get(panel.key))}" for panel in PANELS) for row in rows)
    patterns = "".join(svg_pattern(f"ladder-{panel.key}", panel.fill) for panel in PANELS)
    svg = (f'<svg class="ladder" viewBox="0 0 {width} {bottom + 6}" style="max-width:{width}px" role="img" '
           f'aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg"><defs>{patterns}</defs><style>'
           f".ladder text{{font:12.5px {FONT};fill:{INK}}}.ladder .head{{font-weight:600}}"
           f".ladder .small{{font-size:11px;fill:{MUTED}}}</style>"
           f"{''.join(parts)}</svg>")
    return on_paper(svg)


def _bars(panel: Panel, x: float, values: Sequence[float | None]) -> list[str]:
    """For each value a bar as long as its share of the largest, and the value."""
    known = [value for value in values if value is not None]
    if panel.logarithmic and any(value < 1 for value in known):
        raise ValueError(f"{panel.title}: {min(known)} is below 1, the minimum: the rows cannot be right")
    parts = []
    for place, value in enumerate(values):
        y, length = TOP + place * ROW_H, 0.0
        if value is not None:
            length = max(2.0, PANEL_W * (_share_of_log(value, max(known)) if panel.logarithmic else value / max(known)))
            parts.append(f'<rect x="{x}" y="{y + 4}" width="{length:.1f}" height="{ROW_H - 9}" '
                         f'fill="url(#ladder-{panel.key})"/>')
        parts.append(f'<text x="{x + length + 6:.1f}" y="{y + 16}">{_number(value)}</text>')
    return parts


def _share_of_log(value: float, most: float) -> float:
    return math.log(value) / math.log(most) if most > 1 else 0.0


def _number(value: float | None) -> str:
    return "not counted" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"

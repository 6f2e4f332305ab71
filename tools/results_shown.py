"""How `tools/results.py` writes a figure and a row of a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bros_ref.evaluation.dominance import values
from bros_ref.evaluation.statistics import Interval, interval


class Shown:
    """A figure with its interval, or a plain number. Format: "1" the mean to one digit, "±1" with the interval,
    "+±1" with a sign, "~2" the mean to two significant digits."""

    def __init__(self, figure: Interval | float, scale: float = 1.0) -> None:
        figure = figure if isinstance(figure, Interval) else Interval(figure, None)
        self.mean, self.half = figure.mean * scale, (figure.half or 0.0) * scale

    def __format__(self, spec: str) -> str:
        sign, with_interval, digits = re.fullmatch(r"(\+?)(±|~|)(\d)", spec).groups()  # type: ignore[union-attr]
        if with_interval == "~":
            return f"{float(f'{self.mean:.{digits}g}'):,.0f}"
        text = f"{self.mean:{sign},.{digits}f}"
        if not float(text.replace(",", "")):
            text = text.lstrip("+-")  # no signed zero
        return f"{text} ± {self.half:,.{digits}f}" if with_interval else text


def mean_shown(runs: Sequence[dict[str, Any]], metric: str, scale: float = 1.0) -> Shown:
    return Shown(interval(values(runs, metric)), scale)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"

"""The ladder draws the numbers of its rows, and says what is missing instead of drawing it."""

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.viz.figures.ladder import PANEL_W, ladder_svg

SVG = "{http://www.w3.org/2000/svg}"
numbers = st.none() | st.floats(1, 500)


def bars(svg, key):
    return [float(bar.get("width")) for bar in svg.iter(f"{SVG}rect") if bar.get("fill") == f"url(#ladder-{key})"]


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
def test_bars_are_as_long_as_their_numbers(pairs):
    rows = [{"step": i, "name": f"<{i}>", "sectors_over_minimum": a, "warp_instructions_per_kib": b}
            for i, (a, b) in enumerate(pairs)]
    svg = ElementTree.fromstring(ladder_svg(rows))
    sectors, instructions = ([one for one in column if one is not None] for column in zip(*pairs, strict=True))
    top = math.log(max(sectors, default=1)) or 1
    assert bars(svg, "sectors_over_minimum") == pytest.approx(
        [max(2, PANEL_W * math.log(one) / top) for one in sectors], abs=0.06)
    assert bars(svg, "warp_instructions_per_kib") == pytest.approx(
        [max(2, PANEL_W * one / max(instructions)) for one in instructions], abs=0.06)
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert texts.count("not counted") == sum(one is None for pair in pairs for one in pair)


def test_rows_that_cannot_be_a_ladder_are_refused():
    row = {"step": "3", "name": "x", "sectors_over_minimum": 1.0}
    for rows in ([], [row, row]):
        with pytest.raises(ValueError, match="one row for each step"):
            ladder_svg(rows)
    with pytest.raises(ValueError, match="below 1"):
        ladder_svg([row | {"sectors_over_minimum": 0.5}])

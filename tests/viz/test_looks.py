"""The rules of all pictures: colour means one thing, axes have names, plots name their policy, blocks have numbers and
cells, and a legend shows what is drawn."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.trace import PHASES, BlockView
from bros_ref.trace.metrics import summarise
from bros_ref.viz.figures import charts, kv_blocks, timeline
from bros_ref.viz.figures.gantt import MARK_LABELS, gantt_svg, phase_steps
from bros_ref.viz.figures.kv_blocks import block_map, pool_kinds, pool_svg, slot_kinds
from bros_ref.viz.figures.style import (
    ALARM_COLOUR,
    BE_COLOUR,
    CLASS_COLOURS,
    PHASE_LABELS,
    POLICY_COLOURS,
    RT_COLOUR,
    SHARED_COLOUR,
    TOOLBAR_PX,
    phase_fill,
    request_fill,
    round_values,
)
from bros_ref.viz.widgets.causal_mask import LABELS, MaskSetting, mask_svg
from bros_ref.viz.widgets.player import BlockMapPlayer, pool_labels
from bros_ref.viz.widgets.schedule_player import SchedulePlayer
from tests.viz.factory import make_trace

SVG = "{http://www.w3.org/2000/svg}"
PAIR = [make_trace(policy, seed=2, num_rt=8, num_be=9, num_blocks=30) for policy in ("vllm", "bros")]
ONE_CLASS = make_trace("vllm", num_rt=0, num_be=9, num_blocks=30)
ONE_CLASS.requests.pop("rt-refused")
ONE_CLASS.rejected.clear()
RUNS = [summarise(trace) for trace in PAIR]
RT_RUN = {"policy": "rt-only", "classes": {"rt": {"normalized_latency_ms_per_token": 10.0}}}
BOUNDED = {x: {"policy": "bros", "classes": {"rt": {"normalized_latency_ms_per_token": 9.0 * x},
                                             "be": {"output_throughput": 40.0 * x}}} for x in (1.25, 2.0)}
FIGURES = {  # figure, and the policy if it draws one
    "ecdf": (lambda: charts.latency_ecdf(PAIR), None), "trade-off": (lambda: charts.trade_off(RUNS), None),
    "many": (lambda: charts.trade_off(RUNS * 3), None), "reasons": (lambda: charts.reasons(PAIR), None),
    "predicted": (lambda: charts.predicted_steps(PAIR), None),
    "frontier": (lambda: charts.slowdown_frontier(RT_RUN, BOUNDED[2.0], BOUNDED), "bros"),
    "pool": (lambda: kv_blocks.pool_over_time(PAIR[1]), "bros"),
    "schedule": (lambda: timeline.schedule(PAIR[0]), "vllm")}


@pytest.mark.parametrize("name", FIGURES)
def test_axes_have_names_and_a_plot_of_one_policy_names_it(name: str) -> None:
    make, policy = FIGURES[name]
    figure = make()
    axes = [axis for axis in figure.layout.to_plotly_json() if re.match("[xy]axis", axis)]
    assert len(axes) >= 2
    named = [axis for axis in axes if figure.layout[axis].title.text]
    shared = [axis for axis in axes if figure.layout[axis].matches]  # drawn once, below
    assert set(named) | set(shared) == set(axes)
    assert policy is None or policy in figure.layout.title.text


@pytest.mark.parametrize("name", FIGURES)
def test_the_toolbar_covers_nothing(name: str) -> None:
    """Plotly's toolbar has the top strip to itself, except for the title, which begins at the left."""
    figure: go.Figure = FIGURES[name][0]()
    from_top = (1 - figure.layout.legend.y) * figure.layout.height
    assert from_top >= TOOLBAR_PX - 0.01
    assert figure.layout.legend.yanchor == "top"
    above = [note for note in figure.layout.annotations if note.yref == "paper" and note.y == 1]
    assert figure.layout.margin.t >= TOOLBAR_PX + (20 if above else 0)


def test_a_legend_entry_is_drawn() -> None:
    for figure in (make() for make, _ in FIGURES.values()):
        for one in figure.data:
            assert one.showlegend is False or any(value is not None for value in one.x), one.name


def test_a_class_is_a_colour_and_a_phase_a_pattern() -> None:
    for phase in PHASES:
        rt, be = phase_fill("rt", phase), phase_fill("be", phase)
        assert rt.mark == be.mark
        assert rt.colour != be.colour
    figure = timeline.schedule(PAIR[1])
    for bar in (bar for bar in figure.data if bar.type == "bar"):
        request_class, phase = bar.name.lower().split()
        assert bar.marker.color == phase_fill(request_class, phase).colour
        assert {PAIR[1].requests[name].request_class for name in bar.y} == {request_class}
    taken = {RT_COLOUR, BE_COLOUR, SHARED_COLOUR, ALARM_COLOUR}
    assert not taken & set(POLICY_COLOURS), "a policy's colour is no class's"
    assert not set(CLASS_COLOURS.values()) & {request_fill(place).colour for place in range(56)}


# -- maps of blocks ---------------------------------------------------------------------------------------------------


def drawn_and_keys(svg: str, group: int) -> tuple[set[str], set[str]]:
    """Fills of the cells, and of the legend; a bar of saved slots counts as "saved"."""
    root = ElementTree.fromstring(svg)
    parts = root.findall(f"{SVG}g")

    def fills(part: ElementTree.Element) -> set[str]:
        found = (rect.get("fill") for rect in part.iter(f"{SVG}rect") if "cells" not in rect.get("fill", "cells"))
        return {fill.removeprefix("url(#kv-").rstrip(")") if fill.startswith("url") else "saved" for fill in found}

    return fills(parts[1]), fills(parts[group])


@pytest.mark.parametrize("trace", [*PAIR, ONE_CLASS], ids=["vllm", "bros", "one class"])
def test_a_map_has_numbers_its_policy_and_a_legend_of_what_is_drawn(trace) -> None:
    for index in range(0, len(trace.steps), 7):
        svg = block_map(trace, index)
        drawn, keys = drawn_and_keys(svg, 0)
        assert drawn == keys
        root = ElementTree.fromstring(svg)
        numbers = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "id"]
        assert numbers == [str(block) for block in range(trace.num_blocks)]
        title = next(text.text for text in root.iter(f"{SVG}text") if text.get("class") == "title")
        assert title == f"{trace.policy}: KV pool at {trace.steps[index].start_s:.2f} s"
        if trace is ONE_CLASS:
            assert not drawn & {"rt", "be"}
            assert sum(kind.startswith("request-") for kind in drawn) == len(
                {view.be_owner or view.rt_owner for view in trace.pool_at(index)} - {None})


@pytest.mark.parametrize("size", [1, 2, 16, 32, 33, 64])
def test_slots_are_cells_up_to_32_a_block(size: int) -> None:
    root = ElementTree.fromstring(pool_svg([BlockView("r", size), BlockView("r", 1, "b", size - 1), BlockView()], size))
    patterns = {one.get("id"): float(one.get("width")) for one in root.iter(f"{SVG}pattern")
                if "cells" in one.get("id")}
    assert len(patterns) == (2 if size <= 32 else 0)
    for block in root.findall(f"{SVG}g")[1].findall(f"{SVG}g"):
        rects = [(one.get("fill", "")[5:-1], float(one.get("width"))) for one in block.findall(f"{SVG}rect")]
        wide = sum(width for fill, width in rects if fill.startswith("kv-") and fill not in patterns)
        over = [(width, patterns[fill]) for fill, width in rects if fill in patterns]
        assert sum(width / cell for width, cell in over) == pytest.approx(size if size <= 32 else 0, abs=0.05)
        assert all(cell * size == pytest.approx(wide, abs=0.1) for _, cell in over)


@given(st.integers(1, 32), st.integers(0, 40), st.data())
def test_a_cell_says_its_token_where_there_is_room(size: int, index: int, data: st.DataObject) -> None:
    rt_fill = data.draw(st.integers(0, size))
    be_fill = data.draw(st.integers(0, size))
    overwritten = data.draw(st.integers(max(0, rt_fill + be_fill - size), be_fill))
    view = BlockView("r", rt_fill, "b", be_fill, overwritten, index, index + 1)
    root = ElementTree.fromstring(pool_svg([view], size))
    told = [int(text.text or "") for text in root.iter(f"{SVG}text") if text.get("class", "").startswith("token")]
    expected = []
    for slot, kind in enumerate(slot_kinds(view, size)):
        if kind in ("rt", "over"):
            expected.append(index * size + slot)
        elif kind == "be":
            expected.append((index + 2) * size - 1 - slot)
    assert told in ([], expected)
    assert told == expected or size > 16 or max(expected) > 99, "16 cells have room for two digits"


def test_a_request_keeps_its_look_when_others_leave() -> None:
    pool = [BlockView("a", 2), BlockView("b", 2), BlockView("c", 2)]
    before = pool_svg(pool, 4, requests="abc")
    after = pool_svg([BlockView(), BlockView(), pool[2]], 4, requests="abc")
    for svg in (before, after):
        assert re.search(r'<rect[^>]*url\(#kv-request-2\)"><title>block 2', svg)
    assert "request-0" not in after


def test_many_requests_have_one_key() -> None:
    names = [f"r{i}" for i in range(20)]
    root = ElementTree.fromstring(pool_svg([BlockView(name, 1) for name in names], 4, requests=names))
    legend = [text.text for text in root.findall(f"{SVG}g")[0].iter(f"{SVG}text")]
    assert legend == [kv_blocks.ONE_LOOK_EACH, kv_blocks.SLOT_LABELS["free"]]


@pytest.mark.parametrize("trace", [*PAIR, ONE_CLASS], ids=["vllm", "bros", "one class"])
def test_a_player_names_the_kinds_that_occur_in_its_run(trace) -> None:
    kinds = set()
    for pool, copies in zip(trace.pools(), trace.copies(), strict=True):
        kinds |= {kind for view in pool for kind in slot_kinds(view, trace.block_size)}
        kinds |= {kv_blocks.COPY_KINDS[run.kind] for run in copies}
    assert pool_kinds(trace) == kinds | {"free"}
    keys = re.findall('data-key="(.*?)"', BlockMapPlayer(trace).to_html().split("<script")[0])
    assert keys == list(pool_labels(trace))
    if trace is ONE_CLASS:
        assert set(keys) == kinds - {"rt", "be"} | {"free", "request-0"}
    else:
        assert set(keys) == kinds | {"free"}


# -- schedules and masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", [*PAIR, ONE_CLASS], ids=["vllm", "bros", "one class"])
def test_the_legend_of_a_schedule_shows_what_is_drawn(trace) -> None:
    player = SchedulePlayer(trace)
    for step in range(0, len(trace.steps), 9):
        root = ElementTree.fromstring(gantt_svg(trace, player.request_ids, step))
        rects = [rect for rect in root.findall(f"{SVG}rect") if "url" in rect.get("fill", "")]
        drawn = {rect.get("fill") for rect in rects if rect.find(f"{SVG}title") is not None}
        keys = {rect.get("fill") for rect in rects if rect.find(f"{SVG}title") is None}
        assert drawn == keys
        texts = [text.text for text in root.findall(f"{SVG}text")]
        assert trace.policy in texts
        marks = [mark.find(f"{SVG}title").text for mark in (*root.findall(f"{SVG}path"), *root.findall(f"{SVG}circle"))]
        told = [kind for kind, label in MARK_LABELS.items() if label in texts]
        assert len(marks) >= 2 * len(told)
        assert bool(marks) == bool(told)
    legend = player.to_html().split("<script")[0]
    occur = {(trace.requests[name].request_class, phase) for name in player.request_ids
             for phase, _, _ in phase_steps(trace)[name]}
    told = [tuple(kind.split("-")) for key in re.findall('data-key="(.*?)"', legend) for kind in key.split()]
    assert {kind for kind in told if kind[-1] in PHASE_LABELS} == occur


@given(st.integers(1, 8), st.integers(0, 8), st.booleans(), st.booleans())
def test_the_legend_of_a_mask_shows_what_is_drawn(query: int, more: int, flipped: bool, by_column: bool) -> None:
    svg = ElementTree.fromstring(mask_svg(MaskSetting(query, query + more, 8, flipped, by_column), 0, ["x"] * 16))
    rects = list(svg.iter(f"{SVG}rect"))
    drawn = {rect.get("class") for rect in rects if rect.get("data-row") is not None}
    keys = {rect.get("class") for rect in rects if rect.get("data-row") is None} & set(LABELS)
    assert drawn == keys


@given(st.floats(-100, 100), st.floats(1e-3, 1e4), st.integers(2, 10))
def test_ticks_are_round_and_few(low: float, length: float, most: int) -> None:
    ticks = round_values(low, low + length, most)
    assert len(ticks) <= most + 1
    assert all(low - 1e-6 <= tick <= low + length + 1e-6 for tick in ticks)
    steps = {round(b - a, 6) for a, b in itertools.pairwise(ticks)}
    assert len(ticks) < 3 or max(steps) - min(steps) < 1e-5

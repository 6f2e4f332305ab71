"""The figures hold the data they claim: counts and sums are compared with the trace, never with a picture."""

from __future__ import annotations

from collections import Counter
from xml.etree import ElementTree

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.trace import BEHIND, NO_BLOCKS, PHASES, REASONS, BlockView, Trace
from bros_ref.trace.metrics import request_timings, summarise
from bros_ref.viz.figures import charts, kv_blocks, timeline
from bros_ref.viz.figures.style import BLOCK_LOOKS, PHASE_MARKS, REASON_LABELS, policy_look, request_fill, svg_pattern
from tests.viz.factory import TARGETS, make_trace

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def pair() -> list[Trace]:
    return [make_trace(policy, seed=2, num_rt=10, num_be=14, num_blocks=30) for policy in ("vllm", "bros")]


def test_a_latency_curve_rises_to_the_share_that_was_served(pair: list[Trace]) -> None:
    figure = charts.latency_ecdf(pair)
    curves = {(curve.name, curve.xaxis): curve for curve in figure.data}
    for trace in pair:
        timings = [t for t in request_timings(trace).values() if t.record.request_class == "rt"]
        samples = sorted(t.ttft_s for t in timings if t.ttft_s is not None)
        curve = curves[trace.policy, "x"]
        assert list(curve.x[1:]) == samples
        assert curve.y[-1] == len(samples) / len(timings) < 1  # one was refused
        within = np.searchsorted(curve.x[1:], TARGETS.ttft_s, side="right")
        assert curve.y[within] == sum(s <= TARGETS.ttft_s for s in samples) / len(timings)
    lines = [shape.x0 for shape in figure.layout.shapes]
    assert lines == [TARGETS.ttft_s, TARGETS.tpot_s]  # best-effort has no target, so no line
    assert len(curves) == 2 * 4


def test_a_long_curve_is_thinned_but_keeps_its_ends() -> None:
    figure = go.Figure().set_subplots(2, 2)
    charts._add_ecdf(figure, "p", 0, [float(i) for i in range(1, 5_001)], 10_000, 0)
    (curve,) = figure.data
    assert len(curve.x) == charts.MAX_CURVE_POINTS + 1
    assert (curve.x[1], curve.x[-1], curve.y[0], curve.y[-1]) == (1.0, 5_000.0, 0.0, 0.5)


@pytest.mark.parametrize("copies", [1, 2])
def test_trade_off_points_are_the_summaries(pair: list[Trace], copies: int) -> None:
    summaries = [summarise(trace) for trace in pair] * copies
    figure = charts.trade_off(summaries)
    assert [(point.x[0], point.y[0]) for point in figure.data] == [
        (run["classes"]["be"]["output_throughput"], run["classes"]["rt"]["slo_attainment"]) for run in summaries]
    assert all(point.showlegend == (len(summaries) > charts.MAX_LABELLED) for point in figure.data)


def summary_of(latency: float | None, throughput: float) -> dict:
    classes = {"rt": {"normalized_latency_ms_per_token": latency}, "be": {"output_throughput": throughput}}
    return {"policy": "bros-plus", "classes": classes}


def test_the_frontier_of_slowdown_is_relative_to_the_floor_and_to_the_run_without_it() -> None:
    bounded = {2.0: summary_of(30.0, 80.0), 1.1: summary_of(21.0, 25.0)}
    figure = charts.slowdown_frontier(summary_of(20.0, 0.0), summary_of(60.0, 100.0), bounded)
    (line,) = figure.data
    assert list(line.x) == [1.05, 1.5, 3.0], "in the order of x, then without the knob"
    assert list(line.y) == [0.25, 0.8, 1.0]
    assert [text.strip() for text in line.text] == ["x = 1.1", "x = 2", "no knob"]
    assert [shape.x0 for shape in figure.layout.shapes] == [1.1, 2.0]


@pytest.mark.parametrize(("latency", "throughput"), [(None, 100.0), (20.0, 0.0)])
def test_a_frontier_without_a_floor_or_a_ceiling_is_refused(latency: float | None, throughput: float) -> None:
    with pytest.raises(ValueError, match="a frontier needs real-time requests served under the floor"):
        charts.slowdown_frontier(summary_of(latency, 0.0), summary_of(60.0, throughput), {})


def test_reasons_are_counted_once_each(pair: list[Trace]) -> None:
    pair[0].steps[0].num_behind += 7
    try:
        counts = charts.count_reasons(pair[0])
        figure = charts.reasons(pair)
    finally:
        pair[0].steps[0].num_behind -= 7
    assert counts[BEHIND] == 7
    assert sum(counts.values()) == 7 + sum(len(step.left_out) for step in pair[0].steps)
    given = [reason for reason in REASONS if counts[reason] or charts.count_reasons(pair[1])[reason]]
    assert given == [NO_BLOCKS, BEHIND]
    assert list(figure.data[0].x) == [counts[reason] for reason in given]
    assert list(figure.data[0].y) == [REASON_LABELS[reason] for reason in given]


def test_predictions_are_drawn_in_milliseconds(pair: list[Trace]) -> None:
    figure = charts.predicted_steps(pair)
    for trace, points in zip(pair, figure.data, strict=False):
        assert list(points.x) == [1e3 * step.predicted_s for step in trace.steps if step.predicted_s]
        assert list(points.y) == pytest.approx([1e3 * step.duration_s for step in trace.steps])
    assert figure.data[-1].name == "exact"
    assert not charts.predicted_steps([Trace("none", "none", "cpu", 1, 1, 1, 0)]).data


def test_the_schedule_shows_every_span_of_its_rows(pair: list[Trace]) -> None:
    for trace in pair:
        rows = timeline.shown_requests(trace, 100)
        assert set(rows) == set(trace.requests) - set(trace.rejected)
        assert [trace.requests[row].request_class for row in rows] == ["rt"] * 10 + ["be"] * 14
        figure = timeline.schedule(trace, 100)
        bars = {bar.name: list(zip(bar.y, bar.base, bar.x, strict=True)) for bar in figure.data if bar.type == "bar"}
        spans = trace.phases()
        for phase in PHASES:
            for kind in ("rt", "be"):
                expected = [(row, span.start_s, span.end_s - span.start_s) for row in rows for span in spans[row]
                            if span.phase == phase and row.startswith(kind)]
                assert bars.pop(f"{kind.upper()} {phase}", []) == expected
        assert not bars
        marks = {mark.name: len(mark.x) for mark in figure.data if mark.type == "scatter"}
        timings = [timing for row, timing in request_timings(trace).items() if row.startswith("rt")]
        in_time = sum(timing.ttft_s is not None and timing.ttft_s <= TARGETS.ttft_s for timing in timings)
        late = sum(bool(timing.token_times_s) for timing in timings) - in_time
        assert marks == {name: count for name, count in (("first token in time", in_time), ("first token late", late))
                         if count}


@given(limit=st.integers(1, 40))
def test_rows_are_shared_out_between_the_classes(limit: int) -> None:
    trace = TRACE
    rows = timeline.shown_requests(trace, limit)
    num_rt = sum(row.startswith("rt") for row in rows)
    assert len(rows) == min(limit, 14 + 10)
    assert num_rt >= min(14, limit // 2)
    assert len(rows) - num_rt >= min(10, limit // 2)


TRACE = make_trace()


def test_colour_is_never_alone() -> None:
    assert len(set(PHASE_MARKS.values())) == len(PHASES)
    assert len({request_fill(place) for place in range(56)}) == 56
    assert len({look.pattern for look in BLOCK_LOOKS.values()}) == len(BLOCK_LOOKS)
    looks = [policy_look(place) for place in range(9)]
    assert len({look.dash for look in looks}) == len({look.marker for look in looks}) == 9
    assert kv_blocks.FILLS.keys() == (kv_blocks.SLOT_LABELS | kv_blocks.COPY_LABELS).keys() - {kv_blocks.SAVED}
    for kind, fill in kv_blocks.FILLS.items():
        assert ("<path" in svg_pattern("any", fill)) == (kind not in (kv_blocks.FREE, kv_blocks.RT))
    marks = [(fill.mark, fill.mark_colour) for fill in kv_blocks.FILLS.values() if fill.mark]
    assert len(set(marks)) == len(marks)


# -- the KV pool ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_points", [7, 600])
def test_the_stack_adds_up_to_the_pool(pair: list[Trace], monkeypatch: pytest.MonkeyPatch, max_points: int) -> None:
    monkeypatch.setattr(kv_blocks, "MAX_POINTS", max_points)
    for trace in pair:
        figure = kv_blocks.pool_over_time(trace)
        layers = {layer.name: layer.y for layer in figure.data}
        none = np.zeros_like(figure.data[0].y)
        states = np.array([layers.get(look.label, none) for look in BLOCK_LOOKS.values()])
        assert states.shape[1] == len(figure.data[0].x) <= max_points
        assert (states.sum(axis=0) == trace.num_blocks).all()
        chosen = [trace.steps.index(step) for step in trace.steps if step.start_s in set(figure.data[0].x)]
        assert [trace.steps[i].used_blocks for i in chosen] == (trace.num_blocks - states[-1]).tolist()
        on_host = layers.get("overwritten: on the host only")
        assert (on_host is None) == (trace.policy != "bros")
        if on_host is not None:
            assert list(on_host) == [kv_blocks.tokens_on_host(trace)[i] for i in chosen]


def test_every_token_is_on_the_device_or_on_the_host(pair: list[Trace]) -> None:
    """What a request computed since its table was dropped, less what its blocks hold, is on the host."""
    for trace in pair:
        computed: Counter[str] = Counter()
        on_host = kv_blocks.tokens_on_host(trace)
        for step, pool, num_on_host in zip(trace.steps, trace.pools(), on_host, strict=True):
            for request_id, index, _ in step.block_changes:
                if index < 0:
                    del computed[request_id]
            computed.update(step.scheduled)
            on_device = sum(view.rt_fill + view.be_fill - view.overwritten for view in pool)
            assert computed.total() == on_device + num_on_host
        assert max(on_host) > 0 or trace.policy != "bros"


def test_the_busiest_step_has_the_most_to_show(pair: list[Trace]) -> None:
    trace = pair[1]
    scores = [sum((view.state == "shared") + view.overwritten for view in pool) for pool in trace.pools()]
    assert scores[kv_blocks.busiest_step(trace)] == max(scores) > 0
    fullest = kv_blocks.busiest_step(pair[0])
    assert pair[0].steps[fullest].used_blocks == max(step.used_blocks for step in pair[0].steps)
    with pytest.raises(ValueError, match="no steps"):
        kv_blocks.busiest_step(Trace("none", "none", "cpu", 1, 1, 1, 0))


views = st.integers(1, 16).flatmap(lambda size: st.tuples(
    st.just(size), st.integers(0, size), st.integers(0, size), st.integers(0, size)))


@given(views)
def test_slots_fill_from_their_own_ends(numbers: tuple[int, int, int, int]) -> None:
    size, rt_fill, be_fill, overwritten = numbers
    overwritten = min(be_fill, max(overwritten, rt_fill + be_fill - size))  # what no longer fits is overwritten
    view = BlockView("r", rt_fill, "b", be_fill, overwritten)
    kinds = Counter(kv_blocks.slot_kinds(view, size))
    assert kinds["rt"] + kinds["over"] == rt_fill
    assert kinds["be"] == be_fill - overwritten
    assert kinds["over"] + kinds["lost"] == overwritten
    assert sum(kinds.values()) == size
    ordered = [kind for kind in kv_blocks.slot_kinds(view, size) if kind in ("rt", "over", "be")]
    assert ordered == sorted(ordered, key=lambda kind: kind == "be")  # real-time is left of best-effort


def test_the_map_names_every_owner_and_position() -> None:
    """Block 0: an RT's second block over a BE's third. Block 1: a BE's first block, two newest tokens lost."""
    pool = [BlockView("r<1>", 3, "b", 4, 2, rt_index=1, be_index=2), BlockView(be_owner="b", be_fill=4, overwritten=2),
            BlockView()]
    svg = ElementTree.fromstring(kv_blocks.pool_svg(pool, block_size=5))
    tips = [title.text for title in svg.iter(f"{SVG}title")]
    assert tips == [
        "block 0, slots 0 to 0: real-time r<1>, tokens 5 to 5",
        "block 0, slots 1 to 2: real-time r<1>, tokens 6 to 7; over best-effort b, tokens 12 to 13, which are on the "
        "host",
        "block 0, slots 3 to 4: best-effort b, tokens 10 to 11",
        "block 1, slots 0 to 0: free",
        "block 1, slots 1 to 2: best-effort b, tokens 2 to 3: on the host only",
        "block 1, slots 3 to 4: best-effort b, tokens 0 to 1",
        "block 2, slots 0 to 4: free"]
    assert svg.get("aria-label", "").endswith("1 best-effort only, 1 shared by both, 0 real-time only, 1 empty")


def test_the_map_of_a_moment_is_the_pool_of_that_moment(pair: list[Trace]) -> None:
    trace = pair[1]
    index = kv_blocks.busiest_step(trace)
    svg = ElementTree.fromstring(kv_blocks.block_map(trace, index))
    tips = [title.text or "" for title in svg.iter(f"{SVG}title")]
    pool = trace.pool_at(index)
    for block_id, view in enumerate(pool):
        mine = " ".join(tip for tip in tips if tip.startswith(f"block {block_id},"))
        assert (view.rt_owner is None or f"real-time {view.rt_owner}," in mine)
        assert (view.be_owner is None or f"best-effort {view.be_owner}," in mine)
        assert ("on the host" in mine) == (view.overwritten > 0)


def test_the_map_of_a_moment_marks_what_its_step_copied(pair: list[Trace]) -> None:
    trace, seen = pair[1], Counter[str]()
    for index, copies in enumerate(trace.copies()):
        if not copies:
            continue
        drawn = kv_blocks.block_map(trace, index)
        svg = ElementTree.fromstring(drawn)
        tips = [title.text or "" for title in svg.iter(f"{SVG}title")]
        for run in copies:
            label = kv_blocks.COPY_LABELS[kv_blocks.COPY_KINDS[run.kind]]
            last = run.first_slot + run.num_slots - 1
            assert f"block {run.block_id}, slots {run.first_slot} to {last}: {label}: {run.request_id}" in tips
            seen[run.kind] += 1
        assert ("url(#kv-restored)" in drawn) == any(run.kind == "restore" for run in copies)
    assert seen["checkpoint"] > 0 < seen["restore"]


def test_a_large_pool_shows_its_interesting_blocks_in_order() -> None:
    pool = [BlockView() for _ in range(kv_blocks.MAX_BLOCKS + 50)]
    pool[-1] = BlockView("r", 1, "b", 1)
    pool[-2] = BlockView("r", 1)
    shown = kv_blocks._blocks_to_show(pool)
    assert len(shown) == kv_blocks.MAX_BLOCKS
    assert shown == sorted(shown)
    assert shown[-2:] == [len(pool) - 2, len(pool) - 1]

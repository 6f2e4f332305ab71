"""The schedule: rows, phases and reasons at every step are the trace's, and the page is one self-contained piece."""

import json
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from untrusted import saved_still

from bros_ref.trace import BATCH_CAP, BEHIND, PENDING, PHASES, REASONS, WAITING, Trace
from bros_ref.viz.figures.gantt import (
    gantt_svg,
    phase_steps,
    shown_steps,
    stands_behind,
    step_position,
    what_it_does,
)
from bros_ref.viz.figures.style import REASON_LABELS
from bros_ref.viz.widgets.schedule_player import SchedulePlayer, schedule_rows, schedule_steps
from tests.viz.factory import make_trace


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), policy=st.sampled_from(["bros", "vllm"]), num_blocks=st.integers(8, 40))
def test_a_request_runs_in_exactly_the_steps_that_schedule_it(seed, policy, num_blocks):
    trace = make_trace(policy, seed, num_rt=6, num_be=5, num_blocks=num_blocks)
    for request_id, runs in phase_steps(trace).items():
        at = {index: phase for phase, first, end in runs for index in range(first, end)}
        assert len(at) == sum(end - first for _, first, end in runs), "no step twice"
        for index, step in enumerate(trace.steps):
            assert (at.get(index, WAITING) not in (WAITING, PENDING)) == (request_id in step.scheduled)
            assert (at.get(index) in (WAITING, PENDING)) == (trace.reason_for(index, request_id) is not None)


def test_what_the_page_says_of_a_step_is_what_the_trace_says():
    trace = make_trace(num_blocks=24)
    for step in trace.steps[::2]:  # nobody asked the last but one that was left out
        if len(step.left_out) > 1:
            del step.left_out[list(step.left_out)[-2]]
    player = SchedulePlayer(trace, max_requests=16)
    spans, last_reason = phase_steps(trace), len(REASONS) - 1
    [data] = player.data()["runs"]
    seen = set()
    for index, moment in enumerate(data["moments"]):
        for place, request_id in enumerate(player.request_ids):
            phase = next((PHASES[p] for p, first, end in data["rows"][place]["spans"] if first <= index < end), None)
            if place in moment["ran"]:
                assert moment["ran"][place] == trace.steps[index].scheduled[request_id]
                continue
            if phase is not None:
                reason = REASONS[moment["left_out"].get(place, last_reason)]
                assert reason == trace.reason_for(index, request_id)
                said = f"{phase}: {REASON_LABELS[reason]}"
                if reason == BEHIND and (whom := stands_behind(trace, index, request_id)) is not None:
                    said = f"{phase}: behind {whom}"
                    assert data["owners"][moment["behind"][not data["rows"][place]["rt"]]] == whom
                    seen.add("behind somebody")
                assert what_it_does(trace, spans, index, request_id) == said
                seen.add(phase)
    assert seen == {WAITING, PENDING, "behind somebody"}


def test_one_that_nobody_asked_stands_behind_the_last_of_its_class_that_was_left_out():
    trace = make_trace()
    step = trace.steps[5]
    for left_out, behind_rt, behind_be in (
            ([], None, None), (["rt-0"], "rt-0", "rt-0"), (["be-1", "rt-0", "rt-3"], "rt-3", "be-1"),
            (["rt-0", "be-1", "be-2"], "rt-0", "be-2")):
        step.left_out = dict.fromkeys(left_out, BATCH_CAP)
        assert stands_behind(trace, 5, "rt-5") == behind_rt
        assert stands_behind(trace, 5, "be-5") == behind_be


def test_rows_know_tokens_and_deadlines():
    trace = make_trace()
    rows = {list(trace.requests)[row["request"]]: row for row in schedule_rows(trace, ["rt-0", "be-0"])}
    assert rows["be-0"]["due_at"] is None
    assert len(rows["rt-0"]["emitted"]) == sum("rt-0" in step.emitted for step in trace.steps) > 0
    record = trace.requests["rt-0"]
    index = int(rows["rt-0"]["due_at"])
    due_s = record.arrival_s + record.ttft_slo_s
    assert trace.steps[index].start_s <= due_s <= trace.steps[index + 1].start_s
    assert schedule_steps(trace, ["rt-0"])[rows["rt-0"]["emitted"][0]]["ran"].keys() == {0}


def test_a_position_on_the_axis_of_steps():
    trace = make_trace(num_rt=1, num_be=2)
    starts = [step.start_s for step in trace.steps]
    assert step_position(trace, starts[0] - 1) == 0
    assert [step_position(trace, start) for start in starts] == pytest.approx(list(range(len(starts))))
    assert step_position(trace, (starts[3] + starts[4]) / 2) == pytest.approx(3.5)
    assert step_position(trace, 1e9) == len(starts)


@given(num_steps=st.integers(1, 500), data=st.data())
def test_the_chosen_step_is_always_shown(num_steps, data):
    index = data.draw(st.integers(0, num_steps - 1))
    first, end, cell = shown_steps(num_steps, index)
    assert 0 <= first <= index < end <= num_steps
    assert (end - first) * cell <= 470 + 1e-6


def test_the_still_says_who_was_left_out_and_why():
    trace = make_trace(num_blocks=24)
    player = SchedulePlayer(trace)
    svg = ElementTree.fromstring(gantt_svg(trace, player.request_ids, player.start))
    texts = [text.text or "" for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    said = {name: reason for name in player.request_ids if (reason := trace.reason_for(player.start, name))}
    assert said
    endings = (*(f": {label}" for label in REASON_LABELS.values()), *(f": behind {name}" for name in trace.requests))
    assert sum(text.endswith(endings) for text in texts) == len(said)
    assert {"◆ RT rt-0", "■ BE be-0"} <= set(texts)


def test_the_page_is_one_piece():
    trace = make_trace()
    trace.requests["</script><b>"] = trace.requests.pop("be-9")
    trace.requests["</script><b>"].request_id = "</script><b>"
    for step in trace.steps:
        for held in (step.scheduled, step.left_out, step.finished):
            if "be-9" in held:
                held["</script><b>"] = held.pop("be-9")
        step.emitted = ["</script><b>" if name == "be-9" else name for name in step.emitted]
        step.block_changes = [["</script><b>" if c[0] == "be-9" else c[0], *c[1:]] for c in step.block_changes]
        step.offloaded = [["</script><b>" if c[0] == "be-9" else c[0], *c[1:]] for c in step.offloaded]
    player = SchedulePlayer(trace)
    page = player.to_html()
    [packed] = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(packed)["runs"][0]["num_blocks"] == trace.num_blocks
    assert page.count("<script") == page.count("</script>") == 2
    assert "http" not in page.replace("http://www.w3.org", "")
    bundle = player._repr_mimebundle_()
    assert saved_still(bundle).startswith("<svg")
    assert bundle["text/plain"] == repr(player)


def test_nothing_to_play_is_refused():
    with pytest.raises(ValueError, match="0 steps and 0 requests"):
        SchedulePlayer(Trace("bros", "toy", "cpu", 8, 16, 64, 0))
    with pytest.raises(ValueError, match="max_requests=0"):
        SchedulePlayer(make_trace(), max_requests=0)
    with pytest.raises(ValueError, match="at least one trace"):
        SchedulePlayer([])


def test_runs_of_one_workload_share_a_page():
    runs = [make_trace(policy, seed=2) for policy in ("bros", "vllm")]
    player = SchedulePlayer(runs)
    data = player.data()["runs"]
    assert [run["policy"] for run in data] == ["bros", "vllm"]
    for run, trace in zip(data, runs, strict=True):
        assert [run["owners"][row["request"]] for row in run["rows"]] == player.request_ids
        assert len(run["moments"]) == len(trace.steps)
    assert re.findall("<option value=.*?>(.*?)</option>", player.to_html().split("data-policy")[1]) == ["bros", "vllm"]
    assert "data-policy" not in SchedulePlayer(runs[0]).to_html().split("<script")[0]
    assert repr(player).endswith("policies bros, vllm")


def test_runs_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="got runs under bros, bros"):
        SchedulePlayer([make_trace("bros"), make_trace("bros")])
    other = make_trace("vllm")
    other.requests["rt-0"].request_class = "be"
    with pytest.raises(ValueError, match="a request in two classes"):
        SchedulePlayer([make_trace("bros"), other])

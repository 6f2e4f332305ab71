"""The priority race says of every request in every step what the trace says; the page is one self-contained piece."""

import json
import random
import re
from xml.etree import ElementTree

import pytest
from harness import checksum_engine, random_requests, run
from hypothesis import given, settings
from hypothesis import strategies as st
from untrusted import saved_still

from bros_ref.trace import Trace
from bros_ref.viz.figures.style import REASON_LABELS
from bros_ref.viz.widgets.priority_race import PriorityRace, most_telling_step, race_note, standings
from tests.viz.factory import make_trace


def race_trace(seed=0, num_blocks=12, policy="bros"):
    rng = random.Random(seed)
    engine = checksum_engine(policy, num_blocks=num_blocks, max_num_seqs=rng.choice([2, 4]))
    run(engine, random_requests(rng, 12, 24, 4, 0.2))
    return engine.trace


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.sampled_from([6, 12, 40]))
def test_everybody_the_trace_names_stands_where_it_belongs(seed, num_blocks):
    trace = race_trace(seed, num_blocks)
    for index, (step, rows) in enumerate(zip(trace.steps, standings(trace), strict=True)):
        assert {row.request_id for row in rows} == step.scheduled.keys() | step.left_out.keys()
        assert len(rows) == len({row.request_id for row in rows})
        real_time = [row for row in rows if row.is_rt]
        assert rows[:len(real_time)] == real_time, "real-time first"
        slacks = [row.slack_s for row in real_time if row.slack_s is not None]
        assert slacks == sorted(slacks)
        for row in rows:
            assert row.tokens == step.scheduled.get(row.request_id, 0)
            assert row.reason == (None if row.tokens else step.left_out[row.request_id])
            assert row.slack_s == step.slack_s.get(row.request_id)
            came = next(i for i, s in enumerate(trace.steps) if s.start_s >= trace.requests[row.request_id].arrival_s)
            turns = [i for i in range(index) if row.request_id in trace.steps[i].scheduled]
            assert row.waited_steps == index - (turns[-1] if turns else came - 1)


def test_what_is_said_names_tokens_reason_and_wait():
    said = {row.said for rows in standings(race_trace()) for row in rows}
    assert "ran, 1 token" in said
    assert any(re.fullmatch(r"ran, \d+ tokens", text) for text in said)
    sat_out = [text for text in said if text.startswith("sat out")]
    assert sat_out
    for text in sat_out:
        reason, steps = re.fullmatch(r"sat out: (.*); (\d+ steps?) without a turn", text).groups()
        assert reason in REASON_LABELS.values()
        assert steps.endswith("s") == (steps != "1 step")


def test_it_starts_where_most_real_time_requests_sit_out():
    trace = race_trace(3)
    sat_out = [len(step.slack_s.keys() - step.scheduled.keys()) for step in trace.steps]
    assert sat_out[most_telling_step(trace)] == max(sat_out) > 0
    assert f"{1e3 * trace.steps[-1].predicted_s:.0f} ms" in race_note(trace.steps[-1])


def test_the_page_carries_every_step_and_nothing_from_elsewhere():
    race = PriorityRace(race_trace())
    page = race.to_html()
    [packed] = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    data = json.loads(packed)
    for rows, packed_rows in zip(standings(race.trace), data["steps"], strict=True):
        assert [(row.request_id, row.said, row.reason is None) for row in rows] == [
            (data["requests"][request], data["said"][said], bool(ran)) for request, _, ran, said in packed_rows]
    assert "http" not in page.replace("http://www.w3.org", "")
    bundle = race._repr_mimebundle_()
    assert bundle["text/plain"] == repr(race)
    ElementTree.fromstring(saved_still(bundle))


def test_every_recorded_slack_is_a_dot_and_hollow_ones_sat_out():
    race = PriorityRace(race_trace(3))
    still = ElementTree.fromstring(race.still())
    dots = still.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(dots) == sum(len(step.slack_s) for step in race.trace.steps)
    hollow = [dot for dot in dots if dot.get("fill") == "#fff"]
    assert len(hollow) == sum(len(step.slack_s.keys() - step.scheduled.keys()) for step in race.trace.steps) > 0


def test_names_are_escaped():
    trace = race_trace()
    text = json.dumps({"id": "</script><b>&"})
    name = json.loads(text)["id"]
    old = next(request_id for request_id in trace.requests if request_id.startswith("rt"))
    trace.requests = {name if key == old else key: record for key, record in trace.requests.items()}
    for step in trace.steps:
        for named in (step.scheduled, step.left_out, step.slack_s):
            if old in named:
                named[name] = named.pop(old)
    page = PriorityRace(trace).to_html()
    assert "</script><b>" not in page
    ElementTree.fromstring(PriorityRace(trace).still())


def test_a_trace_without_a_race_is_refused():
    with pytest.raises(ValueError, match="no steps"):
        PriorityRace(Trace("bros", "toy", "cpu", 8, 16, 64, 0))
    with pytest.raises(ValueError, match=r"'vllm-fcfs' records no slack.*bros-plus"):
        PriorityRace(make_trace("vllm-fcfs"))

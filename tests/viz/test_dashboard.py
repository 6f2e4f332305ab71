"""Two runs at the same moment: every number is recounted from the traces, at times on and between their steps."""

import json
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from untrusted import saved_still

from bros_ref.trace import REASONS, BlockView, Trace
from bros_ref.trace.metrics import request_timings
from bros_ref.viz.widgets.dashboard import FIELDS, Dashboard, Moments, seen_of_two_owners
from tests.viz.factory import make_trace
from tests.viz.test_player import pool_after

PAIR = [make_trace(policy, seed=2, num_rt=8, num_be=9, num_blocks=30) for policy in ("vllm", "bros")]


@settings(max_examples=60)
@given(which=st.integers(0, 1), share=st.floats(-0.1, 1.1), on_a_step=st.booleans())
def test_a_moment_is_what_the_trace_says_of_it(which, share, on_a_step):
    trace, moments = PAIR[which], Moments(PAIR[which])
    time_s = share * (trace.end_s - trace.start_s)
    if on_a_step:
        time_s = min((step.start_s - trace.start_s for step in trace.steps), key=lambda start_s: abs(start_s - time_s))
    now, at_s = moments.at(time_s), trace.start_s + time_s
    begun = [i for i, step in enumerate(trace.steps) if step.start_s - trace.start_s <= time_s]
    assert now["step"] == (begun[-1] if begun else -1)
    done = [step for step in trace.steps if step.end_s - trace.start_s <= time_s]
    assert now["be_tokens"] == sum(name.startswith("be") for step in done for name in step.emitted)
    timings = [timing for name, timing in request_timings(trace).items() if name.startswith("rt")]
    finished = [timing for timing in timings if timing.completed and timing.token_times_s[-1] <= at_s + 1e-9]
    assert now["arrived"] == sum(timing.record.arrival_s - trace.start_s <= time_s for timing in timings)
    assert now["finished"] == len(finished)
    assert now["on_time"] == sum(timing.met_ttft and timing.met_tpot for timing in finished)
    going_on = begun and time_s < trace.steps[begun[-1]].end_s - trace.start_s
    assert sum(now["ran"]) == (len(trace.steps[begun[-1]].scheduled) if going_on else 0)
    said = {name: reason for reason, names in now["left_out"] for name in names}
    assert said == ({name: reason for name in trace.requests
                     if (reason := trace.reason_for(begun[-1], name)) is not None} if going_on else {})


def test_the_page_carries_the_pool_of_each_moment():
    dashboard = Dashboard(*PAIR)
    for side, packed in zip(dashboard.sides, dashboard.data()["sides"], strict=True):
        before = None
        pools = pool_after(side.trace, packed["pool"]["steps"])
        moments = [dict(zip(FIELDS, moment, strict=True)) for moment in packed["moments"]]
        for time_s, moment, pool in zip(dashboard.times_s, moments, pools, strict=True):
            step = side.step_at(time_s)
            if step >= 0:
                assert pool == side.trace.pool_at(step)
            assert moment["step"] == step
            before = moment["left_out"] if moment["left_out"] is not None else before
            names = list(side.trace.requests)
            said = [(REASONS[reason], [names[i] for i in who]) for reason, *who in before]
            assert said == side.at(time_s)["left_out"]


@pytest.mark.parametrize("trace", PAIR, ids=lambda trace: trace.policy)
def test_two_owners_are_counted_from_what_changes(trace, monkeypatch):
    """No whole pool is looked at, so a long run in a large pool costs what happened in it."""
    counted = [sum((view.state == "shared") + view.overwritten for view in pool) for pool in trace.pools()]
    changes = list(trace.pool_changes())
    assert sum(map(len, changes)) < len(trace.steps) * trace.num_blocks / 2
    pool = [BlockView() for _ in range(trace.num_blocks)]
    for changed, expected in zip(changes, trace.pools(), strict=True):
        for block_id, view in changed.items():
            pool[block_id] = view
        assert pool == expected
    monkeypatch.setattr(Trace, "pools", None)
    assert seen_of_two_owners(trace) == counted
    Dashboard(trace, trace).data()


@pytest.mark.parametrize("most", [1, 2, 60])
def test_the_slider_has_as_many_moments_as_asked_for(most):
    dashboard = Dashboard(*PAIR, max_moments=most)
    assert len(dashboard.times_s) == most + 1
    assert (dashboard.times_s[0], dashboard.times_s[-1]) == (0, dashboard.end_s)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Dashboard(*PAIR, max_moments=0)


def test_it_starts_where_two_owners_are_to_be_seen():
    dashboard = Dashboard(*PAIR)
    step = dashboard.sides[1].step_at(dashboard.times_s[dashboard.start])
    assert any(view.state == "shared" or view.overwritten for view in dashboard.sides[1].trace.pool_at(step))


def test_the_page_is_one_piece():
    dashboard = Dashboard(*PAIR)
    page = dashboard.to_html()
    [packed] = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(packed)["names"] == ["A: vllm", "B: bros"]
    assert "http" not in page.replace("http://www.w3.org", "")
    bundle = dashboard._repr_mimebundle_()
    svg = ElementTree.fromstring(saved_still(bundle))
    headings = [text.text for text in svg.findall("{http://www.w3.org/2000/svg}text")]
    assert [heading.split(" at ")[0] for heading in headings] == ["A: vllm", "B: bros"]
    assert bundle["text/plain"] == repr(dashboard)


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match=r"the second trace \(policy none\) has no steps"):
        Dashboard(PAIR[0], Trace("none", "toy", "cpu", 8, 16, 64, 0))

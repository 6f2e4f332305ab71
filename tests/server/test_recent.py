"""The bounded trace: a cut replays to the pool that the whole trace has, and nothing of it grows."""

from __future__ import annotations

import random

import pytest
from harness import checksum_engine, random_requests
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.server.recent import RecentTrace
from bros_ref.trace import Trace
from bros_ref.trace.metrics import summarise
from bros_ref.viz.widgets.schedule_player import SchedulePlayer


class Both(RecentTrace):
    """Keeps everything in a second trace as well."""

    def __init__(self, header: Trace, max_steps: int) -> None:
        super().__init__(header, max_steps)
        self.whole, self.ever = header, {}
        self.most = 0

    def append(self, step):
        self.whole.append(step)
        self.ever.update(self.requests)
        super().append(step)
        self.whole.requests = self.ever
        self.most = max(self.most, len(self.requests))


def served(seed: int, max_steps: int, policy: str = "bros-plus", count: int = 40, spread_s: float = 3.0):
    rng = random.Random(seed)
    engine = checksum_engine(policy, num_blocks=12, block_size=4)
    engine.trace = trace = Both(engine.trace, max_steps)
    pending = random_requests(rng, count, 40, 4, spread_s)
    for _ in range(20_000):
        while pending and pending[0].arrival_s <= engine.clock.now_s():
            engine.add_request(pending.pop(0))
        if engine.has_unfinished and rng.random() < 0.05:
            engine.abort(rng.choice(sorted(engine.scheduler.requests)))
        if engine.has_unfinished:
            engine.step()
        elif pending:
            engine.clock.sleep_until(pending[0].arrival_s)
        else:
            break
    return trace, engine


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), max_steps=st.sampled_from([1, 2, 30, 10_000]),
       seconds=st.sampled_from([0.001, 0.05, 0.5, 1e6]),
       policy=st.sampled_from(["bros-plus", "vllm-priority", "bros-swap-request"]))
def test_a_cut_shows_the_true_pool(tmp_path_factory, seed, max_steps, seconds, policy):
    trace, _ = served(seed, max_steps, policy, count=20)
    cut = trace.cut(seconds)
    kept = len(cut.steps) - 1  # the opening
    assert 1 <= kept <= max_steps
    whole = [list(pool) for pool in trace.whole.pools()]
    gone = {name for step in trace.whole.steps[:-kept] for name in step.finished}
    for shown, true in zip(list(cut.pools())[1:], whole[-kept:], strict=True):
        assert list(shown) == [_without(view, gone | _aborted(trace, cut)) for view in true]
    path = tmp_path_factory.mktemp("cut") / "trace.json"
    cut.save(path)
    assert Trace.load(path).steps == cut.steps
    summarise(cut)
    SchedulePlayer(cut).to_html()


def _aborted(trace, cut):
    """Those that were aborted before the cut: their blocks are free in it, and a step later in the whole trace."""
    return {name for name in trace.ever if name not in cut.requests}


def _without(view, gone):
    from dataclasses import replace

    if view.rt_owner in gone:
        view = replace(view, rt_owner=None, rt_fill=0, rt_index=0)
    if view.be_owner in gone:
        view = replace(view, be_owner=None, be_fill=0, be_index=0, overwritten=0)
    return view


def test_nothing_grows():
    trace, _ = served(3, 25, count=400, spread_s=80.0)
    assert len(trace.ever) == 400
    assert len(trace.whole.steps) > 500
    assert trace.most < 120
    for kept in (trace._kept, trace._before, trace._now, trace._ran, trace._ends, trace.ended_outside, trace.rejected):
        assert len(kept) <= 120, kept


def test_an_empty_trace_has_an_empty_cut():
    engine = checksum_engine("bros")
    trace = RecentTrace(engine.trace)
    assert trace.cut(60).steps == []
    with pytest.raises(ValueError, match="no schedule"):
        SchedulePlayer(trace.cut(60))


def test_the_route_gives_a_file_that_loads(server, client, tmp_path):
    import httpx
    from server.support import MODEL

    client.completions.create(model=MODEL, prompt="x", max_tokens=5, temperature=0)
    answer = httpx.get(f"{server.url}/v1/trace", params={"seconds": 60})
    (tmp_path / "trace.json").write_bytes(answer.content)
    trace = Trace.load(tmp_path / "trace.json")
    assert trace.steps
    assert trace.policy == "bros-plus"
    for seconds in ("0", "-1", "nan", "1e9", "x"):
        assert httpx.get(f"{server.url}/v1/trace", params={"seconds": seconds}).status_code == 400

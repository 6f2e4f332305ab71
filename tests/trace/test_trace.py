"""The trace file, and what a replay says: against the cache manager's own accounts, and against obvious recounts."""

from __future__ import annotations

import copy
import gzip
import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.simulator.simulate import SimulationSettings
from bros_ref.simulator.simulate import run as simulate
from bros_ref.trace import (
    BATCH_CAP,
    BEHIND,
    DECODE,
    KIND,
    NO_BLOCKS,
    PENDING,
    PHASES,
    PREFILL,
    RESTORING,
    WAITING,
    BlockView,
    RequestRecord,
    StepRecord,
    Trace,
)
from bros_ref.workload.paper import PaperWorkload
from tests.viz.factory import make_toy, make_trace

B = 4


def step(index: int, **changes: object) -> StepRecord:
    """A step of one second that does nothing, except for what is named."""
    empty = StepRecord(index, float(index), 1.0, 0.001, None, None, None, {}, [], {}, {}, {}, {}, 0, [], [], {}, 0, 0,
                       0, 0)
    return replace(empty, **changes)  # type: ignore[arg-type]


def small_trace(*steps: StepRecord, num_blocks: int = 4) -> Trace:
    trace = Trace("hand", "none", "cpu", num_blocks, B, 2, 0)
    trace.requests = {"r": RequestRecord("r", "rt", 0.0, 3, 4, 0.4, 0.2), "b": RequestRecord("b", "be", 0.0, 6, 4)}
    trace.steps = list(steps)
    return trace


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
@pytest.mark.parametrize("policy", ["bros", "vllm-priority"])
def test_a_trace_survives_its_file(tmp_path: Path, name: str, policy: str) -> None:
    trace = make_trace(policy)
    trace.environment = {"cores": 2, "gpu": None}
    trace.save(tmp_path / name)
    assert Trace.load(tmp_path / name) == trace


def test_the_same_trace_gives_the_same_bytes(tmp_path: Path) -> None:
    make_trace(seed=3).save(tmp_path / "a.json.gz")
    make_trace(seed=3).save(tmp_path / "b.json.gz")
    make_trace(seed=4).save(tmp_path / "c.json.gz")
    a, b, c = ((tmp_path / f"{name}.json.gz").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_json_lacks_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"t\.json: .*NaN or infinite"):
        small_trace(step(0, step_budget_s=value)).save(tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def header(**changes: object) -> dict[str, object]:
    return {"kind": KIND, "schema": 1, "policy": "p", "model": "m", "device": "cpu", "num_blocks": 1, "block_size": 1,
            "slot_bytes": 1, "seed": 0, **changes}


@pytest.mark.parametrize(("content", "says"), [
    ("", "not a trace, or cut short"),
    ("{", "not a trace, or cut short"),
    ("[1]", "not a trace"),
    ('{"traceEvents": []}', "not a trace"),
    (header(schema=99), "trace schema 99.*reads schemas 1 to 2"),
    (header(colour="red"), "header: unknown field 'colour'"),
    ({"kind": KIND, "schema": 1}, "header: .*policy"),
    ('{"kind": NaN}', "not a trace, or cut short: NaN is no JSON number"),
    (header(steps={}), "expected `requests` .* `steps` a list"),
    (header(steps=[7]), "step 0: expected a JSON object, got int"),
    (header(steps=[{"step": 0}]), "step 0: .*start_s"),
    (header(requests={"r": {"prompt": "hi"}}), "request 'r': unknown field 'prompt'"),
])
def test_a_bad_file_is_one_clear_error(tmp_path: Path, content: object, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"bad\.json: " + says) as raised:
        Trace.load(path)
    assert type(raised.value) is ValueError


@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_what_may_never_end_is_not_read(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path}: not a file"):
        Trace.load(path)


@pytest.mark.parametrize("keep", [0, 1, 9, 11, 200, -1])
def test_a_truncated_gzip_file_is_one_clear_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.json.gz"
    make_trace().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.json\.gz: not a trace"):
        Trace.load(path)


def test_a_plain_file_named_gz_and_the_reverse(tmp_path: Path) -> None:
    trace = small_trace(step(0))
    trace.save(tmp_path / "plain.json")
    (tmp_path / "plain.json").rename(tmp_path / "plain.gz")
    (tmp_path / "packed.json").write_bytes(gzip.compress(b"{}"))
    for name in ("plain.gz", "packed.json"):
        with pytest.raises(ValueError, match=name):
            Trace.load(tmp_path / name)


# -- pools ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), policy=st.sampled_from(["bros", "vllm"]), block_size=st.sampled_from([1, 2, 7, 16]),
       num_blocks=st.integers(6, 60), num_rt=st.integers(0, 8), num_be=st.integers(0, 6))
def test_replayed_pools_are_the_managers_own(seed: int, policy: str, block_size: int, num_blocks: int, num_rt: int,
                                             num_be: int) -> None:
    toy = make_toy(policy, seed, num_rt, num_be, num_blocks, block_size)
    pools = list(toy.trace.pools())
    assert pools == toy.snapshots
    for pool, record in zip(pools, toy.trace.steps, strict=True):
        assert sum(view.state != "empty" for view in pool) == record.used_blocks


@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), policy=st.sampled_from(["bros", "vllm"]), block_size=st.sampled_from([1, 2, 7, 16]),
       num_blocks=st.integers(6, 60), num_rt=st.integers(0, 8), num_be=st.integers(0, 6))
def test_replayed_copies_are_the_managers_own(seed: int, policy: str, block_size: int, num_blocks: int, num_rt: int,
                                              num_be: int) -> None:
    toy = make_toy(policy, seed, num_rt, num_be, num_blocks, block_size)
    for copies, planned in zip(toy.trace.copies(), toy.copies, strict=True):
        assert sorted((run.kind, run.block_id * block_size + run.first_slot + i)
                      for run in copies for i in range(run.num_slots)) == planned


def test_the_toy_makes_every_kind_of_copy() -> None:
    kinds = {kind for seed in range(4) for copies in make_toy(seed=seed).copies for kind, _ in copies}
    assert kinds == {"checkpoint", "restore", "relocate"}


@pytest.mark.parametrize("policy", ["bros", "bros-swap-block", "bros-swap-request", "bros-recompute"])
def test_the_copies_of_a_run_are_as_many_as_its_steps_say(policy: str) -> None:
    workload = PaperWorkload(4.0, 8.0, 16)
    run = simulate(policy, SimulationSettings("a100-80gb", "llama-2-7b", 1, kv_tokens=1_536, max_num_seqs=16),
                   workload, keep_steps=True)[1]
    total: Counter[str] = Counter()
    for copies, record in zip(run.copies(), run.steps, strict=True):
        counts: Counter[str] = Counter()
        for slots in copies:
            counts[slots.kind] += slots.num_slots
            assert 0 <= slots.first_slot < slots.first_slot + slots.num_slots <= run.block_size
            assert 0 <= slots.block_id < run.num_blocks
        assert counts == {kind: count for kind, count in record.copied.items() if count}
        total += counts
    assert bool(total) == (policy != "bros-recompute")


def test_pool_at_is_the_same_as_walking_there() -> None:
    trace = make_trace()
    pools = list(trace.pools())
    for index in (0, 1, len(pools) // 2, len(pools) - 1):
        assert trace.pool_at(index) == pools[index]
    for index in (-1, len(pools)):
        with pytest.raises(IndexError, match=f"steps 0 to {len(pools) - 1}"):
            trace.pool_at(index)


def test_a_shared_block_by_hand() -> None:
    """BE takes 6 tokens over blocks 1 and 0; RT joins block 0, then overwrites one of its two BE tokens."""
    trace = small_trace(
        step(0, scheduled={"b": 6}, block_changes=[["b", 0, 1], ["b", 1, 0]]),
        step(1, scheduled={"r": 2}, block_changes=[["r", 0, 0]]),
        step(2, scheduled={"r": 1}, offloaded=[["b", 1, 1]]),
        step(3, scheduled={"b": 1}, block_changes=[["b", 1, 2]], offloaded=[["b", 1, 0]]),
        step(4, block_changes=[["r", -1, -1], ["b", -1, -1]]))
    shared = [pool[0] for pool in trace.pools()]
    assert shared == [BlockView(be_owner="b", be_fill=2), BlockView("r", 2, "b", 2), BlockView("r", 3, "b", 2, 1),
                      BlockView("r", 3), BlockView()]
    assert [view.state for view in shared] == ["be_only", "shared", "shared", "rt_only", "empty"]
    moved = trace.pool_at(3)[2]
    assert (moved, moved.be_index) == (BlockView(be_owner="b", be_fill=3), 1)
    assert trace.pool_at(3)[1] == BlockView(be_owner="b", be_fill=4)


def test_a_preempted_request_starts_over() -> None:
    trace = small_trace(
        step(0, scheduled={"b": 6}, block_changes=[["b", 0, 0], ["b", 1, 1]]),
        step(1, preempted={"b": "recompute"}, block_changes=[["b", -1, -1]]),
        step(2, scheduled={"b": 3}, block_changes=[["b", 0, 3]]))
    assert trace.pool_at(1) == [BlockView()] * 4
    assert trace.pool_at(2) == [BlockView()] * 3 + [BlockView(be_owner="b", be_fill=3)]


def test_what_moved_to_the_host_before_a_drop_is_forgotten_with_it() -> None:
    """Found on an engine run (swap by blocks, seed 2): evicted and dropped in one step, then started over."""
    trace = small_trace(
        step(0, scheduled={"b": 6}, block_changes=[["b", 0, 0], ["b", 1, 1]]),
        step(1, block_changes=[["b", 1, -1], ["b", -1, -1]], offloaded=[["b", 1, 2]]),
        step(2, scheduled={"b": 7}, block_changes=[["b", 0, 2], ["b", 1, 3]]))
    assert trace.pool_at(2)[3] == BlockView(be_owner="b", be_fill=3, overwritten=0)


def test_lists_handed_out_do_not_change_later() -> None:
    pools = make_trace().pools()
    first = next(pools)
    kept = copy.deepcopy(first)
    for _ in pools:
        pass
    assert first == kept


@pytest.mark.parametrize("block_id", [-2, 4])
def test_a_block_outside_the_pool_is_refused(block_id: int) -> None:
    with pytest.raises(ValueError, match=r"step 0: request 'b' is given block -?\d, but the pool has blocks 0 to 3"):
        small_trace(step(0, block_changes=[["b", 0, block_id]])).pool_at(0)


# -- reasons ----------------------------------------------------------------------------------------------------------


def test_reasons_by_hand() -> None:
    trace = small_trace(
        step(0, scheduled={"b": 6}, left_out={"r": NO_BLOCKS}),
        step(1, scheduled={"b": 1}, finished={"b": "length"}),
        step(2, scheduled={"r": 3}))
    trace.requests["late"] = RequestRecord("late", "be", 1.5, 1, 1)
    trace.requests["gone"] = RequestRecord("gone", "be", 0.0, 1, 1)
    trace.requests["refused"] = RequestRecord("refused", "be", 0.0, 99, 1)
    trace.rejected["refused"] = "too long"
    trace.ended_outside["gone"] = [1.0, "aborted"]
    expected = {"r": [NO_BLOCKS, BEHIND, None], "b": [None, None, None], "late": [None, None, BEHIND],
                "gone": [BEHIND, None, None], "refused": [None, None, None]}
    assert {name: [trace.reason_for(i, name) for i in range(3)] for name in trace.requests} == expected
    with pytest.raises(KeyError):
        trace.reason_for(0, "nobody")


def test_in_every_step_everyone_ran_or_has_a_reason() -> None:
    trace = make_trace(num_rt=4, num_be=6, batch_cap=3)
    seen = set()
    for index, record in enumerate(trace.steps):
        reasons = {name: trace.reason_for(index, name) for name in trace.requests}
        seen.update(reasons.values())
        assert {name for name, why in reasons.items() if why and why != BEHIND} == set(record.left_out)
        assert not {name for name, why in reasons.items() if why} & set(record.scheduled)
    assert {None, BATCH_CAP} <= seen


# -- phases -----------------------------------------------------------------------------------------------------------


def test_phases_by_hand() -> None:
    trace = small_trace(
        step(0, scheduled={"b": 6}, emitted=["b"], block_changes=[["b", 0, 1], ["b", 1, 0]]),
        step(1, scheduled={"b": 1}, emitted=["b"]),
        step(2, scheduled={"r": 3}, emitted=["r"], block_changes=[["r", 0, 0]], offloaded=[["b", 1, 1]]),
        step(3, scheduled={"r": 1, "b": 1}, emitted=["r", "b"], finished={"r": "stop"}, offloaded=[["b", 1, 0]]),
        step(4, preempted={"b": "recompute"}, block_changes=[["r", -1, -1], ["b", -1, -1]]),
        step(5, scheduled={"b": 9}, emitted=["b"]))
    spans = {name: [(span.phase, span.start_s, span.end_s, span.tokens) for span in spans]
             for name, spans in trace.phases().items()}
    assert spans == {
        "r": [(WAITING, 0.0, 2.0, 0), (PREFILL, 2.0, 3.0, 3), (DECODE, 3.0, 4.0, 1)],
        "b": [(PREFILL, 0.0, 1.0, 6), (DECODE, 1.0, 2.0, 1), (PENDING, 2.0, 3.0, 0), (RESTORING, 3.0, 4.0, 1),
              (WAITING, 4.0, 5.0, 0), (PREFILL, 5.0, 6.0, 9)]}


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), policy=st.sampled_from(["bros", "vllm"]))
def test_phases_have_no_gaps_and_lose_no_token(seed: int, policy: str) -> None:
    trace = make_trace(policy, seed, num_rt=6, num_be=5)
    phases = trace.phases()
    assert set(phases) == set(trace.requests) - set(trace.rejected)
    for name, spans in phases.items():
        assert all(span.phase in PHASES and span.start_s < span.end_s for span in spans)
        assert all(before.end_s == after.start_s for before, after in pairwise(spans))
        assert spans[0].start_s == trace.requests[name].arrival_s
        ran = [record for record in trace.steps if name in record.scheduled]
        assert sum(span.tokens for span in spans) == sum(record.scheduled[name] for record in ran)
        assert sum(span.steps for span in spans) == len(ran)
        assert all((span.steps > 0) == (span.phase in (PREFILL, DECODE, RESTORING)) for span in spans)


# -- Perfetto ---------------------------------------------------------------------------------------------------------


def test_perfetto_tracks_and_counters(tmp_path: Path) -> None:
    trace = make_trace()
    trace.to_perfetto(tmp_path / "view.json.gz")
    content = json.loads(gzip.decompress((tmp_path / "view.json.gz").read_bytes()))
    events = content["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] == "thread_name"}
    assert names == {"steps"} | set(trace.requests) - set(trace.rejected)
    slices = [event for event in events if event["ph"] == "X"]
    steps = [event for event in slices if event["pid"] == 1]
    assert [event["args"]["scheduled"] for event in steps] == [record.scheduled for record in trace.steps]
    used = [event["args"]["used"] for event in events if event["ph"] == "C" and event["name"] == "KV blocks"]
    assert used == [record.used_blocks for record in trace.steps]
    num_spans = sum(len(spans) for spans in trace.phases().values())
    assert len(slices) == len(trace.steps) + num_spans
    tracks: dict[tuple[int, int], list[dict[str, float]]] = {}
    for event in slices:
        tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    for track in tracks.values():
        for before, after in pairwise(track):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-3  # microseconds


def test_an_empty_trace_is_fine_everywhere(tmp_path: Path) -> None:
    trace = Trace("none", "none", "cpu", 1, 1, 1, 0)
    trace.save(tmp_path / "t.json")
    trace.to_perfetto(tmp_path / "p.json")
    assert Trace.load(tmp_path / "t.json") == trace
    assert (list(trace.pools()), trace.phases(), trace.start_s, trace.end_s) == ([], {}, 0.0, 0.0)

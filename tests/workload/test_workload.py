"""Arrival processes, the closed loop, the source a serving loop asks, and every file format with its mistakes."""

from __future__ import annotations

import gzip
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bros_ref.request import SLO, RequestClass
from bros_ref.workload import (
    ClosedLoopBatches,
    Workload,
    WorkloadError,
    WorkloadItem,
    gamma_arrivals,
    lognormal_lengths,
    merge,
    open_loop,
    poisson_arrivals,
    uniform_lengths,
)
from bros_ref.workload.files import (
    LENGTH_COLUMNS,
    MAX_TOKENS,
    iter_workload,
    read_lengths,
    read_workload,
    save_workload,
)

RT, BE = RequestClass.REAL_TIME, RequestClass.BEST_EFFORT
TARGETS = SLO(0.4, 0.2)
PUBLIC = Path(__file__).parents[3] / "shared" / "data" / "traces"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# -- arrivals and lengths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_impossible_numbers_are_refused(bad: float) -> None:
    for name, call in (("rate_per_s", lambda: poisson_arrivals(bad, 1.0, rng())),
                       ("duration_s", lambda: poisson_arrivals(1.0, bad, rng())),
                       ("cv", lambda: gamma_arrivals(1.0, bad, 1.0, rng())),
                       ("median", lambda: lognormal_lengths(bad, 1.0, 1, 2)),
                       ("sigma", lambda: lognormal_lengths(1.0, bad, 1, 2))):
        with pytest.raises(WorkloadError, match=f"{name}: expected a positive finite number, got {bad}"):
            call()


@settings(max_examples=50)
@given(rate=st.floats(0.1, 50), cv=st.floats(0.2, 5), duration=st.floats(0.01, 60), seed=st.integers(0, 99))
def test_arrivals_ascend_within_the_run_and_repeat(rate: float, cv: float, duration: float, seed: int) -> None:
    times = gamma_arrivals(rate, cv, duration, rng(seed))
    assert times == sorted(times) == gamma_arrivals(rate, cv, duration, rng(seed))
    assert all(0 <= time_s < duration for time_s in times)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(cv: float) -> None:
    gaps = np.diff(gamma_arrivals(20.0, cv, 5_000.0, rng(1)))
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_poisson_is_gamma_with_cv_one() -> None:
    assert poisson_arrivals(3.0, 100.0, rng(7)) == gamma_arrivals(3.0, 1.0, 100.0, rng(7)) != []


@settings(max_examples=50)
@given(low=st.integers(1, 300), width=st.integers(0, 300), seed=st.integers(0, 99))
def test_lengths_stay_in_range(low: int, width: int, seed: int) -> None:
    for sampler in (uniform_lengths(low, low + width), lognormal_lengths(150, 1.2, low, low + width)):
        lengths = sampler(rng(seed), 200)
        assert lengths.dtype == np.int64
        assert low <= lengths.min() <= lengths.max() <= low + width


def test_lengths_have_the_distribution_asked_for() -> None:
    assert set(uniform_lengths(3, 6)(rng(), 500).tolist()) == {3, 4, 5, 6}
    lengths = lognormal_lengths(200, 0.7, 1, 10**6)(rng(), 20_000)
    assert np.median(lengths) == pytest.approx(200, rel=0.03)
    assert np.log(lengths).std() == pytest.approx(0.7, rel=0.03)


@pytest.mark.parametrize(("low", "high"), [(0, 4), (5, 4), (-3, 2)])
def test_a_range_without_lengths_is_refused(low: int, high: int) -> None:
    with pytest.raises(WorkloadError, match="1 <= low <= high"):
        uniform_lengths(low, high)
    with pytest.raises(WorkloadError, match="1 <= low <= high"):
        lognormal_lengths(2, 1, low, high)


@pytest.mark.parametrize(("changes", "says"), [
    ({"arrival_s": -0.1}, "arrival_s"), ({"arrival_s": math.nan}, "arrival_s"), ({"prompt_tokens": 0}, "prompt_tokens"),
    ({"output_tokens": 0}, "output_tokens"), ({"slo": None}, "slo"), ({"request_class": BE}, "slo"),
    ({"prompt": ""}, "prompt")])
def test_an_item_that_cannot_be_served_is_refused(changes: dict[str, object], says: str) -> None:
    fields = {"arrival_s": 0.0, "request_class": RT, "prompt_tokens": 1, "output_tokens": 1, "slo": TARGETS}
    with pytest.raises(WorkloadError, match=f"^{says}: "):
        WorkloadItem(**(fields | changes))  # type: ignore[arg-type]


# -- the source -------------------------------------------------------------------------------------------------------


def be_item(arrival_s: float, tokens: int = 1) -> WorkloadItem:
    return WorkloadItem(arrival_s, BE, tokens, 1)


def closed_loop(**changes: object) -> ClosedLoopBatches:
    fields = {"batch_size": 3, "prompt_tokens": uniform_lengths(5, 9), "output_tokens": uniform_lengths(1, 4),
              "rng": rng(2)}
    return ClosedLoopBatches(**(fields | changes))  # type: ignore[arg-type]


@given(times=st.lists(st.floats(0, 10), max_size=30), asks=st.lists(st.floats(0, 12), max_size=10))
def test_everything_comes_due_once_in_order_and_on_time(times: list[float], asks: list[float]) -> None:
    workload = Workload(be_item(time_s, index + 1) for index, time_s in enumerate(times))
    got: list[WorkloadItem] = []
    for now_s in [*sorted(asks), 13.0]:
        coming = workload.next_arrival_s()
        items = workload.due(now_s)
        assert bool(items) == (coming is not None and coming <= now_s)
        assert all(item.arrival_s <= now_s for item in items)
        got += items
        assert len(got) == sum(time_s <= now_s for time_s in times)
    assert [(item.arrival_s, item.prompt_tokens) for item in got] == sorted(
        (time_s, index + 1) for index, time_s in enumerate(times))
    assert [item.request_id for item in got] == [f"be-{i}" for i in range(len(times))]
    assert (workload.exhausted, workload.next_arrival_s()) == (True, None)


def test_merge_keeps_ties_in_order() -> None:
    a, b = [be_item(2.0, 1), be_item(1.0, 2)], [be_item(1.0, 3), be_item(2.0, 4)]
    assert [item.prompt_tokens for item in merge(a, b)] == [2, 3, 1, 4]


@given(batch_size=st.integers(1, 5), num_batches=st.integers(1, 4), durations=st.lists(st.floats(0.1, 5), min_size=20,
                                                                                       max_size=20))
def test_a_batch_starts_when_the_one_before_has_ended(batch_size: int, num_batches: int,
                                                      durations: list[float]) -> None:
    workload = Workload([], [closed_loop(batch_size=batch_size, num_batches=num_batches, start_s=1.0)])
    expected_s, now_s = 1.0, 0.0
    assert workload.due(0.5) == []
    for _ in range(num_batches):
        assert workload.next_arrival_s() == expected_s
        batch = workload.due(expected_s)
        assert [(item.arrival_s, item.request_class) for item in batch] == [(expected_s, BE)] * batch_size
        assert all(5 <= item.prompt_tokens <= 9 and 1 <= item.output_tokens <= 4 for item in batch)
        for index, item in enumerate(batch):
            assert not workload.exhausted
            assert workload.next_arrival_s() is None
            now_s = expected_s + max(durations[:index + 1])
            workload.on_finished(item if index % 2 else item.request_id, now_s)
        expected_s = now_s
    assert workload.exhausted
    assert workload.due(math.inf) == []


def test_no_batch_starts_at_or_after_the_stop_time() -> None:
    workload = Workload([], [closed_loop(batch_size=1, stop_s=2.0)])
    for end_s in (1.0, 1.999, 2.0):
        (item,) = workload.due(10.0)
        workload.on_finished(item, end_s)
    assert workload.exhausted


def test_open_items_do_not_release_a_closed_loop_and_ids_are_counted_by_class() -> None:
    items = open_loop([0.0, 0.1], RT, uniform_lengths(1, 2), uniform_lengths(1, 2), rng(), TARGETS)
    workload = Workload(items, [closed_loop(batch_size=2, num_batches=2)])
    first = workload.due(0.5)
    assert [item.request_id for item in first] == ["rt-0", "be-0", "be-1", "rt-1"]
    for name in ("rt-0", "be-0", "rt-1"):
        workload.on_finished(name, 1.0)
        assert workload.due(9.0) == []
    workload.on_finished("be-1", 1.5)
    assert [(item.request_id, item.arrival_s) for item in workload.due(9.0)] == [("be-2", 1.5), ("be-3", 1.5)]


def test_an_end_told_twice_or_of_a_stranger_is_an_error() -> None:
    workload = Workload([be_item(0.0)])
    workload.due(0.0)
    workload.on_finished("be-0", 1.0)
    for name in ("be-0", "be-7"):
        with pytest.raises(WorkloadError, match=f"request '{name}' is not out"):
            workload.on_finished(name, 2.0)


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"num_batches": 0}, {"start_s": -1.0}, {"start_s": math.nan},
                                     {"start_s": 2.0, "stop_s": 2.0}, {"stop_s": math.nan}])
def test_a_closed_loop_that_cannot_start_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(WorkloadError, match="a closed loop needs"):
        closed_loop(**changes)


# -- files ------------------------------------------------------------------------------------------------------------

items_strategy = st.lists(st.builds(
    lambda is_rt, arrival_s, prompt_tokens, output_tokens, ttft_s, tpot_s, prompt: WorkloadItem(
        arrival_s, RT if is_rt else BE, prompt_tokens, output_tokens, SLO(ttft_s, tpot_s) if is_rt else None, prompt),
    st.booleans(), st.floats(0, 1e6), st.integers(1, MAX_TOKENS), st.integers(1, MAX_TOKENS), st.floats(1e-6, 1e3),
    st.floats(1e-6, 1e3), st.none() | st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)),
    min_size=1, max_size=12)


@settings(max_examples=50)
@given(items=items_strategy, packed=st.booleans())
def test_saved_items_come_back_equal(tmp_path_factory: pytest.TempPathFactory, items: list[WorkloadItem],
                                     packed: bool) -> None:
    path = tmp_path_factory.mktemp("saved") / ("w.csv.gz" if packed else "w.csv")
    save_workload(items, path)
    assert list(iter_workload(path)) == items
    assert read_workload(path) == merge(items)


def test_our_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text('{"arrival_s": 2, "request_class": "be", "prompt_tokens": 7, "output_tokens": 3}\n\n'
                    '{"arrival_s": 1.5, "request_class": "RT", "prompt_tokens": 4, "output_tokens": 2, '
                    '"ttft_slo_s": 0.3, "prompt": "a, \\"b\\""}\n')
    assert read_workload(path, slo=TARGETS) == [
        WorkloadItem(1.5, RT, 4, 2, SLO(0.3, 0.2), 'a, "b"'), WorkloadItem(2.0, BE, 7, 3)]


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
PUBLISHED = {
    "azure 2023": (AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
                   [(0.0, 374, 44), (4.314579, 396, 109)]),
    "azure 2024, not in order": (AZURE + "2024-05-10 00:00:01.500000+00:00,5,6\n2024-05-10 00:00:01+00:00,7,8\n",
                                 [(0.0, 7, 8), (0.5, 5, 6)]),
    "mooncake": ('{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
                 '{"timestamp": 3100, "input_length": 10, "output_length": 1, "hash_ids": [2]}\n',
                 [(0.0, 6758, 500), (3.1, 10, 1)]),
    "timed_trace in seconds": ('{"timestamp": 0.0, "input_length": 9, "output_length": 5, "hash_ids": []}\n'
                               '{"timestamp": 61.114, "input_length": 8, "output_length": 4, "hash_ids": [1]}\n',
                               [(0.0, 9, 5), (61.114, 8, 4)]),
    "bailian": ('{"chat_id": 1, "timestamp": 61, "input_length": 8, "output_length": 4, "type": "text"}\n',
                [(61.0, 8, 4)]),
    "burstgpt": ("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,"
                 "Conversation log\n45,GPT-4,1087,230,1317,API log\n", [(5.0, 472, 18), (45.0, 1087, 230)]),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("packed", [False, True])
def test_public_traces_as_published(tmp_path: Path, name: str, packed: bool) -> None:
    text, expected = PUBLISHED[name]
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode("utf-8-sig"))
    for request_class, slo in ((RT, TARGETS), (BE, None)):
        items = read_workload(path, request_class, slo)
        assert [(item.prompt_tokens, item.output_tokens, item.request_class, item.slo) for item in items] == [
            (prompt, output, request_class, slo) for _, prompt, output in expected]
        assert [item.arrival_s for item in items] == pytest.approx([time_s for time_s, _, _ in expected], abs=1e-6)


def test_a_time_unit_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 3, "input_length": 8, "output_length": 4}\n')
    assert [item.arrival_s for item in read_workload(path, BE)] == [0.003]
    assert [item.arrival_s for item in read_workload(path, BE, time_unit_s=1.0)] == [3.0]
    with pytest.raises(WorkloadError, match=r"t\.jsonl: time_unit_s: expected a positive"):
        read_workload(path, BE, time_unit_s=0.0)
    path.write_text(PUBLISHED["burstgpt"][0])
    with pytest.raises(WorkloadError, match=r"t\.jsonl: time_unit_s is for files with a `timestamp`"):
        read_workload(path, BE, time_unit_s=1.0)


OWN = "arrival_s,request_class,prompt_tokens,output_tokens,ttft_slo_s,tpot_slo_s,prompt\n0,be,1,1,,,\n"


@pytest.mark.parametrize(("text", "says"), [
    ("", r"f: no requests in it"),
    ("\n\n", r"f: no requests in it"),
    (OWN.splitlines()[0], r"f: no requests in it"),
    ("a,b\n1,2\n", r"f:2: no known columns among a, b; expected one of: arrival_s, "),
    ("arrival_s,prompt_tokens\n1,2\n", r"f:2: column output_tokens is missing; the bros_ref format"),
    ("TIMESTAMP,ContextTokens\n1,2\n", r"f:2: column GeneratedTokens is missing; the Azure"),
    (OWN + "-1,be,1,1,,,\n", r"f:3: arrival_s: expected a time, at least 0; got '-1'"),
    (OWN + "nan,be,1,1,,,\n", r"f:3: arrival_s: expected a finite number; got 'nan'"),
    (OWN + "inf,be,1,1,,,\n", r"f:3: arrival_s: expected a finite number; got 'inf'"),
    (OWN + "soon,be,1,1,,,\n", r"f:3: arrival_s: expected a finite number; got 'soon'"),
    (OWN + "1\n", r"f:3: request_class: expected rt or be, in the file or .*--class.*; got nothing"),
    (OWN + "1,vip,1,1,,,\n", r"f:3: request_class: expected rt or be; got 'vip'"),
    (OWN + "1,be,0,1,,,\n", r"f:3: prompt_tokens: expected a whole number of tokens from 1 to \d+; got '0'"),
    (OWN + "1,be,1,0,,,\n", r"f:3: output_tokens: expected a whole number .*; got '0'"),
    (OWN + "1,be,1.5,1,,,\n", r"f:3: prompt_tokens: .*; got '1.5'"),
    (OWN + "1,be,1e300,1,,,\n", r"f:3: prompt_tokens: .*; got '1e300'"),
    (OWN + "1,be,,1,,,\n", r"f:3: prompt_tokens: expected a finite number; got nothing"),
    (OWN + "1,rt,1,1,,,\n", r"f:3: ttft_slo_s: expected seconds, in the file or as a default .*; got nothing"),
    (OWN + "1,rt,1,1,0.4,,\n", r"f:3: tpot_slo_s: expected seconds"),
    (OWN + "1,rt,1,1,-1,0.2,\n", r"f:3: ttft_slo_s: expected a positive number of seconds; got '-1'"),
    (OWN + "1,be,1,1,0.4,0.2,\n", r"f:3: ttft_slo_s: expected nothing: a best-effort request has no target; got '0.4'"),
    (OWN + "1,be,1,1,,,well, then\n", r"f:3: 1 cells more than the header has columns"),
    (OWN + '1,be,1,1,,,"two\nlines"\n1,no,1,1,,,"x\ny"\n', r"f:5: request_class"),
    (AZURE + "yesterday,1,1\n", r"f:2: TIMESTAMP: expected a date and time such as .*; got 'yesterday'"),
    (PUBLISHED["burstgpt"][0] + "6,x,4,-1,4,API log\n", r"f:4: Response tokens: expected a whole .*; got '-1'"),
    (PUBLISHED["burstgpt"][0] + "6,x,0,-1,4,API log\n", r"f:4: Request tokens: expected a whole .*; got '0'"),
    (PUBLISHED["burstgpt"][0] + "6,x,4,0.5,4,API log\n", r"f:4: Response tokens: expected a whole .*; got '0.5'"),
    (PUBLISHED["mooncake"][0] + '{"timestamp": 4.5, "input_length": 1, "output_length": 1}\n',
     r"f:3: timestamp: expected whole milliseconds.*pass time_unit_s=1; got 4.5"),
    ('{"arrival_s": NaN, "request_class": "be", "prompt_tokens": 1, "output_tokens": 1}', r"f:1: arrival_s.*got nan"),
    ('{"arrival_s": true, "request_class": "be", "prompt_tokens": 1, "output_tokens": 1}', r"f:1: arrival_s.*got True"),
    ('{"arrival_s": 0, "request_class": "be", "prompt_tokens": [], "output_tokens": 1}',
     r"f:1: prompt_tokens: expected a finite number; got \[\]"),
    ('{"arrival_s": 0, "request_class": "be", "prompt_tokens": 1, "output_tokens": 1, "prompt": 5}',
     r"f:1: prompt: expected text; got 5"),
    ('{"arrival_s": 0, ', r"f:1: not JSON .*; expected one object a line"),
    ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n[1]\n', r"f:2: expected a JSON object, got \[1\]"),
])
def test_a_bad_line_names_file_line_and_field(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "f"
    path.write_text(text)
    request_class = None if text.startswith(OWN) else BE
    with pytest.raises(WorkloadError, match=says) as raised:
        read_workload(path, request_class)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = gzip.compress((OWN + "1,be,1,1,,,\n" * 5_000).encode())
    for name, data in (("missing", None), ("cut", whole[:-20]), ("latin", OWN.encode() + b"1,be,1,1,,,caf\xe9\n"),
                       ("damaged", b"\x1f\x8b" + b"\x08" * 40)):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(WorkloadError, match=name):
            read_workload(path)


def test_a_long_file_is_not_held_as_text(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    line = json.dumps({"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": list(range(100))})
    path.write_text((line + "\n") * 4_000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in iter_workload(path, BE))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 4_000
    assert peak_bytes < path.stat().st_size / 10


@pytest.mark.skipif(not PUBLIC.exists(), reason=f"no public traces at {PUBLIC.name}")
def test_a_real_day_of_azure_code_traffic(tmp_path: Path) -> None:
    """The published file, rebuilt from its times: 8,819 requests, inter-arrival CV of 13."""
    lines = gzip.decompress((PUBLIC / "azure2023_code.csv.gz").read_bytes()).decode().splitlines()[1:]
    origin = np.datetime64("2023-11-16T18:15:46.680590")
    rows = [line.split(",") for line in lines]
    stamps = [str(origin + np.timedelta64(round(float(row[0]) * 1e6), "us")).replace("T", " ") for row in rows]
    path = tmp_path / "AzureLLMInferenceTrace_code.csv"
    path.write_text(AZURE + "\n".join(f"{stamp},{row[1]},{row[2]}" for stamp, row in zip(stamps, rows, strict=True)))
    items = read_workload(path, BE)
    assert len(items) == 8_819
    assert [item.arrival_s for item in items] == pytest.approx([float(row[0]) for row in rows], abs=1e-5)
    gaps = np.diff([item.arrival_s for item in items])
    assert gaps.std() / gaps.mean() == pytest.approx(13, abs=0.5)


def test_lengths_are_read_under_every_published_name(tmp_path: Path) -> None:
    for columns in LENGTH_COLUMNS:
        path = tmp_path / "lengths.csv"
        path.write_text(f"id,{columns[0]},{columns[1]}\n0,100,20\n1,3000,10\n2,7,1\n")
        assert read_lengths(path, 2048) == ((100, 20), (7, 1)), "what does not fit the context is left out"
    path.write_text("in,out\n5,6\n5,zero\n")
    with pytest.raises(WorkloadError, match=r"lengths.csv:3: out: expected a finite number"):
        read_lengths(path, 2048)
    for text, expected in (("in,out\n5,6\n", "fit a context of 10"), ("a,b\n5,6\n", "expected one of")):
        path.write_text(text)
        with pytest.raises(WorkloadError, match=expected):
            read_lengths(path, 10)


def test_a_plain_trace_has_arrivals_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n1.5,7,8\n0.5,9,10\n")
    items = read_workload(path, RequestClass.BEST_EFFORT)
    assert [(item.arrival_s, item.prompt_tokens, item.output_tokens) for item in items] == [(0.5, 9, 10), (1.5, 7, 8)]

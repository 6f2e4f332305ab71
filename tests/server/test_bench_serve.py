"""The open-loop client: what it sends, what it counts, and that it hides no waiting."""

from __future__ import annotations

import json

import httpx
import pytest
from server.support import running
from typer.testing import CliRunner

from bros_ref.cli.common import app
from bros_ref.cli.live import COMMAND_MODULES
from bros_ref.evaluation.bench.serve import (
    Answer,
    BenchError,
    Target,
    _http_added,
    _warm_up,
    as_trace,
    bench_serve,
    default_workload,
    find_target,
)
from bros_ref.request import SLO, RequestClass
from bros_ref.trace.metrics import summarise
from bros_ref.trace.records import RequestRecord, StepRecord
from bros_ref.trace.trace import Trace
from bros_ref.workload.generate import WorkloadItem

SHORT = [WorkloadItem(0.05 * i, RequestClass.REAL_TIME, 8, 1 + i, SLO(5, 1)) for i in range(6)] + [
    WorkloadItem(0.0, RequestClass.BEST_EFFORT, 20, 10) for _ in range(4)]


@pytest.mark.parametrize("be_as_batch", [False, True])
def test_both_classes_are_sent_and_counted(server, be_as_batch):
    target, done = find_target(server.url, "none", None, True), []
    before = server.state.metrics.totals()
    run, _ = bench_serve(target, SHORT, 1, be_as_batch=be_as_batch, on_done=lambda: done.append(1))
    after = server.state.metrics.totals()
    rt, be = run["classes"]["rt"], run["classes"]["be"]
    assert (rt["completed"], rt["failed"], rt["output_tokens"]) == (6, 0, sum(range(1, 7)))
    assert (be["completed"], be["failed"], be["output_tokens"]) == (4, 0, 40)
    assert after["be_tokens"] - before["be_tokens"] == 40
    assert rt["slo_attainment"] == 1
    assert run["errors"] == []
    assert len(done) == (6 if be_as_batch else 10)
    assert run["policy"] == "http"
    assert 0 < run["engine_median_ttft_ms"] < rt["median_ttft_ms"]
    assert 0 < run["http_added_ttft_ms"] < rt["p99_ttft_ms"]
    json.dumps(run, allow_nan=False)


def test_latency_counts_from_the_scheduled_arrival():
    late = Answer("rt-0", WorkloadItem(1.0, RequestClass.REAL_TIME, 4, 3, SLO(0.5, 1)), [3.0, 3.1], 3, "length",
                  ended_s=3.2)
    lost = Answer("rt-1", WorkloadItem(2.0, RequestClass.REAL_TIME, 4, 3, SLO(0.5, 1)), error="HTTP 503", ended_s=2.1)
    broken = Answer("be-2", WorkloadItem(0.0, RequestClass.BEST_EFFORT, 4, 3), [0.5], 0, None, "cut", 0.6)
    rt, be = summarise(as_trace([late, lost, broken], "m", 0))["classes"].values()
    assert rt["mean_ttft_ms"] == pytest.approx(2000)
    assert rt["mean_tpot_ms"] == pytest.approx(50)  # three tokens, two of which share a chunk
    assert (rt["arrived"], rt["completed"], rt["failed"], rt["slo_attainment"]) == (2, 1, 1, 0)
    assert (be["completed"], be["failed"]) == (0, 1)


def test_what_http_added_is_the_median_of_the_pairs(monkeypatch, tmp_path):
    """In the engine 100 ms and 300 ms; the client saw 105 and 320. A request unknown to the engine does not count."""
    trace = Trace("bros", "m", "cpu", 1, 1, 1, 0)
    for step, (name, end_s) in enumerate([("a" * 12 + "-0", 5.1), ("b" * 12 + "-0", 5.3)], start=1):
        trace.requests[name] = RequestRecord(name, "rt", 5.0, 4, 1, 1.0, 1.0)
        trace.append(a_step(step, end_s, name))
    trace.save(tmp_path / "trace.json")
    content = (tmp_path / "trace.json").read_bytes()
    item = WorkloadItem(1.0, RequestClass.REAL_TIME, 4, 1, SLO(1, 1))
    answers = [Answer(f"rt-{i}", item, [1.0 + ttft_s], 1, "length", response_id=f"cmpl-{letter * 32}")
               for i, (letter, ttft_s) in enumerate([("a", 0.105), ("b", 0.320), ("c", 9.0)])]
    target = Target("http://ours", "none", "m")
    answer = httpx.Response(200, content=content, request=httpx.Request("GET", "http://ours/v1/trace"))
    monkeypatch.setattr(httpx, "get", lambda *args, **options: answer)
    added = _http_added(target, answers, 10)
    assert added == {"engine_median_ttft_ms": pytest.approx(200), "http_added_ttft_ms": pytest.approx(12.5)}
    answer.status_code = 404
    assert set(_http_added(target, answers, 10).values()) == {None}


def a_step(number, end_s, name):
    return StepRecord(
        step=number, start_s=end_s - 0.1, duration_s=0.1, schedule_s=0.0, predicted_s=None, step_budget_s=None,
        binding=None, scheduled={name: 4}, emitted=[name], finished={name: "length"}, preempted={}, slack_s={},
        left_out={}, num_behind=0, block_changes=[], offloaded=[],
        copied={"checkpoint": 0, "restore": 0, "relocate": 0}, recomputed_tokens=0, num_waiting=0, num_running=0,
        used_blocks=0)


@pytest.mark.parametrize(("first", "expected"), [(SLO(0.5, 0.1), SLO(0.5, 0.1)), (None, None)])
def test_the_warm_up_has_the_targets_of_the_workload(first, expected):
    items = [WorkloadItem(0.0, RequestClass.BEST_EFFORT, 5, 5)]
    items += [WorkloadItem(1.0, RequestClass.REAL_TIME, 5, 5, first)] if first else []
    assert _warm_up(items).slo == expected


def test_the_default_workload():
    items = default_workload(2.0, 5, 30, SLO(1, 1), 3)
    assert sum(item.slo is None for item in items) == 5
    assert 30 < sum(item.slo is not None for item in items) < 100
    assert default_workload(2.0, 5, 30, SLO(1, 1), 3) == items
    assert len(default_workload(0, 5, 30, SLO(1, 1), 3)) == 5


def test_a_full_server_is_told_and_not_hidden(tmp_path):
    with running(tmp_path, max_queued_be=1) as server:
        server.state.loop._gate = lambda engine, request, waiting: _full(request)
        run, _ = bench_serve(find_target(server.url, "none", None, True), SHORT, 1)
    assert run["classes"]["be"]["failed"] == 4
    assert run["classes"]["rt"]["failed"] == 0
    assert any("429" in error for error in run["errors"])


def _full(request):
    from bros_ref.server.errors import APIError

    return None if request.is_rt else APIError(429, "full")


def test_a_server_that_is_none_is_named():
    with pytest.raises(BenchError, match="base-url"):
        find_target("http://127.0.0.1:9", "none", None, True)


def test_the_command(server, tmp_path):
    assert COMMAND_MODULES
    (tmp_path / "w.csv").write_text("arrival_s,request_class,prompt_tokens,output_tokens,ttft_slo_s,tpot_slo_s\n"
                                    "0,rt,5,4,1,1\n0.1,be,5,4,,\n")
    result = CliRunner().invoke(app, [
        "bench", "serve", "--base-url", server.url, "--workload", str(tmp_path / "w.csv"), "--report",
        str(tmp_path / "r.html"), "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    run = json.loads((tmp_path / "r.json").read_text())["runs"][0]
    assert run["classes"]["rt"]["completed"] == run["classes"]["be"]["completed"] == 1
    assert "median_ttft_ms" in (tmp_path / "r.html").read_text()

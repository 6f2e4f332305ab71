"""Settings on which nothing was tuned: system, rate and targets follow from a trace by rules, windows from seeds."""

import math
from dataclasses import replace

import pytest

from bros_ref.__main__ import main
from bros_ref.evaluation.optimality import rt_work_share
from bros_ref.evaluation.reproduce import reproduce_paper
from bros_ref.evaluation.sweeps import BASELINES, all_jobs
from bros_ref.evaluation.traces import LOADS, unseen_points
from bros_ref.request import SLO, RequestClass
from bros_ref.simulator.cost_model import model_named
from bros_ref.viz.figures.reproduction import write_reproduction
from bros_ref.workload.generate import WorkloadError, WorkloadItem
from bros_ref.workload.paper import LONG_LENGTHS, PaperWorkload


def recorded(*arrivals_s, prompt_tokens=100):
    return tuple(WorkloadItem(time_s, RequestClass.REAL_TIME, prompt_tokens + index, 10, SLO(1.0, 1.0))
                 for index, time_s in enumerate(arrivals_s))


def window(workload, seed):
    items = workload.build(seed, only="rt").due(math.inf)
    return [(round(item.arrival_s, 6), item.prompt_tokens) for item in items]


def test_each_seed_plays_another_window_of_a_trace_and_after_the_last_the_first_again():
    trace = recorded(0.0, 1.0, 4.0, 5.0, 9.0, 10.0)
    workload = PaperWorkload(0.6, 4.0, 0, SLO(0.4, 0.2), rt_trace=trace)  # 6 requests in 10 s: its own rate
    assert window(workload, 0) == [(0.0, 100), (1.0, 101)]
    assert window(workload, 1) == [(0.0, 102), (1.0, 103)], "what remains after it is shorter than a window"
    assert window(workload, 2) == window(workload, 0)
    assert all(item.slo == SLO(0.4, 0.2) for item in workload.build(1).due(math.inf))


def test_a_window_without_a_request_is_skipped():
    workload = PaperWorkload(0.2, 5.0, 0, rt_trace=recorded(0.0, 1.0, 17.0, 20.0))
    assert window(workload, 1) == [(2.0, 102)], "of 15 to 20 s"
    assert window(workload, 2) == window(workload, 0) == [(0.0, 100), (1.0, 101)]


def test_a_trace_is_stretched_to_the_wanted_rate():
    workload = PaperWorkload(0.3, 8.0, 0, rt_trace=recorded(0.0, 1.0, 4.0, 5.0, 9.0, 10.0))
    assert window(workload, 0) == [(0.0, 100), (2.0, 101)]
    assert window(workload, 1) == [(0.0, 102), (2.0, 103)]


def test_a_trace_shorter_than_its_window_is_played_as_often_as_there_are_seeds():
    workload = PaperWorkload(2.0, 100.0, 0, rt_trace=recorded(0.0, 1.0))
    assert window(workload, 0) == window(workload, 7) == [(0.0, 100), (1.0, 101)]


def test_best_effort_batches_beside_a_trace_are_the_papers():
    alone, beside = (PaperWorkload(0.6, 4.0, 3, rt_trace=trace) for trace in ((), recorded(0.0, 3.0)))
    assert alone.build(4, only="be").due(0.0) == beside.build(4, only="be").due(0.0)


@pytest.mark.parametrize(("rate", "trace"), [(0.0, recorded(0.0, 1.0)), (1.0, recorded(2.0, 2.0)),
                                             (1.0, recorded(1.0))])
def test_a_trace_without_a_rate_is_refused(rate, trace):
    with pytest.raises(ValueError, match="not all at one time, in order, and a rate above 0"):
        PaperWorkload(rate, 4.0, 0, rt_trace=trace)


def test_long_prompts_are_as_long_as_their_names_say():
    points = {label: arrivals for label, _, arrivals in unseen_points(10.0)}
    assert len(points) == len(LONG_LENGTHS) * len(LOADS)
    shares = {}
    for name in LONG_LENGTHS:
        sample = replace(points[f"{name}/half load"], rt_rate_per_s=1.0, duration_s=20_000.0)
        prompts = [item.prompt_tokens for item in sample.build(1, only="rt").due(math.inf)]
        shares[name] = sum(tokens > 30_000 for tokens in prompts) / len(prompts)
        if name.startswith("long-"):
            mean = sum(prompts) / len(prompts)
            assert mean == pytest.approx(1000 * int(name[5:-1]), rel=0.2), "clipping takes some of the mean"
    assert shares["long-14k"] == pytest.approx(0.1, abs=0.02)
    assert shares["chat-and-30k"] == pytest.approx(0.1, abs=0.02)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "chats.csv").write_text("in,out\n" + "300,20\n40,90\n" * 10 + "5000,1\n")
    (tmp_path / "code.csv").write_text("arrival_s,input_tokens,output_tokens\n" + "".join(
        f"{5 + index},{3000 + index},9\n" for index in range(20)))
    return tmp_path


def test_system_rate_and_targets_follow_from_a_file(folder):
    points = {label: (settings, arrivals) for label, settings, arrivals in unseen_points(30.0, folder)}
    assert points["chats/half load"][0].model == "opt-13b", "the one request that it cannot hold is left out"
    settings, arrivals = points["code/half load"]
    assert settings.model == "llama-3-8b"
    assert len(arrivals.rt_trace) == 20
    assert arrivals.rt_trace[0].arrival_s == 0.0
    assert arrivals.slo.tpot_s == 0.2
    assert arrivals.slo.ttft_s >= 0.4
    assert arrivals.be_batch > 0
    for label, load in LOADS.items():
        settings, arrivals = points[f"code/{label}"]
        length_s = len(arrivals.rt_trace) / arrivals.rt_rate_per_s
        whole = replace(arrivals, duration_s=length_s + 1)
        assert rt_work_share(settings, whole) * (length_s + 1) / length_s == pytest.approx(load)
    for _, (settings, arrivals) in points.items():
        longest = max(item.prompt_tokens + item.output_tokens for item in arrivals.build(0, only="rt").due(math.inf))
        assert longest <= model_named(settings.model).max_context_tokens


def test_a_file_that_is_no_trace_is_refused_by_name(folder):
    (folder / "notes.txt").write_text("a,b\n1,2\n")
    with pytest.raises(WorkloadError, match=r"notes\.txt:2: no lengths among a, b"):
        unseen_points(30.0, folder)


@pytest.mark.parametrize("name", ["missing", "chats.csv"])
def test_a_folder_must_be_one(folder, name):
    with pytest.raises(ValueError, match=f"{name} is no folder with files in it"):
        unseen_points(30.0, folder / name)


def test_a_trace_with_less_than_two_requests_that_fit_is_refused(tmp_path):
    (tmp_path / "one.csv").write_text("arrival_s,input_tokens,output_tokens\n0,10,10\n1,40000,10\n")
    with pytest.raises(ValueError, match=r"one\.csv: 1 real-time requests of at most 32768 tokens"):
        unseen_points(30.0, tmp_path)


def test_every_policy_meets_every_trace_and_other_parts_are_left_out(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bros_ref.simulator.simulate.MAX_TAIL_S", 1.0)
    monkeypatch.setattr("bros_ref.evaluation.traces.LONG_LENGTHS", {})
    result = reproduce_paper(1.0, 0, seeds=2, parts=["unseen"], traces=folder, processes=1)
    assert (result["figures"], result["overhead"], result["bounds"]) == ([], None, None)
    assert (result["systems"], result["ablation"]) == ([], [])
    cells = {f"unseen/{name}/{load}" for name in ("chats", "code") for load in LOADS}
    assert {row["cell"] for row in result["dominance"]} == cells
    assert {row["name"].rpartition("/")[0] for row in result["sweeps"]} == cells
    for row in result["dominance"]:
        assert {other["policy"] for other in row["each"]} == {*BASELINES, "bros"}
        for other in row["each"]:
            assert other["be_gain"] == pytest.approx(row["be"] - other["be"])
            assert other["rt_gain"] == pytest.approx(row["rt"] - other["rt"])
    write_reproduction(tmp_path / "report.html", result)
    page = (tmp_path / "report.html").read_text()
    assert 'id="unseen"' in page
    assert 'id="paper"' not in page


@pytest.mark.parametrize(("options", "message"), [
    (["--parts", "paper,all"], "unknown part 'all'; known are paper, sweep, ablation, unseen"),
    (["--parts", "paper", "--traces", "."], "traces are served in the part unseen")])
def test_parts_that_are_none_are_refused(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr("sys.argv", ["bros-ref", "reproduce", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_parts_name_their_jobs():
    for part in ("paper", "sweep", "ablation", "unseen"):
        assert {name.partition("/")[0] for name in all_jobs(1.0, parts=[part])} == {part}

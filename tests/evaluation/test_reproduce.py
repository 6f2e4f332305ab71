"""The reproduction: the verdict follows its rule, every paper figure is answered, the page opens offline."""

import json
from dataclasses import replace
from html import escape
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.cli.live import main
from bros_ref.evaluation import reproduce
from bros_ref.evaluation.dominance import BE_MARGIN, RT_MARGIN, dominance
from bros_ref.evaluation.reproduce import AGAINST_V0, FIGURES, PaperFigure, compare, reproduce_paper, verdict
from bros_ref.evaluation.sweeps import BASELINES
from bros_ref.scheduler import PLUS
from bros_ref.viz.figures.reproduction import write_reproduction

RATIO = PaperFigure("x", "rt.ttft_attainment", "b", 2.0, "ratio")
LATENCY = PaperFigure("x", "rt.normalized_latency_ms_per_token", "b", -40.0, "reduction")
LOSS = PaperFigure("x", "be.request_throughput", "b", -10.0, "loss")


@pytest.mark.parametrize(("figure", "ours", "theirs", "expected"), [
    (RATIO, 2.0, 0.4, "same"), (RATIO, 2.25, 0.4, "same"), (RATIO, 2.3, 0.4, "better"), (RATIO, 1.7, 0.4, "worse"),
    (RATIO, 0.9, 0.4, "worse"), (RATIO, 30.0, 0.01, "not comparable"),
    (LATENCY, -40.0, 9.0, "same"), (LATENCY, -60.0, 9.0, "better"), (LATENCY, -20.0, 9.0, "worse"),
    (LATENCY, 5.0, 9.0, "worse"),
    (LOSS, -10.0, 9.0, "same"), (LOSS, -20.0, 9.0, "worse"), (LOSS, -1.0, 9.0, "better"), (LOSS, 3.0, 9.0, "better"),
])
def test_a_verdict_is_for_bros(figure, ours, theirs, expected):
    assert verdict(figure, ours, theirs) == expected


def run_of(rt, be):
    return {"classes": {"rt": {"slo_attainment": rt, "output_throughput": 100.0}, "be": {"output_throughput": be}}}


def runs_of(seeds, *, rt=0.9, be=100.0, rt_spread=0.0, be_spread=0.0):
    """Runs around a mean; the spread is that of the seeds and so is shared by all policies of a cell."""
    middle = (seeds - 1) / 2
    return [run_of(rt + rt_spread * (seed - middle), be + be_spread * (seed - middle)) for seed in range(seeds)]


@pytest.mark.parametrize(("rt", "be", "expected"), [
    (0.90, 100, "ahead"), (0.905, 101.5, "ahead"), (0.99, 101, "behind"), (0.80, 150, "trade"), (0.99, 50, "trade"),
    (0.92, 100, "behind"), (0.90, 103, "behind"), (0.95, 110, "behind"), (0.0, 0.0, "ahead")])
@pytest.mark.parametrize("spread", [0.0, 8.0])
def test_a_cell_is_judged_by_both_classes_beyond_the_margins(rt, be, expected, spread):
    """Against a baseline of (rt, be), bros-plus has 90 % of RT on time and 100 BE tokens/s. What differs from seed to
    seed for both alike changes nothing."""
    runs = {"sweep/x/y/bros-plus": runs_of(5, be_spread=spread),
            "sweep/x/y/vllm-priority": runs_of(5, rt=rt, be=be, be_spread=spread),
            "sweep/x/y/bros": runs_of(5, rt=1.0, be=1e9)}
    [row] = dominance(runs)
    assert (row["verdict"], row["against"], row["seeds"]) == (expected, "vllm-priority", 5)
    assert (row["rt_gain"], row["be_gain"]) == (pytest.approx(0.90 - rt), pytest.approx(100 - be))


@pytest.mark.parametrize(("gains", "expected"), [
    ([31.0], "undecided"), ([0.0], "undecided"), ([-31.0], "undecided"),  # a single seed decides nothing
    ([31, 10, 60, 25, 40], "ahead"), ([-31, -10, -60, -25, -40], "behind"),
    ([40, -45, 30, -20, 0], "undecided"), ([60, -40, 50, -30, 40], "undecided"), ([0.4, -0.3, 0.2, 0, 0.1], "ahead")])
def test_a_verdict_rests_on_the_interval_of_the_paired_differences(gains, expected):
    runs = {"sweep/x/y/bros-plus": [run_of(0.9, 200.0 + gain) for gain in gains],
            "sweep/x/y/qoserve": [run_of(0.9, 200.0) for _ in gains]}
    [row] = dominance(runs)
    assert row["verdict"] == expected
    if len(gains) > 1:
        low, high = row["interval95"]["be_gain"]
        assert low < row["be_gain"] < high
        assert row["be_gain"] == pytest.approx(sum(gains) / len(gains))
    else:
        assert row["interval95"]["be_gain"] is None


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1, 500)), min_size=1, max_size=4))
def test_a_cell_is_ahead_only_if_no_baseline_has_more_of_anything(baselines):
    runs = {"sweep/x/y/bros-plus": runs_of(3, rt=0.5)} | {
        f"sweep/x/y/{name}": runs_of(3, rt=rt, be=be) for name, (rt, be) in zip(BASELINES, baselines, strict=False)}
    [row] = dominance(runs)
    slack = 1e-9  # the rounding of means
    assert row["verdict"] != "undecided", "nothing differs from seed to seed"
    if row["verdict"] == "ahead":
        assert all(rt <= 0.5 + RT_MARGIN + slack and be - 100 <= BE_MARGIN * be + slack for rt, be in baselines)
    else:
        assert any(rt >= 0.5 + RT_MARGIN - slack or be - 100 >= BE_MARGIN * be - slack for rt, be in baselines)


def of_policy(policy, samples):
    return {f"paper/opt-30b/sharegpt/10/{policy}": [
        {"classes": {"rt": {"ttft_attainment": sample, "normalized_latency_ms_per_token": 100 * sample}}}
        for sample in samples]}


@pytest.mark.parametrize(("ours", "theirs", "expected"), [
    ([0.8, 0.82, 0.78], [0.4, 0.41, 0.39], "same"), ([0.8], [0.4], "undecided"),
    ([0.8, 0.5, 0.9], [0.4, 0.5, 0.3], "undecided"), ([0.9, 0.9, 0.9], [0.6, 0.61, 0.59], "worse"),
    ([0.9, 0.91, 0.89], [0.3, 0.3, 0.3], "better"), ([0.9], [0.01], "not comparable")])
def test_a_paper_figure_has_a_verdict_that_holds_at_both_ends_of_its_interval(ours, theirs, expected):
    figure = replace(RATIO, baseline="bros-rr", systems=("opt-30b",), rates=(10.0,))
    entry = compare(figure, of_policy("bros", ours) | of_policy("bros-rr", theirs), (10.0,))
    assert entry["verdict"] == expected
    assert entry["ours"] == pytest.approx(sum(ours) / sum(theirs))
    assert (entry["interval95"] is None) == (len(ours) == 1)


def test_a_reduction_is_told_in_per_cent_with_its_interval():
    figure = replace(LATENCY, baseline="bros-rr", systems=("opt-30b",), rates=(10.0,))
    entry = compare(figure, of_policy("bros", [0.5, 0.6, 0.7]) | of_policy("bros-rr", [1.0, 1.0, 1.0]), (10.0,))
    assert entry["ours"] == pytest.approx(-40)
    low, high = entry["interval95"]
    assert high - low == pytest.approx(2 * 100 * 4.303 * 0.1 / 3**0.5, rel=1e-3)


def test_every_comparison_with_vllm_is_made_with_both_of_its_schedulers():
    assert {(figure.metric, figure.paper, figure.only) for figure in AGAINST_V0} == {
        (figure.metric, figure.paper, figure.only) for figure in FIGURES if figure.baseline == "vllm-fcfs"}
    names = [(figure.name, figure.metric) for figure in (*FIGURES, *AGAINST_V0)]
    assert len(set(names)) == len(names)


def test_everything_is_answered_with_absolute_values_and_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr("bros_ref.simulator.simulate.MAX_TAIL_S", 1.0)  # who is served when is not at stake here
    done = []
    result = reproduce_paper(1.0, 0, seeds=2, quick=True, processes=2, on_progress=done.append)
    assert sum(done) == pytest.approx(1.0)
    assert (result["seeds"], result["duration_s"]) == (2, 1.0)
    assert [figure["paper"] for figure in result["figures"]] == [figure.paper for figure in (*FIGURES, *AGAINST_V0)]
    for figure in result["figures"]:
        if figure["ours"] is not None:
            bros, baseline = figure["absolute"].values()
            expected = bros / baseline if figure["kind"] == "ratio" else 100 * (bros / baseline - 1)
            assert figure["ours"] == pytest.approx(expected)
            low, high = figure["interval95"]
            assert low <= figure["ours"] <= high
        else:
            assert figure["verdict"] == "not comparable"
    optimum = result["bounds"]["iteration_optimum"]
    assert optimum["states"] > 0
    assert sum(optimum["histogram"]) == optimum["states"]
    assert result["bounds"]["coverage"].keys() == {"bros", "bros-plus"}
    assert all(shares["least"] <= shares["median"] for shares in result["bounds"]["be_of_reference"].values())
    cells = {row["name"].rpartition("/")[0] for row in (*result["systems"], *result["sweeps"])
             if "-rt/" not in row["name"]}
    assert {row["cell"] for row in result["dominance"]} == cells, "every cell is judged"
    assert {row["against"] for row in result["dominance"]} <= set(BASELINES)
    assert {row["policy"] for row in result["ablation"]} == {"bros", "bros-plus", *(f"bros+{name}" for name in PLUS)}
    for row in (*result["systems"], *result["sweeps"], *result["ablation"]):
        assert row["seeds"] == 2
        low, high = row["interval95"]["be_tokens_per_s"]
        assert low <= row["be_tokens_per_s"] <= high
    low, high = result["overhead"]["ours"]
    assert 0 < low <= high < 1
    policies = {row["policy"] for row in (*result["systems"], *result["sweeps"])}
    assert policies >= {"bros", "bros-plus", "rt-only", "be-only", "bros-swap-block", *BASELINES}
    json.dumps(result, allow_nan=False)
    write_reproduction(tmp_path / "report.html", result)
    page = (tmp_path / "report.html").read_text()
    assert "src=" not in page.split("</script>", 1)[1].split("<script")[0], "nothing is fetched"
    assert "2 seeds" in page
    for figure in (*FIGURES, *AGAINST_V0):
        assert figure.name in page
        assert escape(figure.why) in page
    for row in result["dominance"]:
        assert escape(row["cell"].partition("/")[2].replace("/", ", ")) in page


class StoppedClock:
    """Real time as the budget sees it, in which a simulated run takes as long as the test says."""

    def __init__(self, monkeypatch, run_s):
        self.now_s, self.jobs = 0.0, []
        monkeypatch.setattr(reproduce, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(reproduce, "run_all", self.run_all)
        monkeypatch.setattr(reproduce, "small_instance_gaps", lambda seed: {})
        for name in ("coverage", "be_of_reference", "_iteration_optimum", "compare", "_overhead", "dominance", "_row"):
            monkeypatch.setattr(reproduce, name, lambda *_: {})
        self.run_s = run_s

    def run_all(self, jobs, processes, on_done=None):
        for job in jobs:
            self.now_s += self.run_s * job.arrivals.duration_s
            if on_done is not None:
                on_done(job)
        self.jobs.append(jobs)
        return [{}] * len(jobs)


@pytest.mark.parametrize(("minutes", "seeds"), [(60, 5), (60, 1), (7, 2)])
def test_a_budget_of_time_is_kept_by_shorter_runs(monkeypatch, minutes, seeds):
    clock = StoppedClock(monkeypatch, run_s=0.01)
    result = reproduce_paper(600.0, 0, seeds=seeds, minutes=minutes)
    assert clock.now_s <= 60 * minutes
    assert result["seeds"] == seeds
    assert reproduce.SHORTEST_S <= result["duration_s"] < 600.0
    assert clock.now_s > 0.5 * 60 * minutes, "most of it is used"
    assert {job.settings.seed for job in clock.jobs[-1]} == {seeds - 1}


def test_a_budget_that_is_ample_shortens_nothing(monkeypatch):
    StoppedClock(monkeypatch, run_s=1e-5)
    assert reproduce_paper(600.0, 0, seeds=2, minutes=60)["duration_s"] == 600.0


def test_seeds_that_would_exceed_the_budget_are_not_begun(monkeypatch):
    """Long runs cost more than the probe said: the first seed takes most of the budget, and it stays the only one."""
    clock = StoppedClock(monkeypatch, run_s=0.01)
    monkeypatch.setattr(reproduce, "_affordable_s", lambda *_: 100.0)
    minutes = 1.8 * 0.01 * 100 * len(reproduce.all_jobs(1.0)) / 60
    assert reproduce_paper(600.0, 0, seeds=5, minutes=minutes)["seeds"] == 1
    assert clock.now_s <= 60 * minutes


def test_a_budget_too_short_for_anything_says_how_much_would_do(monkeypatch):
    StoppedClock(monkeypatch, run_s=0.1)
    with pytest.raises(ValueError, match=r"--minutes 1 is too short for 5 seeds.*needs about \d+"):
        reproduce_paper(600.0, 0, seeds=5, minutes=1)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_a_budget_must_be_a_time(tmp_path, monkeypatch, capsys, minutes):
    monkeypatch.setattr("sys.argv", ["bros-ref", "reproduce", "--out", str(tmp_path), "--minutes", minutes])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    assert "--minutes must be a positive finite number" in capsys.readouterr().err

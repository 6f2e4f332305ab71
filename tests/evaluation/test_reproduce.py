"""The reproduction: the verdict follows its rule, every paper figure is answered, the page opens offline."""

import json
from html import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_ref.evaluation.reproduce import (
    BASELINES,
    BE_NOISE,
    FIGURES,
    RT_NOISE,
    PaperFigure,
    _dominance,
    reproduce_paper,
    verdict,
)
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


@pytest.mark.parametrize(("rt", "be", "expected"), [
    (0.90, 100, "ahead"), (0.905, 101.5, "ahead"), (0.99, 101, "behind"), (0.80, 150, "trade"), (0.99, 50, "trade"),
    (0.92, 100, "behind"), (0.90, 103, "behind"), (0.95, 110, "behind"), (0.0, 0.0, "ahead")])
def test_a_cell_is_judged_by_both_classes_beyond_noise(rt, be, expected):
    """Against a baseline of (rt, be), bros-plus has 90 % of RT on time and 100 BE tokens/s."""
    runs = {"sweep/x/y/bros-plus": run_of(0.90, 100.0), "sweep/x/y/vllm-priority": run_of(rt, be),
            "sweep/x/y/bros": run_of(1.0, 1e9)}
    [row] = _dominance(runs)
    assert (row["verdict"], row["against"]) == (expected, "vllm-priority")
    assert row["rt_gain"] == pytest.approx(0.90 - rt)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1, 500)), min_size=1, max_size=4))
def test_a_cell_is_ahead_only_if_no_baseline_has_more_of_anything(baselines):
    runs = {"sweep/x/y/bros-plus": run_of(0.5, 100.0)} | {
        f"sweep/x/y/{name}": run_of(*values) for name, values in zip(BASELINES, baselines, strict=False)}
    [row] = _dominance(runs)
    nobody_has_more = all(rt <= 0.5 + RT_NOISE and 100 / be - 1 >= -BE_NOISE for rt, be in baselines)
    assert (row["verdict"] == "ahead") == nobody_has_more


def test_everything_is_answered_with_absolute_values(tmp_path, monkeypatch):
    monkeypatch.setattr("bros_ref.simulator.simulate.MAX_TAIL_S", 1.0)  # who is served when is not at stake here
    done = []
    result = reproduce_paper(1.5, 0, quick=True, processes=2, on_progress=done.append)
    assert sum(done) == pytest.approx(1.0)
    assert [figure["paper"] for figure in result["figures"]] == [figure.paper for figure in FIGURES]
    for figure in result["figures"]:
        if figure["ours"] is not None:
            bros, baseline = figure["absolute"].values()
            expected = bros / baseline if figure["kind"] == "ratio" else 100 * (bros / baseline - 1)
            assert figure["ours"] == pytest.approx(expected)
        else:
            assert figure["verdict"] == "not comparable"
    assert result["bounds"]["iteration_optimum"]["states"] > 0
    assert result["bounds"]["coverage"].keys() == {"bros", "bros-plus"}
    assert sum(result["bounds"]["iteration_optimum"]["histogram"]) == result["bounds"]["iteration_optimum"]["states"]
    assert all(shares["least"] <= shares["median"] for shares in result["bounds"]["be_of_reference"].values())
    cells = {row["name"].rpartition("/")[0] for row in (*result["systems"], *result["sweeps"])
             if "-rt/" not in row["name"]}
    assert {row["cell"] for row in result["dominance"]} == cells, "every cell is judged"
    assert {row["policy"] for row in result["ablation"]} == {"bros", "bros-plus", *(f"bros+{name}" for name in PLUS)}
    low, high = result["overhead"]["ours"]
    assert 0 < low <= high < 1
    policies = {row["policy"] for row in result["systems"]}
    assert policies >= {"bros", "bros-plus", "rt-only", "be-only", "vllm-fcfs", "vllm-priority", "bros-swap-block"}
    json.dumps(result, allow_nan=False)
    write_reproduction(tmp_path / "report.html", result)
    page = (tmp_path / "report.html").read_text()
    assert "src=" not in page.split("</script>", 1)[1].split("<script")[0], "nothing is fetched"
    for figure in FIGURES:
        assert figure.name in page
        assert escape(figure.why) in page
    for row in result["dominance"]:
        assert escape(row["cell"].partition("/")[2].replace("/", ", ")) in page

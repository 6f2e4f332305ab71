"""The reproduction: the verdict follows its rule, every paper figure is answered, the page opens offline."""

import json

import pytest

from bros_ref.reproduce import FIGURES, PaperFigure, reproduce_paper, verdict
from bros_ref.viz.reproduction import write_reproduction

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


def test_everything_is_answered_with_absolute_values(tmp_path):
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
    policies = {row["policy"] for row in result["systems"]}
    assert policies >= {"bros", "bros-plus", "rt-only", "be-only", "vllm-fcfs", "vllm-priority", "bros-swap-block"}
    json.dumps(result, allow_nan=False)
    write_reproduction(tmp_path / "report.html", result)
    page = (tmp_path / "report.html").read_text()
    assert "src=" not in page.split("</script>", 1)[1].split("<script")[0], "nothing is fetched"
    for figure in FIGURES:
        assert figure.name in page

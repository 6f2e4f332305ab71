"""The report as a reader of a narrow window has it: nothing is cut off, and the player plays."""

from __future__ import annotations

import pytest
from browser.jupyter import why_not
from browser.pages import go_to, violations

from bros_ref.trace.metrics import summarise
from bros_ref.viz.figures.report import verdict, write_report
from bros_ref.viz.widgets.schedule_player import SchedulePlayer
from tests.viz.factory import make_trace

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")


@pytest.mark.parametrize("width", [700, 1280])
def test_it_opens_with_the_verdict_and_fits_the_window(chromium, tmp_path, width):
    traces = [make_trace(policy, seed=2, num_rt=8, num_be=9, num_blocks=30) for policy in ("vllm", "bros")]
    runs, player = [summarise(trace) for trace in traces], SchedulePlayer(traces[1])
    write_report(tmp_path / "report.html", traces, runs, "Both classes", {"Why?": "Because."}, player.to_html())
    page = chromium.new_page(viewport={"width": width, "height": 900})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"file://{tmp_path / 'report.html'}")
    said = page.locator("header p").first
    assert said.inner_text() == verdict(runs[1], runs[0])
    box = said.bounding_box()
    assert box["y"] + box["height"] < 450, "in the first half of the first screen"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for text in page.locator("header p, main section > p, dl.terms dd, .card, figcaption, h2").all():
        box = text.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    root = page.locator("[data-bros-schedule]")
    go_to(root, 3)
    assert root.locator("[role=status]").first.inner_text().startswith("bros: step 4 of")
    assert violations(page, "main") == []
    assert errors == []
    page.close()

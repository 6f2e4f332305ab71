"""The priority race in a real browser: the standings on the page are the trace's, by keyboard and by mouse."""

from __future__ import annotations

import random

import pytest
from browser.jupyter import why_not
from browser.pages import opened, violations, wait_for
from harness import checksum_engine, random_requests, run

from bros_ref.viz.widgets.priority_race import PriorityRace, standings

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")


@pytest.fixture
def race():
    rng = random.Random(3)
    engine = checksum_engine("bros", num_blocks=12, max_num_seqs=3)
    run(engine, random_requests(rng, 12, 24, 4, 0.2))
    return PriorityRace(engine.trace)


@pytest.fixture
def root(chromium, tmp_path, race):
    page = opened(chromium, tmp_path, race.to_html())
    yield page.locator("[data-bros-race]")
    assert page.errors == page.away == []
    page.close()


def shown(root):
    """(request, whether it ran, what is said) of every row on the page."""
    return [(line.get_attribute("data-request"), line.get_attribute("data-ran") == "1",
             line.locator("td").last.inner_text()) for line in root.locator("tbody tr").all()]


def test_the_standings_are_those_of_the_trace_at_every_key_press(root, race):
    expected = [[(row.request_id, row.reason is None, row.said) for row in rows] for rows in standings(race.trace)]
    slider, last = root.locator("input"), len(expected) - 1
    assert shown(root) == expected[race.start]
    slider.focus()
    for at, key in [(0, "Home"), *((at, "ArrowRight") for at in range(1, 12)), (last, "End"), (last - 1, "ArrowLeft")]:
        slider.press(key)
        wait_for(root, "step", at)
        assert shown(root) == expected[at]
        assert root.locator("[role=status]").inner_text().startswith(f"step {at + 1} of {last + 1}, ")
        assert root.locator("[data-cursor]").get_attribute("transform") == f"translate({race.data()['x'][at]:g} 0)"


def test_one_can_follow_a_request_and_play(root, race):
    chosen = race.runners[1]
    root.locator("[data-follow]").select_option(chosen)
    faded = [line.get_attribute("data-line") for line in root.locator("[data-line].faded").all()]
    assert sorted(faded) == sorted(set(race.runners) - {chosen})
    assert root.locator("[data-line].chosen").get_attribute("data-line") == chosen
    root.locator("input").press("Home")
    wait_for(root, "step", 0)
    root.locator("[data-speed]").select_option("10")
    root.locator("button").click()
    wait_for(root, "step", 3)
    root.locator("button").click()
    assert root.locator("button").inner_text() == "play"


def test_axe_finds_nothing(root):
    assert violations(root.page, "[data-bros-race]") == []

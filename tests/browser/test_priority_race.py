"""The priority race in a real browser: the standings on the page are the trace's, by keyboard and by mouse."""

from __future__ import annotations

import random

import pytest
from browser.jupyter import CHROMIUM, FLAGS, why_not
from harness import checksum_engine, random_requests, run

from bros_ref.viz.priority_race import PriorityRace, standings

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")


@pytest.fixture(scope="module")
def race():
    rng = random.Random(3)
    engine = checksum_engine("bros", num_blocks=12, max_num_seqs=3)
    run(engine, random_requests(rng, 12, 24, 4, 0.2))
    return PriorityRace(engine.trace)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture
def root(browser, tmp_path, race):
    (tmp_path / "race.html").write_text(
        f'<!doctype html><html lang="en"><title>race</title><body><main><h1>race</h1>{race.to_html()}</main>',
        encoding="utf-8")
    page = browser.new_page(viewport={"width": 900, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"file://{tmp_path / 'race.html'}")
    yield page.locator("[data-bros-race]")
    assert errors == []
    page.close()


def shown(root):
    """(request, whether it ran, what is said) of every row on the page."""
    return [(line.get_attribute("data-request"), line.get_attribute("data-ran") == "1",
             line.locator("td").last.inner_text()) for line in root.locator("tbody tr").all()]


def test_the_standings_are_those_of_the_trace_at_every_key_press(root, race):
    expected = [[(row.request_id, row.reason is None, row.said) for row in rows] for rows in standings(race.trace)]
    slider = root.locator("input")
    assert shown(root) == expected[race.start]
    slider.focus()
    slider.press("Home")
    for at in range(12):
        assert root.get_attribute("data-step") == str(at)
        assert shown(root) == expected[at]
        assert root.locator("[role=status]").inner_text().startswith(f"step {at + 1} of {len(expected)}, ")
        slider.press("ArrowRight")
    slider.press("End")
    assert shown(root) == expected[-1]


def test_the_cursor_stands_at_the_step(root, race):
    slider = root.locator("input")
    slider.focus()
    for key, index in (("Home", 0), ("End", len(race.trace.steps) - 1)):
        slider.press(key)
        assert root.locator("[data-cursor]").get_attribute("transform") == f"translate({race.data()['x'][index]:g} 0)"


def test_one_can_follow_a_request_and_play(root, race):
    chosen = race.runners[1]
    root.locator("[data-follow]").select_option(chosen)
    faded = [line.get_attribute("data-line") for line in root.locator("[data-line].faded").all()]
    assert sorted(faded) == sorted(set(race.runners) - {chosen})
    assert root.locator("[data-line].chosen").get_attribute("data-line") == chosen
    root.locator("input").press("Home")
    root.locator("[data-speed]").select_option("10")
    root.locator("button").click()
    root.page.wait_for_function("root => Number(root.dataset.step) >= 3", arg=root.element_handle())
    root.locator("button").click()
    assert root.locator("button").inner_text() == "play"
    at = root.get_attribute("data-step")
    root.page.wait_for_timeout(300)
    assert root.get_attribute("data-step") == at, "it stands still after pause"


def test_axe_finds_nothing(root):
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(root.page)
    assert [violation["id"] for violation in results.response["violations"]] == []

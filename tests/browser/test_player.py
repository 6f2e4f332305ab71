"""The KV player in a real browser: what it shows is what the trace replays to, in time, by mouse and by keyboard."""

from __future__ import annotations

import re
import statistics

import pytest
from browser.jupyter import CHROMIUM, FLAGS, why_not

from bros_ref.paper import PaperWorkload
from bros_ref.simulate import SimulationSettings, run
from bros_ref.viz.player import BlockMapPlayer

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")
MAX_REDRAW_MS = 60 * 4  # 60 ms on a quiet machine; a test machine is not
# From a slider event to the second frame after it, which is painted by then.
REDRAW = """root => new Promise(done => {
  const slider = root.querySelector('input'), start = performance.now();
  slider.value = Math.floor(Math.random() * slider.max); slider.dispatchEvent(new Event('input'));
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
})"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture(scope="module")
def trace():
    settings = SimulationSettings("a100-80gb", "llama-2-7b", 1, kv_tokens=64 * 16, max_num_seqs=16)
    return run("bros", settings, PaperWorkload(2.0, 6.0, 12), keep_steps=True)[1]


def opened(browser, tmp_path, trace):
    (tmp_path / "player.html").write_text(f"<!doctype html><body>{BlockMapPlayer(trace).to_html()}", encoding="utf-8")
    page = browser.new_page(viewport={"width": 900, "height": 900})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(f"file://{tmp_path / 'player.html'}")
    return page, page.locator("[data-bros-player]")


def go_to(root, step):
    move = "(slider, at) => { slider.value = at; slider.dispatchEvent(new Event('input')); }"
    root.locator("input").evaluate(move, step)
    root.page.wait_for_function("([root, at]) => root.dataset.step === String(at)", arg=[root.element_handle(), step])


def owner_of(view, slot, size):
    if view.rt_owner is not None and slot < view.rt_fill:
        return f"{view.rt_owner}, token {view.rt_index * size + slot}"
    if view.be_owner is not None and slot >= size - view.be_fill:
        return f"{view.be_owner}, token {view.be_index * size + size - 1 - slot}"
    return "free"


def test_hover_names_the_owner_that_the_trace_names(browser, tmp_path, trace):
    page, root = opened(browser, tmp_path, trace)
    canvas, size, last = root.locator("canvas"), trace.block_size, len(trace.steps) - 1
    seen = set()
    for step in (last // 2, last, 3, 70, 69, 0, last // 3):  # forwards, backwards, across a kept state
        go_to(root, step)
        pool = trace.pool_at(step)
        for x, y in ((40, 10), (300, 40), (500, 90), (700, 60), (120, 120)):
            canvas.hover(position={"x": x, "y": y})
            block, slot, said = re.fullmatch(r"block (\d+), slot (\d+): (.*)", canvas.get_attribute("title")).groups()
            assert said == owner_of(pool[int(block)], int(slot), size)
            seen.add(said == "free")
    assert seen == {True, False}
    assert page.errors == []


def test_click_shows_the_block_table_and_play_moves(browser, tmp_path, trace):
    page, root = opened(browser, tmp_path, trace)
    step = max(range(len(trace.steps)), key=lambda i: trace.steps[i].used_blocks)
    go_to(root, step)
    pool = trace.pool_at(step)
    block = next(i for i, view in enumerate(pool) if view.be_owner is not None and view.be_fill == trace.block_size)
    canvas = root.locator("canvas")
    wide, columns = canvas.bounding_box()["width"], min(64, max(1, round((64 * 0.5) ** 0.5)))
    strip = (wide - 6) / columns - 6
    tall = max(5, min(16, strip / 4))
    x, y = (6 + i * (side + 6) + side / 2 for i, side in ((block % columns, strip), (block // columns, tall)))
    canvas.click(position={"x": x, "y": y})
    mine = sorted((view.be_index, i) for i, view in enumerate(pool) if view.be_owner == pool[block].be_owner)
    said = root.locator("[role=status]").last.inner_text()
    assert said == f"block table of {pool[block].be_owner}: {', '.join(str(i) for _, i in mine)}"
    go_to(root, 0)
    root.locator("button").click()
    page.wait_for_function("root => Number(root.dataset.step) >= 3", arg=root.element_handle())
    root.locator("button").click()
    root.locator("input").press("End")
    page.wait_for_function("([root, at]) => root.dataset.step === String(at)",
                           arg=[root.element_handle(), len(trace.steps) - 1])


def test_512_blocks_redraw_at_once(browser, tmp_path):
    settings = SimulationSettings("a100-80gb", "llama-2-7b", 1, kv_tokens=512 * 16, max_num_seqs=64)
    trace = run("bros", settings, PaperWorkload(3.0, 6.0, 40), keep_steps=True)[1]
    _, root = opened(browser, tmp_path, trace)
    times_ms = [root.evaluate(REDRAW) for _ in range(30)]
    print("slider event to painted, 512 blocks, ms: median", statistics.median(times_ms), "max", max(times_ms))
    assert statistics.median(times_ms) < MAX_REDRAW_MS

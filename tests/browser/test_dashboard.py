"""The dashboard in a real browser: both sides follow one slider, and say what the traces say."""

from __future__ import annotations

import pytest
from browser.jupyter import why_not
from browser.pages import go_to, opened, violations, wait_for

from bros_ref.trace import BEHIND
from bros_ref.viz.figures.style import REASON_LABELS, policy_look
from bros_ref.viz.widgets.dashboard import Dashboard
from tests.viz.factory import make_trace

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")


@pytest.fixture
def shown(chromium, tmp_path):
    pair = [make_trace(policy, seed=2, num_rt=8, num_be=9, num_blocks=30) for policy in ("vllm", "bros")]
    dashboard = Dashboard(*pair)
    page = opened(chromium, tmp_path, dashboard.to_html())
    yield dashboard, page.locator("[data-bros-dashboard]")
    assert page.errors == page.away == []
    page.close()


def test_both_sides_follow_one_slider(shown):
    dashboard, root = shown
    last = len(dashboard.times_s) - 1
    reasons = set()
    for moment in (0, last // 3, dashboard.start, last // 2, 5, last):
        go_to(root, moment)
        time_s = dashboard.times_s[moment]
        assert root.locator("[role=status]").inner_text().startswith(f"{time_s:.2f} s of {dashboard.end_s:.2f} s")
        for place, side in enumerate(dashboard.sides):
            now, box = side.at(time_s), root.locator(f'[data-side="{place}"]')
            ran = box.locator('[data-fact="ran"]').inner_text()
            over = f"nothing: over after {side.ends[-1]:.2f} s"
            assert ran == (over if time_s >= side.ends[-1] else f"{now['ran'][0]} RT, {now['ran'][1]} BE")
            assert box.locator('[data-fact="rt"]').inner_text() == (
                f"{now['on_time']} of {now['finished']} of {now['arrived']}")
            assert box.locator('[data-fact="be"]').inner_text() == str(now["be_tokens"])
            lines = box.locator("[data-waits] > div").all_inner_texts()
            assert [line.split(":")[0] for line in lines] == [REASON_LABELS[reason] for reason, _ in now["left_out"]]
            for line, (reason, names) in zip(lines, now["left_out"], strict=True):
                assert names[0] in line or len(names) > 6
                assert line.endswith(f"and {len(names) - 6} more") == (len(names) > 6)
                reasons.add(reason)
    assert reasons - {BEHIND}


INK_BEYOND = """(canvas, [end, colour]) => {
  const scaled = (length) => Math.round(length * canvas.width / canvas.clientWidth);
  const [left, top, high] = [scaled(end + 3), scaled(18), scaled(canvas.clientHeight - 52)];
  const pixels = canvas.getContext('2d').getImageData(left, top, canvas.width - left - scaled(16), high).data;
  let count = 0;
  for (let i = 0; i < pixels.length; i += 4) count += colour.every((part, k) => Math.abs(pixels[i + k] - part) < 12);
  return count;
}"""


@pytest.mark.parametrize("shorter", [0, 1])
def test_a_curve_ends_where_its_run_ends(chromium, tmp_path, shorter):
    pair = [make_trace("bros", seed=2, num_rt=8, num_be=2 if i == shorter else 9, num_blocks=30) for i in (0, 1)]
    pair[shorter].steps = pair[shorter].steps[:len(pair[shorter].steps) // 2]
    dashboard = Dashboard(*pair)
    page = opened(chromium, tmp_path, dashboard.to_html())
    root = page.locator("[data-bros-dashboard]")
    last = len(dashboard.times_s) - 1
    go_to(root, last)
    ends = [next(i for i, time_s in enumerate(dashboard.times_s) if round(time_s, 3) >= round(side.ends[-1], 3))
            for side in dashboard.sides]
    assert ends[shorter] < last - 5, "one run is over long before the other"
    for canvas in root.locator("canvas[data-chart]").all():
        width = canvas.evaluate("canvas => canvas.clientWidth")
        beyond = 44 + ends[shorter] / last * (width - 56)
        colours = [[int(policy_look(place).colour[i:i + 2], 16) for i in (1, 3, 5)] for place in (0, 1)]
        inks = [canvas.evaluate(INK_BEYOND, [beyond, colour]) for colour in colours]  # of A and of B
        assert inks[shorter] == 0
        assert inks[1 - shorter] > 20
    page.close()


def test_keyboard_and_play(shown):
    dashboard, root = shown
    slider = root.locator("input[type=range]")
    slider.press("Home")
    wait_for(root, "step", 0)
    slider.press("ArrowRight")
    wait_for(root, "step", 1)
    root.locator("button[data-play]").press("Enter")
    root.page.wait_for_function("root => Number(root.dataset.step) >= 6", arg=root.element_handle())
    root.locator("button[data-play]").press("Enter")
    slider.press("End")
    wait_for(root, "step", len(dashboard.times_s) - 1)


def test_a_click_on_a_slot_shows_a_block_table(shown):
    dashboard, root = shown
    box = root.locator('[data-side="1"]')
    box.locator("canvas[data-pool]").click(position={"x": 60, "y": 12})
    said = box.locator("[data-table]").inner_text()
    pool = dashboard.sides[1].trace.pool_at(dashboard.sides[1].step_at(dashboard.times_s[dashboard.start]))
    owner = pool[0].rt_owner or pool[0].be_owner
    assert said.startswith(f"block table of {owner}: ")


def test_a_request_is_chosen_by_keyboard_in_both_runs(shown):
    dashboard, root = shown
    choice = root.locator("select[data-request]")
    choice.focus()
    for _ in range(1 + list(dashboard.sides[0].trace.requests).index("be-2")):  # the first is "none"
        choice.press("ArrowDown")
    wait_for(root, "chosen", "be-2")
    for place, side in enumerate(dashboard.sides):
        said = root.locator(f'[data-side="{place}"] [data-table]').inner_text()
        step = side.step_at(dashboard.times_s[dashboard.start])
        pool = side.trace.pool_at(step)
        mine = sorted((view.be_index, i) for i, view in enumerate(pool) if view.be_owner == "be-2")
        assert said == "block table of be-2: " + (", ".join(str(i) for _, i in mine) or "empty")


@pytest.mark.parametrize("width", [380, 1600])
def test_it_takes_the_width_of_its_page(shown, width):
    page, root = shown[1].page, shown[1]
    page.set_viewport_size({"width": width, "height": 900})
    canvas = root.locator('[data-side="1"] canvas[data-pool]')
    page.wait_for_function("([canvas, most]) => Math.abs(parseFloat(canvas.style.width) - most) < 20",
                           arg=[canvas.element_handle(), width - 16 if width < 700 else 690])
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    assert root.evaluate("root => root.scrollWidth <= root.clientWidth")


def test_axe_finds_nothing(shown):
    assert violations(shown[1].page, "[data-bros-dashboard]") == []

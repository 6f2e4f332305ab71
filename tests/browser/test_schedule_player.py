"""The schedule player in a real browser: one slider for both pictures, choosing in either, by mouse and by keyboard."""

from __future__ import annotations

import pytest
from browser.jupyter import why_not
from browser.pages import go_to, opened, violations, wait_for

from bros_ref.simulator.simulate import SimulationSettings, run
from bros_ref.viz.figures.gantt import HEAD_H, MIN_CELL_W, ROW_H, phase_steps, what_it_does
from bros_ref.viz.widgets.schedule_player import SchedulePlayer
from bros_ref.workload.paper import PaperWorkload
from tests.viz.factory import make_trace

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")


@pytest.fixture(scope="module")
def trace():
    settings = SimulationSettings("a100-80gb", "llama-2-7b", 1, kv_tokens=64 * 16, max_num_seqs=16)
    return run("bros", settings, PaperWorkload(2.0, 6.0, 12), keep_steps=True)[1]


@pytest.fixture
def shown(chromium, tmp_path, trace):
    player = SchedulePlayer(trace)
    page = opened(chromium, tmp_path, player.to_html())
    yield player, page.locator("[data-bros-schedule]")
    assert page.errors == page.away == []
    page.close()


def block_table(trace, step, request_id):
    pool = trace.pool_at(step)
    mine = [(view.rt_index, i) for i, view in enumerate(pool) if view.rt_owner == request_id]
    mine += [(view.be_index, i) for i, view in enumerate(pool) if view.be_owner == request_id]
    return ", ".join(str(block) for _, block in sorted(mine)) or "empty"


def test_every_row_says_what_the_trace_says(shown, trace):
    player, root = shown
    spans, words = phase_steps(trace), set()
    last = len(trace.steps) - 1
    for step in (0, 40, player.start, last // 2, 7, last):
        go_to(root, step)
        for row, request_id in enumerate(player.request_ids):
            said = root.locator(f'[data-does="{row}"]').inner_text()
            assert said.replace("has left", "") == what_it_does(trace, spans, step, request_id)
            slack_s = trace.steps[step].slack_s.get(request_id)
            expected = "" if slack_s is None else f"{1000 * slack_s:.0f} ms"
            got = root.locator(f'[data-slack="{row}"]').inner_text()
            assert got == expected or abs(int(got[:-3]) - 1000 * slack_s) <= 1
            words.add(said.split(":")[0].split(",")[0])
    assert {"prefill", "decode", "pending", "waiting", "has left", ""} <= words


def test_due_in_is_the_time_to_the_next_deadline(shown, trace):
    player, root = shown
    step = next(i for i, one in enumerate(trace.steps) if "rt-1" in one.emitted)
    go_to(root, step)
    record, row = trace.requests["rt-1"], player.request_ids.index("rt-1")
    due_s = record.arrival_s + record.ttft_slo_s - trace.steps[step].start_s
    assert int(root.locator(f'[data-due="{row}"]').inner_text()[:-3]) == pytest.approx(1000 * due_s, abs=1)
    go_to(root, step + 1)
    due_s = trace.steps[step].end_s + record.tpot_slo_s - trace.steps[step + 1].start_s
    assert int(root.locator(f'[data-due="{row}"]').inner_text()[:-3]) == pytest.approx(1000 * due_s, abs=1)


def test_a_request_is_chosen_in_either_picture(shown, trace):
    player, root = shown
    detail = root.locator("[role=status]").last
    step = player.start
    row = next(i for i, name in enumerate(player.request_ids) if block_table(trace, step, name) != "empty")
    root.locator(f'button[data-row="{row}"]').press("Enter")  # by keyboard
    wait_for(root, "chosen", player.request_ids[row])
    said, now = detail.inner_text().split(". In this step: ")
    assert said == f"block table of {player.request_ids[row]}: " + block_table(trace, step, player.request_ids[row])
    assert now.startswith(what_it_does(trace, phase_steps(trace), step, player.request_ids[row]))
    assert root.locator(f'button[data-row="{row}"]').get_attribute("aria-pressed") == "true"
    root.locator("canvas[data-pool]").click(position={"x": 900, "y": 90})  # in the pool
    owners = set(trace.requests)
    root.page.wait_for_function("([root, old]) => root.dataset.chosen !== old",
                                arg=[root.element_handle(), player.request_ids[row]])
    chosen = root.get_attribute("data-chosen")
    assert chosen in owners
    assert detail.inner_text().split(". In")[0].endswith(block_table(trace, step, chosen))
    pressed = root.locator('button[aria-pressed="true"]')
    assert pressed.count() == 1
    assert pressed.inner_text().endswith(chosen)


def test_a_click_in_the_chart_goes_to_its_step_and_row(shown, trace):
    player, root = shown
    shown_steps = int(root.get_attribute("data-shown"))
    first = player.start - shown_steps // 2
    assert 0 < first < len(trace.steps) - shown_steps
    root.locator("canvas[data-gantt]").click(position={"x": 10.5 * MIN_CELL_W, "y": HEAD_H + 2.5 * ROW_H})
    wait_for(root, "step", first + 10)
    assert root.get_attribute("data-chosen") == player.request_ids[2]


def test_keyboard_moves_both_pictures(shown, trace):
    _, root = shown
    slider, status = root.locator("input[type=range]"), root.locator("[role=status]").first
    slider.press("Home")
    wait_for(root, "step", 0)
    slider.press("ArrowRight")
    wait_for(root, "step", 1)
    assert status.inner_text().startswith(f"bros: step 2 of {len(trace.steps)}, {trace.steps[1].start_s:.2f} s:")
    root.locator("button[data-play]").press("Enter")
    root.page.wait_for_function("root => Number(root.dataset.step) >= 4", arg=root.element_handle())
    root.locator("button[data-play]").press("Enter")
    slider.press("End")
    wait_for(root, "step", len(trace.steps) - 1)


def test_a_request_is_found_by_its_id(shown, trace):
    player, root = shown
    last = [name for name in player.request_ids if name.startswith("rt")][-1]
    find, detail = root.get_by_label("find a request"), root.locator("[role=status]").last
    find.fill(last)
    find.press("Enter")
    wait_for(root, "chosen", last)
    wait_for(root, "step", phase_steps(trace)[last][0][1])
    find.fill("rt-999")
    find.press("Enter")
    root.page.wait_for_function("one => one.textContent === 'no request is called rt-999'", arg=detail.element_handle())
    assert root.get_attribute("data-chosen") == last


def test_the_chart_zooms_between_the_whole_run_and_single_steps(shown, trace):
    _, root = shown
    seen = [int(root.get_attribute("data-shown"))]
    for name, presses in (("zoom in", 6), ("zoom out", 12)):
        for _ in range(presses):
            root.get_by_role("button", name=name).press("Enter")
        root.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seen.append(int(root.get_attribute("data-shown")))
    assert seen[1] < seen[0] < seen[2] == len(trace.steps)
    root.get_by_role("button", name="zoom in").press("Enter")
    assert int(root.get_attribute("data-shown")) < len(trace.steps), "presses beyond the limit do not pile up"


def test_a_policy_is_switched_in_place(chromium, tmp_path):
    runs = [make_trace(policy, seed=2, num_rt=8, num_be=9, num_blocks=30) for policy in ("bros", "vllm")]
    player = SchedulePlayer(runs)
    page = opened(chromium, tmp_path, player.to_html())
    root = page.locator("[data-bros-schedule]")
    status, step = root.locator("[role=status]").first, 40
    root.locator('button[data-row="8"]').click()
    go_to(root, step)
    root.get_by_label("policy").select_option("vllm")
    now_s = runs[0].steps[step].start_s
    same = max(i for i, one in enumerate(runs[1].steps) if one.start_s <= now_s)
    wait_for(root, "step", same)
    assert status.inner_text().startswith(f"vllm: step {same + 1} of {len(runs[1].steps)}, ")
    assert root.get_attribute("data-chosen") == player.request_ids[8], "the request stays chosen"
    spans = phase_steps(runs[1])
    for row, request_id in enumerate(player.request_ids):
        said = root.locator(f'[data-does="{row}"]').inner_text()
        assert said.replace("has left", "") == what_it_does(runs[1], spans, same, request_id)
    canvas = root.locator("canvas[data-pool]")
    canvas.hover(position={"x": 60, "y": 12})
    view = runs[1].pool_at(same)[0]
    assert (view.rt_owner or view.be_owner or "free") in canvas.get_attribute("title")
    root.locator("input[type=range]").press("End")
    wait_for(root, "step", len(runs[1].steps) - 1)
    assert violations(page, "[data-bros-schedule]") == []
    assert page.errors == page.away == []
    page.close()


@pytest.mark.parametrize("width", [380, 1600])
def test_it_takes_the_width_of_its_page(shown, width):
    player, root = shown
    page, gantt = root.page, root.locator("canvas[data-gantt]")
    page.set_viewport_size({"width": width, "height": 1000})
    page.wait_for_function("([canvas, wide]) => wide ? parseFloat(canvas.style.width) > 700 "
                           ": parseFloat(canvas.style.width) < 300", arg=[gantt.element_handle(), width > 1000])
    assert root.evaluate("root => root.scrollWidth <= root.clientWidth")
    assert root.locator('[data-does="0"]').is_visible() == (width > 1000)
    root.locator('button[data-row="0"]').press("Enter")
    wait_for(root, "chosen", player.request_ids[0])
    assert "In this step: " in root.locator("[role=status]").last.inner_text(), "on a narrow page it is said here"


def test_axe_finds_nothing(shown):
    _, root = shown
    assert violations(root.page, "[data-bros-schedule]") == []

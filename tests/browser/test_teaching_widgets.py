"""The small widgets of the first notebooks in a real browser: they draw what Python draws, by mouse and by keyboard."""

from __future__ import annotations

import random

import pytest
from browser.jupyter import CHROMIUM, FLAGS, GONE, RESTART, RUN_ALL, jupyter_lab, why_not
from browser.pages import wait_for

from bros_ref.viz.widgets.causal_mask import BLOCK_SIZES, CausalMaskExplorer, MaskSetting, mask_note, mask_svg
from bros_ref.viz.widgets.recomputed import ForwardPass, recomputed

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")
TOKENS = ["The", " capital", " of", "\\n", "<b>", "&", "'s", '"'] * 3
# The browser writes both down its own way, so markup is compared and not its spelling.
SAME = """([root, svg]) => {
  const other = document.createElement('div');
  other.innerHTML = svg;
  return root.querySelector('svg').innerHTML === other.firstChild.innerHTML;
}"""
SET = """([root, values]) => {
  for (const [name, value] of Object.entries(values)) root.querySelector(`[name=${name}]`).value = value;
  root.querySelector('[name=row]').max = 7;
  root.querySelector('[name=row]').value = values.row;
  root.querySelector('[name=context]').dispatchEvent(new Event('input', {bubbles: true}));
}"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture
def show(browser, tmp_path):
    """Opens a piece of HTML and gives its first element; at the end nothing has failed and axe finds no fault."""
    from axe_playwright_python.sync_playwright import Axe

    pages = []

    def opened(html):
        (tmp_path / "widget.html").write_text(
            f'<!doctype html><html lang="en"><title>widget</title><body><main>{html}</main>', encoding="utf-8")
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda request: page.faults.append(request.url) if "http" in request.url else None)
        page.goto(f"file://{tmp_path / 'widget.html'}")
        pages.append(page)
        return page.locator("main > *").first

    yield opened
    for page in pages:
        assert page.faults == []
        violations = Axe().run(page, context="main", options={"rules": {"page-has-heading-one": {"enabled": False}}})
        assert violations.violations_count == 0, violations.generate_report()


def draws(root, setting, row):
    return root.page.evaluate(SAME, [root.element_handle(), mask_svg(setting, row, TOKENS)])


def test_the_mask_explorer_draws_what_python_draws(show):
    root = show(CausalMaskExplorer(TOKENS).to_html())
    assert draws(root, MaskSetting(4, 10, 8), 3)
    assert not draws(root, MaskSetting(4, 10, 8), 2)
    dice = random.Random(0)
    for _ in range(40):
        context = dice.randint(1, 24)
        setting = MaskSetting(dice.randint(1, min(8, context)), context, dice.choice(BLOCK_SIZES),
                              dice.random() < 0.5, dice.random() < 0.5)
        row = dice.randrange(setting.query)
        values = {"query": setting.query, "context": context, "block": setting.block_size, "row": row,
                  "reversed": "yes" if setting.reversed else "no", "column": "yes" if setting.by_column else "no"}
        root.page.evaluate(SET, [root.element_handle(), values])
        assert draws(root, setting, row), (setting, row)
        assert root.locator("[role=status]").inner_text() == mask_note(setting, row, TOKENS)


def test_the_mask_explorer_by_keyboard_and_by_mouse(show):
    root = show(CausalMaskExplorer(TOKENS).to_html())
    root.get_by_label("tokens in all").focus()
    root.page.keyboard.press("ArrowRight")
    assert draws(root, MaskSetting(4, 11, 8), 3)
    root.get_by_label("filled from").select_option("yes")
    root.get_by_role("combobox", name="mask").select_option("yes")
    assert draws(root, MaskSetting(4, 11, 8, True, True), 3)
    assert "are wrong" in root.locator("[role=status]").inner_text()
    root.locator("rect[data-row='1']").first.hover()
    assert draws(root, MaskSetting(4, 11, 8, True, True), 1)
    root.get_by_label("tokens in all").press("Home")  # one token: one row is left
    assert draws(root, MaskSetting(1, 1, 8, True, True), 0)


def test_recomputed_or_reused_is_stepped_through(show):
    variants = {"no cache": [ForwardPass(3 + i, 0) for i in range(5)],
                "cache": [ForwardPass(3 + i, 2 + i if i else 0) for i in range(5)]}
    frames = recomputed(variants, TOKENS, 30)
    root = show(frames.to_html())
    root.locator("input").focus()
    for at, frame in enumerate(frames.frames):
        wait_for(root, "step", at)  # drawn in the next animation frame
        assert root.locator("[role=status]").inner_text() == f"{at + 1} of 5: {frame.caption}"
        [seen] = [still for still in root.locator("svg").all() if still.is_visible()]
        assert f"no cache: {30 * sum(range(3, 4 + at))} K/V pairs computed so far" in seen.text_content()
        root.page.keyboard.press("ArrowRight")
    root.get_by_role("button", name="play").click()  # at the end: from the start again
    wait_for(root, "step", 2)
    tip = root.locator("[data-frame='2'] title").nth(3)
    assert tip.text_content() == "token 3 (\\n): computed again"


PANEL = """from bros_ref.config import KVCacheConfig
from bros_ref.kv_cache.manager import KVCacheManager
from bros_ref.request import SLO, Request, RequestClass, SamplingParams
from bros_ref.viz.widgets.panels import PoolPanel

def request(i):
    return Request(f"r{i}", RequestClass.REAL_TIME, [1], SamplingParams(max_tokens=9), slo=SLO(1.0, 1.0)), 7

PoolPanel(KVCacheManager(KVCacheConfig(num_blocks=3, block_size=4)), request)"""


def test_the_pool_panel_in_the_lab(browser, tmp_path):
    import nbformat
    from axe_playwright_python.sync_playwright import Axe

    with jupyter_lab(tmp_path) as address:
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # else the lab asks which one
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PANEL)], metadata=kernel),
                       tmp_path / "notebooks" / "panel.ipynb")
        page = browser.new_page(base_url=address)
        page.set_default_timeout(120_000)
        page.goto("/doc/tree/notebooks/panel.ipynb")
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.context !== undefined")
        page.evaluate(RUN_ALL)
        shown = page.locator("[data-bros-pool]")
        shown.wait_for()
        page.get_by_role("button", name="new request").focus()
        page.keyboard.press("Enter")
        page.get_by_text("r0 came with 7 tokens; 2 of 3 blocks in use").wait_for()
        page.get_by_role("button", name="new request").click()
        page.get_by_text("no room for 7 tokens").wait_for()
        page.get_by_role("button", name="one token each").press("Space")
        page.get_by_text("r0: 8 tokens, block table [0, 1]").wait_for()
        violations = Axe().run(page, context=".jp-OutputArea-output")
        assert violations.violations_count == 0, violations.generate_report()
        page.get_by_role("button", name="oldest leaves").click()
        page.get_by_text("r0 left; 0 of 3 blocks in use").wait_for()
        assert page.get_by_text(GONE).count() == 0
        page.evaluate(RESTART)
        page.get_by_text(GONE).wait_for()  # before anything is clicked
        page.close()

"""Every notebook opens in JupyterLab and runs from top to bottom; what plays is played; nothing leaves the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser.jupyter import CHROMIUM, FLAGS, OUTPUTS, ROOT, RUN_ALL, jupyter_lab, why_not
from browser.pages import violations, wait_for

KERNEL_WIDGETS = re.compile(r"\w+Panel\(|WhatIf\(|Explorer\(")


def to_run():
    """Those in which a kernel answers what one does on the page, the last one of each kind of widget. The players of
    the others need no kernel, and test_site.py opens all pages. BROS_REF_ALL_NOTEBOOKS=1 runs every notebook."""
    chosen, seen = [], set()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"), reverse=True):
        kinds = set(KERNEL_WIDGETS.findall(path.read_text()))
        if os.environ.get("BROS_REF_ALL_NOTEBOOKS") or kinds - seen:
            chosen.append(path.name)
        seen |= kinds
    return sorted(chosen)


NOTEBOOKS = to_run()
TO_LOOK_AT = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb")
                    if os.environ.get("BROS_REF_ALL_NOTEBOOKS") or path.name[:2] in ("00", "08", "09"))
WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")
WIDGETS = ".jp-OutputArea-output:has(button, input, select, canvas)"  # outputs that one can operate
FAILS_ON_PURPOSE = {"raises-exception", "nbval-raises-exception"}


@pytest.fixture(scope="module")
def lab_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def context(lab_folder):
    from playwright.sync_api import sync_playwright

    with jupyter_lab(lab_folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_context(base_url=address, viewport={"width": 1280, "height": 1600})
        browser.close()


@pytest.fixture
def page(context):
    """A page that notes console errors and requests to elsewhere, which it aborts."""
    page = context.new_page()
    page.away, page.errors = [], []

    def guard(route):
        if route.request.url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")):
            route.continue_()
        else:
            page.away.append(route.request.url)
            route.abort()

    page.route(re.compile(".*"), guard)
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    page.close()


def run_all(page, name):
    page.goto(f"/doc/tree/notebooks/{name}")
    page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.context !== undefined", timeout=120_000)
    page.evaluate(RUN_ALL)
    page.wait_for_function(f"() => ({OUTPUTS})().every(cell => cell.count !== null)")
    return page.evaluate(OUTPUTS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_in_the_lab(page, name):
    page.set_default_timeout(120_000)
    cells = run_all(page, name)
    assert [cell["count"] for cell in cells] == list(range(1, len(cells) + 1)), "every cell ran, in order"
    for cell in cells:
        failed = [output["evalue"] for output in cell["outputs"] if output["output_type"] == "error"]
        assert bool(failed) == bool(FAILS_ON_PURPOSE & set(cell["tags"])), failed
    for root in page.locator(".jp-OutputArea [data-bros-frames]").all():
        plays_through(root)
    if page.locator(WIDGETS).count():
        assert violations(page, WIDGETS) == []
    if folder := os.environ.get("BROS_REF_SCREENSHOTS"):
        page.set_viewport_size({"width": 1280, "height": 14_000})  # the notebook scrolls inside the page
        page.evaluate("() => { document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0; }")
        page.screenshot(path=Path(folder) / f"{name}.png")
    assert page.away == []
    assert page.errors == []


VISIBLE = """() => {
  const all = (what) => [...document.querySelectorAll(`.jp-OutputArea-output ${what}`)];
  const shown = (one) => one.checkVisibility() && one.clientWidth > 0 && one.clientHeight > 0;
  const controls = all(':is(button, input, select, canvas):not(.modebar-btn)'); // a chart's own buttons work
  const stills = all('img[src^="data:image/svg"]');
  return {
    text: all('').map((output) => output.innerText).join(' '),
    controls: controls.filter(shown).map((one) => one.outerHTML),
    pictures: stills.map((image) => [shown(image), image.naturalWidth, image.clientWidth, image.clientHeight]),
  };
}"""


@pytest.mark.parametrize("name", ["03_paging_the_cache.ipynb", "06_two_kinds_of_request.ipynb"])
def test_a_notebook_that_is_not_trusted_shows_pictures(page, name):
    """As it is after a clone, before anything has run: no script runs, and each drawing and widget is a picture."""
    page.set_default_timeout(60_000)
    page.goto(f"/doc/tree/notebooks/{name}")
    page.get_by_text("Run this cell to bring it to life").first.wait_for()
    page.wait_for_function("() => [...document.querySelectorAll('.jp-OutputArea img')]"
                           ".every((image) => image.complete)")
    cells = "window.jupyterapp.shell.currentWidget.content.widgets"
    assert not page.evaluate(f"() => {cells}.every((cell) => cell.model.trusted)")
    saved = [output.get("data", {}) for cell in page.evaluate(OUTPUTS) for output in cell["outputs"]]
    seen = page.evaluate(VISIBLE)
    assert len(seen["text"]) > 1_000
    assert len(seen["pictures"]) == sum("data:image/svg" in str(data.get("text/html", "")) for data in saved) >= 2
    for shown, natural, width, height in seen["pictures"]:
        assert shown
        assert natural > 0, "the image could be decoded"
        assert width > 300
        assert height > 50
    assert "IPython.core.display" not in seen["text"]
    assert seen["controls"] == []


def test_scripts_take_the_still_away(page):
    page.set_default_timeout(120_000)
    run_all(page, "05_continuous_batching.ipynb")
    page.locator("[data-bros-schedule][data-ready]").wait_for()
    assert page.get_by_text("Run this cell to bring it to life.").count() == 0


THEME = "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
WAIT_FOR_THEME = "theme => document.body.dataset.jpThemeName === theme"
BEYOND = """() => [...document.querySelectorAll('.jp-OutputArea-output')].filter((one) => one.offsetWidth > 0
  && [...one.querySelectorAll('svg, canvas, img, table, input, select, button')].some((part) =>
    part.getBoundingClientRect().right > one.getBoundingClientRect().right + 1 && !part.closest('.modebar')))
  .map((one) => one.outerHTML.slice(0, 300))"""


@pytest.mark.parametrize("name", TO_LOOK_AT)
def test_outputs_can_be_read_in_both_themes_and_at_three_widths(page, lab_folder, name):
    """As `make lab` shows them: trusted, with the saved outputs, before anything has run."""
    page.set_default_timeout(60_000)
    trust(lab_folder, name)
    page.goto(f"/doc/tree/notebooks/{name}")
    page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.context !== undefined")
    page.locator(".jp-OutputArea-output").last.wait_for()
    assert page.get_by_text("Run this cell to bring it to life.").count() == 0, "its scripts ran"
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        page.evaluate(THEME, theme)
        page.wait_for_function(WAIT_FOR_THEME, arg=theme)
        for width in (700, 900, 1280):
            page.set_viewport_size({"width": width, "height": 1600})
            assert violations(page, ".jp-OutputArea-output:has(svg, canvas, img)") == [], (theme, width)
            assert page.evaluate(BEYOND) == [], (theme, width)
    assert page.away == []
    assert page.errors == []


def trust(lab_folder, name):
    """Signs a notebook for this lab, as `make lab` does."""
    places = {f"JUPYTER_{kind}_DIR": str(lab_folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    subprocess.run([sys.executable, "-m", "nbformat.sign", str(lab_folder / "notebooks" / name)], check=True,
                   capture_output=True, env={**os.environ, **places})


def plays_through(root):
    """The slider by keyboard: every press shows the next picture, and says so."""
    slider, stills = root.locator("input[type=range]"), root.locator("[data-frame]")
    assert root.get_attribute("aria-label")
    slider.focus()
    slider.press("Home")
    for at in range(min(stills.count(), 3)):
        wait_for(root, "step", at)
        assert root.locator("[role=status]").inner_text().startswith(f"{at + 1} of {stills.count()}")
        assert [i for i, still in enumerate(stills.all()) if still.is_visible()] == [at]
        slider.press("ArrowRight")

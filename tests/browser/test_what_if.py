"""What-if in a real browser: as a page of its own it shows what was asked beforehand, in JupyterLab the kernel answers
the rest; by mouse and by keyboard, and axe-core finds nothing."""

from __future__ import annotations

import nbformat
import pytest
from browser.jupyter import GONE, OUTPUTS, RUN_ALL, SHUT_DOWN, SILENT, jupyter_lab, why_not
from browser.pages import opened, violations, wait_for

from bros_ref.viz.widgets.what_if import WhatIf, sentence

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")
SOURCE = """
from bros_ref.workload.paper import PaperWorkload
from bros_ref.simulator.simulate import SimulationSettings, run
from bros_ref.viz.widgets.what_if import Choice, WhatIf

def ask(question):
    settings = SimulationSettings("a100-40gb", "opt-13b", 2, kv_tokens=question["pool"])
    return run(question["policy"], settings, PaperWorkload(question["rate"], 3.0, 8))[0]

choices = (Choice("rate", "RT requests a second", (1, 4, 8), "/s"), Choice("pool", "KV pool", (8, 20_000), "tokens"),
           Choice("policy", "policy", ("vllm-fcfs", "bros")))
beforehand = [{"rate": rate, "pool": 20_000, "policy": "vllm-fcfs"} for rate in (1, 4)]
what_if = WhatIf(choices, ask, beforehand)
"""
UNASKED = "This setting was not asked beforehand: run the cell, and the kernel answers."


@pytest.fixture(scope="module")
def made() -> WhatIf:
    names: dict[str, object] = {}
    exec(SOURCE, names)  # the very code of the notebook below
    assert isinstance(names["what_if"], WhatIf)
    return names["what_if"]


def test_without_a_kernel_the_page_shows_what_was_asked(chromium, tmp_path, made):
    page = opened(chromium, tmp_path, made.to_html())
    root = page.locator("[data-bros-what-if]")
    status, rate = root.get_by_role("status"), root.get_by_role("slider", name="RT requests a second")
    assert status.inner_text() == sentence(made.answers["0 1 0"])
    assert violations(page, "[data-bros-what-if]") == []
    rate.focus()
    rate.press("ArrowRight")
    assert status.inner_text() == sentence(made.answers["1 1 0"])
    assert root.locator("svg").get_attribute("aria-label") == sentence(made.answers["1 1 0"])
    assert rate.get_attribute("aria-valuetext") == "4 /s"
    rate.press("ArrowRight")
    assert status.inner_text() == UNASKED
    rate.press("Home")
    root.get_by_label("policy").select_option("bros")
    assert status.inner_text() == UNASKED
    assert root.get_attribute("data-at") == "0 1 0", "the picture is still that of the last answer"
    assert root.locator("[data-picture]").evaluate("one => getComputedStyle(one).opacity") == "0.3", "and says so"
    assert page.errors == page.away == []


def test_a_kernel_that_does_not_answer_is_named(chromium, tmp_path, made):
    page = opened(chromium, tmp_path, made.to_html())
    page.clock.install()
    page.evaluate('''() => {
        const old = document.querySelector('[data-bros-what-if]'), root = old.cloneNode(true);
        old.replaceWith(root);
        whatIf(root, JSON.parse(root.querySelector('script[type="application/json"]').textContent), () => {});
    }''')
    root = page.locator("[data-bros-what-if]")
    root.get_by_label("policy").select_option("bros")
    page.clock.run_for(5_000)
    assert root.get_by_role("status").inner_text() == "asking the simulator ..."
    page.clock.run_for(6_000)
    assert SILENT in root.get_by_role("status").inner_text()
    root.get_by_label("policy").select_option("vllm-fcfs")  # answered beforehand
    page.clock.run_for(11_000)
    assert root.get_by_role("status").inner_text() == sentence(made.answers["0 1 0"])
    assert page.errors == []


def test_in_the_lab_the_kernel_answers(chromium, tmp_path):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}  # else the lab asks for one
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel}, cells=[
        nbformat.v4.new_code_cell(SOURCE), nbformat.v4.new_code_cell("what_if")])
    with jupyter_lab(tmp_path) as address:
        nbformat.write(notebook, tmp_path / "what_if.ipynb")
        page = chromium.new_page(base_url=address)
        page.set_default_timeout(60_000)
        page.goto("/doc/tree/what_if.ipynb")
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.context !== undefined")
        page.evaluate(RUN_ALL)
        page.wait_for_function(f"() => ({OUTPUTS})().every(cell => cell.count !== null)")
        root = page.locator(".jp-OutputArea [data-bros-what-if][data-ready]")
        root.get_by_label("policy").select_option("bros")
        wait_for(root, "at", "0 1 1")
        status = root.get_by_role("status")
        assert status.inner_text().startswith("bros: RT on time")
        assert "answered in" in status.inner_text()
        assert root.locator("svg path title").count() == 3, "the two that were asked beforehand, and this one"
        rate = root.get_by_role("slider", name="RT requests a second")
        rate.focus()
        rate.press("End")
        wait_for(root, "at", "2 1 1")
        root.get_by_role("slider", name="KV pool").press("Home")
        wait_for(root, "at", "2 0 1")
        assert status.inner_text().startswith("there is no answer: a KV pool of 8 tokens holds no block of 16")
        root.get_by_role("slider", name="KV pool").press("End")
        wait_for(root, "at", "2 1 1")
        assert root.locator("svg path title").count() == 4
        assert violations(page, "[data-bros-what-if]") == []
        page.evaluate(SHUT_DOWN)
        page.get_by_text(GONE).wait_for()  # before anything is chosen
        rate.press("ArrowLeft")
        assert status.inner_text() == GONE
        rate.press("ArrowRight")
        assert status.inner_text().startswith("bros: RT on time"), "what was answered is still there"
        page.close()

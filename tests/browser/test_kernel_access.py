"""What a warp asks of memory, in a real browser: stepped through by keyboard, nothing for axe-core to find."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from browser.jupyter import why_not
from browser.pages import opened, violations, wait_for

from bros_ref.viz.widgets.kernel_access import SHARED, kernel_access

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")


def accesses():
    """A coalesced load, a strided one, and a bank conflict of 8 turns."""
    for step, (argument, stride) in enumerate([(1, 4), (1, 64), (SHARED, 32)]):
        for lane in range(32):
            yield SimpleNamespace(block=0, warp=0, lane=lane, step=step, kind="load", argument=argument,
                                  offset=lane * stride, size=4, line=f"toy.cu:{10 + step}")


def test_every_press_shows_the_next_request(chromium, tmp_path):
    frames = kernel_access(accesses(), {1: "k_cache"})
    page = opened(chromium, tmp_path, frames._repr_mimebundle_()["text/html"])
    root = page.locator("[data-bros-frames]")
    slider, stills = root.locator("input[type=range]"), root.locator("[data-frame]")
    slider.press("Home")
    for at, cost in enumerate(("4 sectors for 128 bytes, 4 would do", "32 sectors for 128 bytes", "8 turns")):
        wait_for(root, "step", at)
        assert [i for i, still in enumerate(stills.all()) if still.is_visible()] == [at]
        assert root.locator("[role=status]").inner_text().startswith(f"{at + 1} of 3: ")
        assert cost in root.locator("[role=status]").inner_text()
        slider.press("ArrowRight")
    root.locator("button[data-play]").press("Enter")  # from the end it starts over
    wait_for(root, "step", 1)
    assert page.errors == page.away == []


def test_axe_finds_nothing(chromium, tmp_path):
    page = opened(chromium, tmp_path, kernel_access(accesses(), {1: "k_cache"}).to_html())
    assert violations(page, "[data-bros-frames]") == []


def test_axe_would_find_something(chromium, tmp_path):
    """A slider without a name is found: the check is awake."""
    page = opened(chromium, tmp_path, '<div data-bros-frames><input type="range"></div>')
    assert [line.split(":")[0] for line in violations(page, "[data-bros-frames]")] == ["label"]

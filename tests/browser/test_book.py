"""The book in a real browser, from its files: charts are drawn, players play, nothing is asked of the network."""

from __future__ import annotations

import importlib
import sys

import pytest
from browser.jupyter import ROOT, why_not
from browser.pages import go_to, violations

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("make_book").make_book(tmp_path_factory.mktemp("book"))
    sys.path.remove(str(ROOT / "tools"))


def test_every_page_opens_offline(chromium, pages):
    page = chromium.new_page(viewport={"width": 1180, "height": 900})
    errors, away, charts, players = [], [], 0, 0
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: away.append(request.url)
            if not request.url.startswith(("file://", "data:", "blob:")) else None)
    page.goto(pages[0].as_uri())
    assert violations(page, "body") == []
    for path in pages[1:]:
        page.goto(pages[0].as_uri())
        page.locator(f'a[href="{path.name}"]').click()
        assert page.locator("h1").first.inner_text()[:2] == path.name[:2]
        for chart in page.locator(".plotly-graph-div").all():
            chart.locator(".main-svg").first.wait_for()
            charts += 1
        for kind in ("player", "schedule", "dashboard", "frames"):
            for root in page.locator(f"[data-bros-{kind}]").all():
                go_to(root, 0)
                players += 1
        assert violations(page, "body") == [], path.name
        wide = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{path.name} is wider than its window"
    assert charts > 0 < players
    assert errors == away == []

"""The dashboard of a running server in a real browser: it shows what happens, and sends what its buttons say."""

from __future__ import annotations

import pytest
from browser.jupyter import why_not
from server.support import running

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")


CHOSEN = """() => {
  const button = document.querySelector('[data-requests] button');
  if (button === null) return false;
  button.focus(); button.click();
  const said = document.querySelector('[data-table]').textContent, name = button.dataset.name;
  return said.startsWith(`block table of ${name}: `) && document.activeElement === button;
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("data")) as one:
        yield one


def opened(chromium, server, width=1200, scheme="light"):
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.errors, page.away = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith((server.url, "data:", "about:"))
            else page.away.append(request.url))
    page.goto(f"{server.url}/dashboard")
    page.wait_for_function("() => Number(document.querySelector('[data-live]').dataset.frames || 0) >= 2")
    return page


def status(page, text):
    page.wait_for_function("text => document.querySelector('[data-status]').textContent.includes(text)", arg=text,
                           timeout=30_000)


def test_questions_and_a_batch_are_sent_and_shown(chromium, server):
    page = opened(chromium, server)
    status(page, "connected")
    page.locator("[data-do=batch]").press("Enter")
    status(page, "batch_")
    page.locator("[data-do=ask]").click()
    status(page, "8 questions answered")
    page.wait_for_function("() => document.querySelector('[data-batches]').innerText.includes('completed')",
                           timeout=30_000)
    row = page.locator("[data-batches] tr").first.locator("td").all_inner_texts()
    assert row[1:] == ["completed", "50", "0", "50"]
    page.wait_for_function("() => /on time since start\\s+\\d+ of 8/.test("
                           "document.querySelector('[data-facts]').innerText)")
    page.locator("[data-do=schedule]").click()
    status(page, "the schedule is below")
    frame = page.frame_locator("[data-schedule] iframe")
    frame.locator("[data-bros-schedule][data-ready]").wait_for()
    assert frame.locator("button[data-row]").count() > 0
    assert page.errors == page.away == []
    page.close()


def test_the_map_shows_blocks_that_are_taken_and_given_back(chromium, server):
    page = opened(chromium, server)
    shown = "() => document.querySelector('[data-facts]').innerText"
    page.evaluate("""() => { window.asked = fetch('/v1/completions', { method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ model: 'checksum', prompt: 'x'.repeat(200), max_tokens: 250 }) }); }""")
    page.wait_for_function(f"() => !/blocks in use\\s+0 of/.test(({shown})())", timeout=20_000)
    page.wait_for_function(CHOSEN, timeout=20_000)
    assert page.locator("[data-legend] > :visible").count() < page.locator("[data-legend] > *").count()
    page.wait_for_function(f"() => /blocks in use\\s+0 of/.test(({shown})())", timeout=30_000)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1600])
def test_axe_finds_nothing_and_nothing_is_cut_off(chromium, server, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(chromium, server, width, scheme)
    found = Axe().run(page, options={"resultTypes": ["violations"], "preload": False}).response["violations"]
    assert [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found] == []
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    page.close()

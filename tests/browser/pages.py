"""A widget on a page of its own: opened from a file, moved, checked with axe-core."""

from __future__ import annotations


def opened(chromium, tmp_path, html, width=1000, height=1000):
    """A page that holds this piece of HTML; errors and requests to elsewhere are noted."""
    (tmp_path / "widget.html").write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>widget</title>'
                                          f"<body>{html}", encoding="utf-8")
    page = chromium.new_page(viewport={"width": width, "height": height})
    page.errors, page.away = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.away.append(request.url)
            if not request.url.startswith(("file://", "data:", "blob:")) else None)
    page.goto(f"file://{tmp_path / 'widget.html'}")
    return page


def go_to(root, value):
    """Moves the slider and waits for the picture."""
    move = "(slider, at) => { slider.value = at; slider.dispatchEvent(new Event('input')); }"
    root.locator("input[type=range]").evaluate(move, value)
    wait_for(root, "step", value)


def wait_for(root, name, value):
    """Until a data-* attribute of the root has a value."""
    root.page.wait_for_function("([root, name, value]) => root.dataset[name] === String(value)",
                                arg=[root.element_handle(), name, value])


def violations(page, selector):
    """What axe-core finds wrong with the elements that match, in a line each; page-level rules aside."""
    from axe_playwright_python.sync_playwright import Axe

    options = {"resultTypes": ["violations"], "preload": False}  # it would fetch style sheets
    found = Axe().run(page, context={"include": [[selector]]}, options=options).response["violations"]
    return [f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}" for one in found]

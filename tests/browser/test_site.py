"""The site of `make docs`: it builds without a warning, opens offline, holds everything of the notebooks, and in a real
browser its charts are drawn and its players play."""

import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from browser.jupyter import ROOT, why_not
from browser.pages import go_to, violations

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WHY_NOT = why_not()


@pytest.fixture(scope="module")
def extension():
    """docs/site_extension.py as a module."""
    sys.path.insert(0, str(ROOT / "docs"))
    yield importlib.import_module("site_extension")
    sys.path.remove(str(ROOT / "docs"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder of the site, warnings of the build)."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    result = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-c", ROOT / "docs", source, site],
                            capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return site, result.stderr


@pytest.fixture(scope="module")
def site(built):
    return built[0]


class Page(HTMLParser):
    """What a page loads, what it links to, its anchors, and its text."""

    def __init__(self, html):
        super().__init__()
        self.loads, self.links, self.anchors, self.text = [], [], set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value)
            elif name in ("src", "srcset", "poster", "data") or (
                    name in ("href", "xlink:href") and tag in ("link", "image", "use", "script")):
                self.loads.append(value)
            elif name == "href":
                self.links.append(value)
            elif name == "style" and value:
                self.loads += re.findall(r"url\(['\"]?([^)'\"]+)", value)

    def handle_data(self, data):
        self.text += data


def is_here(page, address):
    """Whether an address on a page is in the page itself or a file of the site."""
    path = address.split("#")[0].split("?")[0]
    return address.startswith(("data:", "#")) or (":" not in address and (page.parent / path).is_file())


def test_it_builds_without_a_warning(built):
    assert [line for line in built[1].splitlines() if "WARNING" in line or "ERROR" in line] == []


def test_nothing_is_loaded_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert {f"{path.stem}.html" for path in NOTEBOOKS} <= {page.name for page in pages}
    for path in pages:
        page = Page(path.read_text())
        assert [address for address in page.loads if not is_here(path, address)] == [], path
    for path in site.rglob("*.css"):
        style = path.read_text()
        loads = re.findall(r"(?:url\(|@import )\s*['\"]?([^)'\"]+)", style)
        assert [address for address in loads if not is_here(path, address)] == [], path
    assert is_here(site / "index.html", "https://cdn.example/x.js") is False


def test_every_link_of_a_guide_leads_somewhere(site):
    """Within the site: page and anchor. Pages made from docstrings are left to Sphinx, which makes their links."""
    anchors = {path: Page(path.read_text()).anchors for path in sorted(site.rglob("*.html"))}
    lost = []
    for path in anchors:
        if path.is_relative_to(site / "api") or path.is_relative_to(site / "_modules"):
            continue
        for link in Page(path.read_text()).links:
            if link.startswith(("https://", "http://", "mailto:")):
                continue
            target, _, anchor = link.partition("#")
            place = (path.parent / target).resolve() if target else path
            if not place.is_file() or (anchor and place in anchors and anchor not in anchors[place]):
                lost.append((path.name, link))
    assert lost == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_and_output_is_on_its_page(site, path):
    page = (site / "book" / f"{path.stem}.html").read_text()
    text = re.sub(r"\s+", "", Page(page).text)
    cells = json.loads(path.read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert re.sub(r"\s+", "", "".join(cell["source"])) in text
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                assert re.sub(r"\s+", "", "".join(output["text"])) in text
    num_charts = sum("application/vnd.plotly.v1+json" in output.get("data", ())
                     for cell in cells for output in cell.get("outputs", ()))
    assert page.count('class="plotly-graph-div"') == num_charts
    assert ("plotly.min.js" in page) == (num_charts > 0)


def test_the_reference_has_every_module(site):
    text = "".join(path.read_text() for path in (site / "api").rglob("*.html"))
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
               for package in ("bros_ref", "kernels_cupy") for path in (ROOT / package).rglob("*.py")]
    missing = [module for module in modules if f'id="module-{module}"' not in text]
    assert missing == ["bros_ref.__main__"]


def test_an_output_without_a_form_that_a_page_can_show_is_refused(extension):
    assert extension.shown_data({"text/plain": "x", "image/svg+xml": "<svg/>"}) == {"text/html": "<svg/>"}
    with pytest.raises(ValueError, match=r"it has application/x-new"):
        extension.shown_data({"application/x-new": 1})


def test_links_between_files_become_links_between_pages(extension, tmp_path):
    def moved(text, source):
        return extension.site_links(text, source, tmp_path)

    assert moved("[a](docs/faq.md#x) [b](https://a.b/c)", "README.md") == "[a](faq.md#x) [b](https://a.b/c)"
    assert moved("[a](../docs/faq.md) [n](03_paging_the_cache.ipynb)", "notebooks/README.md") \
        == "[a](../faq.md) [n](03_paging_the_cache.ipynb)"
    assert moved("[a](../LICENSE)", "docs/faq.md") == "[a](files/LICENSE)"
    assert (tmp_path / "files" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    with pytest.raises(FileNotFoundError):
        moved("[a](gone.md)", "README.md")


def test_formulas_become_mathml(extension):
    shown = ElementTree.fromstring(extension.mathml(r"\frac{a}{b}", "block"))
    assert shown.get("display") == "block"
    assert "".join(shown.itertext()) == "ab"
    assert any(part.tag.endswith("mfrac") for part in shown.iter())
    with pytest.raises(ValueError, match="unheard"):
        extension.mathml(r"\unheard{x}", "inline")


@pytest.mark.skipif(WHY_NOT is not None, reason=f"no browser test here: {WHY_NOT}")
def test_every_notebook_opens_offline_in_a_browser(chromium, site):
    page = chromium.new_page(viewport={"width": 1180, "height": 900})
    errors, away, charts, players = [], [], 0, Counter()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: away.append(request.url)
            if not request.url.startswith(("file://", "data:", "blob:")) else None)
    page.goto((site / "index.html").as_uri())
    assert violations(page, "article") == []
    for path in NOTEBOOKS:
        page.goto((site / "book" / "index.html").as_uri())
        page.locator(f'article a[href="{path.stem}.html"]').first.click()
        page.wait_for_url(f"**/{path.stem}.html")  # and for its load event: a page half read has half of its widgets
        assert page.locator("h1").first.inner_text()[:2] == path.name[:2]
        for chart in page.locator(".plotly-graph-div").all():
            chart.locator(".main-svg").first.wait_for()
            charts += 1
        for kind in ("player", "schedule", "dashboard", "frames", "race"):
            for root in page.locator(f"[data-bros-{kind}]").all():
                go_to(root, 0)
                players[kind] += 1
        for kind, name in (("mask", "tokens in all"), ("what-if", "RT requests a second")):
            for root in page.locator(f"[data-bros-{kind}]").all():
                before = root.get_by_role("status").inner_text()
                slider = root.get_by_role("slider", name=name)
                slider.press("Home")
                assert root.get_by_role("status").inner_text() != before
                slider.press("End")
                players[kind] += 1
        assert page.locator("img[data-bros-still], [data-bros-asleep]").count() == 0, "scripts ran, so all is alive"
        assert violations(page, "article") == [], path.name
        wide = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{path.name} is wider than its window"
    assert charts > 0
    assert set(players) == {"player", "schedule", "dashboard", "frames", "race", "mask", "what-if"}
    assert errors == away == []

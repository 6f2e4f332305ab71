"""The book opens offline: nothing in it is loaded from elsewhere, everything of the notebooks is in it. The table of
notebooks is what the notebooks say."""

import importlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def tools():
    """Imports a script of tools/ as a module."""
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def book(tools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    tools("make_book").make_book(folder)
    return folder


class Page(HTMLParser):
    """What a page loads, what it links to, and its text."""

    def __init__(self, html):
        super().__init__()
        self.loads, self.links, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "srcset", "poster", "data") or (name in ("href", "xlink:href") and tag != "a"):
                self.loads.append(value)
            elif name == "href":
                self.links.append(value)
            elif name == "style" and value:
                self.loads += re.findall(r"url\(['\"]?([^)'\"]+)", value)

    def handle_data(self, data):
        self.text += data


def is_here(folder, address):
    return address.startswith(("data:", "#")) or (":" not in address and (folder / address.split("#")[0]).is_file())


def test_nothing_is_loaded_from_elsewhere(book):
    pages = sorted(book.glob("*.html"))
    assert [page.name for page in pages] == sorted(["index.html", *(f"{path.stem}.html" for path in NOTEBOOKS)])
    for path in pages:
        page = Page(path.read_text())
        assert [address for address in page.loads if not is_here(book, address)] == [], path.name
        assert [link for link in page.links if not link.startswith("https://") and not is_here(book, link)] == []
    css = (book / "book.css").read_text()
    assert "url(" not in css
    assert "@import" not in css
    assert is_here(book, "https://cdn.example/x.js") is False


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_and_output_is_on_its_page(book, path):
    page = (book / f"{path.stem}.html").read_text()
    text = re.sub(r"\s+", "", Page(page).text)
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert re.sub(r"\s+", "", "".join(cell["source"])) in text
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                assert re.sub(r"\s+", "", "".join(output["text"])) in text
    num_charts = sum("application/vnd.plotly.v1+json" in output.get("data", ())
                     for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", ()))
    assert page.count('class="plotly-graph-div"') == num_charts
    assert ('src="plotly.min.js"' in page) == (num_charts > 0)


def test_an_output_without_a_form_that_a_page_can_show_is_refused(tools):
    shown_data = tools("make_book").shown_data
    assert shown_data({"text/plain": "x", "image/svg+xml": "<svg/>"}) == {"text/html": "<svg/>"}
    with pytest.raises(ValueError, match=r"it has application/x-new"):
        shown_data({"application/x-new": 1})


def test_the_table_of_notebooks_is_what_they_say(tools, book):
    index = tools("notebook_index")
    readme = (ROOT / "notebooks" / "README.md").read_text()
    assert index.with_index(readme, index.entries()) == readme, "python tools/notebook_index.py"
    page = Page((book / "index.html").read_text())
    for entry in index.entries():
        assert f"{entry.path.stem}.html" in page.links
        assert entry.title in page.text
        assert entry.need.replace("`", "") in page.text
    with pytest.raises(ValueError, match="expected a line"):
        index.with_index("no markers", [])


@pytest.mark.parametrize("lacks", ["claim", "need", "minutes"])
def test_a_notebook_without_its_facts_is_refused(tools, tmp_path, lacks):
    parts = {"title": "# 03 Any\n\n", "claim": "**Claim.** This\nholds.\n\n", "need": "You. **Need:** a *book*.\n",
             "minutes": "**Time:** 35 minutes."}
    path = tmp_path / "03_any.ipynb"
    path.write_text(json.dumps({"cells": [{"source": ["".join(parts.values())]}]}))
    entry = tools("notebook_index").read_entry(path)
    assert (entry.title, entry.claim, entry.need, entry.minutes) == ("03 Any", "This holds.", "a *book*", 35)
    del parts[lacks]
    path.write_text(json.dumps({"cells": [{"source": ["".join(parts.values())]}]}))
    with pytest.raises(ValueError, match=rf"03_any.ipynb: no .*{lacks}"):
        tools("notebook_index").read_entry(path)


# -- formulas ---------------------------------------------------------------------------------------------------------


def test_only_formulas_are_translated(tools):
    with_mathml = tools("make_book").with_mathml
    assert with_mathml("costs $5 and $6, `$x$`\n```\n$y$\n```") == "costs $5 and $6, `$x$`\n```\n$y$\n```"
    shown, inline = (ElementTree.fromstring(math) for math in with_mathml(r"$$\frac{a}{b}$$|$b$").split("|"))
    assert (shown.get("display"), inline.get("display")) == ("block", "inline")
    assert "".join(shown.itertext()) == "ab"
    assert any(part.tag.endswith("mfrac") for part in shown.iter())
    with pytest.raises(ValueError, match="unheard"):
        with_mathml(r"so $\unheard{x}$.")

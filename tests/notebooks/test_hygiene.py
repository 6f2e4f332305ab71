"""Committed notebooks are run, clean, and compare something: a cleared notebook would pass nbval silently."""

import base64
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from untrusted import seen_untrusted

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 300_000
NOT_COMPARED = {"nbval-ignore-output", "nbval-skip", "nbval-raises-exception"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_run_clean_and_compares_something(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    tags = [set(cell["metadata"].get("tags", ())) for cell in code]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run it: make notebooks"
    assert "widgets" not in notebook["metadata"], "no widget state"
    assert path.stat().st_size < MAX_BYTES
    assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text()), "no folder of the machine it was run on"
    for cell, tag in zip(code, tags, strict=True):
        failed = any(output["output_type"] == "error" for output in cell["outputs"])
        assert failed == ("nbval-raises-exception" in tag or "raises-exception" in tag), "".join(cell["source"])
    compared = [cell for cell, tag in zip(code, tags, strict=True) if cell["outputs"] and not tag & NOT_COMPARED]
    assert len(compared) >= 5, f"only {len(compared)} cells are compared"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_follows_the_template(path):
    cells = json.loads(path.read_text())["cells"]
    headings = [line for cell in cells if cell["cell_type"] == "markdown" for line in cell["source"]
                if line.startswith("#")]
    text = "\n".join(headings)
    for part in ("Predict", "Build", "See", "Measure", "Break it", "Summary", "Exercises"):
        assert part in text, f"no section {part!r}"
    work = {"exercise", "raises-exception", "answer"}  # stub, check and answer of what the reader builds
    assert sum(not work & set(cell["metadata"].get("tags", ())) for cell in cells) <= 50
    assert all(len(cell["source"]) <= 30 for cell in cells if cell["cell_type"] == "code"), "one idea a cell"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_answer_is_folded_and_stands_below_its_check(path):
    cells = json.loads(path.read_text())["cells"]
    tags = [set(cell["metadata"].get("tags", ())) for cell in cells]
    for i in (i for i, tag in enumerate(tags) if "answer" in tag):
        assert "hide-input" in tags[i], "folded in the book"
        assert cells[i]["metadata"]["jupyter"] == {"source_hidden": True}, "folded in JupyterLab: make notebooks"
        assert "raises-exception" in tags[i - 1], "the check comes first"
        assert "exercise" in tags[i - 2]


NAMED_FILE = re.compile(r"`((?:\w+/)+\w+\.\w+)(?:: ?([\w.]+))?`")  # a path in backquotes; a name after a colon


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_the_text_names_exists(path):
    """Files by their path or its end, and in Python files what stands behind the colon."""
    text = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
                     if cell["cell_type"] == "markdown")
    named = [match for match in NAMED_FILE.findall(text) if not match[0].startswith("out/")]
    assert named, "the summary says where things live"
    for name, symbol in named:
        found = [file for folder in ("bros_ref", "kernels_cupy", "tests") for file in (ROOT / folder).rglob("*")
                 if file.is_file() and f"/{file.relative_to(ROOT)}".endswith(f"/{name}")]
        assert found, name
        for part in filter(None, symbol.split(".")):
            assert any(re.search(rf"\b(def|class) {part}\b|^\s*{part}\b.*=|^\s*{part}:", file.read_text(), re.MULTILINE)
                       for file in found), f"{name} has no {part}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_saved_drawing_or_widget_needs_no_script(path):
    """JupyterLab shows an output of a notebook that it does not trust without scripts and without SVG elements."""
    for cell in json.loads(path.read_text())["cells"]:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            assert "IPython.core.display" not in "".join(data.get("text/plain", ())), "make it a Picture"
            page = "".join(data.get("text/html", ()))
            assert "image/svg+xml" not in data, "make it a Picture"
            if "<script" in page:
                seen = seen_untrusted(page)
                assert len(seen.images) == 1, "".join(cell["source"])
                assert seen.controls == []
                image = base64.b64decode(seen.images[0].partition(",")[2])
                assert ElementTree.fromstring(image).tag.endswith("svg")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_saved_chart_has_a_picture(path):
    """GitHub runs no script, so it shows nothing of a chart alone."""
    for cell in json.loads(path.read_text())["cells"]:
        for output in cell.get("outputs", ()):
            if chart := output.get("data", {}).get("application/vnd.plotly.v1+json"):
                page = "".join(output["data"]["text/html"])
                image = re.fullmatch(r'<img alt="[^"]+: [^"]+" [^>]*src="data:image/png;base64,([^"]+)">', page)
                picture = base64.b64decode(image[1])
                width, height = int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])
                assert (width, height) == (700, chart["layout"].get("height", 450)), "run it: make notebooks"


def test_the_notebooks_have_drawings_and_widgets():
    saved = [output.get("data", {}) for path in NOTEBOOKS for cell in json.loads(path.read_text())["cells"]
             for output in cell.get("outputs", ())]
    assert sum("data-bros-still" in "".join(data.get("text/html", ())) for data in saved) >= 20
    assert sum("<script" in "".join(data.get("text/html", ())) for data in saved) >= 10


def test_a_saved_drawing_stands_on_paper_of_its_own():
    """Dark text on JupyterLab's dark theme would not be seen."""
    drawings = []
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", ()):
                data = output.get("data", {})
                page = "".join(data.get("text/html", ()))
                drawings += [base64.b64decode(image).decode()
                             for image in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]
                drawings += filter(None, ["".join(data.get("image/svg+xml", ()))])
    assert len(drawings) >= 20
    assert [drawing[:200] for drawing in drawings if "background:#fff" not in drawing.split(">", 1)[0]] == []


def test_there_are_notebooks():
    assert NOTEBOOKS

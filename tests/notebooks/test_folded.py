"""What would give an answer away is saved folded: outputs that answer a prediction, and the code of answers."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BUILT_BY_HAND = [path for path in NOTEBOOKS if path.name[:2] in ("01", "02", "03", "04")]


@pytest.fixture(scope="module")
def runner():
    """tools/run_notebooks.py as a module."""
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("run_notebooks")
    sys.path.remove(str(ROOT / "tools"))


def test_tags_become_the_metadata_that_folds(runner):
    assert runner.folded([]) == {}
    assert runner.folded(["exercise"]) == {"tags": ["exercise"]}
    assert runner.folded(["hide-output"]) == {"tags": ["hide-output"], "jupyter": {"outputs_hidden": True}}
    assert runner.folded(["answer", "hide-input"]) == {"tags": ["answer", "hide-input"],
                                                       "jupyter": {"source_hidden": True}}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_as_its_tags_say(runner, path):
    cells = json.loads(path.read_text())["cells"]
    assert [cell["metadata"] for cell in cells] == runner.described(cells), "run it: make notebooks"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_grader_finds_every_exercise_and_its_check(path):
    """The rules of nbgrader's schema 3, which it checks itself before it releases or grades."""
    cells = json.loads(path.read_text())["cells"]
    found = [(i, cell["metadata"]["nbgrader"]) for i, cell in enumerate(cells) if "nbgrader" in cell["metadata"]]
    ids = [rules["grade_id"] for _, rules in found]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", grade_id) for grade_id in ids)
    for (stub, written), (check, graded) in zip(found[::2], found[1::2], strict=True):
        assert check == stub + 1
        assert written | {"grade_id": ""} == {"schema_version": 3, "grade_id": "", "solution": True, "grade": False,
                                              "locked": False, "task": False}
        assert graded | {"grade_id": "", "points": 0} == {"schema_version": 3, "grade_id": "", "solution": False,
                                                          "grade": True, "locked": True, "task": False, "points": 0}
        assert graded["points"] in (1, 3)
        assert cells[check]["cell_type"] == cells[stub]["cell_type"] == "code"
        assert any(output["output_type"] == "error" for output in cells[check]["outputs"]), "no answer: no points"
    stubs = [i for i, cell in enumerate(cells) if "exercise" in cell["metadata"].get("tags", ())]
    assert [i for i, _ in found[::2]] == stubs != []


def test_an_exercise_without_its_check_is_refused(runner):
    stub = {"id": "a", "source": "x = ...", "metadata": {"tags": ["exercise"]}}
    other = {"id": "b", "source": "check(x)", "metadata": {}}
    for cells in ([stub], [stub, other]):
        with pytest.raises(ValueError, match="its check"):
            runner.described(cells)


ANSWERED = [path for path in NOTEBOOKS if path.name[:2] in ("00", "01", "02", "03", "04", "05", "06", "08", "09")]


@pytest.mark.parametrize("path", ANSWERED, ids=lambda path: path.stem)
def test_outputs_that_answer_predict_are_folded(path):
    cells = json.loads(path.read_text())["cells"]
    folded = [cell for cell in cells if "hide-output" in cell["metadata"].get("tags", ())]
    assert folded
    assert all(cell["outputs"] for cell in folded)


@pytest.mark.parametrize("path", BUILT_BY_HAND, ids=lambda path: path.stem)
def test_the_reader_builds_a_part(path):
    """The stub says what to do in numbered steps; the check stands right below it, and then the folded answer."""
    cells = json.loads(path.read_text())["cells"]
    tags = [set(cell["metadata"].get("tags", ())) for cell in cells]
    built = [i for i, tag in enumerate(tags) if "answer" in tag]
    assert len(built) == 1
    stub, check = cells[built[0] - 2], cells[built[0] - 1]
    assert "# 1 " in "".join(stub["source"]) or "// 1 " in "".join(stub["source"])
    assert "check_against(" in "".join(check["source"])


def test_four_notebooks_have_a_part_to_build():
    assert len(BUILT_BY_HAND) == 4


def test_every_part_of_the_system_is_measured_on_the_device_at_hand():
    """In a section of its own, which names the device."""
    live = []
    for path in NOTEBOOKS:
        cells, section = json.loads(path.read_text())["cells"], []
        for cell in cells:
            if cell["cell_type"] == "markdown" and (headings := re.findall("^## .*", "".join(cell["source"]), re.M)):
                section = headings
            elif "## Live on your device" in section and "device_line(" in "".join(cell["source"]):
                live.append(path.name[:2])
    assert sorted({"01", "02", "03", "04", "05", "06", "07", "08", "09"} - set(live)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_folded_answer_gives_way_to_one_that_passed(path):
    for cell in json.loads(path.read_text())["cells"]:
        if "answer" in cell["metadata"].get("tags", ()):
            source = "".join(cell["source"])
            parts = re.findall(r"^(?:def|class) ", source, re.MULTILINE)
            assert source.count("yours_if_right") >= len(parts) >= 1 or path.name.startswith("04"), "04's is CUDA text"

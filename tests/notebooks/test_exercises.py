"""Every exercise can be solved by the answer that is folded below it; that the bare stub fails, nbval sees.

A part of the system that the reader builds is an exercise too: its answer is a folded code cell, tagged `answer`, which
runs, so that what follows works for whoever skipped it.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


FOLDED = re.compile(r"<details>.*?```python\n(.*?)```", re.DOTALL)


def exercises(cells):
    """(stub, checks, answer): cell indices, and the code of the folded answer, of each exercise of a notebook."""
    found = []
    for i, cell in enumerate(cells):
        if "exercise" not in cell.metadata.get("tags", ()):
            continue
        rest = list(range(i + 1, len(cells)))
        answered = next((j for j in rest if "answer" in cells[j].metadata.get("tags", ())
                         or (cells[j].cell_type == "markdown" and FOLDED.search(cells[j].source))), None)
        assert answered is not None, f"exercise without a folded answer: {cell.source}"
        answer = cells[answered].source
        if cells[answered].cell_type == "markdown":
            answer = FOLDED.search(answer)[1]
        found.append((i, [j for j in rest if j < answered and cells[j].cell_type == "code"], answer))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_folded_answers_are_right(path):
    notebook = nbformat.read(path, as_version=4)
    tasks = exercises(notebook.cells)
    assert tasks, "a notebook has exercises"
    for stub, checks, answer in tasks:
        assert checks, "an exercise is followed by a check"
        notebook.cells[stub].source = answer
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for stub, checks, answer in tasks:
        outputs = [output for j in (stub, *checks) for output in notebook.cells[j].outputs]
        assert [output.evalue for output in outputs if output.output_type == "error"] == [], answer
        assert "right" in "".join(output.get("text", "") for output in outputs), answer

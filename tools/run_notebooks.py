"""Executes notebooks and leaves what is to be committed: outputs and counts, no widget state, no versions.

A cell's metadata follows from its tags. A cell tagged `hide-input` or `hide-output` is folded: by its tag on a page of
the site, in JupyterLab by the metadata that is written here (running a cell unfolds its output). A cell tagged
`exercise` and the check below it are what nbgrader collects and grades.

    python tools/run_notebooks.py [notebooks/03_*.ipynb ...]      # in place
    python tools/run_notebooks.py --out FOLDER [NOTEBOOK ...]     # into another folder; the notebooks stay as they are
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from notebook_charts import add_pictures

FOLDED = {"hide-input": "source_hidden", "hide-output": "outputs_hidden"}  # tag -> JupyterLab's metadata
PART_POINTS = 3  # for a part of the system; other exercises count 1
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def run(path: Path, out: Path | None = None) -> None:
    """Runs one notebook from top to bottom, in its own folder, and writes it back, or into the folder `out`."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", store_widget_state=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
        for output in cell.get("outputs", ()):
            if "text/html" in output.get("data", ()):  # a widget that is a page too: the page needs no kernel
                output.data.pop("application/vnd.jupyter.widget-view+json", None)
            if output.output_type == "error":  # the last line says it; the rest names folders of this machine
                output.traceback = [f"{output.ename}: {output.evalue}"]
    for cell, metadata in zip(notebook.cells, described(notebook.cells), strict=True):
        cell.metadata = metadata
    if not add_pictures(notebook):
        print("its charts are saved without pictures: no chromium or no playwright is installed")
    nbformat.write(notebook, path if out is None else out / path.name)


def described(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each cell's whole metadata: its tags, what folds it in JupyterLab, and what nbgrader reads (schema version 3).

    Raises:
        ValueError: an exercise is not followed by its check, a cell tagged `raises-exception`.
    """
    tags = [list(cell["metadata"].get("tags", ())) for cell in cells] + [[], []]
    described = [folded(one) for one in tags[:-2]]
    for i, cell in enumerate(cells):
        if "exercise" in tags[i]:
            if "raises-exception" not in tags[i + 1]:
                raise ValueError(f"the cell below an exercise is its check, tagged raises-exception: {cell['source']}")
            points = PART_POINTS if "answer" in tags[i + 2] else 1
            described[i]["nbgrader"] = _nbgrader(cell["id"], solution=True)
            described[i + 1]["nbgrader"] = _nbgrader(cells[i + 1]["id"], points=points)
    return described


def folded(tags: Sequence[str]) -> dict[str, Any]:
    """A cell's tags, and what folds it in JupyterLab."""
    hidden = {FOLDED[tag]: True for tag in tags if tag in FOLDED}
    return ({"tags": list(tags)} if tags else {}) | ({"jupyter": hidden} if hidden else {})


def _nbgrader(cell_id: str, *, solution: bool = False, points: int = 0) -> dict[str, Any]:
    graded: dict[str, Any] = {"points": points} if points else {}
    return {"schema_version": 3, "grade_id": cell_id, "solution": solution, "grade": bool(points),
            "locked": not solution, "task": False, **graded}


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Adjacent pieces of one stream as one: how a stream was cut depends on the clock."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main() -> None:
    """Runs the notebooks that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of notebooks/ if none is named")
    parser.add_argument("--out", type=Path, help="folder for the results; created if needed")
    options = parser.parse_args()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    for path in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
        print(path.name, flush=True)
        run(path, options.out)


if __name__ == "__main__":
    main()

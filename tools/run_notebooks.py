"""Executes notebooks and leaves what is to be committed: outputs and counts, no widget state, no versions.

A cell tagged `hide-input` or `hide-output` is folded: by its tag on a page of the site, in JupyterLab by the metadata
that is written here. Running a cell in JupyterLab unfolds its output.

    python tools/run_notebooks.py [notebooks/03_*.ipynb ...]      # in place
    python tools/run_notebooks.py --out FOLDER [NOTEBOOK ...]     # into another folder; the notebooks stay as they are
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDED = {"hide-input": "source_hidden", "hide-output": "outputs_hidden"}  # tag -> JupyterLab's metadata
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
        cell.metadata = folded(cell.metadata.get("tags", []))
    nbformat.write(notebook, path if out is None else out / path.name)


def folded(tags: list[str]) -> dict[str, object]:
    """A cell's whole metadata: its tags, and what folds it in JupyterLab."""
    hidden = {FOLDED[tag]: True for tag in tags if tag in FOLDED}
    return ({"tags": list(tags)} if tags else {}) | ({"jupyter": hidden} if hidden else {})


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

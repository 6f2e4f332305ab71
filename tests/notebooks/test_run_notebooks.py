"""tools/run_notebooks.py: in place, or into another folder."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_notebooks.py"


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_notebook_is_run_in_place_or_into_another_folder(tmp_path, elsewhere):
    path, out = tmp_path / "one.ipynb", tmp_path / "out" / "deeper"
    (tmp_path / "beside.txt").write_text("read in the notebook's own folder")
    nbformat.write(nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell("print(open('beside.txt').read())", id="one")]), path)
    before = path.read_text()
    subprocess.run([sys.executable, str(TOOL), *(["--out", str(out)] if elsewhere else []), str(path)], check=True)
    written = nbformat.read(out / path.name if elsewhere else path, as_version=4)
    assert written.cells[0].outputs[0].text == "read in the notebook's own folder\n"
    assert (path.read_text() == before) == elsewhere
    assert out.exists() == elsewhere

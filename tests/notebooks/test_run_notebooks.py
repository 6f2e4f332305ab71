"""tools/run_notebooks.py: in place, or into another folder; and the pictures that it gives to charts."""

import importlib
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_notebooks.py"


@pytest.fixture(scope="module")
def charts():
    """tools/notebook_charts.py as a module."""
    sys.path.insert(0, str(TOOL.parent))
    yield importlib.import_module("notebook_charts")
    sys.path.remove(str(TOOL.parent))


def test_a_picture_keeps_its_size_and_nearly_its_colours_in_fewer_bytes(charts):
    rgb = np.full((90, 120, 3), 255, np.uint8)
    rgb[:30] = 255, 254, 17
    rgb[60:, ::7] = np.random.default_rng(0).integers(0, 60, (30, 18, 3), dtype=np.uint8)
    whole = BytesIO()
    Image.fromarray(rgb).save(whole, "PNG")
    small = charts.small(whole.getvalue())
    assert len(small) < len(whole.getvalue())
    shown = np.asarray(Image.open(BytesIO(small)).convert("RGB")).astype(int)
    assert shown.shape == rgb.shape
    assert np.array_equal(shown[:60], rgb[:60]), "the frequent colours"
    assert np.abs(shown - rgb).max() <= 30


def test_a_notebook_without_charts_needs_no_browser(charts, monkeypatch):
    monkeypatch.setattr(charts, "drawn", lambda figures: pytest.fail("nothing to draw"))
    assert charts.add_pictures(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]))


def test_where_nothing_can_draw_a_chart_stays_as_it_is(charts, monkeypatch):
    monkeypatch.setattr(charts.shutil, "which", lambda name: None)
    output = nbformat.v4.new_output("display_data", {charts.CHART: {"data": [], "layout": {}}})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    assert not charts.add_pictures(notebook)
    assert list(notebook.cells[0].outputs[0].data) == [charts.CHART]


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

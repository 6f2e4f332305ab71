"""tools/run_notebooks.py: in place, or into another folder; and the pictures that it gives to charts."""

import importlib
import subprocess
import sys
import zlib
from pathlib import Path

import nbformat
import numpy as np
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_notebooks.py"


@pytest.fixture(scope="module")
def charts():
    """tools/notebook_charts.py as a module."""
    sys.path.insert(0, str(TOOL.parent))
    yield importlib.import_module("notebook_charts")
    sys.path.remove(str(TOOL.parent))


def test_a_picture_has_the_nearest_of_its_colours(charts):
    rgb = np.random.default_rng(0).integers(0, 256, (7, 12, 3), dtype=np.uint8)
    rgb[:3] = 255, 254, 17
    data, parts = charts.png(rgb)[8:], {}
    while data:
        size = int.from_bytes(data[:4])
        name, content, check = data[4:8], data[8:8 + size], data[8 + size:12 + size]
        assert int.from_bytes(check) == zlib.crc32(name + content)
        parts[name], data = content, data[12 + size:]
    assert parts[b"IHDR"] == bytes([0, 0, 0, 12, 0, 0, 0, 7, 8, 3, 0, 0, 0])
    rows = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(7, 13)
    shown = np.frombuffer(parts[b"PLTE"], np.uint8).reshape(-1, 3)[rows[:, 1:]]
    assert not rows[:, 0].any(), "no filter"
    assert np.abs(shown.astype(int) - rgb).max() <= 26
    exact = (shown == rgb).all(axis=-1)
    assert exact[:3].all(), "the most frequent colour"
    assert exact.sum() >= 3 * 12 + charts.EXACT - 1
    assert not exact.all(), "there are more colours than places"


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

"""What git shows of a notebook: its text and that something else changed, but not the count of a run."""

import copy
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = {"cells": [
    {"cell_type": "markdown", "metadata": {}, "source": ["# Title\n", "text"]},
    {"cell_type": "code", "metadata": {"tags": ["exercise"]}, "execution_count": 3, "source": "1 / 0", "outputs": [
        {"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]},
        {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "division by zero", "traceback": ["long"]},
        {"output_type": "execute_result", "execution_count": 3, "metadata": {},
         "data": {"text/plain": "<SVG>", "image/svg+xml": ["<svg>", "</svg>"]}}]}]}


def shown(tmp_path, notebook):
    path = tmp_path / "one.ipynb"
    path.write_text(json.dumps(notebook))
    return subprocess.run([sys.executable, ROOT / "tools" / "notebook_text.py", path], capture_output=True, text=True,
                          check=True).stdout


def test_sources_whole_outputs_as_printed(tmp_path):
    lines = shown(tmp_path, NOTEBOOK).splitlines()
    assert lines[:9] == ["---- markdown", "# Title", "text", "---- code #exercise", "1 / 0", "  > a", "  > b",
                         "  > ZeroDivisionError: division by zero", "  > <SVG>"]
    assert lines[9].startswith("  > image/svg+xml ")
    assert len(lines) == 10


def test_a_changed_picture_is_a_changed_line_and_a_new_count_is_none(tmp_path):
    other = copy.deepcopy(NOTEBOOK)
    other["cells"][1]["execution_count"] = 9
    assert shown(tmp_path, other) == shown(tmp_path, NOTEBOOK)
    other["cells"][1]["outputs"][2]["data"]["image/svg+xml"] = "<svg> </svg>"
    changed = set(shown(tmp_path, other).splitlines()) ^ set(shown(tmp_path, NOTEBOOK).splitlines())
    assert [line.split()[1] for line in changed] == ["image/svg+xml"] * 2


def test_git_asks_for_it():
    attributes = subprocess.run(["git", "check-attr", "diff", "notebooks/00_the_whole_game.ipynb"], cwd=ROOT,
                                capture_output=True, text=True, check=False).stdout
    assert attributes.strip().endswith("diff: notebook") or not (ROOT / ".git").exists()

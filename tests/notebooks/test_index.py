"""The table of notebooks is what the notebooks say."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def index():
    """tools/notebook_index.py as a module."""
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("notebook_index")
    sys.path.remove(str(ROOT / "tools"))


def test_the_table_of_notebooks_is_what_they_say(index):
    readme = (ROOT / "notebooks" / "README.md").read_text()
    assert index.with_index(readme, index.entries()) == readme, "python tools/notebook_index.py"
    assert len(index.entries()) == len(list((ROOT / "notebooks").glob("*.ipynb")))
    for entry in index.entries():
        assert f"[{entry.title}]({entry.path.name})" in readme
    with pytest.raises(ValueError, match="expected a line"):
        index.with_index("no markers", [])


@pytest.mark.parametrize("lacks", ["claim", "need", "minutes"])
def test_a_notebook_without_its_facts_is_refused(index, tmp_path, lacks):
    parts = {"title": "# 03 Any\n\n", "claim": "**Claim.** This\nholds.\n\n", "need": "You. **Need:** a *book*.\n",
             "minutes": "**Time:** 35 minutes."}
    path = tmp_path / "03_any.ipynb"
    path.write_text(json.dumps({"cells": [{"source": ["".join(parts.values())]}]}))
    entry = index.read_entry(path)
    assert (entry.title, entry.claim, entry.need, entry.minutes) == ("03 Any", "This holds.", "a *book*", 35)
    del parts[lacks]
    path.write_text(json.dumps({"cells": [{"source": ["".join(parts.values())]}]}))
    with pytest.raises(ValueError, match=rf"03_any.ipynb: no .*{lacks}"):
        index.read_entry(path)

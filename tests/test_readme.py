"""The README's map is true: it names every room, and none that is gone."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def rooms():
    """Folders that hold tracked files: of the top level, and one level down in the package."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing to compare with")
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout.split("\n")
    folders = [name.split("/")[:-1] for name in listing if "/" in name]
    top = {parts[0] for parts in folders if not parts[0].startswith(".")}
    return top | {"/".join(parts[:2]) for parts in folders if parts[0] == "bros_ref" and len(parts) > 1}


def test_the_map_names_every_room():
    text = (ROOT / "README.md").read_text()
    missing = sorted(room for room in rooms() if f"`{room}/`" not in text)
    assert not missing, f"README.md does not say what is in {missing}"


def test_the_map_names_no_room_that_is_gone():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`((?:bros_ref/|kernels_cupy/)?[a-z_]+)/`", text))
    assert named
    gone = sorted(name for name in named if not (ROOT / name).is_dir())
    assert not gone, f"README.md names folders that do not exist: {gone}"


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?\bmake ([a-z]+)\b", (ROOT / "README.md").read_text()))
    assert named
    assert named <= targets, f"README names make targets that do not exist: {sorted(named - targets)}"

"""The README's tree is true: every tracked file of the package and of the top level, and nothing else."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def named_in(block):
    """Paths that an indented tree names; a line is `name    description`, a folder ends in a slash."""
    paths, folders = set(), []
    for line in block.splitlines():
        match = re.fullmatch(r"( *)(\S+)  +(\S.*)", line)
        if match is None:
            raise AssertionError(f"not `name    description`: {line!r}")
        depth = len(match[1]) // 2
        folders = folders[:depth]
        paths.add("".join(folders) + match[2])
        if match[2].endswith("/"):
            folders.append(match[2])
    return paths


def tracked():
    """All files and folders, but of tests, hidden folders and the emulator's C++ the folder only."""
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout.split("\n")
    wanted = set()
    for name in filter(None, listing):
        parts = name.split("/")
        if parts[0] in ("tests", ".ci"):
            wanted.add(parts[0] + "/")
        elif parts[2:3] in (["include"], ["runtime"]):
            wanted.add("/".join(parts[:3]) + "/")
        elif not (parts[-1] in ("__init__.py", "py.typed") and len(parts) > 1) or name.startswith("bros_ref/scheduler"):
            wanted.update("/".join(parts[:depth]) + "/" for depth in range(1, len(parts)))
            wanted.add(name)
    return wanted - {".gitignore"}


def test_the_tree_names_exactly_what_is_there():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing to compare with")
    block = re.search(r"```tree\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None, "README.md has no ```tree block"
    named, there = named_in(block[1].rstrip("\n")), tracked()
    assert named == there, f"missing in README: {sorted(there - named)}; named but absent: {sorted(named - there)}"


def test_the_tree_parser_refuses_a_line_without_a_description():
    assert named_in("a/  folder\n  b.py  file\nc  file") == {"a/", "a/b.py", "c"}
    with pytest.raises(AssertionError):
        named_in("a.py")


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?\bmake ([a-z]+)\b", (ROOT / "README.md").read_text()))
    assert named
    assert named <= targets, f"README names make targets that do not exist: {sorted(named - targets)}"

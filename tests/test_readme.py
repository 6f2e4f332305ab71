"""The pages are true: the map names every folder and none that is gone, commands and files that are named exist, the
README's Python runs."""

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "kernels_cupy" / "README.md", ROOT / "notebooks" / "README.md"]
ELSEWHERE = {"vllm/v1/core/sched/scheduler.py"}  # files of other projects


def tracked():
    """Files that git tracks or would."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing to compare with")
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout.split("\n")
    return [name for name in listing if (ROOT / name).is_file()]


def rooms():
    """Folders that hold tracked files: of the top level, and one level down in the package."""
    folders = [name.split("/")[:-1] for name in tracked() if "/" in name]
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


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_of_a_page_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)\b", page.read_text(), re.MULTILINE))
    assert named <= targets, f"make targets that do not exist: {sorted(named - targets)}"


def lost_files(text, files):
    """File names in backquotes, and paths from the top folders, that no file ends in."""
    named = {quoted or bare for quoted, bare in re.findall(
        r"`([\w./-]+\.(?:py|cuh?|md|toml|yml|svg))`"
        r"|(?<![\w`/.])((?:bros_ref|kernels_cupy|tests|tools|docs)/[\w./-]+\.(?:py|cuh?|md|svg))", text)}
    return sorted(name for name in named - ELSEWHERE if not any(f"/{file}".endswith(f"/{name}") for file in files))


def test_pages_and_sources_name_no_file_that_is_gone():
    files = tracked()
    lost = {name: lost_files((ROOT / name).read_text(), files) for name in files
            if name.endswith((".md", ".py", ".cu", ".cuh")) and name not in ("CHANGELOG.md", "tests/test_readme.py")}
    assert {name: gone for name, gone in lost.items() if gone} == {}
    assert lost_files("`gone.py` and bros_ref/gone.py, `blocks.py`", ["bros_ref/kv_cache/blocks.py"]) \
        == ["bros_ref/gone.py", "gone.py"]


def commands(text):
    """What follows `bros-ref` in the indented or fenced lines of a page, comments left out."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^(?:\.venv/bin/)?bros-ref (.*)$", joined, re.MULTILINE)
    lines += re.findall(r"`bros-ref ([^`]*)`", joined)
    return [shlex.split(line, comments=True) for line in lines]


def unknown_parts(words, command):
    """Words that the command line does not know: a sub-command or an option."""
    words = list(words)
    while words and (below := getattr(command, "commands", {}).get(words[0])):
        command = below
        words.pop(0)
    if hasattr(command, "commands"):
        return words
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in words if word.startswith("--") and word not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_known(page):
    from bros_ref.cli.live import app

    command = typer.main.get_command(app)
    assert [(words, bad) for words in commands(page.read_text()) if (bad := unknown_parts(words, command))] == []
    assert unknown_parts(["simulate", "--gone", "x"], command) == ["--gone"]
    assert unknown_parts(["gone"], command) == ["gone"]


def test_the_python_of_the_readme_runs():
    """With the exact toy model in the place of the real one, and no measuring of this machine."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 5
    code = code.replace('LLM("smollm2")', 'LLM("checksum", kv_blocks=64, latency="online")')
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names := {})
    assert len(names["batch"]) == 2
    assert [output.finish_reason for output in names["batch"]] == ["length"] * 2
    assert printed.getvalue().strip().endswith(str(names["llm"].metrics()["classes"]["rt"]["slo_attainment"]))

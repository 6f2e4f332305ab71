"""A test that crashes or hangs ends the whole run at once, red, and is named: no dead run keeps waiting."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FATAL = {
    "abort": "import os; os.abort()",
    "exit": "import os; os._exit(0)",
    "sleep": "import time; time.sleep(300)",
    "sleep_in_c": "import ctypes; ctypes.PyDLL(None).sleep(300)",  # holds the GIL: only faulthandler's watchdog acts
}
LIMIT_S = 60  # for the whole run; what is queued behind the fatal test would take 300 s more


def flags_of_make_test():
    line = re.search(r"^TEST := .* -m pytest -n \S+ (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return line[1].split()


def run(folder, *, workers):
    """Runs pytest on a folder with the project's settings and flags, its own two plugins only, and limits of 2 and 4 s
    for each test."""
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", folder, "-n", str(workers),
         *flags_of_make_test(), "-p", "xdist.plugin", "-p", "pytest_timeout", "-o", "timeout=2",
         "-o", "faulthandler_timeout=4", folder],
        cwd=folder, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, capture_output=True, text=True,
        timeout=LIMIT_S, check=False)


SLOW = """
import pytest, time
@pytest.mark.parametrize("i", range(100))
def test_slow(i):
    time.sleep(1)
"""


@pytest.mark.parametrize(("kind", "workers"), [
    ("abort", 0), ("sleep", 0), ("sleep_in_c", 0), *((kind, 2) for kind in FATAL)])
def test_a_fatal_test_ends_the_run_red(tmp_path, kind, workers):
    """Behind the fatal test wait a hundred slow ones, and the other worker has as many."""
    (tmp_path / "test_0.py").write_text(f"def test_fatal():\n    {FATAL[kind]}\n{SLOW}")
    (tmp_path / "test_1.py").write_text(SLOW)
    result = run(tmp_path, workers=workers)
    output = result.stdout + result.stderr
    assert "test_fatal" in output
    if workers:
        assert result.returncode == pytest.ExitCode.TESTS_FAILED, output
        assert re.search(r"^worker 'gw\d' crashed while running 'test_0.py::test_fatal'$", result.stdout,
                         re.MULTILINE), output
        assert re.search(r"\b1 failed\b.* in [\d.]+s", result.stdout.splitlines()[-1]), output
    else:
        assert result.returncode != 0, output


def test_a_run_without_accident_passes(tmp_path):
    (tmp_path / "test_fine.py").write_text(
        "import pytest\ndef test_fine():\n    pass\ndef test_skipped():\n    pytest.skip('no GPU here')\n")
    result = run(tmp_path, workers=2)
    assert result.returncode == pytest.ExitCode.OK, result.stdout + result.stderr
    assert re.search(r"^SKIPPED \[1\] .*no GPU here$", result.stdout, re.MULTILINE)
    assert "1 passed, 1 skipped" in result.stdout.splitlines()[-1]

"""tools/http_overhead.py: both runs of a round serve the whole workload, a round is kept, and the table is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "http_overhead.py"


def run(*args):
    return subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True, check=False)


def test_a_round_of_a_batch_is_measured_and_kept(tmp_path):
    asked = ("--lines", 5, "--model", "checksum", "--file", tmp_path / "rounds.jsonl")
    measured = run("--rounds", 1, *asked)
    assert measured.returncode == 0, measured.stderr
    [kept] = map(json.loads, (tmp_path / "rounds.jsonl").read_text().splitlines())
    assert kept["key"] == {"model": "checksum", "lines": 5, "threads": 1, "seed": 0}
    http, process = (kept["runs"][served] for served in ("http", "process"))
    for figures in (http, process):
        assert figures["RT on time"] == 1.0
        assert figures["BE tokens/s"] > 0
    assert http["HTTP adds to TTFT (ms)"] > 0
    assert process["HTTP adds to TTFT (ms)"] is None
    again = run("--rounds", 1, *asked)
    assert "round 1" in measured.stderr
    assert again.stderr == "", "a kept round is not run again"
    assert again.stdout == measured.stdout


def test_the_table_has_medians_and_ratios_of_paired_runs(tmp_path):
    file = tmp_path / "rounds.jsonl"
    key = {"model": "smollm2", "lines": 0, "threads": 1}
    rounds = [({"TTFT": 11.0, "added": 4.0}, {"TTFT": 10.0, "added": None}),
              ({"TTFT": 20.0, "added": 6.0}, {"TTFT": 40.0, "added": None}),
              ({"TTFT": 30.0, "added": 5.0}, {"TTFT": 30.0, "added": None})]
    file.write_text("".join(json.dumps({"key": key | {"seed": seed}, "runs": {"http": http, "process": process}}) + "\n"
                            for seed, (http, process) in enumerate(rounds)))
    printed = run("--rounds", 0, "--file", file).stdout.splitlines()
    assert " ".join(printed[1].split()) == "TTFT 20.00 [11.00, 30.00] 30.00 [10.00, 40.00] 1.000 [0.500, 1.100]"
    assert " ".join(printed[2].split()) == "added 5.0 [4.0, 6.0]"


@pytest.mark.parametrize("lines", [0, 7])
def test_a_comparison_without_rounds_is_said(tmp_path, lines):
    result = run("--rounds", 0, "--lines", lines, "--file", tmp_path / "none.jsonl")
    assert result.returncode == 1
    assert "has no round of this comparison; ask for --rounds 1 or more" in result.stderr

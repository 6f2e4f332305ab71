"""tools/gpu_day.py without a GPU: the dry run, stages that fail, hang or are missing, and what docs/gpu.md says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from kernels.support import needs_emulator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("gpu_day", ROOT / "tools" / "gpu_day.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_day"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_day"]


def stage(tool, code, **more):
    return tool.Stage("probe", more.pop("limit_s", 30), (sys.executable, "-c", code), **more)


@needs_emulator
def test_a_dry_run_verifies_every_kernel_and_prints_no_time(tool, tmp_path, capsys):
    assert tool.main(["--dry", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_day.json").read_text())
    results = {one["stage"]: one["result"] for one in report["stages"]}
    assert [name for name, result in results.items() if result == "ok"] == [
        one.name for one in tool.STAGES if one.dry]
    assert {result for result in results.values() if result != "ok"} == {"not in a dry run"}
    assert report["machine"]["gpu"] == "none: the emulator"
    verified = report["results"]["verify"]
    assert (verified["checked"], verified["wrong"]) == (17, [])
    steps = report["results"]["engine_steps"]["rows"]
    assert [row["path"] for row in steps] == ["attention only", "fused", "fused, graph"]
    assert all(row["ms"] != row["ms"] for row in steps), "no number"
    timed = [row for part in (report["results"]["decode"]["rows"], *report["results"]["prefill_and_copies"].values())
             for row in part]
    assert {row.get("system", "copy") for row in timed} >= {"step 3", "step 5", "prefill", "copy"}
    for row in timed:
        assert all(row[name] != row[name] for name in ("us", "gb_per_s", "tflop_per_s") if name in row), "no number"
    for line in (tmp_path / "gpu_day.md").read_text().splitlines():
        if "step " in line or "prefill |" in line:
            assert line.rstrip(" |").endswith("-"), line


def test_a_stage_that_fails_hangs_or_is_missing_costs_only_itself(tool, tmp_path):
    def result(one, left_s=60.0, dry=False):
        return tool.run(one, tmp_path, left_s, dry)["result"]

    assert result(stage(tool, "pass")) == "ok"
    assert result(stage(tool, "raise SystemExit(3)")) == "exit code 3, see probe.log"
    slow = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); " \
           "time.sleep(600)"
    assert result(stage(tool, slow, limit_s=1)) == "out of time"
    assert result(stage(tool, "pass", needs="no_such_program")) == "no_such_program is not installed"
    assert result(stage(tool, "pass"), left_s=5) == "no time left"
    assert result(stage(tool, "pass"), dry=True) == "not in a dry run"
    patient = stage(tool, "import time; time.sleep(0.2)", limit_s=0.01, dry=True)
    assert result(patient, left_s=0.01, dry=True) == "ok", "a busy machine must not fail a dry run"


def test_a_wrong_kernel_fails_the_day(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "verify", lambda dry: {"checked": 2, "wrong": [{"kernel": "step 4"}]})
    assert tool.main(["--stage", "verify", "--out", str(tmp_path)]) == 1
    monkeypatch.setattr(tool, "STAGES", (stage(tool, "raise SystemExit(1)", dry=True),))
    assert tool.main(["--dry", "--out", str(tmp_path)]) == 1


def test_the_page_shows_the_kept_results_or_says_that_there_are_none(tool):
    kept = json.loads(tool.KEPT.read_text()) if tool.KEPT.exists() else None
    assert tool.PAGE.read_text() == tool.page(kept) + tool.estimates(), "write it anew: tools/gpu_day.py --estimates"
    assert "Not measured yet" in tool.page(None)
    report = {"machine": {"gpu": "G"}, "stages": [{"stage": "verify", "result": "ok", "seconds": 1.0}],
              "results": {"verify": {"checked": 3, "wrong": []},
                          "decode": {"rows": [{"case": "c", "system": "step 5", "us": 12.345, "samples_us": [1.0]}]}}}
    text = tool.page(report)
    assert "| c | step 5 | 12.35 |" in text or "| c | step 5 | 12.34 |" in text
    assert "3 runs against float64, 0 wrong" in text
    assert "samples" not in text


def test_the_stages_fit_the_budget_as_far_as_they_must(tool):
    must = [one.limit_s for one in tool.STAGES if one.dry]
    assert sum(must) <= tool.BUDGET_S

"""Peaks of memory belong to the work that reached them, not to what ran before it."""

from pathlib import Path

import numpy as np
import pytest

from bros_ref.evaluation.bench import engine
from bros_ref.evaluation.bench.memory import PeakMemory

needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset through /proc")


def hold(megabytes):
    np.ones(megabytes << 20, np.uint8)


@needs_linux
def test_a_peak_rises_with_its_own_work_and_falls_again_with_the_next():
    peaks = []
    for megabytes in (1, 400, 1):
        with PeakMemory() as peak:
            hold(megabytes)
        peaks.append(peak.bytes)
    assert peaks[1] - peaks[0] > 350e6
    assert peaks[2] - peaks[0] < 50e6


@needs_linux
def test_a_row_of_the_engines_benchmark_does_not_carry_over_to_the_next(monkeypatch):
    monkeypatch.setattr(engine, "run_ours", lambda loaded, lengths, seed: (hold(300 if lengths[0][0] == 128 else 1), [
        1.0])[1])
    monkeypatch.setattr(engine, "_against_the_machine", lambda loaded: {})
    large, small = engine.bench_engine(None, ("offline-32x128+64", "decode-1"), rounds=2, peers=())["rows"]
    assert large["peak_rss_bytes"] - small["peak_rss_bytes"] > 250e6


def test_without_a_peak_to_reset_nothing_is_claimed(monkeypatch, tmp_path):
    monkeypatch.setattr("bros_ref.evaluation.bench.memory._PROCESS", tmp_path / "missing")
    with PeakMemory() as peak:
        hold(1)
    assert peak.bytes is None

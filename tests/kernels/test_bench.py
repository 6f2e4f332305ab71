"""The kernel benchmark without a GPU: it verifies before it times, and its command says that nothing was measured."""

import json

import pytest
import torch
from kernels.support import needs_emulator
from typer.testing import CliRunner

from bros_ref.bench.kernels import Case, bench_kernels, copy_bandwidth
from bros_ref.cli import app
from kernels_cupy.contract import Heads
from kernels_cupy.device import FOLDER
from kernels_cupy.emulator import Emulator
from kernels_cupy.gpu import why_unavailable

HEADS = Heads(8, 2, 64, 16, torch.float16)
RAGGED = (Case("ragged", (1, 16, 40)),)


def once(call):
    call()
    return [3e-6, 1e-6, 2e-6]


@needs_emulator
def test_rows_hold_the_median_and_its_bandwidth():
    rows = bench_kernels(Emulator(), once, HEADS, 0, "cpu", bandwidth=1e9, cases=RAGGED, steps=(3, 5))
    assert [row["system"] for row in rows] == ["step 3", "step 5", "torch SDPA, gathered"]
    num_bytes = 2 * 57 * 2 * 64 * 2
    for row in rows:
        assert row["us"] == pytest.approx(2.0)
        assert row["gb_per_s"] == pytest.approx(num_bytes / 2e-6 / 1e9)
        assert row["share_of_copy_bandwidth"] == pytest.approx(num_bytes / 2e-6 / 1e9)


@needs_emulator
def test_a_wrong_kernel_is_not_timed():
    file = "paged_attention_1_warp.cu"
    wrong = (FOLDER / file).read_text().replace("total[i] / sum", "total[i]")
    with pytest.raises(ArithmeticError, match="step 1 is off by"):
        bench_kernels(Emulator(sources={file: wrong}), once, HEADS, 0, "cpu", 1e9, cases=RAGGED, steps=(1,))


def test_copy_bandwidth_counts_both_ways(monkeypatch):
    monkeypatch.setattr("bros_ref.bench.kernels.COPY_BYTES", 1000)
    assert copy_bandwidth(lambda call: [1e-6], "cpu") == pytest.approx(2e9)


@pytest.mark.skipif(why_unavailable() is None, reason="a GPU is here")
def test_without_a_gpu_the_command_measures_nothing(tmp_path):
    path = tmp_path / "k.json"
    result = CliRunner().invoke(app, ["bench", "kernels", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "not measured here" in result.output
    assert json.loads(path.read_text())["rows"] == []

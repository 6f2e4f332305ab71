"""The kernel benchmark without a GPU: it verifies before it times, and its command says that nothing was measured."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from kernels.support import needs_emulator
from typer.testing import CliRunner

from bros_ref.cli.live import app
from bros_ref.evaluation.bench.kernels import (
    Case,
    PrefillCase,
    bench_copies,
    bench_kernels,
    bench_prefill,
    copy_bandwidth,
)
from bros_ref.evaluation.bench.peers import peers
from kernels_cupy.device import FOLDER
from kernels_cupy.gpu import why_unavailable
from kernels_cupy.heads import FP8, Heads
from kernels_cupy.proof.contract import Batch
from kernels_cupy.proof.emulator import Emulator

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


@needs_emulator
def test_prefills_are_verified_and_their_operations_counted():
    cases = (PrefillCase("prompts", 2, 20, 20), PrefillCase("chunks", 2, 3, 20))
    rows = bench_prefill(Emulator(), once, HEADS, 0, "cpu", cases)
    assert [(row["case"], row["system"]) for row in rows] == [
        ("prompts", "prefill"), ("prompts", "torch SDPA, dense"), ("chunks", "prefill")]
    visible = 2 * (18 + 19 + 20)
    assert rows[2]["tflop_per_s"] == pytest.approx(4 * visible * 8 * 64 / 2e-6 / 1e12)
    file = "prefill_attention_1_tensor_cores.cu"
    wrong = (FOLDER / file).read_text().replace("rows.out[j][2 * h] * scale", "rows.out[j][2 * h]")
    with pytest.raises(ArithmeticError, match="prefill is off by"):
        bench_prefill(Emulator(sources={file: wrong}), once, HEADS, 0, "cpu", cases)


@needs_emulator
def test_copies_count_each_byte_once():
    rows = bench_copies(Emulator(), once, HEADS, "cpu", layers=2, slots=5)
    assert [row["case"] for row in rows] == ["on the device"]
    assert rows[0]["gb_per_s"] == pytest.approx(2 * 2 * 5 * 2 * 64 * 2 / 2e-6 / 1e9)


@needs_emulator
def test_an_fp8_cache_has_half_the_bytes_and_only_our_kernels_read_it():
    heads = Heads(8, 2, 64, 16, torch.float16, FP8)
    rows = bench_kernels(Emulator(), once, heads, 0, "cpu", bandwidth=1e9, cases=RAGGED, steps=(3, 5))
    assert [row["system"] for row in rows] == ["step 3", "step 5"]
    assert rows[0]["gb_per_s"] == pytest.approx(2 * 57 * 2 * 64 / 2e-6 / 1e9)
    assert [row["system"] for row in bench_prefill(Emulator(), once, heads, 0, "cpu", (PrefillCase("p", 2, 20, 20),))] \
        == ["prefill"]


class FakePeers:
    """Stands in for libraries that need a GPU: it finds each row of K and V by what it is handed, as they do."""

    def __init__(self):
        self.wrong = 0.0

    def attend(self, q, k, v, blocks, lengths):
        outs = []
        for s, length in enumerate(lengths):
            rows = [cache[blocks[s].long()].flatten(0, 1)[:length].double() for cache in (k, v)]
            keys, values = (row.repeat_interleave(q.shape[1] // k.shape[2], dim=1) for row in rows)
            weights = (torch.einsum("hd,chd->hc", q[s].double(), keys) * q.shape[2] ** -0.5).softmax(-1)
            outs.append(torch.einsum("hc,chd->hd", weights, values) + self.wrong)
        return torch.stack(outs).to(q.dtype)

    def BatchDecodeWithPagedKVCacheWrapper(self, workspace, layout):
        assert layout == "NHD"
        return self

    def plan(self, starts, indices, last, num_heads, num_kv_heads, head_dim, page, **types):
        ends = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        self.blocks = [indices[a:b] for a, b in ends]
        self.lengths = [(len(b) - 1) * page + int(n) for b, n in zip(self.blocks, last, strict=True)]

    def run(self, q, cache):
        return self.attend(q, *cache, self.blocks, self.lengths)

    def flash_attn_with_kvcache(self, q, k, v, cache_seqlens, block_table, causal):
        return self.attend(q[:, 0], k, v, block_table, cache_seqlens.tolist())[:, None]

    def flash_attn_varlen_func(self, q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k, causal, block_table):
        assert cu_seqlens_q.tolist() == list(range(len(q) + 1))
        assert max_seqlen_k == int(seqused_k.max())
        return self.attend(q, k, v, block_table, seqused_k.tolist())


@needs_emulator
def test_installed_peers_get_the_same_batch_and_are_verified_too(monkeypatch):
    fake = FakePeers()
    monkeypatch.setattr("bros_ref.evaluation.bench.peers._installed", lambda module: True)
    monkeypatch.setattr("bros_ref.evaluation.bench.peers.importlib.import_module", lambda name: fake)
    for block_size, names in ((16, ["FlashInfer", "vLLM flash-attn"]),
                              (256, ["FlashInfer", "flash-attn", "vLLM flash-attn"])):
        heads = Heads(4, 2, 64, block_size, torch.float16)
        rows = bench_kernels(Emulator(), once, heads, 0, "cpu", 1e9, cases=RAGGED, steps=(3,))
        assert [row["system"] for row in rows] == ["step 3", *names, "torch SDPA, gathered"]
    fake.wrong = 0.5
    with pytest.raises(ArithmeticError, match="FlashInfer is off by"):
        bench_kernels(Emulator(), once, HEADS, 0, "cpu", 1e9, cases=RAGGED, steps=())


def test_peers_refuse_a_direction_and_are_left_out_where_they_are_not_installed():
    reversed_ = Batch.draw(np.random.default_rng(0), HEADS, [1], [20], [True])
    with pytest.raises(ValueError, match="no direction"):
        peers(reversed_)
    if importlib.util.find_spec("flashinfer") is None:
        forward = Batch.draw(np.random.default_rng(0), HEADS, [1], [20], [False])
        assert "FlashInfer" not in dict(peers(forward))


def test_copy_bandwidth_counts_both_ways(monkeypatch):
    monkeypatch.setattr("bros_ref.evaluation.bench.kernels.COPY_BYTES", 1000)
    assert copy_bandwidth(lambda call: [1e-6], "cpu") == pytest.approx(2e9)


@pytest.mark.skipif(why_unavailable() is None, reason="a GPU is here")
def test_without_a_gpu_the_command_measures_nothing(tmp_path):
    path = tmp_path / "k.json"
    result = CliRunner().invoke(app, ["bench", "kernels", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "not measured here" in result.output
    assert json.loads(path.read_text())["rows"] == []

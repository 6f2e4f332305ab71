"""Decode steps 0 to 5, store_kv and copy_slots through the launcher, on the checked emulator, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels.support import needs_emulator

from kernels_cupy.checks import check_batch
from kernels_cupy.device import Gpu
from kernels_cupy.heads import Heads
from kernels_cupy.launch import (
    STEPS,
    Problem,
    best_step,
    choose_splits,
    copy_slots,
    paged_attention,
    store_kv,
    why_not,
    workspace_floats,
)
from kernels_cupy.proof.contract import Batch, decode
from kernels_cupy.proof.emulator import Emulator, KernelFault

pytestmark = needs_emulator
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
SMALL = Heads(8, 2, 64, 16, HALF)
SCALAR_STEPS = (0, 1, 2, 3)


def ragged(rng, heads):
    size = heads.block_size
    lengths = [1, size - 1, size, size + 1, 3 * size + 2, int(rng.integers(1, 200))]
    return Batch.draw(rng, heads, [1] * len(lengths), [max(1, length) for length in lengths])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT], ids=str)
def test_every_step_equals_float64_on_ragged_batches(step, dtype, rng):
    if step >= 4 and dtype is FLOAT:
        pytest.skip("tensor cores take fp16 and bf16")
    batch = ragged(rng, Heads(8, 2, 64, 16, dtype))
    batch.check(decode(Emulator(), batch, step, 1 if step == 3 else None))


@pytest.mark.parametrize(("heads", "steps"), [
    (Heads(4, 4, 80, 16, HALF), (0, 1, 2, 3)), (Heads(4, 2, 128, 32, HALF), (0, 1, 2, 3)),
    (Heads(9, 3, 64, 16, FLOAT), (0, 1, 2, 3)), (Heads(12, 1, 96, 16, BF16), (1, 3)),
    (Heads(8, 1, 256, 16, FLOAT), (1, 2, 3)), (Heads(2, 2, 64, 5, FLOAT), (0, 3)), (Heads(4, 2, 64, 1, HALF), (3,)),
], ids=lambda value: f"{value.num_heads}x{value.num_kv_heads}x{value.head_dim}" if isinstance(value, Heads) else "")
def test_shapes_beside_the_usual(heads, steps, rng):
    batch = ragged(rng, heads)
    for step in steps:
        batch.check(decode(Emulator(), batch, step))


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("step", [3, 4, 5])
def test_long_contexts_and_large_blocks(step, block_size, rng):
    batch = Batch.draw(rng, Heads(2, 1, 64, block_size, HALF), [1, 1], [16_384, block_size + 1])
    batch.check(decode(Emulator(), batch, step))


def test_a_second_launch_allocates_nothing(rng, monkeypatch):
    # what a CUDA graph records must not allocate: the workspace has grown by then
    batch, device = ragged(rng, SMALL), Emulator()
    out = torch.empty_like(batch.q)
    arguments = (device, batch.q, batch.k, batch.v, *batch.integers(), out)
    for step in (3, 5):
        paged_attention(*arguments, step=step, num_splits=2, num_sms=1)
    monkeypatch.setattr("kernels_cupy.launch.torch.empty", lambda *_, **__: pytest.fail("allocates"))
    for step in (5, 3):
        paged_attention(*arguments, step=step, num_splits=2, num_sms=1)
    batch.check(out)


def test_a_workspace_that_grew_in_inference_mode_serves_everybody(rng, monkeypatch):
    monkeypatch.setattr("kernels_cupy.launch._workspaces", {})
    batch = ragged(rng, SMALL)
    with torch.inference_mode():
        decode(Emulator(), batch, 3, 2)
    batch.check(decode(Emulator(), batch, 3, 2))  # it fills the workspace with NaN first


@pytest.mark.parametrize("num_splits", [2, 3, 7])
def test_pieces_merge_to_the_whole_even_if_some_are_empty(num_splits, rng):
    batch = ragged(rng, SMALL)
    batch.check(decode(Emulator(), batch, 3, num_splits))


def test_direction_costs_step_3_no_sector(rng):
    sectors = []
    for direction in (False, True):
        batch = Batch.draw(np.random.default_rng(3), Heads(8, 2, 128, 16, HALF), [1, 1], [256, 200], [direction] * 2)
        device = Emulator(counters=True)
        batch.check(decode(device, batch, 3, 1))
        sectors.append(device.counters.total("sectors", "global", "load"))
    assert abs(sectors[1] / sectors[0] - 1) < 0.01
    cache_bytes = 2 * (256 + 200) * 2 * 128 * 2
    assert sectors[0] * 32 < 1.12 * cache_bytes, "K and V are read once, and little else"


def test_a_foreign_slot_is_never_read_even_if_masked_later(rng):
    batch = ragged(rng, SMALL)
    device = Emulator()
    nobody = torch.full_like(batch.owner, -1)
    device.guard(batch.k, nobody)
    with pytest.raises(KernelFault):
        paged_attention(device, batch.q, batch.k, batch.v, *batch.integers(), torch.empty_like(batch.q), step=3)


def test_splits_fill_the_gpu_and_no_more():
    heads = Heads(32, 8, 128, 16, HALF)
    assert choose_splits(Problem(heads, 1, 1024), 108) >= 12, "8 KV heads need splits to reach 108 multiprocessors"
    assert choose_splits(Problem(heads, 54, 1024), 108) == 1
    assert choose_splits(Problem(heads, 1, 4), 108) == 1, "a short context is not cut"


@pytest.mark.parametrize(("arch", "dtype", "head_dim", "best"), [
    (75, HALF, 64, 5), (75, HALF, 128, 4), (75, HALF, 256, 3), (75, BF16, 64, 3), (75, FLOAT, 64, 3),
    (80, HALF, 128, 5), (80, BF16, 128, 5), (80, FLOAT, 128, 3), (86, HALF, 256, 5), (90, BF16, 256, 5),
    (90, HALF, 72, 3)])
def test_the_best_step_is_one_that_the_gpu_can_run(arch, dtype, head_dim, best):
    problem, gpu = Problem(Heads(8, 2, head_dim, 16, dtype), 1, 4), Gpu.of(arch)
    assert best_step(problem, gpu) == best
    assert why_not(best, problem, gpu) is None


def test_a_step_that_the_gpu_cannot_run_is_refused_with_the_reason(rng):
    t4 = Emulator(arch=75)
    with pytest.raises(ValueError, match=r"step 5 .* needs 66560 bytes of shared memory .* sm_75 has 65536"):
        decode(t4, ragged(rng, Heads(4, 2, 128, 16, HALF)), 5)
    with pytest.raises(ValueError, match="bf16 from sm_80 on, and this is sm_75"):
        decode(t4, ragged(rng, Heads(4, 2, 64, 16, BF16)), 4)
    long = Problem(Heads(4, 2, 64, 16, HALF), 1, 1000)  # step 2 keeps all scores: 16,000, and 1,040 bytes of its own
    assert "65040 bytes" in why_not(2, long, Gpu(75, 65_039, 65_536))
    assert why_not(2, long, Gpu(75, 65_040, 65_536)) is None
    batch = ragged(rng, Heads(4, 2, 128, 16, HALF))
    batch.check(decode(t4, batch))


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17])
def test_store_kv_writes_its_slots_and_no_other(num_tokens, rng):
    k, v = (torch.from_numpy(rng.standard_normal((num_tokens, 2, 64))).half() for _ in range(2))
    caches = [torch.full((3, 16, 2, 64), torch.nan, dtype=HALF) for _ in range(2)]
    slots = torch.from_numpy(rng.permutation(48)[:num_tokens].astype(np.int32))
    store_kv(Emulator(), k, v, slots, *caches)
    for rows, cache in zip((k, v), caches, strict=True):
        flat = cache.view(48, 2, 64)
        assert torch.equal(flat[slots.long()], rows)
        assert int(flat.isnan().all(dim=(1, 2)).sum()) == 48 - num_tokens


def test_copy_slots_moves_all_layers_and_nothing_else(rng):
    source = torch.from_numpy(rng.standard_normal((3, 2, 20, 2, 8))).float()
    destination = torch.zeros(3, 2, 30, 2, 8)
    pairs = torch.tensor([[4, 29], [0, 0], [19, 7]], dtype=torch.int32)
    copy_slots(Emulator(), source, destination, pairs)
    wanted = torch.zeros_like(destination)
    for a, b in pairs.tolist():
        wanted[:, :, b] = source[:, :, a]
    assert torch.equal(destination, wanted)
    copy_slots(Emulator(), source, destination, pairs[:0])
    assert torch.equal(destination, wanted)


def test_bad_arguments_are_named(rng):
    batch = ragged(rng, SMALL)
    device, tables = Emulator(), batch.integers()
    good = (batch.q, batch.k, batch.v, *tables, torch.empty_like(batch.q))
    for index, wrong, message in ((0, batch.q.float(), "k_cache is torch.float16"),
                                  (3, tables[0].long(), "block_tables must be int32"),
                                  (4, tables[1][:2], "context_lens must be"),
                                  (5, tables[2].to("meta"), "reversed must lie on cpu"),
                                  (6, batch.q[:, :, :32], "out must be")):
        with pytest.raises((TypeError, ValueError), match=message):
            paged_attention(device, *good[:index], wrong, *good[index + 1:], step=3)
    with pytest.raises(ValueError, match="step must be one of"):
        paged_attention(device, *good, step=6)
    wide = ragged(rng, Heads(2, 2, 256, 16, HALF))
    with pytest.raises(ValueError, match="head_dim up to 128"):
        decode(device, wide, 0)
    with pytest.raises(ValueError, match="block 9 is not one of"):
        check_batch([[0, 9]], [20], 4, 16)
    with pytest.raises(ValueError, match="cannot hold 40 tokens"):
        check_batch([[0, 1]], [40], 4, 16)


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_sequence_of_no_tokens_is_padding(rng, step):
    """Nothing is read for it, whatever its row of the tables says, and the others come out as without it."""
    batch = Batch.draw(rng, SMALL, [1] * 3, [5, 40, 17])
    q, out = torch.cat([batch.q, batch.q]), torch.full((6, *batch.q.shape[1:]), torch.nan, dtype=HALF)
    tables = torch.cat([batch.tables, torch.full_like(batch.tables, 1 << 30)])
    lengths, flips = (torch.cat([part, torch.zeros_like(part)]) for part in (batch.lengths, batch.reversed))
    device = Emulator()
    for cache in (batch.k, batch.v):
        device.guard(cache, batch.owner)
    for splits in (1, 3):
        paged_attention(device, q, batch.k, batch.v, tables, lengths, flips, out, step=step, num_splits=splits,
                        num_sms=1)
        batch.check(out[:3])


@pytest.mark.parametrize(("dtype", "lengths"), [(HALF, [5, 700]), (FLOAT, [5, 700]), (FLOAT, [3])])
def test_a_workspace_of_the_callers_own(rng, dtype, lengths):
    batch = Batch.draw(rng, Heads(4, 2, 64, 16, dtype), [1] * len(lengths), lengths)
    device, out = Emulator(), torch.empty_like(batch.q)
    floats = workspace_floats(batch.heads, len(lengths), batch.tables.shape[1], device.gpu)
    assert floats >= 1
    scratch = torch.full((floats,), torch.nan)
    arguments = (batch.q, batch.k, batch.v, *batch.integers(), out)
    paged_attention(device, *arguments, scratch=scratch)
    batch.check(out)
    assert bool(scratch.isfinite().any()) == (len(lengths) > 1), "it was used, where pieces are merged"
    for wrong in (scratch[1:], scratch.double(), torch.zeros(2, floats + 1)[:, ::2]):
        with pytest.raises(ValueError, match=f"scratch must be {floats} contiguous float32 values"):
            paged_attention(device, *arguments, scratch=wrong)

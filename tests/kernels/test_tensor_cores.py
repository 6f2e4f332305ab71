"""Decode steps 4 and 5 and both prefills on the checked emulator, against float64: numbers, ownership, conflicts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from kernels.support import needs_emulator

from bros_ref.model.attention import AttentionMetadata, dense_attention
from kernels_cupy import tensor_core_shapes as shapes
from kernels_cupy.device import Gpu
from kernels_cupy.heads import Heads
from kernels_cupy.launch import paged_attention
from kernels_cupy.launch_prefill import TENSOR_CORES, prefill_attention, prefill_launch
from kernels_cupy.proof.contract import Batch, decode, prefill
from kernels_cupy.proof.emulator import Emulator

pytestmark = needs_emulator


HALF, BFLOAT = torch.float16, torch.bfloat16
SHAPES = [Heads(8, 2, 64, 16, HALF), Heads(4, 4, 80, 32, BFLOAT), Heads(12, 1, 96, 16, HALF),
          Heads(20, 1, 128, 64, BFLOAT), Heads(6, 2, 256, 16, HALF)]


def _lengths(rng: np.random.Generator, size: int) -> list[int]:
    return [1, size - 1, size, size + 1, int(rng.integers(2 * size, 6 * size)), 8 * size]


def test_the_oracle_is_the_models(rng: np.random.Generator) -> None:
    batch = Batch.draw(rng, SHAPES[0], [1, 16, 1, 40, 3], [1, 16, 17, 50, 33])
    meta = AttentionMetadata.build(batch.block_lists, batch.reversed.bool().tolist(), batch.query_lens,
                                   batch.context_lens, SHAPES[0].block_size)
    wanted = dense_attention(batch.q.double(), batch.k.double(), batch.v.double(), meta, torch.float64)
    torch.testing.assert_close(batch.reference(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_decode_4(rng: np.random.Generator, heads: Heads) -> None:
    lengths = _lengths(rng, heads.block_size)
    batch = Batch.draw(rng, heads, [1] * len(lengths), lengths)
    for num_splits in (1, int(rng.integers(2, 6))):
        device = Emulator(cp_async="early" if rng.integers(2) else "late")
        batch.check(decode(device, batch, 4, num_splits))


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_decode_5(rng: np.random.Generator, heads: Heads) -> None:
    lengths = _lengths(rng, heads.block_size) + rng.integers(1, 50, 30).tolist()  # more than one warp's worth
    batch = Batch.draw(rng, heads, [1] * len(lengths), lengths)
    for num_sms in (1, int(rng.integers(2, 15))):
        device = Emulator(cp_async="early" if rng.integers(2) else "late")
        batch.check(decode(device, batch, 5, num_sms=num_sms))


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("steepness", [0.1, 4.0, 8.0])
def test_a_maximum_that_is_passed_by_little_or_by_much(rng: np.random.Generator, dtype: torch.dtype,
                                                       steepness: float) -> None:
    # the running maximum is raised only when a weight would get large: then it must be, and nothing may overflow
    heads = Heads(8, 2, 64, 16, dtype)
    lengths = [17, 300]
    batch = Batch.draw(rng, heads, [1, 1], lengths, steepness=steepness)
    for step in (3, 4, 5):
        batch.check(decode(Emulator(), batch, step, num_sms=1))
    batch = Batch.draw(rng, heads, [17, 40], lengths, steepness=steepness)
    batch.check(prefill(Emulator(), batch))


def _mixed(rng: np.random.Generator, size: int) -> tuple[list[int], list[int]]:
    """A decode of one token, whole prompts, chunks in the middle, a decode of longer contexts."""
    contexts = [1, size - 1, size, size + 1, int(rng.integers(65, 140)), int(rng.integers(100, 200)), 5 * size]
    chunks = [int(rng.integers(1, most)) for most in (size, 65, 100)]
    return [1, size - 1, 1, *chunks, 1], contexts


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_prefill_on_tensor_cores(rng: np.random.Generator, heads: Heads) -> None:
    batch = Batch.draw(rng, heads, *_mixed(rng, heads.block_size))
    batch.check(prefill(Emulator(cp_async="early" if rng.integers(2) else "late"), batch))


@pytest.mark.parametrize("heads", [Heads(9, 3, 64, 16, torch.float32), Heads(2, 2, 80, 5, torch.float32),
                                   Heads(4, 1, 32, 7, BFLOAT), Heads(2, 1, 256, 16, torch.float32)], ids=str)
def test_plain_prefill(rng: np.random.Generator, heads: Heads) -> None:
    batch = Batch.draw(rng, heads, [1, 20, heads.block_size + 1, 1], [1, 20, 70, 40])
    batch.check(prefill(Emulator(), batch))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_no_bank_conflicts_and_few_sectors(rng: np.random.Generator, head_dim: int) -> None:
    batch = Batch.draw(rng, Heads(4, 1, head_dim, 16, HALF), [1], [2048])
    minimum = sum(batch.context_lens) * head_dim * 4
    for step in (4, 5):
        device = Emulator(counters=True)
        decode(device, batch, step, 2, num_sms=1)
        assert device.counters is not None
        main_loop = [site for site in device.counters.sites if site.space == "shared" and "cuh" in str(site.line)]
        assert main_loop
        assert max(site.worst_conflict for site in main_loop) == 1
        ratio = device.counters.sectors * 32 / minimum
        assert ratio <= 1.05, ratio
        print(head_dim, ratio)


@pytest.mark.parametrize("step", [4, 5, "prefill"])
def test_direction_moves_the_same_bytes(rng: np.random.Generator, step: int | str) -> None:
    sectors = []
    for flip in (False, True):
        heads = Heads(4, 2, 64, 16, HALF)
        queries = [40 if step == "prefill" else 1] * 2
        batch = Batch.draw(np.random.default_rng(1), heads, queries, [100, 160], [flip] * 2)
        device = Emulator(counters=True)
        if step == "prefill":
            prefill(device, batch)
        else:
            decode(device, batch, step, 2, num_sms=1)
        assert device.counters is not None
        sectors.append(device.counters.total("sectors", "global", "load"))
    assert sectors[0] == sectors[1]


def test_prefill_refuses_what_it_cannot_run() -> None:
    batch = Batch.draw(np.random.default_rng(0), Heads(4, 2, 64, 16, HALF), [3], [3])
    starts, out, device = torch.tensor([0, 3], dtype=torch.int32), torch.empty_like(batch.q), Emulator()
    tables, lengths, reversed_ = batch.integers()
    with pytest.raises(TypeError, match="int32"):
        prefill_attention(device, batch.q, batch.k, batch.v, tables.long(), lengths, reversed_, starts, out)
    with pytest.raises(ValueError, match="query_starts must be"):
        prefill_attention(device, batch.q, batch.k, batch.v, tables, lengths, reversed_, starts[:1], out)
    with pytest.raises(ValueError, match="contiguous"):
        prefill_attention(device, batch.q.transpose(0, 1).contiguous().transpose(0, 1), batch.k, batch.v, tables,
                          lengths, reversed_, starts, out)
    with pytest.raises(TypeError, match="k_cache"):
        prefill_attention(device, batch.q, batch.k.float(), batch.v, tables, lengths, reversed_, starts, out)
    with pytest.raises(ValueError, match="16-byte"):
        Heads(4, 2, 20, 16, HALF)
    with pytest.raises(ValueError, match="evenly"):
        Heads(4, 3, 64, 16, HALF)
    with pytest.raises(TypeError, match="float64"):
        Heads(4, 2, 64, 16, torch.float64)
    with pytest.raises(ValueError, match="at most 256"):
        Heads(4, 2, 512, 16, HALF)
    with pytest.raises(ValueError, match="block_size"):
        Heads(4, 2, 64, 0, HALF)


@pytest.mark.parametrize(("arch", "dtype", "fast"), [(75, HALF, True), (75, BFLOAT, False), (80, BFLOAT, True),
                                                     (90, torch.float32, False)])
def test_prefill_takes_tensor_cores_where_the_gpu_has_them(arch: int, dtype: torch.dtype, fast: bool) -> None:
    for head_dim in (64, 128, 256):
        gpu = Gpu.of(arch)
        kernel, shape = prefill_launch(Heads(4, 2, head_dim, 16, dtype), gpu, 100, 2)
        assert (kernel.file == TENSOR_CORES) == fast
        assert shape.shared_bytes <= gpu.shared_bytes


class _Loads:
    """Records what each warp of each launch loads from global memory: (block, warp) -> tiles of K and V of so many
    bytes. A merge's share is counted in the same unit."""

    def __init__(self, heads: Heads) -> None:
        self.gpu = Gpu.of(90)
        self.launches: list[dict[tuple[int, int], float]] = []
        self._tile_bytes = 2 * shapes.TILE_TOKENS * heads.head_dim * 2

    def launch(self, *arguments: Any) -> None:
        device = Emulator(record=2_000_000)
        device.launch(*arguments)
        loaded = Counter[tuple[int, int]]()
        for access in device.accesses:
            if access.argument >= 0 and access.kind == "load":
                loaded[access.block, access.warp] += access.size
        self.launches.append({who: size / self._tile_bytes for who, size in loaded.items()})


def _finish(batch: Batch, step: int, resident: int, num_splits: int | None = None) -> float:
    """When the last block of a step and then of its merge has ended, in tiles, if `resident` blocks run at a time."""
    device = _Loads(batch.heads)
    paged_attention(device, batch.q, batch.k, batch.v, *batch.integers(), torch.empty_like(batch.q), step=step,
                    num_splits=num_splits, num_sms=resident // 2)
    return sum(_last_finish(launch, 1 + max(block for block, _ in launch), resident) for launch in device.launches)


def _last_finish(tiles: dict[tuple[int, int], float], num_blocks: int, resident: int) -> float:
    """When the last block ends, in tiles, if `resident` blocks run at a time and start in order."""
    ends = [0.0] * resident
    for block in range(num_blocks):
        first_free = ends.index(min(ends))
        ends[first_free] += max((tiles.get((block, warp), 0.0) for warp in range(4)), default=0.0)
    return max(ends)


def test_the_blocks_of_a_prompt_that_see_most_begin_first(rng: np.random.Generator) -> None:
    batch = Batch.draw(rng, Heads(4, 1, 64, 16, HALF), [192], [192])
    device = _Loads(batch.heads)
    prefill_attention(device, batch.q, batch.k, batch.v, *batch.integers(), batch.starts, torch.empty_like(batch.q))
    loaded = Counter[int]()
    for (block, _), tiles in device.launches[0].items():
        loaded[block] += round(16 * tiles)
    blocks = [loaded[block] for block in range(max(loaded) + 1)]
    with_rows = [tiles for tiles in blocks if tiles > max(blocks) / 10]  # one block finds no rows
    assert len(with_rows) == 6
    assert with_rows == sorted(with_rows, reverse=True)
    assert with_rows[0] > 2 * with_rows[-1]


RAGGED, EVEN = [700, 40, 90, 16, 300, 33], [400] * 3


@pytest.mark.parametrize(("lengths", "last"), [(RAGGED, (6.0, 7.3, 11.3)), (EVEN, (5.9, 7.1, 8.0))],
                         ids=["ragged", "even"])
def test_step_5_ends_before_any_split_of_step_4_merges_included(rng: np.random.Generator, lengths: list[int],
                                                                last: tuple[float, float, float]) -> None:
    batch = Batch.draw(rng, Heads(8, 2, 128, 16, HALF), [1] * len(lengths), lengths)
    fours = [_finish(batch, 4, 8, n) for n in (1, 2, 3, 4)]
    five = _finish(batch, 5, 8)
    assert five < min(fours), (five, fours)
    assert [round(tiles, 1) for tiles in (five, min(fours), max(fours))] == list(last), "the README says so"

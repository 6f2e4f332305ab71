"""Decode steps 4 and 5 and both prefills on the checked emulator, against float64: numbers, ownership, conflicts."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from bros_ref.model.attention import AttentionMetadata, dense_attention
from kernels_cupy import tensor_core_shapes as shapes
from kernels_cupy.device import Kernel
from kernels_cupy.emulator import Emulator
from kernels_cupy.launch_prefill import SCALARS, choose_kernel, prefill_attention

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
STEP_4, STEP_5 = "paged_attention_4_tensor_cores.cu", "paged_attention_5_balanced.cu"


@dataclass(frozen=True)
class Heads:
    """What a kernel is compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    def kernel(self, file: str, function: str) -> Kernel:
        values = (SCALARS[self.dtype], self.head_dim, self.num_heads, self.num_kv_heads, self.block_size)
        names = ("SCALAR", "HEAD_DIM", "NUM_HEADS", "NUM_KV_HEADS", "BLOCK_SIZE")
        return Kernel(file, function, tuple((name, str(value)) for name, value in zip(names, values, strict=True)))


@dataclass(frozen=True)
class Batch:
    """Random sequences in a cache whose other slots hold NaN."""

    heads: Heads
    q: Tensor  # [T, H, D]
    k: Tensor  # [num_blocks, B, K, D]
    v: Tensor
    meta: AttentionMetadata
    owner: Tensor  # [slots] int32: the sequence that owns a slot, -1 for none

    @classmethod
    def draw(cls, rng: np.random.Generator, heads: Heads, query_lens: list[int], context_lens: list[int],
             directions: list[bool] | None = None) -> Batch:
        size = heads.block_size
        needs = [-(-length // size) for length in context_lens]
        num_blocks = sum(needs) + 2
        order = rng.permutation(num_blocks).tolist()
        tables = [order[sum(needs[:i]):sum(needs[:i + 1])] for i in range(len(needs))]
        flips = directions or [bool(rng.integers(2)) for _ in needs]
        meta = AttentionMetadata.build(tables, flips, query_lens, context_lens, size)
        owner = torch.full((num_blocks * size,), -1, dtype=torch.int32)
        for s, length in enumerate(context_lens):
            for position in range(length):
                offset = position % size
                owner[tables[s][position // size] * size + (size - 1 - offset if flips[s] else offset)] = s
        rows, mine = (heads.num_kv_heads, heads.head_dim), owner >= 0
        caches = []
        for _ in range(2):
            cache = torch.full((num_blocks * size, *rows), torch.nan)
            cache[mine] = torch.from_numpy(rng.standard_normal((int(mine.sum()), *rows))).float() * 1.3
            caches.append(cache.view(num_blocks, size, *rows).to(heads.dtype))
        q = torch.from_numpy(rng.standard_normal((sum(query_lens), heads.num_heads, heads.head_dim))) * 1.3
        return cls(heads, q.to(heads.dtype), caches[0], caches[1], meta, owner)

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        return (self.meta.block_tables.int(), torch.tensor(self.meta.context_lens, dtype=torch.int32),
                self.meta.reversed.int())

    def check(self, out: Tensor) -> None:
        wanted = dense_attention(self.q.double(), self.k.double(), self.v.double(), self.meta, torch.float64)
        error = ((out.double() - wanted).abs().max() / wanted.abs().max()).item()
        assert error <= TOLERANCE[self.heads.dtype], error  # NaN fails too


def decode_4(batch: Batch, num_splits: int, device: Emulator) -> Tensor:
    h, num_seqs = batch.heads, len(batch.q)
    out = torch.full_like(batch.q, torch.nan)
    workspace = torch.full((shapes.decode_4_workspace(num_seqs, h.num_heads, h.head_dim, num_splits),), torch.nan)
    for cache in (batch.k, batch.v):
        device.guard(cache, batch.owner, serves=lambda x, y, z: z)
    tables, lengths, reversed_ = batch.integers()
    shape = shapes.decode_4(num_seqs, h.num_heads, h.num_kv_heads, h.head_dim, num_splits)
    device.launch(h.kernel(STEP_4, "paged_attention"), shape.grid, shape.block, shape.shared_bytes,
                  (batch.q, batch.k, batch.v, tables, lengths, reversed_, out, workspace,
                   np.float32(h.head_dim ** -0.5), np.int32(num_seqs), np.int32(tables.shape[1]), np.int32(num_splits)))
    device.unguard()
    if num_splits > 1:
        merge = shapes.merge_splits(num_seqs, h.num_heads, h.head_dim)
        Emulator().launch(h.kernel(STEP_4, "merge_splits"), merge.grid, merge.block, 0,
                          (workspace, out, np.int32(num_seqs), np.int32(num_splits)))
    return out


def decode_5(batch: Batch, num_blocks: int, device: Emulator) -> Tensor:
    h, num_seqs = batch.heads, len(batch.q)
    out = torch.full_like(batch.q, torch.nan)
    size = shapes.decode_5_workspace(h.num_heads, h.num_kv_heads, h.head_dim, num_blocks)
    workspace, workers = torch.full((size,), torch.nan), np.int32(shapes.decode_5_workers(h.head_dim, num_blocks))
    for cache in (batch.k, batch.v):
        device.guard(cache, batch.owner)
    tables, lengths, reversed_ = batch.integers()
    shape = shapes.decode_5(h.num_heads, h.num_kv_heads, h.head_dim, num_blocks)
    device.launch(h.kernel(STEP_5, "paged_attention"), shape.grid, shape.block, shape.shared_bytes,
                  (batch.q, batch.k, batch.v, tables, lengths, reversed_, out, workspace,
                   np.float32(h.head_dim ** -0.5), np.int32(num_seqs), np.int32(tables.shape[1]), workers))
    device.unguard()
    merge = shapes.merge_pieces(num_seqs, h.num_heads)
    Emulator().launch(h.kernel(STEP_5, "merge_pieces"), merge.grid, merge.block, 0,
                      (workspace, lengths, out, np.int32(num_seqs), workers))
    return out


def prefill(batch: Batch, device: Emulator, tensor_cores: bool = True) -> Tensor:
    h, out = batch.heads, torch.full_like(batch.q, torch.nan)
    starts = [0, *np.cumsum(batch.meta.query_lens).tolist()]
    group = h.num_heads // h.num_kv_heads
    tiles = [start * group // shapes.PREFILL_ROWS + s for s, start in enumerate(starts[:-1])]
    kernel = choose_kernel(h.dtype, h.num_heads, h.num_kv_heads, h.head_dim, h.block_size, tensor_cores)
    firsts = tiles if "tensor" in kernel.file else starts[:-1]  # the first blockIdx.x of each sequence
    for cache in (batch.k, batch.v):
        device.guard(cache, batch.owner, serves=lambda x, y, z: bisect.bisect_right(firsts, x) - 1)
    prefill_attention(device, batch.q, batch.k, batch.v, *batch.integers(), torch.tensor(starts, dtype=torch.int32),
                      out, tensor_cores=tensor_cores)
    device.unguard()
    return out


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)


HALF, BFLOAT = torch.float16, torch.bfloat16
SHAPES = [Heads(8, 2, 64, 16, HALF), Heads(4, 4, 80, 32, BFLOAT), Heads(12, 1, 96, 16, HALF),
          Heads(20, 1, 128, 64, BFLOAT), Heads(6, 2, 256, 16, HALF)]


def _lengths(rng: np.random.Generator, size: int) -> list[int]:
    return [1, size - 1, size, size + 1, int(rng.integers(2 * size, 6 * size)), 8 * size]


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_decode_4(rng: np.random.Generator, heads: Heads) -> None:
    lengths = _lengths(rng, heads.block_size)
    batch = Batch.draw(rng, heads, [1] * len(lengths), lengths)
    for num_splits in (1, int(rng.integers(2, 6))):
        batch.check(decode_4(batch, num_splits, Emulator(cp_async="early" if rng.integers(2) else "late")))


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_decode_5(rng: np.random.Generator, heads: Heads) -> None:
    lengths = _lengths(rng, heads.block_size) + rng.integers(1, 50, 30).tolist()  # more than one warp's worth
    batch = Batch.draw(rng, heads, [1] * len(lengths), lengths)
    for num_blocks in (1, int(rng.integers(2, 30))):
        batch.check(decode_5(batch, num_blocks, Emulator(cp_async="early" if rng.integers(2) else "late")))


def _mixed(rng: np.random.Generator, size: int) -> tuple[list[int], list[int]]:
    """A decode of one token, whole prompts, chunks in the middle, a decode of a longer context."""
    contexts = [1, size - 1, size, size + 1, int(rng.integers(65, 140)), int(rng.integers(100, 200)), 5 * size]
    return [1, size - 1, 1, int(rng.integers(1, size)), int(rng.integers(1, 65)), int(rng.integers(1, 100)), 1], contexts


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_prefill_on_tensor_cores(rng: np.random.Generator, heads: Heads) -> None:
    batch = Batch.draw(rng, heads, *_mixed(rng, heads.block_size))
    batch.check(prefill(batch, Emulator(cp_async="early" if rng.integers(2) else "late")))


@pytest.mark.parametrize("heads", [Heads(9, 3, 64, 16, torch.float32), Heads(2, 2, 80, 5, torch.float32),
                                   Heads(4, 1, 32, 7, BFLOAT), Heads(2, 1, 256, 16, torch.float32)], ids=str)
def test_plain_prefill(rng: np.random.Generator, heads: Heads) -> None:
    batch = Batch.draw(rng, heads, [1, 20, heads.block_size + 1, 1], [1, 20, 70, 40])
    batch.check(prefill(batch, Emulator()))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_no_bank_conflicts_and_few_sectors(rng: np.random.Generator, head_dim: int) -> None:
    batch = Batch.draw(rng, Heads(4, 1, head_dim, 16, HALF), [1], [2048])
    minimum = sum(batch.meta.context_lens) * head_dim * 4
    for run in (lambda device: decode_4(batch, 2, device), lambda device: decode_5(batch, 2, device)):
        device = Emulator(counters=True)
        run(device)
        assert device.counters is not None
        main_loop = [site for site in device.counters.sites if site.space == "shared" and "cuh" in str(site.line)]
        assert main_loop and max(site.worst_conflict for site in main_loop) == 1
        ratio = device.counters.sectors * 32 / minimum
        assert ratio <= 1.05, ratio
        print(head_dim, ratio)


@pytest.mark.parametrize("step", [4, 5, "prefill"])
def test_direction_moves_the_same_bytes(rng: np.random.Generator, step: int | str) -> None:
    sectors = []
    for flip in (False, True):
        heads = Heads(4, 2, 64, 16, HALF)
        batch = Batch.draw(np.random.default_rng(1), heads, [40 if step == "prefill" else 1] * 2, [100, 160], [flip] * 2)
        device = Emulator(counters=True)
        run = {4: lambda: decode_4(batch, 2, device), 5: lambda: decode_5(batch, 2, device),
               "prefill": lambda: prefill(batch, device)}[step]
        run()
        assert device.counters is not None
        sectors.append(device.counters.total("sectors", "global", "load"))
    assert sectors[0] == sectors[1]


def test_prefill_refuses_what_it_cannot_run() -> None:
    batch = Batch.draw(np.random.default_rng(0), Heads(4, 2, 64, 16, HALF), [3], [3])
    starts, out, device = torch.tensor([0, 3], dtype=torch.int32), torch.empty_like(batch.q), Emulator()
    tables, lengths, reversed_ = batch.integers()
    with pytest.raises(TypeError, match="int32"):
        prefill_attention(device, batch.q, batch.k, batch.v, tables.long(), lengths, reversed_, starts, out)
    with pytest.raises(ValueError, match="entries"):
        prefill_attention(device, batch.q, batch.k, batch.v, tables, lengths, reversed_, starts[:1], out)
    with pytest.raises(ValueError, match="contiguous"):
        prefill_attention(device, batch.q.transpose(0, 1).contiguous().transpose(0, 1), batch.k, batch.v, tables,
                          lengths, reversed_, starts, out)
    with pytest.raises(TypeError, match="k_cache"):
        prefill_attention(device, batch.q, batch.k.float(), batch.v, tables, lengths, reversed_, starts, out)
    with pytest.raises(ValueError, match="16-byte"):
        choose_kernel(HALF, 4, 2, 20, 16)
    with pytest.raises(ValueError, match="evenly"):
        choose_kernel(HALF, 4, 3, 64, 16)
    with pytest.raises(TypeError, match="float64"):
        choose_kernel(torch.float64, 4, 2, 64, 16)


def _tiles_of_warps(run: Callable[[Emulator], Tensor], heads: Heads) -> dict[tuple[int, int], float]:
    """Tiles of K that each (block, warp) loaded, from the recorded accesses of a launch."""
    device = Emulator(record=1_000_000)
    run(device)
    loaded = Counter[tuple[int, int]]()
    for access in device.accesses:
        if access.argument == 1:  # k_cache
            loaded[access.block, access.warp] += access.size
    return {who: size / (shapes.TILE_TOKENS * heads.head_dim * 2) for who, size in loaded.items()}


def _last_finish(tiles: dict[tuple[int, int], float], num_blocks: int, resident: int) -> float:
    """When the last block ends, in tiles, if `resident` blocks run at a time and start in order."""
    ends = [0.0] * resident
    for block in range(num_blocks):
        first_free = ends.index(min(ends))
        ends[first_free] += max((tiles.get((block, warp), 0.0) for warp in range(4)), default=0.0)
    return max(ends)


def test_step_5_ends_ragged_batches_earlier_than_any_split_of_step_4(rng: np.random.Generator) -> None:
    heads, resident = Heads(8, 2, 16, 16, HALF), 8
    batch = Batch.draw(rng, heads, [1] * 6, [700, 40, 90, 16, 300, 33])
    fours = [_last_finish(_tiles_of_warps(lambda device, n=n: decode_4(batch, n, device), heads), 12 * n, resident)
             for n in (1, 2, 3, 4)]
    five = max(_tiles_of_warps(lambda device: decode_5(batch, resident, device), heads).values())
    total = 2 * sum(-(-n // 16) for n in batch.meta.context_lens)
    assert five == -(-total // (4 * resident)) < min(fours), (five, fours)

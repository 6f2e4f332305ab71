"""What every kernel must do, on any device: random batches in a cache full of NaN, a float64 reference, guarded runs.

The tests, the mutation suite and `bros-ref kernels` share it. A run through `decode` or `prefill` goes through the
launcher; on an emulator it also says which slots each thread block may read, so a read of another's slot is an error
even where a mask would drop it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels_cupy import tensor_core_shapes as shapes
from kernels_cupy.device import Argument, Device, Dim3, Kernel, cdiv
from kernels_cupy.heads import FP8, Heads
from kernels_cupy.launch import paged_attention, workspace
from kernels_cupy.launch_prefill import TENSOR_CORES, prefill_attention, prefill_launch
from kernels_cupy.proof.emulator import Emulator
from kernels_cupy.proof.ptx import PtxDevice

# Of every row of the output (one token and head), in the L2 norm: rounding of weights, sums and the output itself.
# In float32 a row whose values cancel is off by up to 2.1e-6 (about 1,000 draws); twice that is still far from what a
# wrong slot or a dropped token does.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # the most that rounding changes a number, relative
FP8_LARGEST = 448.0
FP8_SCALES = (0.013, 0.37)  # of K and V in a drawn fp8 cache: some keys are cut off at 448, some values are subnormal
FP8_NANS = (0x7F, 0xFF)
REVERSED = (1, 2, -1)  # any number but 0 says that a sequence fills its blocks from the right


@dataclass(frozen=True)
class Batch:
    """Random sequences in a cache whose other slots hold NaN, some of them two to a block, from its two ends.

    Attributes:
        q: [T, H, D], all sequences one after another; k, v: [num_blocks, B, K, D].
        tables: [S, max_blocks] int32; lengths, reversed: [S] int32; starts: [S + 1] int32 rows of q.
        owner: [slots] int32, the sequence that owns a slot, -1 for none.
        k_scale, v_scale: of an fp8 cache; its numbers times these are what the reference attends to.
    """

    heads: Heads
    query_lens: list[int]
    context_lens: list[int]
    block_lists: list[list[int]]
    q: Tensor
    k: Tensor
    v: Tensor
    tables: Tensor
    lengths: Tensor
    reversed: Tensor
    starts: Tensor
    owner: Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator, heads: Heads, query_lens: list[int], context_lens: list[int],
             directions: Sequence[bool] | None = None, steepness: float = 1.0) -> Batch:
        """Draws blocks, directions (unless given) and values; two blocks stay unused. A `steepness` above 1 makes
        scores differ more, so that a running maximum is passed by much, and often; 0 makes all weights equal."""
        size = heads.block_size
        needs = [cdiv(length, size) for length in context_lens]
        num_blocks = sum(needs) + 2
        order = rng.permutation(num_blocks).tolist()
        lists = [order[sum(needs[:i]):sum(needs[:i + 1])] for i in range(len(needs))]
        flips = [bool(rng.integers(2)) for _ in needs] if directions is None else list(directions)
        _share_blocks(rng, lists, context_lens, flips, size)
        tables = torch.zeros(len(needs), max(needs), dtype=torch.int32)
        owner = torch.full((num_blocks * size,), -1, dtype=torch.int32)
        for s, length in enumerate(context_lens):
            tables[s, :needs[s]] = torch.tensor(lists[s], dtype=torch.int32)
            owner[_slots(lists[s], length, flips[s], size)] = s
        scales = FP8_SCALES if heads.is_fp8 else (1.0, 1.0)
        k, v = (_draw_cache(rng, heads, owner >= 0, scale).view(num_blocks, size, heads.num_kv_heads, heads.head_dim)
                for scale in scales)
        q = torch.from_numpy(rng.standard_normal((sum(query_lens), heads.num_heads, heads.head_dim))) * 1.3 * steepness
        starts = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
        return cls(heads, query_lens, context_lens, lists, q.to(heads.dtype), k, v, tables,
                   torch.tensor(context_lens, dtype=torch.int32),
                   torch.tensor(_directions(rng, flips), dtype=torch.int32),
                   torch.from_numpy(starts), owner, *scales)

    def to(self, place: str) -> Batch:
        """The same batch with its tensors on another device."""
        moved = {name: getattr(self, name).to(place)
                 for name in ("q", "k", "v", "tables", "lengths", "reversed", "starts", "owner")}
        return replace(self, **moved)

    def slots(self, seq: int) -> Tensor:
        """[context] int64: where a sequence's tokens lie, in logical order; on the CPU."""
        return _slots(self.block_lists[seq], self.context_lens[seq], bool(self.reversed[seq]), self.heads.block_size)

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """block_tables, context_lens, reversed: as the launchers take them."""
        return self.tables, self.lengths, self.reversed

    def reference(self) -> Tensor:
        """[T, H, D] float64, where the batch lies: one sequence at a time, its keys gathered in logical order, a causal
        mask, a softmax. No more than one sequence's K and V are copied."""
        h, outs, place = self.heads, [], self.q.device
        for s, (query, context) in enumerate(zip(self.query_lens, self.context_lens, strict=True)):
            slots = self.slots(s).to(place)
            k, v = (cache.flatten(0, 1)[slots].double() * scale
                    for cache, scale in ((self.k, self.k_scale), (self.v, self.v_scale)))
            start = sum(self.query_lens[:s])
            q = self.q[start:start + query].double().view(query, h.num_kv_heads, h.group, h.head_dim)
            scores = torch.einsum("qkgd,ckd->kgqc", q, k) * h.head_dim ** -0.5
            future = torch.ones(query, context, dtype=torch.bool, device=place).triu(context - query + 1)
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            outs.append(torch.einsum("kgqc,ckd->qkgd", weights, v).flatten(1, 2))
        return torch.cat(outs)

    def error(self, out: Tensor) -> float:
        """The largest distance of a row of [T, H, D] from `reference`, in the L2 norm, relative to that row: a sequence
        of one token must not set the scale for all. NaN stays NaN."""
        wanted = self.reference()
        distance = torch.linalg.vector_norm(out.double() - wanted, dim=-1)
        return float((distance / torch.linalg.vector_norm(wanted, dim=-1)).max())

    def check(self, out: Tensor) -> None:
        """Raises AssertionError if the error is beyond the dtype's TOLERANCE, or NaN."""
        error = self.error(out)
        assert error <= TOLERANCE[self.heads.dtype], f"relative error {error:.3g} of a row"

    def check_rounding(self, out: Tensor) -> None:
        """For fp16 and bf16 and a batch drawn with steepness 0, whose weights are exact: raises AssertionError unless
        each value is the float64 mean, rounded once. An intermediate result kept in 16 bits rounds twice."""
        wanted = self.reference()
        near_zero = wanted.abs() < wanted.abs().max() / 100  # there float32's own rounding is no longer small
        error = ((out.double() - wanted).abs() / wanted.abs()).masked_fill(near_zero, 0).max().item()
        assert error <= 1.01 * HALF_ULP[self.heads.dtype], f"{error / HALF_ULP[self.heads.dtype]:.3g} of half a unit"


def quantised(values: Tensor, scale: float) -> Tensor:
    """What an fp8 cache with this scale holds of values: the nearest numbers, ties to even, none beyond +-448."""
    return (values.float() / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)


def _draw_cache(rng: np.random.Generator, heads: Heads, mine: Tensor, scale: float) -> Tensor:
    """[slots, K, D]: random values in the slots that somebody owns, NaN in all others."""
    rows = (heads.num_kv_heads, heads.head_dim)
    cache = torch.full((len(mine), *rows), torch.nan)
    cache[mine] = torch.from_numpy(rng.standard_normal((int(mine.sum()), *rows))).float() * 1.3
    if not heads.is_fp8:
        return cache.to(heads.dtype)
    stored = quantised(cache, scale)
    nans = torch.from_numpy(rng.choice(np.array(FP8_NANS, np.uint8), (int((~mine).sum()), *rows)))
    stored.view(torch.uint8)[~mine] = nans
    return stored


def _directions(rng: np.random.Generator, flips: Sequence[bool]) -> list[int]:
    """0 for a forward sequence; the reversed ones take turns with the numbers of REVERSED."""
    turn = itertools.cycle(np.roll(REVERSED, rng.integers(len(REVERSED))).tolist())
    return [next(turn) if flip else 0 for flip in flips]


def _share_blocks(rng: np.random.Generator, lists: list[list[int]], lengths: list[int], flips: Sequence[bool],
                  size: int) -> None:
    """Moves the last tokens of some reversed sequences into the last block of a forward one, where both fit."""
    tails = [(length - 1) % size + 1 for length in lengths]
    partners = [s for s in rng.permutation(len(lists)).tolist() if not flips[s]]
    for s in np.flatnonzero(flips).tolist():
        fitting = [other for other in partners if tails[s] + tails[other] <= size]
        if fitting and rng.integers(4):
            lists[s][-1] = lists[fitting[0]][-1]
            partners.remove(fitting[0])


def _slots(blocks: list[int], length: int, reversed: bool, size: int) -> Tensor:
    position = torch.arange(length)
    offset = position % size
    return torch.tensor(blocks)[position // size] * size + (size - 1 - offset if reversed else offset)


class _FirstLaunch:
    """A device that runs the first launch on one device and what follows (a merge) on another, so that counters and
    recorded accesses are those of the kernel itself."""

    def __init__(self, first: Device) -> None:
        self._device = self._then = first
        self.gpu = first.gpu
        if isinstance(first, Emulator):
            self._then = Emulator(sources=first.sources, arch=first.gpu.arch)
        elif isinstance(first, PtxDevice):
            self._then = PtxDevice(first.gpu.arch, sources=first.sources)

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int,
               arguments: Sequence[Argument]) -> None:
        self._device.launch(kernel, grid, block, shared_bytes, arguments)
        self._device = self._then


def decode(device: Device, batch: Batch, step: int | None = None, num_splits: int | None = None,
           num_sms: int = 2) -> Tensor:
    """Runs one token per sequence through a rung of the ladder. Returns [S, H, D]; raises what the device raises."""
    out = torch.full_like(batch.q, torch.nan)
    workspace(batch.q.device, 1).fill_(torch.nan)  # nothing of an earlier launch may be of use
    if isinstance(device, Emulator) and device.checks:  # in steps 3 and 4, blockIdx.z is the sequence that is served
        for cache in (batch.k, batch.v):
            device.guard(cache, batch.owner, serves=(lambda x, y, z: z) if step in (3, 4) else None)
    try:
        paged_attention(_FirstLaunch(device), batch.q, batch.k, batch.v, *batch.integers(), out, step=step,
                        num_splits=num_splits, num_sms=num_sms, k_scale=batch.k_scale, v_scale=batch.v_scale)
    finally:
        if isinstance(device, Emulator):
            device.unguard()
    return out


def prefill(device: Device, batch: Batch, tensor_cores: bool = True) -> Tensor:
    """Runs several tokens per sequence, or a mixed batch, through a prefill kernel. Returns [T, H, D]."""
    h, out = batch.heads, torch.full_like(batch.q, torch.nan)
    if isinstance(device, Emulator) and device.checks:
        kernel, shape = prefill_launch(h, device.gpu, len(batch.q), len(batch.query_lens), tensor_cores)
        firsts = batch.starts[:-1].tolist()  # of each sequence, its first token or tile of rows
        fast, last = kernel.file == TENSOR_CORES, shape.grid[0] - 1
        if fast:
            firsts = [start * h.group // shapes.prefill_rows(h) + s for s, start in enumerate(firsts)]
        for cache in (batch.k, batch.v):
            device.guard(cache, batch.owner,
                         serves=lambda x, y, z: bisect.bisect_right(firsts, last - x if fast else x) - 1)
    try:
        prefill_attention(device, batch.q, batch.k, batch.v, *batch.integers(), batch.starts, out,
                          use_tensor_cores=tensor_cores, k_scale=batch.k_scale, v_scale=batch.v_scale)
    finally:
        if isinstance(device, Emulator):
            device.unguard()
    return out

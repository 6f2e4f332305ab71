"""What every kernel must do, on any device: random batches in a cache full of NaN, the float64 oracle, guarded runs.

The tests, the mutation suite and `bros-ref kernels` share it. A run through `decode` or `prefill` goes through the
launcher; on an emulator it also says which slots each thread block may read, so a read of another's slot is an error
even where a mask would drop it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels_cupy import tensor_core_shapes as shapes
from kernels_cupy.device import Argument, Device, Dim3, Kernel, cdiv
from kernels_cupy.heads import Heads
from kernels_cupy.launch import paged_attention, workspace
from kernels_cupy.launch_prefill import TENSOR_CORES, prefill_attention, prefill_launch
from kernels_cupy.proof.emulator import Emulator
from kernels_cupy.proof.ptx import PtxDevice

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the output's largest value


@dataclass(frozen=True)
class Batch:
    """Random sequences in a cache whose other slots hold NaN.

    Attributes:
        q: [T, H, D], all sequences one after another; k, v: [num_blocks, B, K, D].
        tables: [S, max_blocks] int32; lengths, reversed: [S] int32; starts: [S + 1] int32 rows of q.
        owner: [slots] int32, the sequence that owns a slot, -1 for none.
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

    @classmethod
    def draw(cls, rng: np.random.Generator, heads: Heads, query_lens: list[int], context_lens: list[int],
             directions: Sequence[bool] | None = None, steepness: float = 1.0) -> Batch:
        """Draws blocks, directions (unless given) and values; two blocks stay unused. A `steepness` above 1 makes
        scores differ more, so that a running maximum is passed by much, and often."""
        size = heads.block_size
        needs = [cdiv(length, size) for length in context_lens]
        num_blocks = sum(needs) + 2
        order = rng.permutation(num_blocks).tolist()
        lists = [order[sum(needs[:i]):sum(needs[:i + 1])] for i in range(len(needs))]
        flips = [bool(rng.integers(2)) for _ in needs] if directions is None else list(directions)
        tables = torch.zeros(len(needs), max(needs), dtype=torch.int32)
        owner = torch.full((num_blocks * size,), -1, dtype=torch.int32)
        for s, length in enumerate(context_lens):
            tables[s, :needs[s]] = torch.tensor(lists[s], dtype=torch.int32)
            owner[_slots(lists[s], length, flips[s], size)] = s
        rows, mine = (heads.num_kv_heads, heads.head_dim), owner >= 0
        caches = []
        for _ in range(2):
            cache = torch.full((num_blocks * size, *rows), torch.nan)
            cache[mine] = torch.from_numpy(rng.standard_normal((int(mine.sum()), *rows))).float() * 1.3
            caches.append(cache.view(num_blocks, size, *rows).to(heads.dtype))
        q = torch.from_numpy(rng.standard_normal((sum(query_lens), heads.num_heads, heads.head_dim))) * 1.3 * steepness
        starts = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
        return cls(heads, query_lens, context_lens, lists, q.to(heads.dtype), caches[0], caches[1], tables,
                   torch.tensor(context_lens, dtype=torch.int32), torch.tensor(flips, dtype=torch.int32),
                   torch.from_numpy(starts), owner)

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
        """[T, H, D] float64: one sequence at a time, keys gathered in logical order, a causal mask, a softmax."""
        h, outs = self.heads, []
        for s, (query, context) in enumerate(zip(self.query_lens, self.context_lens, strict=True)):
            slots = self.slots(s)
            k, v = (cache.flatten(0, 1)[slots].double().repeat_interleave(h.group, dim=1)
                    for cache in (self.k.cpu(), self.v.cpu()))
            q = self.q.cpu()[int(self.starts[s]):int(self.starts[s + 1])].double()
            scores = torch.einsum("qhd,chd->hqc", q, k) * h.head_dim ** -0.5
            future = torch.ones(query, context, dtype=torch.bool).triu(context - query + 1)
            outs.append(torch.einsum("hqc,chd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v))
        return torch.cat(outs)

    def error(self, out: Tensor) -> float:
        """The largest distance of [T, H, D] from `reference`, relative to its largest value; NaN stays NaN."""
        wanted = self.reference()
        return ((out.cpu().double() - wanted).abs().max() / wanted.abs().max()).item()

    def check(self, out: Tensor) -> None:
        """Raises AssertionError if the error is beyond the dtype's TOLERANCE, or NaN."""
        error = self.error(out)
        assert error <= TOLERANCE[self.heads.dtype], f"relative error {error:.3g}"


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
    """One token a sequence through a rung of the ladder. Returns [S, H, D]; raises what the device raises."""
    out = torch.full_like(batch.q, torch.nan)
    workspace(batch.q.device, 1).fill_(torch.nan)  # nothing of an earlier launch may be of use
    if isinstance(device, Emulator):  # in steps 3 and 4 a thread block serves one sequence, blockIdx.z
        for cache in (batch.k, batch.v):
            device.guard(cache, batch.owner, serves=(lambda x, y, z: z) if step in (3, 4) else None)
    try:
        paged_attention(_FirstLaunch(device), batch.q, batch.k, batch.v, *batch.integers(), out, step=step,
                        num_splits=num_splits, num_sms=num_sms)
    finally:
        if isinstance(device, Emulator):
            device.unguard()
    return out


def prefill(device: Device, batch: Batch, tensor_cores: bool = True) -> Tensor:
    """Several tokens a sequence, or a mixed batch, through a prefill kernel. Returns [T, H, D]."""
    h, out = batch.heads, torch.full_like(batch.q, torch.nan)
    if isinstance(device, Emulator):
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
                          use_tensor_cores=tensor_cores)
    finally:
        if isinstance(device, Emulator):
            device.unguard()
    return out

"""Caches with slots beyond 2^32 elements that use hardly any memory, to check that all addresses have 64 bits.

A pool is a sparse temporary file, which takes space only where it is touched: some gigabytes cost the pages of a few
blocks. Offsets are chosen so that 32-bit arithmetic gives a small positive result, and reads a wrong place inside the
pool. Checks would copy the tensors, so these run on an emulator without checks, or on any other device that takes CPU
tensors.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from dataclasses import replace

import torch
from torch import Tensor

from kernels_cupy.checks import VECTOR_BYTES
from kernels_cupy.device import Device, cdiv
from kernels_cupy.heads import FP8
from kernels_cupy.launch import copy_slots, store_kv
from kernels_cupy.launch_fused import rope_store
from kernels_cupy.proof.contract import Batch, quantised

FAR = 1 << 32


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are touched. Raises OSError if the system has no sparse files so large."""
    size = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)


def far_batch(batch: Batch) -> Batch:
    """The same sequences, their blocks beyond FAR elements of the caches; slots without an owner hold zeros there."""
    first = cdiv(FAR, batch.k[0].numel())
    caches = []
    for near in (batch.k, batch.v):
        cache = lazy_zeros((first + len(near), *near.shape[1:]), near.dtype)
        cache[first:] = near
        caches.append(cache)
    return replace(batch, k=caches[0], v=caches[1], tables=batch.tables + first,
                   block_lists=[[first + block for block in blocks] for blocks in batch.block_lists])


def check_far_store(device: Device) -> None:
    """Raises AssertionError unless `store_kv` writes rows to slots beyond FAR pieces of 16 bytes."""
    rows = torch.arange(1, 1 + 2 * 2 * 64).half().view(2, 2, 64)
    first = cdiv(FAR, 2 * 64 * 2 // VECTOR_BYTES)
    caches = [lazy_zeros((first // 16 + 1, 16, 2, 64), torch.float16) for _ in range(2)]
    store_kv(device, rows, -rows, torch.tensor([first, first + 3], dtype=torch.int32), caches[0], caches[1])
    for sign, cache in zip((1, -1), caches, strict=True):
        assert torch.equal(cache.view(-1, 2, 64)[[first, first + 3]], sign * rows), "a row is not in its slot"


def check_far_store_fp8(device: Device) -> None:
    """The same for an fp8 cache, beyond FAR pieces of 8 bytes."""
    rows = torch.arange(1, 1 + 2 * 2 * 64).half().view(2, 2, 64)
    first = cdiv(FAR, 2 * 64 // 8)
    caches = [lazy_zeros((first // 16 + 1, 16, 2, 64), FP8) for _ in range(2)]
    store_kv(device, rows, -rows, torch.tensor([first, first + 3], dtype=torch.int32), caches[0], caches[1])
    for sign, cache in zip((1, -1), caches, strict=True):
        found = cache.view(-1, 2, 64)[[first, first + 3]].float()
        assert torch.equal(found, quantised(sign * rows, 1.0).float()), "a row is not in its slot"


def check_far_rope_store(device: Device) -> None:
    """Raises AssertionError unless `rope_store` writes keys and values to slots beyond FAR elements; no dimension turns
    at position 0."""
    rows = torch.arange(1, 1 + 2 * 6 * 64).half().view(2, 6, 64)
    first = cdiv(FAR, 2 * 64)
    caches = [lazy_zeros((first // 16 + 1, 16, 2, 64), torch.float16) for _ in range(2)]
    cos, position = torch.ones(1, 32), torch.zeros(2, dtype=torch.int32)
    rope_store(device, rows, position, torch.tensor([first, first + 3], dtype=torch.int32), cos, torch.zeros(1, 32),
               caches[0], caches[1], torch.zeros(2, 2, 64, dtype=torch.float16))
    for cache, wanted in zip(caches, (rows[:, 2:4], rows[:, 4:]), strict=True):
        assert torch.equal(cache.view(-1, 2, 64)[[first, first + 3]], wanted), "a row is not in its slot"


def check_far_copies(device: Device) -> None:
    """Raises AssertionError unless `copy_slots` reads and writes planes beyond FAR pieces of 16 bytes."""
    slots, pairs = cdiv(FAR, 2 * 64 * 2 // VECTOR_BYTES), torch.tensor([[2, 5]], dtype=torch.int32)
    far, near = lazy_zeros((1, 2, slots, 2, 64), torch.float16), torch.zeros(1, 2, 8, 2, 64, dtype=torch.float16)
    far[:, :, 2] = torch.arange(1, 1 + 2 * 2 * 64).half().view(2, 2, 64)
    copy_slots(device, far, near, pairs)
    assert torch.equal(near[:, :, 5], far[:, :, 2]), "a slot was not read"
    copy_slots(device, near, far, pairs.flip(1))
    copy_slots(device, near * 2, far, torch.tensor([[5, 3]], dtype=torch.int32))
    assert torch.equal(far[:, :, 3], 2 * near[:, :, 5]), "a slot was not written"

"""What launchers check of their tensors before a launch, and `check_batch`, which checks values.

Launchers do not check values in device memory (ids, lengths, slots), because reading them would wait for the device; so
values are checked where they are made, on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels_cupy.device import cdiv
from kernels_cupy.heads import FP8, SCALE_LIMIT, Heads

VECTOR_BYTES = 16  # kernels load and store rows in pieces of so many bytes


def check_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, block_tables: Tensor,
                    scales: tuple[float, float], **integers: tuple[Tensor, int]) -> Heads:
    """Checks an attention launch and returns the sizes it is for.

    Args:
        q, out: [tokens, H, D]; k_cache, v_cache: [num_blocks, B, K, D]; block_tables: [S, max_blocks].
        scales: of an fp8 cache's K and V; 1 for any other cache.
        integers: further int32 tensors by name, each with the number of entries it must have.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape, device or layout; the message names it.
    """
    check_vectors("q", q, q)
    check_caches(k_cache, v_cache, q, scales)
    check_vectors("out", out, q)
    if q.dim() != 3 or out.shape != q.shape or k_cache.dim() != 4 or v_cache.shape != k_cache.shape \
            or k_cache.shape[3] != q.shape[2] or block_tables.dim() != 2:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, out {tuple(out.shape)}, k_cache "
                         f"{tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}, block_tables "
                         f"{tuple(block_tables.shape)}")
    check_integers("block_tables", block_tables, tuple(block_tables.shape), q)
    for name, (tensor, length) in integers.items():
        check_integers(name, tensor, (length,), q)
    return Heads(q.shape[1], k_cache.shape[2], q.shape[2], k_cache.shape[1], q.dtype, k_cache.dtype)


def check_caches(k_cache: Tensor, v_cache: Tensor, like: Tensor, scales: tuple[float, float]) -> None:
    """Raises TypeError or ValueError unless both caches have `like`'s dtype, or both are fp8, with scales that fit."""
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_vectors(name, tensor, like, dtype=FP8 if k_cache.dtype == FP8 else like.dtype)
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        if k_cache.dtype != FP8 and scale != 1:
            raise ValueError(f"{name} is {scale}, but a cache of {k_cache.dtype} holds its values as they are; only "
                             f"{FP8} has a scale")
        if not 1 / SCALE_LIMIT <= scale <= SCALE_LIMIT:
            raise ValueError(f"{name} must lie between 2^-60 and 2^60, not be {scale}")


def check_vectors(name: str, tensor: Tensor, like: Tensor, same_device: bool = True,
                  dtype: torch.dtype | None = None) -> None:
    """Raises TypeError or ValueError unless the tensor has `dtype` (`like`'s if None), `like`'s device, and rows that
    can be loaded 16 bytes at a time."""
    dtype = dtype or like.dtype
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if not tensor.is_contiguous() or tensor.data_ptr() % VECTOR_BYTES or (same_device and tensor.device != like.device):
        raise ValueError(f"{name} must be contiguous, start at a multiple of {VECTOR_BYTES} bytes, and lie on "
                         f"{like.device}")


def check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor | None = None) -> None:
    """Raises TypeError or ValueError unless the tensor is contiguous int32 of this shape (and on `like`'s device)."""
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, not {tensor.dtype}")
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous and of shape {shape}, not {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must lie on {like.device}, not on {tensor.device}")


def row_vectors(rows: Tensor) -> int:
    """16-byte pieces of one slot's row, [..., K, D]. Raises ValueError if the row is not a multiple of 16 bytes."""
    row_bytes = rows.shape[-2] * rows.shape[-1] * rows.element_size()
    if row_bytes % VECTOR_BYTES:
        raise ValueError(f"a slot of {row_bytes} bytes is not a whole number of {VECTOR_BYTES}-byte pieces")
    return row_bytes // VECTOR_BYTES


def check_batch(block_tables: Sequence[Sequence[int]], context_lens: Sequence[int], num_blocks: int,
                block_size: int) -> None:
    """Checks on the host the values that the kernels trust: ids within the cache, tables as long as their contexts.

    Raises:
        ValueError: it names the sequence and the number.
    """
    for i, (table, length) in enumerate(zip(block_tables, context_lens, strict=True)):
        if length < 1 or len(table) * block_size < length:
            raise ValueError(f"sequence {i}: {len(table)} blocks of {block_size} cannot hold {length} tokens, or it "
                             "has none")
        if wrong := [block for block in table[:cdiv(length, block_size)] if not 0 <= block < num_blocks]:
            raise ValueError(f"sequence {i}: block {wrong[0]} is not one of 0..{num_blocks - 1}")

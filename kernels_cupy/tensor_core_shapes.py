"""Grids, blocks and shared memory of the tensor-core kernels: the Python side of the constants in their .cu files.

It knows numbers only; the launchers check tensors. The names are those of the kernels' headers.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels_cupy.device import Dim3, Gpu, cdiv
from kernels_cupy.heads import Heads

TILE_TOKENS = 16
PREFILL_WARPS, PREFILL_STAGES = 4, 2
ELEMENT_BYTES = 2  # fp16 and bf16


@dataclass(frozen=True)
class Shape:
    """One launch: the grid, the block, and the dynamic shared memory of a block."""

    grid: Dim3
    block: Dim3
    shared_bytes: int


def why_no_tensor_cores(heads: Heads, gpu: Gpu) -> str | None:
    """None if tensor cores can take these sizes on this GPU, else the reason."""
    if heads.dtype.itemsize != ELEMENT_BYTES:
        return f"tensor cores take fp16 and bf16, not {heads.dtype}"
    if "bfloat16" in str(heads.dtype) and gpu.arch < 80:
        return f"tensor cores take bf16 from sm_80 on, and this is sm_{gpu.arch}"
    if heads.head_dim % 16 or heads.block_size % TILE_TOKENS:
        return (f"tensor cores take tiles of 16 tokens by 16 dimensions: head_dim {heads.head_dim} and block_size "
                f"{heads.block_size} must both be multiples of 16")
    if heads.is_fp8 and heads.head_dim % 32:
        return (f"tensor cores take 32 dimensions of an fp8 cache at a time, and head_dim {heads.head_dim} is no "
                "multiple of 32")
    return None


def decode_warps(heads: Heads) -> int:
    """Warps of a block of steps 4 and 5."""
    return 2 if heads.head_dim > 128 else 4


def _cache_row_bytes(heads: Heads) -> int:
    return heads.head_dim * (1 if heads.is_fp8 else ELEMENT_BYTES)


def _ring_bytes(heads: Heads) -> int:
    stages = 3 if _cache_row_bytes(heads) <= 160 else 2
    return stages * 2 * TILE_TOKENS * _cache_row_bytes(heads)


def decode_4(heads: Heads, num_seqs: int, num_splits: int) -> Shape:
    """Step 4's `paged_attention`."""
    warps = decode_warps(heads)
    queries = TILE_TOKENS * heads.head_dim * ELEMENT_BYTES if heads.head_dim > 128 else 0
    return Shape((heads.num_kv_heads * cdiv(heads.group, 16), num_splits, num_seqs), (32 * warps, 1, 1),
                 warps * (_ring_bytes(heads) + queries))


def _heads_of_a_tile(heads: Heads) -> int:
    return 16 if heads.group > 8 and heads.head_dim <= 128 else 8


def decode_5(heads: Heads, num_blocks: int) -> Shape:
    """Step 5's `paged_attention` on a fixed grid; its num_splits is `decode_5_workers`."""
    warps = decode_warps(heads)
    return Shape((num_blocks, 1, 1), (32 * warps, 1, 1),
                 warps * (_ring_bytes(heads) + TILE_TOKENS * _heads_of_a_tile(heads) * ELEMENT_BYTES))


def decode_5_workers(heads: Heads, num_blocks: int) -> int:
    """Number of workers of step 5, its num_splits argument."""
    return num_blocks * decode_warps(heads)


def decode_5_workspace(heads: Heads, num_blocks: int) -> int:
    """Floats of workspace that step 5 and its merge need, for any batch."""
    return 2 * decode_5_workers(heads, num_blocks) * _heads_of_a_tile(heads) * (heads.head_dim + 1)


def merge_pieces(heads: Heads, num_seqs: int) -> Shape:
    """Step 5's second launch."""
    return Shape((num_seqs * heads.num_heads, 1, 1), (128, 1, 1), 0)


def prefill_rows(heads: Heads) -> int:
    """Query rows of a block of prefill 1, a row being a token and a head."""
    return PREFILL_WARPS * 16 * (2 if heads.head_dim <= 128 else 1)


def prefill_keys(heads: Heads, gpu: Gpu) -> int:
    """Tokens of a ring stage of prefill 1: the most that registers hold without spilling and with which two blocks fit
    a multiprocessor, else the fewest."""
    most = 16
    if heads.head_dim <= 128:
        most = 64 if heads.head_dim <= 64 or (gpu.arch == 90 and not heads.is_fp8) else 32  # decoding takes registers
    return next((keys for keys in (64, 32) if keys <= most and
                 2 * (_prefill_bytes(heads, keys) + gpu.reserved_bytes) <= gpu.sm_shared_bytes), 16)


def _prefill_bytes(heads: Heads, keys: int) -> int:
    return PREFILL_STAGES * 2 * keys * _cache_row_bytes(heads) + prefill_rows(heads) * heads.head_dim * ELEMENT_BYTES


def prefill_1(heads: Heads, keys: int, num_tokens: int, num_seqs: int) -> Shape:
    """The tensor-core prefill. At most one block per sequence has no rows and returns at once."""
    tiles = num_tokens * heads.group // prefill_rows(heads) + num_seqs
    return Shape((tiles, heads.num_kv_heads, 1), (32 * PREFILL_WARPS, 1, 1), _prefill_bytes(heads, keys))

"""Grids, blocks and shared memory of the tensor-core kernels: the constants of their .cu files, said once in Python.

It knows numbers only; the launchers check tensors. The names are those of the kernels' headers.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels_cupy.device import Dim3

PREFILL_ROWS = 64  # query rows of a block, a row being a token and a head
TILE_TOKENS = 16


@dataclass(frozen=True)
class Shape:
    """One launch: the grid, the block, and the dynamic shared memory of a block."""

    grid: Dim3
    block: Dim3
    shared_bytes: int


def supports_tensor_cores(head_dim: int, block_size: int, element_bytes: int) -> bool:
    """Whether steps 4 and 5 and prefill 1 can run: fp16 or bf16 (on an sm_80 or newer; sm_75 has fp16 only), and
    whole tiles of 16 tokens by 16 dimensions."""
    return element_bytes == 2 and head_dim % 16 == 0 and 16 <= head_dim <= 256 and block_size % TILE_TOKENS == 0


def decode_warps(head_dim: int) -> int:
    """Warps of a block of steps 4 and 5."""
    return 2 if head_dim > 128 else 4


def _ring_bytes(head_dim: int) -> int:
    stages = 3 if head_dim <= 80 else 2
    return stages * 2 * TILE_TOKENS * head_dim * 2


def decode_4(num_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, num_splits: int) -> Shape:
    """Step 4's `paged_attention`."""
    warps = decode_warps(head_dim)
    queries = TILE_TOKENS * head_dim * 2 if head_dim > 128 else 0
    head_tiles = -(-(num_heads // num_kv_heads) // 16)
    return Shape((num_kv_heads * head_tiles, num_splits, num_seqs), (32 * warps, 1, 1),
                 warps * (_ring_bytes(head_dim) + queries))


def decode_4_workspace(num_seqs: int, num_heads: int, head_dim: int, num_splits: int) -> int:
    """Floats of workspace that step 4 and its merge need; unused with one split."""
    return num_seqs * num_heads * num_splits * (head_dim + 1)


def merge_splits(num_seqs: int, num_heads: int, head_dim: int) -> Shape:
    """Step 4's second launch, needed if num_splits > 1."""
    return Shape((num_heads, num_seqs, 1), (head_dim, 1, 1), 0)


def _heads_of_a_tile(num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    return 16 if num_heads // num_kv_heads > 8 and head_dim <= 128 else 8


def decode_5(num_heads: int, num_kv_heads: int, head_dim: int, num_blocks: int) -> Shape:
    """Step 5's `paged_attention` on a fixed grid; its num_splits is `decode_5_workers`."""
    warps = decode_warps(head_dim)
    heads = _heads_of_a_tile(num_heads, num_kv_heads, head_dim)
    return Shape((num_blocks, 1, 1), (32 * warps, 1, 1), warps * (_ring_bytes(head_dim) + 32 * heads))


def decode_5_workers(head_dim: int, num_blocks: int) -> int:
    """Workers of step 5: what its num_splits argument says."""
    return num_blocks * decode_warps(head_dim)


def decode_5_workspace(num_heads: int, num_kv_heads: int, head_dim: int, num_blocks: int) -> int:
    """Floats of workspace that step 5 and its merge need, whatever the batch."""
    pieces = 2 * decode_5_workers(head_dim, num_blocks)
    return pieces * _heads_of_a_tile(num_heads, num_kv_heads, head_dim) * (head_dim + 1)


def merge_pieces(num_seqs: int, num_heads: int) -> Shape:
    """Step 5's second launch."""
    return Shape((-(-num_seqs * num_heads // 4), 1, 1), (128, 1, 1), 0)


def prefill_0(num_tokens: int, num_heads: int) -> Shape:
    """The plain prefill."""
    return Shape((num_tokens, -(-num_heads // 4), 1), (128, 1, 1), 0)


def prefill_1(num_tokens: int, num_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Shape:
    """The tensor-core prefill. Up to one block a sequence finds no rows and returns."""
    keys = 64 if head_dim <= 128 else 16
    shared = 2 * 2 * keys * head_dim * 2 + (PREFILL_ROWS * head_dim * 2 if head_dim > 128 else 0)
    tiles = num_tokens * (num_heads // num_kv_heads) // PREFILL_ROWS + num_seqs
    return Shape((tiles, num_kv_heads, 1), (128, 1, 1), shared)

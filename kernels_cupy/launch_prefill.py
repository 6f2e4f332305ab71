"""`prefill_attention`: checks, the choice of a kernel, and its launch, the same on every device.

It serves mixed batches: prefill, chunked prefill and decode sequences in one launch. It allocates nothing and never
waits for the device, so a CUDA graph may hold it; therefore it trusts what lies in device memory (lengths, block ids):
`check_batch` of launch.py's kind belongs where those tensors are made.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels_cupy import tensor_core_shapes as shapes
from kernels_cupy.device import Device, Kernel

PLAIN, TENSOR_CORES = "prefill_attention_0_plain.cu", "prefill_attention_1_tensor_cores.cu"
SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def choose_kernel(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int,
                  tensor_cores: bool = True) -> Kernel:
    """Tensor cores for fp16 and bf16 where whole tiles of 16 fit head_dim and block_size; the plain kernel elsewhere.

    Raises:
        TypeError: another dtype.
        ValueError: head_dim rows that are not whole 16-byte pieces, or heads that KV heads do not divide.
    """
    if dtype not in SCALARS:
        raise TypeError(f"prefill_attention takes {', '.join(map(str, SCALARS))}, not {dtype}")
    if head_dim * dtype.itemsize % 16:
        raise ValueError(f"a row of {head_dim} values of {dtype} is not a whole number of 16-byte pieces")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly")
    fast = tensor_cores and shapes.supports_tensor_cores(head_dim, block_size, dtype.itemsize)
    constants = {"SCALAR": SCALARS[dtype], "HEAD_DIM": head_dim, "NUM_HEADS": num_heads,
                 "NUM_KV_HEADS": num_kv_heads, "BLOCK_SIZE": block_size}
    return Kernel(TENSOR_CORES if fast else PLAIN, "prefill_attention",
                  tuple((name, str(value)) for name, value in constants.items()))


def prefill_attention(device: Device, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor,
                      context_lens: Tensor, reversed: Tensor, query_starts: Tensor, out: Tensor,
                      scale: float | None = None, tensor_cores: bool = True) -> None:
    """Causal attention of sequences with any number of new tokens over a paged cache, either direction, into `out`.

    Args:
        q, out: [T, H, D], the new tokens of all sequences one after another.
        k_cache, v_cache: [num_blocks, B, K, D], the new tokens already stored. Slots of others may hold anything.
        block_tables: [S, max_blocks] int32 block ids in logical order.
        context_lens: [S] int32, tokens visible to a sequence's last row, the new ones included.
        reversed: [S] int32, not 0 if the sequence fills its blocks from the right.
        query_starts: [S + 1] int32: sequence s owns rows query_starts[s] ... query_starts[s + 1] - 1, at least one.
        scale: of the scores; D ** -0.5 if None.
        tensor_cores: False asks for the plain kernel.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape, device or layout; nothing was launched.
    """
    num_seqs, max_blocks = block_tables.shape
    num_tokens, num_heads, head_dim = q.shape
    _check(q, k_cache, v_cache, out, num_seqs, block_tables, context_lens, reversed, query_starts)
    kernel = choose_kernel(q.dtype, num_heads, k_cache.shape[2], head_dim, k_cache.shape[1], tensor_cores)
    if kernel.file == TENSOR_CORES:
        shape = shapes.prefill_1(num_tokens, num_seqs, num_heads, k_cache.shape[2], head_dim)
    else:
        shape = shapes.prefill_0(num_tokens, num_heads)
    device.launch(kernel, shape.grid, shape.block, shape.shared_bytes,
                  (q, k_cache, v_cache, block_tables, context_lens, reversed, query_starts, out,
                   np.float32(head_dim ** -0.5 if scale is None else scale), np.int32(num_seqs), np.int32(max_blocks)))


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, num_seqs: int, *integers: Tensor) -> None:
    if q.dim() != 3 or out.shape != q.shape or k_cache.dim() != 4 or v_cache.shape != k_cache.shape \
            or k_cache.shape[3] != q.shape[2]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, out {tuple(out.shape)}, k_cache "
                         f"{tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}")
    for name, tensor in zip(("q", "k_cache", "v_cache", "out"), (q, k_cache, v_cache, out), strict=True):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, q is {q.dtype}")
        if not tensor.is_contiguous() or tensor.data_ptr() % 16 or tensor.device != q.device:
            raise ValueError(f"{name} must be contiguous, start at a multiple of 16 bytes, and lie on {q.device}")
    lengths = (num_seqs, num_seqs, num_seqs, num_seqs + 1)
    names = ("block_tables", "context_lens", "reversed", "query_starts")
    for name, tensor, length in zip(names, integers, lengths, strict=True):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, not {tensor.dtype}")
        if len(tensor) != length or not tensor.is_contiguous() or tensor.device != q.device:
            raise ValueError(f"{name} must be contiguous, on {q.device}, with {length} entries; it has {len(tensor)}")

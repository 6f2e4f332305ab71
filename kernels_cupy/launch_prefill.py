"""`prefill_attention`: checks, the choice of a kernel, and its launch, the same on every device.

It serves mixed batches: prefill, chunked prefill and decode sequences in one launch. It allocates nothing and never
waits for the device.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kernels_cupy import tensor_core_shapes as tensor_cores
from kernels_cupy.checks import check_attention
from kernels_cupy.device import Device, Gpu, Kernel, cdiv
from kernels_cupy.heads import Heads
from kernels_cupy.tensor_core_shapes import Shape, prefill_keys, why_no_tensor_cores

PLAIN, TENSOR_CORES = "prefill_attention_0_plain.cu", "prefill_attention_1_tensor_cores.cu"


def why_not_1(heads: Heads, gpu: Gpu) -> str | None:
    """None if prefill 1 serves these sizes on this GPU, else the reason; prefill 0 runs everywhere."""
    if reason := why_no_tensor_cores(heads, gpu):
        return reason
    needed = tensor_cores.prefill_1(heads, prefill_keys(heads, gpu), 1, 1).shared_bytes
    return None if needed <= gpu.shared_bytes else \
        f"it needs {needed} bytes of shared memory for a thread block, and sm_{gpu.arch} has {gpu.shared_bytes}"


def prefill_launch(heads: Heads, gpu: Gpu, num_tokens: int, num_seqs: int,
                   use_tensor_cores: bool = True) -> tuple[Kernel, Shape]:
    """The kernel and its launch: prefill 1 where it can run, unless it is not wanted; else prefill 0."""
    if use_tensor_cores and why_not_1(heads, gpu) is None:
        keys = prefill_keys(heads, gpu)
        return (heads.kernel(TENSOR_CORES, "prefill_attention", KEYS=keys),
                tensor_cores.prefill_1(heads, keys, num_tokens, num_seqs))
    return (heads.kernel(PLAIN, "prefill_attention"),
            Shape((num_tokens, cdiv(heads.num_heads, 4), 1), (128, 1, 1), 0))


def prefill_attention(device: Device, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor,
                      context_lens: Tensor, reversed: Tensor, query_starts: Tensor, out: Tensor,
                      scale: float | None = None, use_tensor_cores: bool = True, k_scale: float = 1.0,
                      v_scale: float = 1.0) -> None:
    """Causal attention of sequences with any number of new tokens over a paged cache, either direction, into `out`.

    Args:
        q, out: [T, H, D], the new tokens of all sequences one after another.
        k_cache, v_cache: [num_blocks, B, K, D], the new tokens already stored; the dtype of q, or float8_e4m3fn. Slots
            of others may hold anything.
        block_tables: [S, max_blocks] int32 block ids in logical order.
        context_lens: [S] int32, tokens visible to a sequence's last row, the new ones included.
        reversed: [S] int32, not 0 if the sequence fills its blocks from the right.
        query_starts: [S + 1] int32: sequence s owns rows query_starts[s] ... query_starts[s + 1] - 1, at least one.
        scale: of the scores; D ** -0.5 if None.
        use_tensor_cores: False asks for the plain kernel.
        k_scale, v_scale: of an fp8 cache, where a stored value x means x * k_scale or x * v_scale.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape, device or layout; nothing was launched.
    """
    num_seqs = len(block_tables)
    heads = check_attention(q, k_cache, v_cache, out, block_tables, (k_scale, v_scale),
                            context_lens=(context_lens, num_seqs), reversed=(reversed, num_seqs),
                            query_starts=(query_starts, num_seqs + 1))
    kernel, shape = prefill_launch(heads, device.gpu, len(q), num_seqs, use_tensor_cores)
    device.launch(kernel, shape.grid, shape.block, shape.shared_bytes,
                  (q, k_cache, v_cache, block_tables, context_lens, reversed, query_starts, out,
                   heads.score_factor(scale, k_scale), np.int32(num_seqs), np.int32(block_tables.shape[1]),
                   *heads.output_factor(v_scale)))

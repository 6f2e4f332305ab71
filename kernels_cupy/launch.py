"""`paged_attention`, `store_kv`, `copy_slots`: checks, sizes, and the launch, the same on a GPU and on a CPU.

It allocates nothing once its workspace has grown, and never waits for the device, so a CUDA graph may hold it. Hence it
trusts what lies in device memory: `check_batch` looks at ids and lengths where they are made, on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels_cupy import tensor_core_shapes as tensor_cores
from kernels_cupy.device import Device, Kernel
from kernels_cupy.launch_prefill import SCALARS
from kernels_cupy.tensor_core_shapes import Shape

DEFAULT_SMS = 108  # multiprocessors to fill where the device does not say: an A100's
WAVE_EFFICIENCY = 0.85  # the fewest splits within this share of the best
MIN_BLOCKS_PER_SPLIT = 4
_workspaces: dict[torch.device, Tensor] = {}


@dataclass(frozen=True)
class Problem:
    """The sizes of a decode launch, all that grids depend on."""

    num_seqs: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_blocks: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def kernel(self, file: str, function: str = "paged_attention") -> Kernel:
        """The kernel compiled for these sizes."""
        constants = {"SCALAR": SCALARS[self.dtype], "HEAD_DIM": self.head_dim, "NUM_HEADS": self.num_heads,
                     "NUM_KV_HEADS": self.num_kv_heads, "BLOCK_SIZE": self.block_size}
        return Kernel(file, function, tuple((name, str(value)) for name, value in constants.items()))


@dataclass(frozen=True)
class DecodeStep:
    """One rung of the ladder.

    Attributes:
        file: the .cu file.
        shape: (problem, num_splits) -> grid, block, dynamic shared memory.
        supports: problem -> None, or why not.
        splits: whether a sequence may be cut; then `merge_splits` follows.
    """

    file: str
    shape: Callable[[Problem, int], Shape]
    supports: Callable[[Problem], str | None]
    splits: bool = False


def _heads_of_a_block(p: Problem) -> int:
    return min(p.group, 4 if p.head_dim > 128 else 8)


def _always(p: Problem) -> str | None:
    return None


def _small_head(p: Problem) -> str | None:
    return None if p.head_dim <= 128 else "step 0 keeps its output in registers: head_dim up to 128"


def _tensor_cores(p: Problem) -> str | None:
    if tensor_cores.supports_tensor_cores(p.head_dim, p.block_size, p.dtype.itemsize):
        return None
    return "tensor cores need fp16 or bf16, head_dim and block_size divisible by 16, and head_dim up to 256"


DECODE_STEPS: dict[int, DecodeStep] = {
    0: DecodeStep("paged_attention_0_naive.cu",
                  lambda p, _: Shape((-(-p.num_seqs * p.num_heads // 64), 1, 1), (64, 1, 1), 0), _small_head),
    1: DecodeStep("paged_attention_1_warp.cu",
                  lambda p, _: Shape((-(-p.num_seqs * p.num_heads // 4), 1, 1), (128, 1, 1), 0), _always),
    2: DecodeStep("paged_attention_2_block.cu",
                  lambda p, _: Shape((p.num_heads, p.num_seqs, 1), (128, 1, 1), 4 * p.max_blocks * p.block_size),
                  _always),
    3: DecodeStep("paged_attention_3_split.cu",
                  lambda p, n: Shape((p.num_kv_heads * -(-p.group // _heads_of_a_block(p)), n, p.num_seqs),
                                     (128, 1, 1), 0), _always, splits=True),
    4: DecodeStep("paged_attention_4_tensor_cores.cu",
                  lambda p, n: tensor_cores.decode_4(p.num_seqs, p.num_heads, p.num_kv_heads, p.head_dim, n),
                  _tensor_cores, splits=True),
}
STEP_5 = "paged_attention_5_balanced.cu"
STEPS = (*DECODE_STEPS, 5)


def best_step(problem: Problem) -> int:
    """Step 5 where tensor cores serve the problem, else step 3."""
    return 3 if _tensor_cores(problem) else 5


def choose_splits(problem: Problem, num_sms: int = DEFAULT_SMS) -> int:
    """Pieces to cut every sequence into: the fewest whose waves of thread blocks are nearly as full as any choice's,
    and no more than leave each piece MIN_BLOCKS_PER_SPLIT blocks of the longest table."""
    blocks = problem.num_seqs * problem.num_kv_heads
    most = max(1, problem.max_blocks // MIN_BLOCKS_PER_SPLIT)

    def fullness(splits: int) -> float:
        waves = blocks * splits / num_sms
        return waves / -(-blocks * splits // num_sms)

    efficiencies = [fullness(splits) for splits in range(1, min(most, 64) + 1)]
    return next(i + 1 for i, e in enumerate(efficiencies) if e >= WAVE_EFFICIENCY * max(efficiencies))


def workspace(device: torch.device, floats: int) -> Tensor:
    """[at least `floats`] float32, shared by all launches on a device, in stream order; it grows and never shrinks."""
    current = _workspaces.get(device)
    if current is None or current.numel() < floats:
        current = _workspaces[device] = torch.empty(max(floats, 1), dtype=torch.float32, device=device)
    return current


def paged_attention(device: Device, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor,
                    context_lens: Tensor, reversed: Tensor, out: Tensor, step: int | None = None,
                    num_splits: int | None = None, scale: float | None = None, num_sms: int = DEFAULT_SMS) -> None:
    """Decode attention of one new token a sequence over a paged cache, either direction, into `out`.

    Args:
        q, out: [S, H, D].
        k_cache, v_cache: [num_blocks, B, K, D], the new tokens already stored. Slots of others may hold anything.
        block_tables: [S, max_blocks] int32 block ids in logical order.
        context_lens: [S] int32, tokens visible, the new one included; at least 1.
        reversed: [S] int32, not 0 if the sequence fills its blocks from the right.
        step: rung of the ladder, 0 to 5; None takes the best that serves these sizes.
        num_splits: pieces a sequence is cut into (steps 3 and 4); None lets `choose_splits` say.
        scale: of the scores; D ** -0.5 if None.

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape, device or layout, or the step does not serve these
            sizes; nothing was launched.
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("out", out)):
        _check_vectors(name, tensor, q)
    if q.dim() != 3 or out.shape != q.shape or k_cache.dim() != 4 or v_cache.shape != k_cache.shape \
            or k_cache.shape[3] != q.shape[2] or block_tables.dim() != 2:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, out {tuple(out.shape)}, k_cache "
                         f"{tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}, tables {tuple(block_tables.shape)}")
    _check_integers("block_tables", block_tables, (len(q), block_tables.shape[1]), q)
    _check_integers("context_lens", context_lens, (len(q),), q)
    _check_integers("reversed", reversed, (len(q),), q)
    p = Problem(len(q), q.shape[1], k_cache.shape[2], q.shape[2], k_cache.shape[1], block_tables.shape[1], q.dtype)
    _check_problem(p)
    step = best_step(p) if step is None else step
    if step not in STEPS:
        raise ValueError(f"step must be one of {', '.join(map(str, STEPS))}, not {step}")
    rung = DECODE_STEPS.get(step)
    if reason := _tensor_cores(p) if rung is None else rung.supports(p):
        raise ValueError(f"step {step} does not serve these sizes: {reason}")
    pointers = (q, k_cache, v_cache, block_tables, context_lens, reversed, out)
    factor = np.float32(p.head_dim ** -0.5 if scale is None else scale)
    sizes = (np.int32(p.num_seqs), np.int32(p.max_blocks))
    if rung is None:
        _launch_balanced(device, p, pointers, factor, sizes, num_sms)
        return
    splits = (num_splits or choose_splits(p, num_sms)) if rung.splits else 1
    scratch = workspace(q.device, p.num_seqs * p.num_heads * splits * (p.head_dim + 1) if splits > 1 else 1)
    shape = rung.shape(p, splits)
    device.launch(p.kernel(rung.file), shape.grid, shape.block, shape.shared_bytes,
                  (*pointers, scratch, factor, *sizes, np.int32(splits)))
    if splits > 1:
        merge = tensor_cores.merge_splits(p.num_seqs, p.num_heads, p.head_dim)
        device.launch(p.kernel(rung.file, "merge_splits"), merge.grid, merge.block, 0,
                      (scratch, out, np.int32(p.num_seqs), np.int32(splits)))


def _launch_balanced(device: Device, p: Problem, pointers: tuple[Tensor, ...], factor: np.float32,
                     sizes: tuple[np.int32, np.int32], num_sms: int) -> None:
    """Step 5: a fixed grid, two blocks a multiprocessor, whatever the batch looks like."""
    blocks = 2 * num_sms
    scratch = workspace(pointers[0].device,
                        tensor_cores.decode_5_workspace(p.num_heads, p.num_kv_heads, p.head_dim, blocks))
    workers = np.int32(tensor_cores.decode_5_workers(p.head_dim, blocks))
    shape = tensor_cores.decode_5(p.num_heads, p.num_kv_heads, p.head_dim, blocks)
    device.launch(p.kernel(STEP_5), shape.grid, shape.block, shape.shared_bytes,
                  (*pointers, scratch, factor, *sizes, workers))
    merge = tensor_cores.merge_pieces(p.num_seqs, p.num_heads)
    device.launch(p.kernel(STEP_5, "merge_pieces"), merge.grid, merge.block, 0,
                  (scratch, pointers[4], pointers[6], sizes[0], workers))


def store_kv(device: Device, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Writes new rows to their slots.

    Args:
        k, v: [T, K, D]; k_cache, v_cache: [num_blocks, B, K, D], the same dtype.
        slot_mapping: [T] int32, no slot twice.

    Raises:
        TypeError, ValueError: as for `paged_attention`.
    """
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check_vectors(name, tensor, k)
    if k.shape != v.shape or k_cache.shape != v_cache.shape or k.shape[1:] != k_cache.shape[2:]:
        raise ValueError(f"shapes do not fit: k {tuple(k.shape)}, v {tuple(v.shape)}, k_cache "
                         f"{tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}")
    _check_integers("slot_mapping", slot_mapping, (len(k),), k)
    vectors = _row_vectors(k)
    if len(k):
        device.launch(Kernel("store_kv.cu", "store_kv", (("ROW_VECTORS", str(vectors)),)),
                      (-(-len(k) * vectors // 256), 1, 1), (256, 1, 1), 0,
                      (k, v, slot_mapping, k_cache, v_cache, np.int32(len(k))))


def copy_slots(device: Device, source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """Copies slots of one store to slots of another, or of the same, all layers at once.

    Args:
        source, destination: [layers, 2, slots, K, D] of one dtype; the number of slots may differ. On a GPU one of
            them may be pinned host memory.
        pairs: [n, 2] int32, (from, to). No destination twice, and none that is a source too if the stores are one.

    Raises:
        TypeError, ValueError: as for `paged_attention`.
    """
    for name, tensor in (("source", source), ("destination", destination)):
        _check_vectors(name, tensor, source, same_device=False)
    if source.dim() != 5 or source.shape[:2] != destination.shape[:2] or source.shape[3:] != destination.shape[3:]:
        raise ValueError(f"stores must be [layers, 2, slots, K, D] and differ in slots only, not "
                         f"{tuple(source.shape)} and {tuple(destination.shape)}")
    _check_integers("pairs", pairs, (len(pairs), 2))
    if len(pairs):
        device.launch(Kernel("copy_slots.cu", "copy_slots", (("ROW_VECTORS", str(_row_vectors(source))),)),
                      (len(pairs), source.shape[0] * 2, 1), (64, 1, 1), 0,
                      (source, destination, pairs, np.int32(source.shape[2]), np.int32(destination.shape[2])))


def check_batch(block_tables: Sequence[Sequence[int]], context_lens: Sequence[int], num_blocks: int,
                block_size: int) -> None:
    """Looks at what the kernels trust, on the host: ids within the cache, tables as long as their contexts.

    Raises:
        ValueError: it names the sequence and the number.
    """
    for i, (table, length) in enumerate(zip(block_tables, context_lens, strict=True)):
        if length < 1 or len(table) * block_size < length:
            raise ValueError(f"sequence {i}: {len(table)} blocks of {block_size} cannot hold {length} tokens, or it "
                             "has none")
        if wrong := [block for block in table[:-(-length // block_size)] if not 0 <= block < num_blocks]:
            raise ValueError(f"sequence {i}: block {wrong[0]} is not one of 0..{num_blocks - 1}")


def _check_problem(p: Problem) -> None:
    if p.dtype not in SCALARS:
        raise TypeError(f"paged_attention takes {', '.join(map(str, SCALARS))}, not {p.dtype}")
    if p.num_heads % p.num_kv_heads:
        raise ValueError(f"{p.num_heads} query heads do not share {p.num_kv_heads} KV heads evenly")
    if p.head_dim * p.dtype.itemsize % 16 or p.head_dim > 256:
        raise ValueError(f"head_dim {p.head_dim}: rows must be whole 16-byte pieces of at most 256 values")


def _check_vectors(name: str, tensor: Tensor, like: Tensor, same_device: bool = True) -> None:
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {like.dtype}")
    if not tensor.is_contiguous() or tensor.data_ptr() % 16 or (same_device and tensor.device != like.device):
        raise ValueError(f"{name} must be contiguous, start at a multiple of 16 bytes, and lie on {like.device}")


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor | None = None) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, not {tensor.dtype}")
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous and of shape {shape}, not {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must lie on {like.device}, not on {tensor.device}")


def _row_vectors(rows: Tensor) -> int:
    row_bytes = rows.shape[-2] * rows.shape[-1] * rows.element_size()
    if row_bytes % 16:
        raise ValueError(f"a slot of {row_bytes} bytes is not a whole number of 16-byte pieces")
    return row_bytes // 16

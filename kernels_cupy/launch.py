"""`paged_attention`, `store_kv`, `copy_slots`: checks, sizes, and the launch, the same on a GPU and on a CPU.

No launch waits for the device. `paged_attention` allocates only while its workspace grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels_cupy import tensor_core_shapes as tensor_cores
from kernels_cupy.checks import check_attention, check_caches, check_integers, check_vectors, row_vectors
from kernels_cupy.device import Device, Gpu, Kernel, cdiv
from kernels_cupy.heads import FP8, SCALARS, Heads
from kernels_cupy.tensor_core_shapes import Shape, why_no_tensor_cores

WAVE_EFFICIENCY = 0.85  # the fewest splits within this share of the best
MIN_BLOCKS_PER_SPLIT = 4
BLOCKS_PER_SM = 2  # of step 5's fixed grid
_workspaces: dict[torch.device, Tensor] = {}


@dataclass(frozen=True)
class Problem:
    """The sizes of a decode launch, which determine the grid."""

    heads: Heads
    num_seqs: int
    max_blocks: int


@dataclass(frozen=True)
class DecodeStep:
    """One rung of the ladder.

    Attributes:
        file: the .cu file.
        shape: (problem, pieces) -> grid, block, dynamic shared memory; pieces are the splits of a sequence, in step 5
            the thread blocks.
        refuses: (heads, gpu) -> None, or why it cannot serve them.
        splits: whether a sequence may be cut; then `merge_splits` follows.
        static_bytes: static shared memory of a thread block.
    """

    file: str
    shape: Callable[[Problem, int], Shape]
    refuses: Callable[[Heads, Gpu], str | None] = lambda heads, gpu: None
    splits: bool = False
    static_bytes: Callable[[Heads], int] = lambda heads: 0


def _heads_of_a_block(heads: Heads) -> int:
    return min(heads.group, 4 if heads.head_dim > 128 else 8)


def _no_fp8(heads: Heads, gpu: Gpu) -> str | None:
    return f"of decode steps only 3 and 5 read a cache of {FP8}" if heads.is_fp8 else None


def _small_head(heads: Heads, gpu: Gpu) -> str | None:
    return _no_fp8(heads, gpu) or (
        None if heads.head_dim <= 128 else "step 0 keeps its output in registers: head_dim up to 128")


def _tensor_cores_without_fp8(heads: Heads, gpu: Gpu) -> str | None:
    return _no_fp8(heads, gpu) or why_no_tensor_cores(heads, gpu)


DECODE_STEPS: dict[int, DecodeStep] = {
    0: DecodeStep("paged_attention_0_naive.cu",
                  lambda p, _: Shape((cdiv(p.num_seqs * p.heads.num_heads, 64), 1, 1), (64, 1, 1), 0), _small_head),
    1: DecodeStep("paged_attention_1_warp.cu",
                  lambda p, _: Shape((cdiv(p.num_seqs * p.heads.num_heads, 4), 1, 1), (128, 1, 1), 0), _no_fp8),
    2: DecodeStep("paged_attention_2_block.cu",
                  lambda p, _: Shape((p.heads.num_heads, p.num_seqs, 1), (128, 1, 1),
                                     4 * p.max_blocks * p.heads.block_size), _no_fp8,
                  static_bytes=lambda heads: 4 * 4 * (heads.head_dim + 1)),
    3: DecodeStep("paged_attention_3_split.cu",
                  lambda p, n: Shape((p.heads.num_kv_heads * cdiv(p.heads.group, _heads_of_a_block(p.heads)), n,
                                      p.num_seqs), (128, 1, 1), 0), splits=True),
    4: DecodeStep("paged_attention_4_tensor_cores.cu",
                  lambda p, n: tensor_cores.decode_4(p.heads, p.num_seqs, n), _tensor_cores_without_fp8,
                  splits=True),
    5: DecodeStep("paged_attention_5_balanced.cu", lambda p, n: tensor_cores.decode_5(p.heads, n), why_no_tensor_cores),
}
STEPS = tuple(DECODE_STEPS)


def why_not(step: int, problem: Problem, gpu: Gpu) -> str | None:
    """None if the step serves these sizes on this GPU, else the reason."""
    rung = DECODE_STEPS[step]
    if reason := rung.refuses(problem.heads, gpu):
        return reason
    needed = rung.shape(problem, 1).shared_bytes + rung.static_bytes(problem.heads)
    if needed > gpu.shared_bytes:
        return (f"it needs {needed} bytes of shared memory for a thread block, and sm_{gpu.arch} has "
                f"{gpu.shared_bytes}")
    return None


def best_step(problem: Problem, gpu: Gpu) -> int:
    """Step 5 where it can run, else step 4, else step 3, which runs everywhere."""
    return next(step for step in (5, 4, 3) if why_not(step, problem, gpu) is None)


def choose_splits(problem: Problem, num_sms: int) -> int:
    """Pieces to split every sequence into: the fewest whose waves of thread blocks are nearly as full as with the best
    choice, but so few that each piece has MIN_BLOCKS_PER_SPLIT blocks of the longest table."""
    blocks = problem.num_seqs * problem.heads.num_kv_heads
    most = max(1, problem.max_blocks // MIN_BLOCKS_PER_SPLIT)

    def fullness(splits: int) -> float:
        return blocks * splits / num_sms / cdiv(blocks * splits, num_sms)

    efficiencies = [fullness(splits) for splits in range(1, min(most, 64) + 1)]
    return next(i + 1 for i, e in enumerate(efficiencies) if e >= WAVE_EFFICIENCY * max(efficiencies))


def workspace(device: torch.device, floats: int) -> Tensor:
    """[at least `floats`] float32, shared by all launches on a device, in stream order; it grows and never shrinks.

    When it grows, the tensor before is freed: a CUDA graph that holds it must be captured again.
    """
    current = _workspaces.get(device)
    if current is None or current.numel() < floats:
        with torch.inference_mode(False):  # a caller's mode would stick to the tensor, which others use too
            current = _workspaces[device] = torch.empty(max(floats, 1), dtype=torch.float32, device=device)
    return current


def workspace_floats(heads: Heads, num_seqs: int, max_blocks: int, gpu: Gpu) -> int:
    """float32 values of workspace that `paged_attention` needs for such a launch, with the step and the splits that it
    chooses by itself."""
    p = Problem(heads, num_seqs, max_blocks)
    step = best_step(p, gpu)
    return _workspace_floats(p, step, _pieces(p, step, None, gpu.num_sms))


def _pieces(p: Problem, step: int, num_splits: int | None, num_sms: int) -> int:
    """The splits of a sequence, or step 5's thread blocks."""
    if step == 5:
        return BLOCKS_PER_SM * num_sms
    return (num_splits or choose_splits(p, num_sms)) if DECODE_STEPS[step].splits else 1


def _workspace_floats(p: Problem, step: int, pieces: int) -> int:
    if step == 5:
        return tensor_cores.decode_5_workspace(p.heads, pieces)
    return p.num_seqs * p.heads.num_heads * pieces * (p.heads.head_dim + 1) if pieces > 1 else 1


def paged_attention(device: Device, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor,
                    context_lens: Tensor, reversed: Tensor, out: Tensor, step: int | None = None,
                    num_splits: int | None = None, scale: float | None = None, num_sms: int | None = None,
                    scratch: Tensor | None = None, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
    """Decode attention of one new token per sequence over a paged cache, either direction, into `out`.

    Args:
        q, out: [S, H, D].
        k_cache, v_cache: [num_blocks, B, K, D], the new tokens already stored; the dtype of q, or float8_e4m3fn. Slots
            of others may hold anything.
        block_tables: [S, max_blocks] int32 block ids in logical order.
        context_lens: [S] int32, tokens visible, the new one included. A sequence of 0 is padding: nothing is read for
            it, and its row of `out` is undefined.
        reversed: [S] int32, not 0 if the sequence fills its blocks from the right.
        step: rung of the ladder, 0 to 5; None takes the best that serves these sizes on the device.
        num_splits: pieces that a sequence is split into (steps 3 and 4); None lets `choose_splits` decide.
        scale: of the scores; D ** -0.5 if None.
        num_sms: multiprocessors to fill; the device's if None.
        scratch: float32, at least as many as `workspace_floats` says, of the caller's own, as a CUDA graph needs; None
            takes the `workspace` that all launches share.
        k_scale, v_scale: of an fp8 cache, where a stored value x means x * k_scale or x * v_scale. A NaN in it is read
            as 480 (0x7f) or -480 (0xff).

    Raises:
        TypeError, ValueError: a tensor has the wrong dtype, shape, device or layout, or the step does not serve these
            sizes on this device; nothing was launched.
    """
    num_seqs = len(q)
    heads = check_attention(q, k_cache, v_cache, out, block_tables, (k_scale, v_scale),
                            context_lens=(context_lens, num_seqs), reversed=(reversed, num_seqs))
    if len(block_tables) != num_seqs:
        raise ValueError(f"block_tables has {len(block_tables)} rows, q has {num_seqs}")
    p = Problem(heads, num_seqs, block_tables.shape[1])
    step = best_step(p, device.gpu) if step is None else step
    if step not in DECODE_STEPS:
        raise ValueError(f"step must be one of {', '.join(map(str, STEPS))}, not {step}")
    if reason := why_not(step, p, device.gpu):
        raise ValueError(f"step {step} does not serve these sizes: {reason}")
    pointers = (q, k_cache, v_cache, block_tables, context_lens, reversed, out)
    factor, of_output = heads.score_factor(scale, k_scale), heads.output_factor(v_scale)
    splits = _pieces(p, step, num_splits, num_sms or device.gpu.num_sms)
    floats = _workspace_floats(p, step, splits)
    if scratch is None:
        scratch = workspace(q.device, floats)
    elif scratch.dtype != torch.float32 or not scratch.is_contiguous() or scratch.numel() < floats \
            or scratch.device != q.device:
        raise ValueError(f"scratch must be {floats} contiguous float32 values on {q.device}, not {scratch.numel()} of "
                         f"{scratch.dtype} on {scratch.device}")
    if step == 5:
        _launch_balanced(device, p, pointers, factor, of_output, splits, scratch)
        return
    rung = DECODE_STEPS[step]
    shape = rung.shape(p, splits)
    device.launch(heads.kernel(rung.file, "paged_attention"), shape.grid, shape.block, shape.shared_bytes,
                  (*pointers, scratch, factor, np.int32(num_seqs), np.int32(p.max_blocks), np.int32(splits),
                   *of_output))
    if splits > 1:
        device.launch(heads.kernel(rung.file, "merge_splits"), (heads.num_heads, num_seqs, 1), (heads.head_dim, 1, 1),
                      0, (scratch, out, np.int32(num_seqs), np.int32(splits)))


def _launch_balanced(device: Device, p: Problem, pointers: tuple[Tensor, ...], factor: np.float32,
                     of_output: tuple[np.float32, ...], blocks: int, scratch: Tensor) -> None:
    """Step 5: a fixed grid for every batch."""
    workers, num_seqs = np.int32(tensor_cores.decode_5_workers(p.heads, blocks)), np.int32(p.num_seqs)
    file, shape = DECODE_STEPS[5].file, tensor_cores.decode_5(p.heads, blocks)
    device.launch(p.heads.kernel(file, "paged_attention"), shape.grid, shape.block, shape.shared_bytes,
                  (*pointers, scratch, factor, num_seqs, np.int32(p.max_blocks), workers, *of_output))
    merge = tensor_cores.merge_pieces(p.heads, p.num_seqs)
    device.launch(p.heads.kernel(file, "merge_pieces"), merge.grid, merge.block, 0,
                  (scratch, pointers[4], pointers[6], num_seqs, workers))


def store_kv(device: Device, k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor,
             k_scale: float = 1.0, v_scale: float = 1.0) -> None:
    """Writes new rows to their slots.

    Args:
        k, v: [T, K, D]; k_cache, v_cache: [num_blocks, B, K, D], the same dtype, or float8_e4m3fn.
        slot_mapping: [T] int32, no slot twice.
        k_scale, v_scale: of an fp8 cache: a value is divided by it in float32, rounded to the nearest number of the
            cache (ties to even), and becomes +-448 if it is beyond. NaN stays NaN.

    Raises:
        TypeError, ValueError: as for `paged_attention`.
    """
    for name, tensor in (("k", k), ("v", v)):
        check_vectors(name, tensor, k)
    check_caches(k_cache, v_cache, k, (k_scale, v_scale))
    if k.shape != v.shape or k_cache.shape != v_cache.shape or k.shape[1:] != k_cache.shape[2:]:
        raise ValueError(f"shapes do not fit: k {tuple(k.shape)}, v {tuple(v.shape)}, k_cache "
                         f"{tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}")
    check_integers("slot_mapping", slot_mapping, (len(k),), k)
    vectors = row_vectors(k)
    constants = {"ROW_VECTORS": vectors}
    scales: tuple[np.float32, ...] = ()
    if k_cache.dtype == FP8:
        if k.dtype not in SCALARS:
            raise TypeError(f"a cache of {FP8} takes rows of {', '.join(map(str, SCALARS))}, not {k.dtype}")
        row_vectors(k_cache)  # an fp8 row is 16-byte pieces too, as attention and copies need it
        constants |= {"SCALAR": SCALARS[k.dtype], "KV_FP8": 1}
        scales = (np.float32(k_scale), np.float32(v_scale))
    if len(k):
        device.launch(Kernel("store_kv.cu", "store_kv", tuple((name, str(value)) for name, value in constants.items())),
                      (cdiv(len(k) * vectors, 256), 1, 1), (256, 1, 1), 0,
                      (k, v, slot_mapping, k_cache, v_cache, np.int32(len(k)), *scales))


def copy_slots(device: Device, source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """Copies slots of one store to slots of another, or of the same, all layers at once.

    Args:
        source, destination: [layers, 2, slots, K, D] of one dtype, any; the number of slots may differ. On a GPU one of
            them may be pinned host memory.
        pairs: [n, 2] int32, (from, to). No destination twice, and none that is a source too if the stores are one.

    Raises:
        TypeError, ValueError: as for `paged_attention`.
    """
    for name, tensor in (("source", source), ("destination", destination)):
        check_vectors(name, tensor, source, same_device=False)
    if source.dim() != 5 or source.shape[:2] != destination.shape[:2] or source.shape[3:] != destination.shape[3:]:
        raise ValueError(f"stores must be [layers, 2, slots, K, D] and differ in slots only, not "
                         f"{tuple(source.shape)} and {tuple(destination.shape)}")
    check_integers("pairs", pairs, (len(pairs), 2))
    if len(pairs):
        device.launch(Kernel("copy_slots.cu", "copy_slots", (("ROW_VECTORS", str(row_vectors(source))),)),
                      (len(pairs), source.shape[0] * 2, 1), (64, 1, 1), 0,
                      (source, destination, pairs, np.int32(source.shape[2]), np.int32(destination.shape[2])))

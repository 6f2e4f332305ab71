"""Tests of the checks: seeded defects in the kernels, each with the check that must flag it.

A mutant is one replacement in one file. It runs on small ragged batches, in both directions, on the checked emulator,
and against float64. "numerics" means that only the comparison with float64 saw it. A defect that neither sees is
either equivalent, and listed in EQUIVALENT with the reason, or a gap in the checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kernels_cupy.device import FOLDER, Device
from kernels_cupy.heads import FP8, Heads
from kernels_cupy.launch import copy_slots, store_kv
from kernels_cupy.proof.contract import FP8_SCALES, Batch, decode, prefill
from kernels_cupy.proof.emulator import Emulator, KernelFault
from kernels_cupy.proof.far import check_far_copies, check_far_rope_store, check_far_store, far_batch
from kernels_cupy.proof.fused import check_add_norm, check_rope_store, check_silu_mul, check_store_fp8

HALF = torch.float16
TINY, ODD, MANY = Heads(6, 2, 80, 16, HALF), Heads(4, 2, 64, 5, HALF), Heads(10, 1, 64, 16, HALF)
SMALL, WIDE, PLAIN = Heads(8, 2, 64, 16, HALF), Heads(4, 2, 256, 16, HALF), Heads(6, 2, 80, 5, torch.float32)
TILES_OF_A_BLOCK = Heads(8, 2, 64, 32, HALF)
FP8_SMALL, FP8_ODD = Heads(8, 2, 64, 16, HALF, FP8), Heads(6, 2, 80, 5, HALF, FP8)
LENGTHS, DIRECTIONS = [1, 15, 16, 17, 100, 170], [False, True, False, True, False, True]


def _decode(heads: Heads, step: int, num_splits: int | None = 1,
            steepness: float = 1.0) -> Callable[[Emulator], None]:
    def run(device: Emulator) -> None:
        batch = Batch.draw(np.random.default_rng(5), heads, [1] * len(LENGTHS), LENGTHS, DIRECTIONS, steepness)
        batch.check(decode(device, batch, step, num_splits, num_sms=1))

    return run


def _prefill(heads: Heads) -> Callable[[Emulator], None]:
    def run(device: Emulator) -> None:
        batch = Batch.draw(np.random.default_rng(5), heads, [1, 7, 16, 1, 70, 110], LENGTHS, DIRECTIONS)
        batch.check(prefill(device, batch))

    return run


def _level(heads: Heads, step: int) -> Callable[[Emulator], None]:
    """All weights equal: every value must be rounded once."""
    def run(device: Emulator) -> None:
        batch = Batch.draw(np.random.default_rng(5), heads, [1, 1], [700, 90], steepness=0.0)
        batch.check_rounding(decode(device, batch, step, 2, num_sms=2))

    return run


def _far(heads: Heads, step: int | None) -> Callable[[Emulator], None]:
    """Slots beyond 2^32 elements; a prefill if there is no step."""
    def run(device: Emulator) -> None:
        far = Emulator(checks=False, sources=device.sources)
        batch = far_batch(Batch.draw(np.random.default_rng(5), heads, [1, 1] if step is not None else [5, 1], [70, 33]))
        tensor_cores = heads.dtype is HALF and heads.block_size % 16 == 0
        batch.check(prefill(far, batch, tensor_cores) if step is None else decode(far, batch, step, 1, num_sms=1))

    return run


class CopiesAwaited(AssertionError):
    """A warp multiplies with fewer copies under way than its ring has room for."""


def _under_way(step: int | None, least: float) -> Callable[[Emulator], None]:
    """A long sequence, whose tiles must be on their way while earlier ones are multiplied."""
    def run(device: Emulator) -> None:
        counting = Emulator(counters=True, sources=device.sources)
        batch = Batch.draw(np.random.default_rng(5), SMALL, [1 if step is not None else 8], [640], [False])
        batch.check(prefill(counting, batch) if step is None else decode(counting, batch, step, 1, num_sms=1))
        assert counting.counters is not None
        if counting.counters.copies_under_way < least:
            raise CopiesAwaited(f"{counting.counters.copies_under_way:.2f} groups are under way, not {least}")

    return run


def _store(device: Emulator) -> None:
    rng = np.random.default_rng(5)
    k, v = (torch.from_numpy(rng.standard_normal((3, 2, 64))).half() for _ in range(2))
    caches, slots = [torch.zeros(2, 16, 2, 64, dtype=HALF) for _ in range(2)], torch.tensor([31, 0, 7]).int()
    store_kv(device, k, v, slots, caches[0], caches[1])
    for rows, cache in zip((k, v), caches, strict=True):
        wanted = torch.zeros(32, 2, 64, dtype=HALF)
        wanted[slots.long()] = rows
        assert torch.equal(cache.view(32, 2, 64), wanted)


def _store_fp8(device: Emulator) -> None:
    values = torch.from_numpy(np.random.default_rng(5).standard_normal((4, 2, 64)) * 3).half()
    check_store_fp8(lambda k, v, *to: store_kv(device, k, v, to[0], to[1], to[2], *FP8_SCALES), values, FP8_SCALES)


def _copies(device: Emulator) -> None:
    source = torch.arange(1, 1 + 2 * 20 * 520).float().view(1, 2, 20, 2, 260)
    destination = torch.zeros(1, 2, 30, 2, 260)
    pairs = torch.tensor([[4, 29], [0, 0], [19, 7]]).int()
    copy_slots(device, source, destination, pairs)
    for a, b in pairs.tolist():
        assert torch.equal(destination[:, :, b], source[:, :, a])
    assert int((destination != 0).any(dim=4).any(dim=3).sum()) == 6


def _long(device: Emulator) -> None:
    """Enough pieces that each warp of the merge has several."""
    batch = Batch.draw(np.random.default_rng(5), SMALL, [1, 1], [1500, 40])
    batch.check(decode(device, batch, 5, num_sms=2))


def _fused(check: Callable[..., None], *sizes: object) -> Callable[[Emulator], None]:
    return lambda device: check(device, np.random.default_rng(5), *sizes)


def _unchecked(check: Callable[[Device], None]) -> Callable[[Emulator], None]:
    return lambda device: check(Emulator(checks=False, sources=device.sources))


RUNS: dict[str, Callable[[Emulator], None]] = {
    "step 0": _decode(TINY, 0), "step 1": _decode(TINY, 1), "step 2": _decode(TINY, 2), "step 3": _decode(TINY, 3),
    "step 3, two splits": _decode(TINY, 3, 2), "step 3, blocks of 5": _decode(ODD, 3),
    "step 3, a group of 10": _decode(MANY, 3), "step 4": _decode(SMALL, 4), "step 4, two splits": _decode(SMALL, 4, 2),
    "step 4, two tiles a block": _decode(TILES_OF_A_BLOCK, 4), "step 4, D = 256": _decode(WIDE, 4),
    "step 4, steep scores": _decode(SMALL, 4, steepness=8.0),
    "step 5": _decode(SMALL, 5), "step 5, pieces": _level(SMALL, 5), "step 5, long": _long,
    "prefill 0": _prefill(PLAIN), "prefill 1": _prefill(SMALL), "store_kv": _store, "copy_slots": _copies,
    "step 0, far": _far(SMALL, 0), "step 3, far": _far(SMALL, 3), "step 4, far": _far(SMALL, 4),
    "prefill 0, far": _far(PLAIN, None), "store_kv, far": _unchecked(check_far_store),
    "copy_slots, far": _unchecked(check_far_copies), "step 4, copies": _under_way(4, 1.5),
    "rope_store": _fused(check_rope_store, TINY, 9, 72),
    "rope_store, norms": _fused(check_rope_store, TINY, 9, 32, True),
    "rope_store, far": _unchecked(check_far_rope_store),
    "add_norm": _fused(check_add_norm, 3, 2056, HALF), "silu_mul": _fused(check_silu_mul, 3, 1032, HALF),
    "step 5, copies": _under_way(5, 1.5), "prefill 1, copies": _under_way(None, 0.85),
    "step 3, fp8": _decode(FP8_ODD, 3), "step 3, fp8, two splits": _decode(FP8_ODD, 3, 2),
    "step 5, fp8": _decode(FP8_SMALL, 5), "prefill 0, fp8": _prefill(FP8_ODD), "prefill 1, fp8": _prefill(FP8_SMALL),
    "store_kv, fp8": _store_fp8, "rope_store, fp8": _fused(check_rope_store, FP8_SMALL, 9, 32),
}


@dataclass(frozen=True)
class Mutant:
    """A defect: in `file`, `old` (which stands there once) becomes `new`; `flagged` names the check that sees it."""

    run: str
    file: str
    old: str
    new: str
    flagged: str


TILES, ROWS = "tiles.cuh", "query_rows.cuh"
PREFILL_0, PREFILL_1 = "prefill_attention_0_plain.cu", "prefill_attention_1_tensor_cores.cu"
NAIVE, WARP, BLOCK, SPLIT, STEP_4, STEP_5 = (next(FOLDER.glob(f"paged_attention_{i}_*.cu")).name for i in range(6))
MUTANTS = [
    # steps 0 to 3, and the copies
    Mutant("step 0", NAIVE, "if (row >= num_seqs * NUM_HEADS) return;", "", "out of bounds"),
    Mutant("step 0", NAIVE, "position < context_lens[seq]", "position <= context_lens[seq]", "foreign slot"),
    Mutant("step 0", "paged.cuh", "(reversed ? BLOCK_SIZE - 1 - offset : offset)", "offset", "foreign slot"),
    Mutant("step 0", NAIVE, "total[d] * fade + weight", "total[d] + weight", "numerics"),
    Mutant("step 1", WARP, "row % NUM_HEADS / GROUP", "row % NUM_KV_HEADS", "numerics"),
    Mutant("step 1", WARP, "row >= num_seqs * NUM_HEADS) return", "row >= num_seqs * NUM_HEADS || lane > 30) return",
           "undefined shuffle"),
    Mutant("step 1", "paged.cuh", "LANES / 2; other; other", "LANES / 4; other; other", "numerics"),
    Mutant("step 1", WARP, "d < HEAD_DIM ? to_float(q", "true ? to_float(q", "out of bounds"),
    Mutant("step 2", BLOCK, "    __syncthreads();  // whoever", "    //", "race"),
    Mutant("step 2", BLOCK, "= x;\n    __syncthreads();", "= x;", "uninitialised read"),
    Mutant("step 2", BLOCK, "= total[i];\n    __syncthreads();", "= total[i];", "uninitialised read"),
    Mutant("step 2", BLOCK, "if (lane == 0) weights[position] = score;", "if (warp == 0) weights[position] = score;",
           "race"),
    Mutant("step 2", BLOCK, "w < WARPS; w++) x += totals", "w < WARPS - 1; w++) x += totals", "numerics"),
    Mutant("step 3", SPLIT, "sums[team][h] = sum[h];\n    }\n    __syncthreads();", "sums[team][h] = sum[h];\n    }",
           "uninitialised read"),
    Mutant("step 3", SPLIT, "i - slot + offset < length", "i < length", "foreign slot"),
    Mutant("step 3, blocks of 5", SPLIT, "i - team < end; i += TEAMS", "i < end; i += TEAMS", "deadlock"),
    Mutant("step 3", SPLIT, "if (ours && vector < VECTORS)", "if (vector < VECTORS)", "foreign slot"),
    Mutant("step 3", SPLIT, "if (ours && vector < VECTORS)", "if (ours)", "foreign slot"),
    Mutant("step 3", SPLIT, "slot ^ flip", "slot", "foreign slot"),
    Mutant("step 3, blocks of 5", SPLIT, "flip ? flip - slot : slot", "slot", "foreign slot"),
    Mutant("step 3, a group of 10", SPLIT, "h < heads);", "true);", "out of bounds"),
    Mutant("step 3", SPLIT, "ours ? exp2f(score - new_top) : 0", "exp2f(score - new_top)", "numerics"),
    Mutant("store_kv", "store_kv.cu", "if (i >= num_tokens * ROW_VECTORS) return;", "", "out of bounds"),
    Mutant("store_kv", "store_kv.cu", "i % ROW_VECTORS;", "0;", "race"),
    Mutant("store_kv", "store_kv.cu", "stored(v[i], v_scale);", "stored(k[i], v_scale);", "numerics"),
    Mutant("copy_slots", "copy_slots.cu", "slots[2 * blockIdx.x + 1]", "slots[2 * blockIdx.x]", "numerics"),
    Mutant("copy_slots", "copy_slots.cu", "blockIdx.y * source_slots", "blockIdx.y * destination_slots",
           "out of bounds"),
    Mutant("copy_slots", "copy_slots.cu", "i += blockDim.x", "i += 2 * blockDim.x", "numerics"),
    # barriers
    Mutant("step 4", STEP_4, "store_rows((float*)ring, rows[0], lane);\n    __syncthreads();",
           "store_rows((float*)ring, rows[0], lane);", "uninitialised read"),
    Mutant("step 4", STEP_4, "        __syncwarp();  // every lane's copies", "        //", "uninitialised read"),
    Mutant("step 4", STEP_4, "    __syncwarp();  // the ring is this warp's own", "    //", "race"),
    Mutant("step 5", STEP_5, "    __syncwarp();\n    unsigned weights", "    unsigned weights", "uninitialised read"),
    Mutant("step 5", STEP_5, "        __syncwarp();  // every lane's copies", "        //", "uninitialised read"),
    Mutant("prefill 0", PREFILL_0, "    __syncwarp();\n\n    // 2.", "\n    // 2.", "uninitialised read"),
    Mutant("prefill 0", PREFILL_0, "        __syncwarp();  // weights and offsets", "        //", "race"),
    Mutant("prefill 0", PREFILL_0, "        __syncwarp();  // all lanes are done", "        //", "race"),
    Mutant("prefill 1", PREFILL_1, "        __syncthreads();  // this tile", "        __syncwarp();  //",
           "uninitialised read"),
    Mutant("prefill 1", PREFILL_1, "        __syncthreads();  // this tile", "        if (active) __syncthreads();  //",
           "divergent barrier"),
    Mutant("prefill 0", PREFILL_0, "if (head >= NUM_HEADS) return;", "if (head >= NUM_HEADS || lane > 30) return;",
           "uninitialised read"),
    # waits
    Mutant("step 4", STEP_4, "copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();", "race"),
    Mutant("step 4", STEP_4, "copy_wait<STAGES - 2>();", "", "race"),
    Mutant("step 5", STEP_5, "copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();", "race"),
    Mutant("prefill 1", PREFILL_1, "        copy_wait<0>();\n", "        copy_wait<1>();\n", "race"),
    Mutant("step 4", STEP_4, "        copy_commit();  // an empty group", "        if (tile < end) copy_commit();  //",
           "race"),
    Mutant("step 4", STEP_4, "stage == 0 ? STAGES - 1 : stage - 1);\n        const", "stage);\n        const", "race"),
    # guards and tails
    Mutant("step 4", TILES, "FULL ? 16 : (present >> row & 1) * 16", "16", "foreign slot"),
    Mutant("step 4", TILES, "flip ? 0xffffu << gap : 0xffffu >> gap", "0xffffu >> gap", "foreign slot"),
    Mutant("step 4", TILES, "max(TOKENS - tokens, 0)", "max(TOKENS - 1 - tokens, 0)", "foreign slot"),
    Mutant("step 4", STEP_4, "tiles = (s.length + TOKENS - 1) / TOKENS", "tiles = s.length / TOKENS", "numerics"),
    Mutant("step 4, two splits", STEP_4, "begin + share, tiles)", "begin + share, tiles + 1)", "out of bounds"),
    Mutant("step 4, two splits", STEP_4, "        if (num_splits > 1 && threadIdx.x < heads)", "        if (false)",
           "numerics"),
    Mutant("prefill 1", PREFILL_1, "tokens > 0 ? tile_offset(s, tile * PARTS + part) : 0",
           "tile_offset(s, tile * PARTS + part)", "out of bounds"),
    Mutant("prefill 1", PREFILL_1, "row < work.rows\n", "row < work.rows + 1\n", "out of bounds"),
    Mutant("prefill 0", PREFILL_0, "if (position < visible) {", "if (position <= visible) {", "foreign slot"),
    Mutant("prefill 0", PREFILL_0, "if (lane + 32 * i < HEAD_DIM) out", "out", "race"),
    Mutant("prefill 0", PREFILL_0, "min(32, visible - first)", "32", "uninitialised read"),
    Mutant("prefill 0", PREFILL_0, "if (head >= NUM_HEADS) return;", "", "foreign slot"),
    # indices
    Mutant("step 4, two tiles a block", TILES, "if (s.flip) inside = TILES - 1 - inside;", "", "foreign slot"),
    Mutant("step 4, two tiles a block", TILES, "s.table[tile / TILES]", "s.table[tile / TILES + 1]", "foreign slot"),
    Mutant("step 4", STEP_4, "float* one = ring + head * MERGE_STRIDE", "float* one = ring + (head + 1) * MERGE_STRIDE",
           "numerics"),
    Mutant("step 4", STEP_4, "row = seq * NUM_HEADS + kv_head * GROUP",
           "row = seq * NUM_HEADS + (kv_head ^ 1) * GROUP", "numerics"),
    Mutant("step 4", TILES, "return (place<ROW_PIECES>(row, across ? high : low) ^ (16 * pair)) * 2",
           "return (place<ROW_PIECES>(row, across ? high : low) + 16 * pair) * 2", "uninitialised read"),
    Mutant("prefill 0", PREFILL_0, "flip ? BLOCK_SIZE - 1 - inside : inside", "flip ? BLOCK_SIZE - inside : inside",
           "foreign slot"),
    Mutant("prefill 0", PREFILL_0, "head / GROUP) * HEAD_DIM", "head % GROUP) * HEAD_DIM", "foreign slot"),
    Mutant("prefill 0", PREFILL_0, "(slot * NUM_KV_HEADS + head / GROUP)", "(slot * NUM_HEADS + head / GROUP)",
           "out of bounds"),
    Mutant("step 5", STEP_5, "line.begin(worker + 1)", "line.begin(worker + 1) - 1", "numerics"),
    Mutant("step 5", STEP_5, "if (lane >= step) sum += left;", "sum += left;", "foreign slot"),
    Mutant("step 5", STEP_5, "first ? 0 : 1)", "0)", "numerics"),
    # masks and causality
    Mutant("step 4", STEP_4, "(token ^ s.flip) >= tokens", "token >= tokens", "numerics"),
    Mutant("step 4", STEP_4, "(token ^ s.flip) >= tokens", "(token ^ s.flip) > tokens", "numerics"),
    Mutant("step 5", STEP_5, "((lane / 4 + 8 * half) ^ flip) >= tokens", "(lane / 4 + 8 * half) >= tokens", "numerics"),
    Mutant("prefill 1", PREFILL_1, "> position(2 * m + half)", ">= position(2 * m + half)", "numerics"),
    Mutant("prefill 1", PREFILL_1, "(token ^ s.flip) > position", "token > position", "numerics"),
    Mutant("prefill 1", PREFILL_1, "last_row / GROUP + 1,", "last_row / GROUP + 2,", "foreign slot"),
    Mutant("prefill 0", PREFILL_0, "query_starts[seq + 1] - 1 - token", "query_starts[seq + 1] - 2 - token",
           "foreign slot"),
    # operands and arithmetic
    Mutant("step 4", ROWS, "q[i * ROW_TILES + m], k[i] + 2)", "q[i * ROW_TILES + m], k[i])", "numerics"),
    Mutant("step 4", ROWS, "load_operands<true, true,", "load_operands<true, false,", "numerics"),
    Mutant("step 4", ROWS, "corner<PIECES>(step / LOADED, lane, false)", "corner<PIECES>(step / LOADED, lane, true)",
           "numerics"),
    Mutant("step 5", STEP_5, "load_matrices_trans(weights", "load_matrices(weights", "numerics"),
    Mutant("step 5", STEP_5, "multiply_add(c.out[step + i][column], v[i], weights + 2 * column)",
           "multiply_add(c.out[step + i][column], weights, v[i])", "numerics"),
    Mutant("step 4, steep scores", ROWS, "    rows.sum[2 * h] *= correction;\n", "", "numerics"),
    Mutant("step 4, steep scores", ROWS, "(rows.max[h] - top) * scale", "(top - rows.max[h]) * scale", "numerics"),
    Mutant("step 4, steep scores", ROWS, "SLACK = 8;", "SLACK = 800;", "numerics"),
    Mutant("step 4", ROWS, "top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));", "", "numerics"),
    Mutant("step 4", STEP_4, "value / sum);\n        } else", "value);\n        } else", "numerics"),
    Mutant("step 4, two splits", "merge.cuh", "total += weight;", "total = weight;", "numerics"),
    Mutant("step 4, two splits", "merge.cuh", "exp2f(logs[i] - top)", "exp2f(logs[0] - top)", "numerics"),
    Mutant("step 5, long", STEP_5, "exp2f(log - new_top)", "exp2f(new_top - log)", "numerics"),
    Mutant("prefill 0", PREFILL_0, "sum = sum * correction + weight;", "sum = sum + weight;", "numerics"),
    Mutant("prefill 0", PREFILL_0, "    sum = warp_sum(sum);\n", "", "numerics"),
]
MUTANTS += [
    # 64-bit slots: beyond 2^32 elements
    Mutant("step 0, far", "paged.cuh", "long long slot = (long long)block_table", "int slot = block_table", "numerics"),
    Mutant("step 3, far", SPLIT, "kv = (((long long)block_tables[", "kv = ((block_tables[", "numerics"),
    Mutant("step 4, far", TILES, "return (long long)s.table", "return s.table", "numerics"),
    Mutant("prefill 0, far", PREFILL_0, "long long slot = (long long)table", "int slot = table", "numerics"),
    Mutant("store_kv, far", "store_kv.cu", "long long to = (long long)slot", "int to = slot", "numerics"),
    Mutant("copy_slots, far", "copy_slots.cu", "long long from", "int from", "numerics"),
    Mutant("copy_slots, far", "copy_slots.cu", "long long to", "int to", "numerics"),
    # directions: any number but 0
    Mutant("step 0", "paged.cuh", "(reversed ?", "(reversed == 1 ?", "foreign slot"),
    Mutant("step 3", SPLIT, "reversed[seq] ?", "reversed[seq] == 1 ?", "foreign slot"),
    Mutant("step 4", STEP_4, "reversed[seq] ?", "reversed[seq] == 1 ?", "foreign slot"),
    Mutant("step 5", STEP_5, "reversed[seq] ?", "reversed[seq] > 0 ?", "foreign slot"),
    Mutant("prefill 0", PREFILL_0, "reversed[seq] != 0", "reversed[seq] == 1", "foreign slot"),
    Mutant("prefill 1", PREFILL_1, "reversed[work.seq] ?", "reversed[work.seq] > 0 ?", "foreign slot"),
    # right answers, slowly, or a little off
    Mutant("step 4, copies", STEP_4, "copy_wait<STAGES - 2>();", "copy_wait<0>();", "copies awaited"),
    Mutant("step 5, copies", STEP_5, "copy_wait<STAGES - 2>();", "copy_wait<0>();", "copies awaited"),
    Mutant("prefill 1, copies", PREFILL_1, "        copy_commit();\n        if (!active)",
           "        copy_commit();\n        copy_wait<0>();\n        if (!active)", "copies awaited"),
    Mutant("step 5, pieces", STEP_5, "workspace[(piece + head) * HEAD_DIM + d] = value;",
           "workspace[(piece + head) * HEAD_DIM + d] = to_float(from_float(value));", "numerics"),
    # the merge of step 5
    Mutant("step 5, long", STEP_5, "worker > first || begins_here", "begins_here", "numerics"),
    Mutant("step 5, long", STEP_5, "(last - some) / MERGE_WARPS + 1", "(last - some) / MERGE_WARPS", "numerics"),
    Mutant("step 5, long", STEP_5, "tops[warp] = top, sums[warp] = sum;\n    __syncthreads();",
           "tops[warp] = top, sums[warp] = sum;", "uninitialised read"),
    Mutant("step 5, long", STEP_5, "if (first == last) return;", "", "numerics"),
    # the fused kernels
    Mutant("rope_store", "rope_store.cu", "if (row >= num_tokens * ROWS) return;", "", "out of bounds"),
    Mutant("rope_store", "rope_store.cu", "if (slot < 0) return;", "", "out of bounds"),
    Mutant("rope_store", "rope_store.cu", "(is_value ? v_cache : k_cache)", "k_cache", "race"),
    Mutant("rope_store", "rope_store.cu", "(head - NUM_HEADS) % NUM_KV_HEADS", "0", "race"),
    Mutant("rope_store, far", "rope_store.cu", "long long slot = slots", "int slot = slots", "numerics"),
    Mutant("rope_store", "rope_store.cu", "left * c - right * s", "left * c + right * s", "numerics"),
    Mutant("rope_store", "rope_store.cu", "d < PAIRS; d += 32", "d < 32; d += 32", "numerics"),
    Mutant("rope_store", "rope_store.cu", "int d = ROTARY + lane", "int d = ROTARY + 32 + lane", "numerics"),
    Mutant("rope_store", "rope_store.cu", "value(d + PAIRS), c", "value(d + HEAD_DIM / 2), c", "numerics"),
    Mutant("rope_store, norms", "rope_store.cu", "is_query ? q_norm : k_norm", "q_norm", "numerics"),
    Mutant("rope_store, norms", "rope_store.cu", "squares / HEAD_DIM + eps", "squares / ROTARY + eps", "numerics"),
    Mutant("rope_store, norms", "rope_store.cu", "HEAD_DIM + eps", "HEAD_DIM", "numerics"),
    Mutant("rope_store, norms", "rope_store.cu", "int other = 16; other", "int other = 8; other", "numerics"),
    Mutant("add_norm", "add_norm.cu", "= squares;\n    __syncthreads();", "= squares;", "uninitialised read"),
    Mutant("add_norm", "add_norm.cu", "w < WARPS; w++", "w < WARPS - 1; w++", "numerics"),
    Mutant("add_norm", "add_norm.cu", "= from_float(to_float(sum[i].values[j]) + to_float(more.values[j]));",
           "= more.values[j];", "numerics"),
    Mutant("add_norm", "add_norm.cu", "((uint4*)residual)[row + piece] = sum[i].bits;", "", "numerics"),
    Mutant("add_norm", "add_norm.cu", "((const uint4*)weight)[piece]", "((const uint4*)weight)[row + piece]",
           "out of bounds"),
    Mutant("add_norm", "add_norm.cu", "total / HIDDEN + eps", "total / HIDDEN", "numerics"),
    Mutant("silu_mul", "silu_mul.cu", "if (i >= num_rows * PIECES) return;", "", "out of bounds"),
    Mutant("silu_mul", "silu_mul.cu", "gate_up[from + PIECES]", "gate_up[from + 1]", "numerics"),
    Mutant("silu_mul", "silu_mul.cu", "exp2f(-x * LOG2_E)", "exp2f(-x)", "numerics"),
    # 32 rows of a warp
    Mutant("prefill 1", PREFILL_1, "position(2 * m + half)", "position(half)", "numerics"),
    Mutant("prefill 1", PREFILL_1, "nullptr : q + element(16 * m + i)", "nullptr : q + element(i)", "numerics"),
    Mutant("prefill 1", PREFILL_1, "warp * ROW_TILES + m) * TILE", "warp * ROW_TILES) * TILE", "numerics"),
    Mutant("prefill 1", PREFILL_1, "gridDim.x - 1 - blockIdx.x", "gridDim.x - blockIdx.x", "foreign slot"),
]
FP8_CUH = "fp8.cuh"
MUTANTS += [
    # an fp8 cache
    Mutant("step 3, fp8", FP8_CUH, "bytes << 7 & 0x3f803f80u", "bytes << 7 & 0x3f003f00u", "numerics"),
    Mutant("step 3, fp8", FP8_CUH, "[1] = odd.x, values[2] = even.y", "[2] = odd.x, values[1] = even.y", "numerics"),
    Mutant("step 3, fp8", SPLIT, "if (vector < VECTORS && ours)", "if (vector < VECTORS)", "foreign slot"),
    Mutant("step 3, fp8", SPLIT, "from_float(x / weights * v_scale)", "from_float(x / weights)", "numerics"),
    Mutant("step 3, fp8, two splits", SPLIT, "[d] = x / weights * v_scale;", "[d] = x / weights;", "numerics"),
    Mutant("step 5, fp8", FP8_CUH, "(bytes & 0x80008000u)", "(bytes & 0x8000u)", "numerics"),
    Mutant("step 5, fp8", TILES, "operands[i][ACROSS ? 2 : 1]", "operands[i][1]", "numerics"),
    Mutant("step 5, fp8", TILES, "even = (first & 0xffff) | second << 16", "even = first", "numerics"),
    Mutant("step 5, fp8", STEP_5, "FP8 ? lane / 4 * 2 + half : ", "", "numerics"),
    Mutant("step 5, fp8", STEP_5, "for_each_value(c, heads, lane, factor,", "for_each_value(c, heads, lane, 1,",
           "numerics"),
    Mutant("prefill 0, fp8", PREFILL_0, "total[i] / sum * v_scale", "total[i] / sum", "numerics"),
    Mutant("prefill 0, fp8", FP8_CUH, "to_floats(even_halves(byte)).x", "to_floats(even_halves(byte)).y", "numerics"),
    Mutant("prefill 1, fp8", TILES, "bytes[ACROSS ? 2 * i : i]", "bytes[2 * i]", "numerics"),
    Mutant("prefill 1, fp8", ROWS, "sort_dims(high.x, high.y", "sort_dims(high.y, high.x", "numerics"),
    Mutant("prefill 1, fp8", ROWS, "i % STEPS * 2 + 1)) = odd", "i % STEPS * 2)) = odd", "uninitialised read"),
    Mutant("prefill 1, fp8", PREFILL_1, "pack(even[1] * scale, odd[1]", "pack(odd[1] * scale, even[1]", "numerics"),
    Mutant("prefill 1, fp8", PREFILL_1, "factor / rows.sum", "1 / rows.sum", "numerics"),
    Mutant("store_kv, fp8", "store_kv.cu", "to_float(values[i]) / scale", "to_float(values[i]) * scale", "numerics"),
    Mutant("store_kv, fp8", "store_kv.cu", "stored(v[i], v_scale)", "stored(v[i], k_scale)", "numerics"),
    Mutant("store_kv, fp8", FP8_CUH, "(exponent + 20) << 23", "(exponent + 21) << 23", "numerics"),
    Mutant("store_kv, fp8", FP8_CUH, "fminf(fabsf(x), 448.0f)", "fabsf(x)", "numerics"),
    Mutant("rope_store, fp8", "rope_store.cu", "is_value ? v_scale : k_scale", "k_scale", "numerics"),
]
EQUIVALENT = [  # survivors: (mutant, why no check could flag it)
    (Mutant("step 3, two splits", SPLIT, "min((split + 1) * share, blocks)", "(split + 1) * share", "nothing"),
     "slots past the context are not `ours` anyway: a few empty rounds"),
    (Mutant("step 3, two splits", SPLIT, "if (d == 0)\n", "if (d == 1)\n", "nothing"),
     "any one thread of the row may write the piece's log"),
    (Mutant("step 4, D = 256", ROWS, "        __syncwarp();\n        queries.tile", "        queries.tile", "nothing"),
     "the loop's own __syncwarp comes before the first read of the queries"),
    (Mutant("step 5", STEP_5, "if (i < end) {", "if (i <= end) {", "nothing"),
     "loads one tile more than is read: traffic, no error"),
    (Mutant("prefill 1", PREFILL_1, "if (work.first_row >= work.rows) return;", "", "nothing"),
     "a block without rows then loads keys, and stores nothing"),
    (Mutant("step 4", STEP_4, "kv_head = blockIdx.x / HEAD_TILES", "kv_head = blockIdx.x / HEAD_TILES ^ 1", "nothing"),
     "two blocks swap their KV heads, keys, queries and outputs alike"),
]


def outcome(mutant: Mutant) -> str:
    """What saw the defect: a check of the emulator, "copies awaited", "numerics", or "nothing".

    Raises:
        LookupError: the file no longer holds the text that the defect replaces, or holds it twice.
    """
    text = (FOLDER / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise LookupError(f"{mutant.file} holds {text.count(mutant.old)} times, not once: {mutant.old!r}")
    try:
        RUNS[mutant.run](Emulator(sources={mutant.file: text.replace(mutant.old, mutant.new)}))
    except KernelFault as fault:
        return fault.what
    except CopiesAwaited:
        return "copies awaited"
    except AssertionError:
        return "numerics"
    return "nothing"

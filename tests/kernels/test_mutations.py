"""Proof that the checks bite: seeded defects in the kernels, each with the check that must flag it.

A mutant is one replacement in one file. It runs on small ragged batches, in both directions, on the checked emulator,
and against float64. "numerics" means that only the comparison with float64 saw it. A defect that neither sees is
either equivalent, and listed below with the reason, or a hole in the checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from kernels import test_tensor_cores as tensor_cores
from kernels.test_tensor_cores import Batch, Heads

from kernels_cupy.device import FOLDER
from kernels_cupy.emulator import Emulator, KernelFault

HALF = torch.float16
SMALL, WIDE = Heads(8, 2, 64, 16, HALF), Heads(4, 2, 256, 16, HALF)
TILES_OF_A_BLOCK, PLAIN = Heads(8, 2, 64, 32, HALF), Heads(6, 2, 80, 5, torch.float32)
LENGTHS, DIRECTIONS = [1, 15, 16, 17, 100, 170], [False, True, True, False, False, True]


def _decode(heads: Heads) -> Batch:
    return Batch.draw(np.random.default_rng(5), heads, [1] * len(LENGTHS), LENGTHS, DIRECTIONS)


def _prefill(heads: Heads) -> Batch:
    return Batch.draw(np.random.default_rng(5), heads, [1, 7, 16, 1, 70, 110], LENGTHS, DIRECTIONS)


RUNS: dict[str, Callable[[Emulator], tuple[Batch, torch.Tensor]]] = {}


def run(name: str) -> Callable[[Callable[[Emulator], tuple[Batch, torch.Tensor]]], None]:
    """Names a way to run a kernel."""
    return lambda function: RUNS.__setitem__(name, function)


@run("step 4")
def _(device: Emulator) -> tuple[Batch, torch.Tensor]:
    batch = _decode(SMALL)
    return batch, tensor_cores.decode_4(batch, 1, device)


@run("step 4, two splits")
def _(device: Emulator) -> tuple[Batch, torch.Tensor]:
    batch = _decode(SMALL)
    return batch, tensor_cores.decode_4(batch, 2, device)


@run("step 4, two tiles a block")
def _(device: Emulator) -> tuple[Batch, torch.Tensor]:
    batch = _decode(TILES_OF_A_BLOCK)
    return batch, tensor_cores.decode_4(batch, 1, device)


@run("step 4, D = 256")
def _(device: Emulator) -> tuple[Batch, torch.Tensor]:
    batch = _decode(WIDE)
    return batch, tensor_cores.decode_4(batch, 1, device)


@run("step 5")
def _(device: Emulator) -> tuple[Batch, torch.Tensor]:
    batch = _decode(SMALL)
    return batch, tensor_cores.decode_5(batch, 1, device)


@run("prefill 0")
def _(device: Emulator) -> tuple[Batch, torch.Tensor]:
    batch = _prefill(PLAIN)
    return batch, tensor_cores.prefill(batch, device)


@run("prefill 1")
def _(device: Emulator) -> tuple[Batch, torch.Tensor]:
    batch = _prefill(SMALL)
    return batch, tensor_cores.prefill(batch, device)


@dataclass(frozen=True)
class Mutant:
    """A defect: in `file`, `old` (which stands there once) becomes `new`; `flagged` names the check that sees it."""

    run: str
    file: str
    old: str
    new: str
    flagged: str


STEP_4, STEP_5, TILES, ROWS = tensor_cores.STEP_4, tensor_cores.STEP_5, "tiles.cuh", "query_rows.cuh"
PREFILL_0, PREFILL_1 = "prefill_attention_0_plain.cu", "prefill_attention_1_tensor_cores.cu"
MUTANTS = [
    # barriers
    Mutant("step 4", STEP_4, "store_rows((float*)ring, rows, lane);\n    __syncthreads();",
           "store_rows((float*)ring, rows, lane);", "uninitialised read"),
    Mutant("step 4", STEP_4, "        __syncwarp();  // every lane's copies", "        //", "uninitialised read"),
    Mutant("step 4", STEP_4, "    __syncwarp();  // the ring is this warp's own", "    //", "race"),
    Mutant("step 5", STEP_5, "    __syncwarp();\n    unsigned weights", "    unsigned weights", "uninitialised read"),
    Mutant("step 5", STEP_5, "        __syncwarp();  // every lane's copies", "        //", "uninitialised read"),
    Mutant("prefill 0", PREFILL_0, "    __syncwarp();\n\n    // 2.", "\n    // 2.", "uninitialised read"),
    Mutant("prefill 0", PREFILL_0, "        __syncwarp();  // weights and offsets", "        //", "race"),
    Mutant("prefill 0", PREFILL_0, "        __syncwarp();  // all lanes are done", "        //", "race"),
    Mutant("prefill 1", PREFILL_1, "        __syncthreads();  // this tile", "        __syncwarp();  //", "uninitialised read"),
    Mutant("prefill 1", PREFILL_1, "        __syncthreads();  // this tile", "        if (active) __syncthreads();  //",
           "divergent barrier"),
    Mutant("prefill 0", PREFILL_0, "if (head >= NUM_HEADS) return;", "if (head >= NUM_HEADS || lane > 30) return;",
           "uninitialised read"),
    # waits
    Mutant("step 4", STEP_4, "copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();", "race"),
    Mutant("step 4", STEP_4, "copy_wait<STAGES - 2>();", "", "race"),
    Mutant("step 5", STEP_5, "copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();", "race"),
    Mutant("prefill 1", PREFILL_1, "        copy_wait<0>();\n", "        copy_wait<1>();\n", "race"),
    Mutant("step 4", STEP_4, "        copy_commit();  // an empty group", "        if (tile < end) copy_commit();  //", "race"),
    Mutant("step 4", STEP_4, "stage == 0 ? STAGES - 1 : stage - 1);\n        const", "stage);\n        const", "race"),
    # guards and tails
    Mutant("step 4", TILES, "full || (row ^ flip) < tokens ? 16 : 0", "16", "foreign slot"),
    Mutant("step 4", TILES, "(row ^ flip) < tokens ? 16", "row < tokens ? 16", "foreign slot"),
    Mutant("step 4", TILES, "(row ^ flip) < tokens ? 16", "(row ^ flip) <= tokens ? 16", "foreign slot"),
    Mutant("step 4", STEP_4, "tiles = (s.length + TOKENS - 1) / TOKENS", "tiles = s.length / TOKENS", "numerics"),
    Mutant("step 4, two splits", STEP_4, "begin + share, tiles)", "begin + share, tiles + 1)", "out of bounds"),
    Mutant("step 4, two splits", STEP_4, "        if (num_splits > 1 && threadIdx.x < heads)", "        if (false)", "numerics"),
    Mutant("prefill 1", PREFILL_1, "tokens > 0 ? tile_offset(s, tile * PARTS + part) : 0",
           "tile_offset(s, tile * PARTS + part)", "out of bounds"),
    Mutant("prefill 1", PREFILL_1, "row < work.rows\n", "row < work.rows + 1\n", "race"),
    Mutant("prefill 0", PREFILL_0, "if (position < visible) {", "if (position <= visible) {", "foreign slot"),
    Mutant("prefill 0", PREFILL_0, "if (lane + 32 * i < HEAD_DIM) out", "out", "race"),
    Mutant("prefill 0", PREFILL_0, "min(32, visible - first)", "32", "uninitialised read"),
    Mutant("prefill 0", PREFILL_0, "if (head >= NUM_HEADS) return;", "", "foreign slot"),
    # indices
    Mutant("step 4, two tiles a block", TILES, "if (s.flip) inside = TILES - 1 - inside;", "", "foreign slot"),
    Mutant("step 4, two tiles a block", TILES, "s.table[tile / TILES]", "s.table[tile / TILES + 1]", "foreign slot"),
    Mutant("step 4", STEP_4, "float* one = ring + head * MERGE_STRIDE", "float* one = ring + (head + 1) * MERGE_STRIDE",
           "numerics"),
    Mutant("step 4", STEP_4, "row = seq * NUM_HEADS + kv_head * GROUP", "row = seq * NUM_HEADS + (kv_head ^ 1) * GROUP", "numerics"),
    Mutant("step 4", TILES, "return tile + (place(row, across ? high : low) ^ (16 * step))",
           "return tile + place(row, across ? high : low) + 16 * step", "uninitialised read"),
    Mutant("prefill 0", PREFILL_0, "flip ? BLOCK_SIZE - 1 - inside : inside", "flip ? BLOCK_SIZE - inside : inside", "foreign slot"),
    Mutant("prefill 0", PREFILL_0, "head / GROUP) * HEAD_DIM", "head % GROUP) * HEAD_DIM", "foreign slot"),
    Mutant("prefill 0", PREFILL_0, "(slot * NUM_KV_HEADS + head / GROUP)", "(slot * NUM_HEADS + head / GROUP)", "out of bounds"),
    Mutant("step 5", STEP_5, "line.begin(worker + 1)", "line.begin(worker + 1) - 1", "numerics"),
    Mutant("step 5", STEP_5, "if (lane >= step) sum += left;", "sum += left;", "foreign slot"),
    Mutant("step 5", STEP_5, "first ? 0 : 1)", "0)", "numerics"),
    # masks and causality
    Mutant("step 4", STEP_4, "(token ^ s.flip) >= tokens", "token >= tokens", "numerics"),
    Mutant("step 4", STEP_4, "(token ^ s.flip) >= tokens", "(token ^ s.flip) > tokens", "numerics"),
    Mutant("step 5", STEP_5, "((lane / 4 + 8 * half) ^ flip) >= tokens", "(lane / 4 + 8 * half) >= tokens", "numerics"),
    Mutant("prefill 1", PREFILL_1, "> position[half]", ">= position[half]", "numerics"),
    Mutant("prefill 1", PREFILL_1, "(token ^ s.flip) > position", "token > position", "numerics"),
    Mutant("prefill 1", PREFILL_1, "last_row / GROUP + 1,", "last_row / GROUP + 2,", "foreign slot"),
    Mutant("prefill 0", PREFILL_0, "query_starts[seq + 1] - 1 - token", "query_starts[seq + 1] - 2 - token", "foreign slot"),
    # operands and arithmetic
    Mutant("step 4", ROWS, "queries.fragment[step] : q, k + 2", "queries.fragment[step] : q, k", "numerics"),
    Mutant("step 4", ROWS, "load_matrices_trans(v,", "load_matrices(v,", "numerics"),
    Mutant("step 4", ROWS, "corner(k_tiles + part * TILE, step, lane, false)",
           "corner(k_tiles + part * TILE, step, lane, true)", "numerics"),
    Mutant("step 5", STEP_5, "load_matrices_trans(weights", "load_matrices(weights", "numerics"),
    Mutant("step 5", STEP_5, "multiply_add(c.out[step][column], v, weights + 2 * column)",
           "multiply_add(c.out[step][column], weights, v)", "numerics"),
    Mutant("step 4", ROWS, "    rows.sum[2 * h] *= correction;\n", "", "numerics"),
    Mutant("step 4", ROWS, "top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));", "", "numerics"),
    Mutant("step 4", STEP_4, "value / sum);\n        } else", "value);\n        } else", "numerics"),
    Mutant("step 4, two splits", "merge.cuh", "total += weight;", "total = weight;", "numerics"),
    Mutant("step 4, two splits", "merge.cuh", "exp2f(logs[i] - top)", "exp2f(logs[0] - top)", "numerics"),
    Mutant("step 5", STEP_5, "exp2f(logs[piece] - top)", "exp2f(top - logs[piece])", "numerics"),
    Mutant("prefill 0", PREFILL_0, "sum = sum * correction + weight;", "sum = sum + weight;", "numerics"),
    Mutant("prefill 0", PREFILL_0, "    sum = warp_sum(sum);\n", "", "numerics"),
]
EQUIVALENT = [  # survivors: (mutant, why no check could flag it)
    (Mutant("step 4, D = 256", ROWS, "        __syncwarp();\n        queries.tile", "        queries.tile", "nothing"),
     "the loop's own __syncwarp comes before the first read of the queries"),
    (Mutant("step 5", STEP_5, "if (i < end) {", "if (i <= end) {", "nothing"),
     "loads one tile more than is read: traffic, no error"),
    (Mutant("prefill 1", PREFILL_1, "if (work.first_row >= work.rows) return;", "", "nothing"),
     "a block without rows then loads keys, and stores nothing"),
    (Mutant("step 4", STEP_4, "kv_head = blockIdx.x / HEAD_TILES", "kv_head = blockIdx.x / HEAD_TILES ^ 1", "nothing"),
     "two blocks swap their KV heads, keys, queries and outputs alike"),
]


def outcome(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> str:
    """What saw the defect: a check of the emulator, "numerics", or "nothing"."""
    text = (FOLDER / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} no longer holds once: {mutant.old!r}"
    sources = {mutant.file: text.replace(mutant.old, mutant.new)}
    monkeypatch.setattr(tensor_cores, "Emulator", lambda: Emulator(sources=sources))  # for second launches
    try:
        batch, out = RUNS[mutant.run](Emulator(sources=sources))
    except KernelFault as fault:
        assert fault.location is not None
        return fault.what
    try:
        batch.check(out)
    except AssertionError:
        return "numerics"
    return "nothing"


@pytest.mark.parametrize("name", RUNS)
def test_without_a_defect_nothing_is_flagged(name: str) -> None:
    batch, out = RUNS[name](Emulator())
    batch.check(out)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.run}: {m.old.strip()[:40]} -> {m.new.strip()[:40]}")
def test_a_defect_is_flagged(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(mutant, monkeypatch) == mutant.flagged


@pytest.mark.parametrize(("mutant", "reason"), EQUIVALENT, ids=lambda value: value if isinstance(value, str) else "")
def test_a_survivor_is_equivalent(mutant: Mutant, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(mutant, monkeypatch) == "nothing", reason

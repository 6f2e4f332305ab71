"""What the lanes of a warp do together: shuffles, votes, barriers of a warp, ldmatrix and mma.

A matrix fragment is spread over a warp: with group = lane / 4 and pair = lane % 4 * 2, a register of two 16-bit values
holds row `group`, columns `pair` and `pair + 1` of an 8 x 8 matrix. So a warp's register, read lane after lane, is that
matrix row after row. Lanes that a `.sync` names and that are elsewhere are an error, as is an exchange with one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from kernels_cupy.proof.ptx.arithmetic import Array, from_bfloat16
from kernels_cupy.proof.ptx.memory import WARP, Violation
from kernels_cupy.proof.ptx.operands import Operands
from kernels_cupy.proof.ptx.parser import Instruction, PtxError
from kernels_cupy.proof.ptx.state import Fetch, Put, State, Step, Threads

LANES = np.arange(WARP)
LANE_BITS = np.uint32(1) << LANES.astype(np.uint32)
EVERY = np.uint32(0xFFFF_FFFF)


def warp_step(decoder: Operands, one: Instruction) -> Step | None:
    """The step of an instruction of whole warps; None if it is none."""
    opcode = one.opcode
    if opcode.startswith("shfl.sync."):
        return _shuffle(decoder, one)
    if opcode.startswith("vote.sync."):
        return _vote(decoder, one)
    if opcode.startswith("ldmatrix."):
        return _load_matrices(decoder, one)
    if opcode.startswith("mma."):
        return _multiply(decoder, one)
    if opcode == "bar.warp.sync":
        members = decoder.fetch(one.operands[0], "b32")
        return lambda state, threads: _meet(state, threads, members(state))
    if opcode == "activemask.b32":
        put = decoder.store(one.operands[0], "b32")
        return lambda state, threads: put(state, np.repeat(_bits(threads.matrix()), WARP), threads)
    return None


def _bits(matrix: Array) -> Array:
    """[warps] uint32 of [warps, 32] booleans."""
    bits: Array = np.where(matrix, LANE_BITS, np.uint32(0)).sum(axis=1, dtype=np.uint32)
    return bits


def _meet(state: State, threads: Threads, members: Array) -> None:
    """Checks that all lanes a warp instruction names are here, and no other.

    Raises:
        Violation: "divergent collective", at a thread that waits in vain, or that is not named.
    """
    whole = (members == EVERY).all()
    if threads.mask is None and whole:
        return
    named = np.repeat(np.broadcast_to(members, (state.num_threads,))[threads.lanes, None], WARP, axis=1)
    named = (named >> LANES.astype(np.uint32)) & np.uint32(1) != 0
    here, alive = threads.matrix(), state.alive().reshape(-1, WARP)
    warps = threads.lanes // WARP
    missing = (named & ~here[warps] & alive[warps]).any(axis=1)
    stranger = ~named[np.arange(len(warps)), threads.lanes % WARP]
    if (missing | stranger).any():
        at = int(np.flatnonzero(missing | stranger)[0])
        absent = np.flatnonzero(named[at] & ~here[warps[at]] & alive[warps[at]]).tolist()
        message = f"waits for lanes {absent}, which are elsewhere" if absent else "is not named by its own mask"
        raise Violation("divergent collective", message, int(threads.lanes[at]))


def _shuffle(decoder: Operands, one: Instruction) -> Step:
    mode = one.opcode.removeprefix("shfl.sync.")
    if mode not in ("up.b32", "down.b32", "bfly.b32", "idx.b32") or len(one.operands) not in (5, 6):
        raise PtxError(f"unknown instruction {one.opcode}")
    mode = mode.removesuffix(".b32")
    *destinations, source, by, bounds, members = one.operands
    put = decoder.store(destinations[0], "b32")
    put_valid = decoder.store(destinations[1], "pred") if len(destinations) == 2 else None
    gets = [decoder.fetch(operand, "b32") for operand in (source, by, bounds, members)]

    def shuffle(state: State, threads: Threads) -> None:
        value, distance, clamp, named = (get(state) for get in gets)
        _meet(state, threads, named)
        value = np.broadcast_to(value, (state.num_threads,)).reshape(-1, WARP)
        if len(distance) == len(clamp) == 1:
            lanes, valid = _same_partners(mode, int(distance[0]), int(clamp[0]))
            lanes, valid, taken = np.broadcast_to(lanes, value.shape), np.tile(valid, len(value)), value[:, lanes]
        else:
            distance, clamp = (np.broadcast_to(each, (state.num_threads,)).reshape(-1, WARP).astype(np.int64)
                               for each in (distance, clamp))
            lanes, valid = _partners(mode, distance, clamp)
            taken = np.take_along_axis(value, lanes, axis=1)
        if threads.mask is not None:
            here = threads.matrix()
            lost = here & ~np.take_along_axis(here, lanes, axis=1)
            if lost.any():
                at = int(np.flatnonzero(lost)[0])
                raise Violation("undefined shuffle", f"takes a value from lane {int(lanes.flat[at])}, which is not "
                                "here", at)
        put(state, taken.reshape(-1), threads)
        if put_valid is not None:
            put_valid(state, valid.reshape(-1), threads)

    return shuffle


@lru_cache(maxsize=256)
def _same_partners(mode: str, distance: int, clamp: int) -> tuple[Array, Array]:
    """[32]: as `_partners` where all lanes bring the same numbers."""
    lanes, valid = _partners(mode, np.array([distance]), np.array([clamp]))
    return lanes, valid


def _partners(mode: str, distance: Array, clamp: Array) -> tuple[Array, Array]:
    """[..., 32]: the lane each lane reads, and whether it lies in its segment; if not it reads itself."""
    distance, segment, bound = distance & 31, clamp >> 8 & 31, clamp & 31
    lowest, highest = LANES & segment, (LANES & segment) | (bound & ~segment)
    if mode == "up":
        lanes = LANES - distance
        valid = lanes >= highest  # for up, the bound is the lowest lane of the segment
    elif mode == "down":
        lanes = LANES + distance
        valid = lanes <= highest
    elif mode == "bfly":
        lanes = LANES ^ distance
        valid = lanes <= highest
    else:
        lanes = lowest | (distance & ~segment)
        valid = lanes <= highest
    return np.where(valid, lanes, LANES), valid


def _vote(decoder: Operands, one: Instruction) -> Step:
    mode = one.opcode.removeprefix("vote.sync.")
    tests: dict[str, Callable[[Array, Array], Any]] = {
        "any.pred": lambda yes, here: (yes & here).any(axis=1), "all.pred": lambda yes, here: (yes | ~here).all(axis=1),
        "uni.pred": lambda yes, here: (yes | ~here).all(axis=1) | ~(yes & here).any(axis=1),
        "ballot.b32": lambda yes, here: _bits(yes & here)}
    if mode not in tests or len(one.operands) != 3:
        raise PtxError(f"unknown instruction {one.opcode}")
    put, test = decoder.store(one.operands[0], mode.split(".")[1]), tests[mode]
    get, get_members = decoder.fetch(one.operands[1], "pred"), decoder.fetch(one.operands[2], "b32")

    def vote(state: State, threads: Threads) -> None:
        _meet(state, threads, get_members(state))
        yes = np.broadcast_to(get(state), (state.num_threads,)).reshape(-1, WARP)
        put(state, np.repeat(test(yes, threads.matrix()), WARP), threads)

    return vote


# ----- matrices


def _whole_warps(threads: Threads) -> Array:
    """[warps] numbers of those that are here. `.aligned` instructions take whole warps only."""
    here = threads.matrix()
    some, all_ = here.any(axis=1), here.all(axis=1)
    if (some != all_).any():
        warp = int(np.flatnonzero(some != all_)[0])
        lane = int(np.flatnonzero(here[warp])[0])
        raise Violation("divergent collective", "is here without all lanes of its warp", warp * WARP + lane)
    return np.flatnonzero(some)


def _of_warps(value: Array, warps: Array, num_threads: int) -> Array:
    """[warps, 32] of a register."""
    return np.broadcast_to(value, (num_threads,)).reshape(-1, WARP)[warps]


def _put_warps(state: State, threads: Threads, put: Put, warps: Array,
               values: Array) -> None:
    if threads.mask is None:
        put(state, values.reshape(-1), threads)
        return
    whole = np.zeros((state.num_threads // WARP, WARP), values.dtype)
    whole[warps] = values
    put(state, whole.reshape(-1), threads)


def _load_matrices(decoder: Operands, one: Instruction) -> Step:
    match = re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(::cta)?\.b16", one.opcode)
    if match is None:
        raise PtxError(f"unknown instruction {one.opcode}")
    count, transposed = int(match[1]), bool(match[2])
    puts = [decoder.store(operand, "b32") for operand in decoder.vector(one.operands[0])]
    get = decoder.address(one.operands[1])
    if len(puts) != count:
        raise PtxError(f"{len(puts)} registers for {count} matrices")

    def load(state: State, threads: Threads) -> None:
        warps = _whole_warps(threads)
        addresses = _of_warps(get(state), warps, state.num_threads)[:, :8 * count]
        lanes = (warps[:, None] * WARP + LANES[:8 * count]).reshape(-1)
        try:
            rows = state.memories["shared"].load(addresses.reshape(-1), state.block_of[lanes], 2, 8)
        except Violation as violation:
            violation.at = int(lanes[violation.at])
            raise
        state.count_request(one, "shared", "load", addresses.reshape(-1), lanes, 16)
        matrices = rows.reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        registers = matrices.view(np.uint32).reshape(-1, count, WARP)
        for i, put in enumerate(puts):
            _put_warps(state, threads, put, warps, registers[:, i])

    return load


def _multiply(decoder: Operands, one: Instruction) -> Step:
    match = re.fullmatch(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(f16|bf16)\.\2\.f32", one.opcode)
    if match is None:
        raise PtxError(f"unknown instruction {one.opcode}")
    halves, values = int(match[1]) // 8, _half if match[2] == "f16" else _bfloat
    d, a, b, c = (decoder.vector(operand) for operand in one.operands)
    if (len(d), len(a), len(b), len(c)) != (4, 2 * halves, halves, 4):
        raise PtxError(f"wrong number of registers for {one.opcode}")
    puts = [decoder.store(operand, "f32") for operand in d]
    gets_a, gets_b = ([decoder.fetch(operand, "b32") for operand in part] for part in (a, b))
    gets_c = [decoder.fetch(operand, "f32") for operand in c]

    def multiply(state: State, threads: Threads) -> None:
        warps = _whole_warps(threads)
        left = np.empty((len(warps), 16, 8 * halves), np.float32)
        right = np.empty((len(warps), 8, 8 * halves), np.float32)  # transposed: its rows are columns of B
        for i, get in enumerate(gets_a):
            left[:, i % 2 * 8:i % 2 * 8 + 8, i // 2 * 8:i // 2 * 8 + 8] = _matrix(state, get, warps, values)
        for i, get in enumerate(gets_b):
            right[:, :, 8 * i:8 * i + 8] = _matrix(state, get, warps, values)
        product = (left @ right.swapaxes(1, 2)).reshape(-1, 2, WARP, 2)  # upper and lower rows, lanes, pairs
        sums = [product[:, i // 2, :, i % 2] + _of_warps(get(state), warps, state.num_threads)
                for i, get in enumerate(gets_c)]
        for put, total in zip(puts, sums, strict=True):
            _put_warps(state, threads, put, warps, total)

    return multiply


def _matrix(state: State, get: Fetch, warps: Array, values: Callable[[Array], Array]) -> Array:
    """[warps, 8, 8] float32 of a register of pairs."""
    return values(np.ascontiguousarray(_of_warps(get(state), warps, state.num_threads))).reshape(-1, 8, 8)


def _half(registers: Array) -> Array:
    return registers.view(np.float16).astype(np.float32)


def _bfloat(registers: Array) -> Array:
    return from_bfloat16(registers.view(np.uint16))

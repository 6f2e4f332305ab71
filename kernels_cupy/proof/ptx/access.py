"""Loads, stores and asynchronous copies: instructions that touch memory, and the traffic they are counted with.

A cp.async lands as late as the program allows, when its thread waits for it; until then its bytes count as "under way",
and loading one is an error. Sectors are counted for every global request of a warp, each 32 bytes once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from kernels_cupy.proof.ptx.arithmetic import DTYPES, Array
from kernels_cupy.proof.ptx.memory import UNDER_WAY, Memory, Violation
from kernels_cupy.proof.ptx.operands import Operands
from kernels_cupy.proof.ptx.parser import Address, Immediate, Instruction, PtxError, Symbol
from kernels_cupy.proof.ptx.state import PendingCopy, State, Step, Threads

_T = TypeVar("_T")
SPACES = ("global", "shared", "local", "const", "param")
# They say how caches are used, or how strong an access is among others; here every access is done at once.
_HINTS = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "volatile", "weak", "relaxed", "cta", "gpu", "sys"}


def memory_step(decoder: Operands, one: Instruction) -> Step | None:
    """The step of an instruction that touches memory; None if it does not."""
    root, *parts = one.opcode.split(".")
    if root == "cp" and parts[:1] == ["async"]:
        return _copy_step(decoder, one, parts[1:])
    if root not in ("ld", "st"):
        return None
    space = next((part for part in parts if part in SPACES), None)
    if space is None:
        raise PtxError(f"unknown instruction {one.opcode}: generic addresses are not known, only those of a space")
    kind, count = parts[-1], next((int(part[1:]) for part in parts if part in ("v2", "v4")), 1)
    if kind not in DTYPES or set(parts) - _HINTS - {space, kind, f"v{count}"}:
        raise PtxError(f"unknown instruction {one.opcode}")
    if root == "st":
        return _store_step(decoder, one, space, kind, count)
    return _parameter_step(decoder, one, kind, count) if space == "param" else \
        _load_step(decoder, one, space, kind, count)


def _load_step(decoder: Operands, one: Instruction, space: str, kind: str, count: int) -> Step:
    puts = [decoder.store(operand, kind) for operand in decoder.vector(one.operands[0])]
    get, dtype = decoder.address(one.operands[1]), np.dtype(DTYPES[kind])
    if len(puts) != count:
        raise PtxError(f"{len(puts)} registers for {count} values")

    def load(state: State, threads: Threads) -> None:
        addresses, memory = threads.of(get(state)), state.memories[space]
        state.count_request(one, space, "load", addresses, threads.lanes, dtype.itemsize * count)
        segments = state.segments(space, threads)
        rows = _checked(threads, lambda: memory.load(addresses, segments, dtype.itemsize, count))
        for i, put in enumerate(puts):
            put(state, threads.spread(rows[:, i]).view(dtype), threads)

    return load


def _store_step(decoder: Operands, one: Instruction, space: str, kind: str, count: int) -> Step:
    gets = [decoder.fetch(operand, kind) for operand in decoder.vector(one.operands[1])]
    get, dtype = decoder.address(one.operands[0]), np.dtype(DTYPES[kind])
    raw = np.dtype(f"u{dtype.itemsize}")
    if len(gets) != count or space in ("const", "param"):
        raise PtxError(f"{one.opcode} of {len(gets)} registers")

    def store(state: State, threads: Threads) -> None:
        addresses, memory = threads.of(get(state)), state.memories[space]
        state.count_request(one, space, "store", addresses, threads.lanes, dtype.itemsize * count)
        values = np.stack([threads.of(get(state)).view(raw) for get in gets], axis=1)
        _checked(threads, lambda: memory.store(addresses, state.segments(space, threads), values))

    return store


def _parameter_step(decoder: Operands, one: Instruction, kind: str, count: int) -> Step:
    operand, dtype = one.operands[1], np.dtype(DTYPES[kind])
    if not isinstance(operand, Address) or not isinstance(operand.base, Symbol):
        raise PtxError("a parameter is loaded by its name")
    name, start = operand.base.name, operand.offset
    if name not in [known for known, _ in decoder.program.function.parameters]:
        raise PtxError(f"unknown parameter {name}")
    puts = [decoder.store(part, kind) for part in decoder.vector(one.operands[0])]
    if len(puts) != count:
        raise PtxError(f"{len(puts)} registers for {count} values")

    def load(state: State, threads: Threads) -> None:
        values = state.parameters[name][start:start + dtype.itemsize * count].view(dtype)
        for i, put in enumerate(puts):
            put(state, values[i:i + 1], threads)

    return load


# ----- cp.async


def _copy_step(decoder: Operands, one: Instruction, parts: list[str]) -> Step:
    if parts == ["commit_group"]:
        return _commit
    if parts in (["wait_group"], ["wait_all"]):
        left = one.operands[0] if one.operands else Immediate(0)
        if not isinstance(left, Immediate):
            raise PtxError("cp.async.wait_group takes a number")
        return _wait(left.value, parts == ["wait_all"])
    if len(parts) < 3 or parts[0] not in ("ca", "cg") or parts[1:] != ["shared", "global"]:
        raise PtxError(f"unknown instruction {one.opcode}")
    to, of, size, *source = one.operands
    if not isinstance(size, Immediate) or size.value not in (4, 8, 16) or len(source) > 1:
        raise PtxError(f"{one.opcode} copies 4, 8 or 16 bytes")
    get_to, get_of, num_bytes = decoder.address(to), decoder.address(of), size.value
    get_size = decoder.fetch(source[0] if source else size, "u32")

    def copy(state: State, threads: Threads) -> None:
        targets, sources = threads.of(get_to(state)), threads.of(get_of(state))
        sizes = threads.of(get_size(state)).astype(np.int64)
        shared = state.memories["shared"]

        def start() -> tuple[Array, Array]:
            if (sizes > num_bytes).any():
                raise Violation("bad cp.async", f"copies {int(sizes.max())} of {num_bytes} bytes", int(sizes.argmax()))
            where = shared.place(targets, state.segments("shared", threads), num_bytes, num_bytes, "copies")
            return where, _source_rows(state.memories["global"], sources, sizes, num_bytes)

        read = sizes > 0
        state.count_request(one, "global", "load", sources[read], threads.lanes[read], num_bytes)
        where, rows = _checked(threads, start)
        shared.mark(where, num_bytes, UNDER_WAY)
        state.pending.append(PendingCopy(threads.lanes, state.groups[threads.lanes], where, rows))

    return copy


def _source_rows(memory: Memory, sources: Array, sizes: Array, num_bytes: int) -> Array:
    """[lanes, num_bytes]: what is copied; bytes from a lane's size on are zero, and not read."""
    rows = np.zeros((len(sources), num_bytes), np.uint8)
    for size in np.unique(sizes).tolist():
        some = np.flatnonzero(sizes == size)
        if size == 0:
            continue
        try:
            where = memory.place(sources[some], None, size, num_bytes, "copies")
        except Violation as violation:
            violation.at = int(some[violation.at])
            raise
        rows[some, :size] = memory.read(where, size)
    return rows


def _commit(state: State, threads: Threads) -> None:
    state.groups[threads.lanes] += 1


def _wait(left: int, everything: bool) -> Step:
    def wait(state: State, threads: Threads) -> None:
        ends = np.full(len(state.groups), -1)  # of threads that wait: groups below this have landed
        ends[threads.lanes] = np.iinfo(np.int64).max if everything else state.groups[threads.lanes] - left
        kept = []
        for copy in state.pending:
            lands = copy.groups < ends[copy.lanes]
            if lands.all():
                state.memories["shared"].put(copy.where, copy.rows)
                continue
            if lands.any():
                state.memories["shared"].put(copy.where[lands], copy.rows[lands])
                copy = PendingCopy(copy.lanes[~lands], copy.groups[~lands], copy.where[~lands], copy.rows[~lands])
            kept.append(copy)
        state.pending = kept

    return wait


def _checked(threads: Threads, action: Callable[[], _T]) -> _T:
    """Does it; a violation then names the thread, not the position among those that took part."""
    try:
        return action()
    except Violation as violation:
        violation.at = int(threads.lanes[violation.at])
        raise



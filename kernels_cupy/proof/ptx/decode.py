"""Turns a function's PTX into a program: blocks of steps that a machine runs one by one.

A step is a function of the state and of the threads that execute it. Instructions that touch memory are made in
access.py, those of whole warps in warp.py, all others here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kernels_cupy.proof.ptx.access import memory_step
from kernels_cupy.proof.ptx.arithmetic import operation
from kernels_cupy.proof.ptx.flow import blocks_of, is_barrier
from kernels_cupy.proof.ptx.operands import DecodedBlock, Operands, Program
from kernels_cupy.proof.ptx.parser import Address, Immediate, Instruction, Module, Operand, PtxError, Vector
from kernels_cupy.proof.ptx.state import Fetch, State, Step, Threads
from kernels_cupy.proof.ptx.warp import warp_step


def decode(module: Module, name: str, addresses: dict[str, int]) -> Program:
    """Decodes a function.

    Args:
        addresses: of the module's global and constant variables.

    Raises:
        PtxError: it has no such function; or an instruction is unknown, with its PTX line.
    """
    if name not in module.functions:
        raise PtxError(f"the PTX has no function {name}; it has {', '.join(module.functions) or 'none'}")
    function = module.functions[name]
    decoder = Operands(module, function, addresses)
    for block in blocks_of(function):
        steps = []
        for one in block.body:
            try:
                step = memory_step(decoder, one) or warp_step(decoder, one) or _plain_step(decoder, one)
                steps.append((_guarded(decoder, one, step), one))
            except PtxError as error:
                raise PtxError(f"PTX line {one.line}, `{text_of(one)}`: {error}") from None
        last, condition = block.last, None
        if last is not None and is_barrier(last.opcode) and (last.guard or last.operands[1:] or
                                                             last.operands[:1] != (Immediate(0),)):
            raise PtxError(f"PTX line {last.line}: only barrier 0 of all threads is known, not `{text_of(last)}`")
        if last is not None and last.guard is not None:
            condition = _condition(decoder, last)
        decoder.program.blocks.append(DecodedBlock(steps, block, condition))
    return decoder.program


def text_of(one: Instruction) -> str:
    """The opcode and its registers, about as written."""
    def word(operand: Operand) -> str:
        if isinstance(operand, Vector):
            return "{" + ", ".join(map(word, operand.parts)) + "}"
        if isinstance(operand, Address):
            return f"[{word(operand.base)}{f'+{operand.offset}' if operand.offset else ''}]"
        return str(operand.value) if isinstance(operand, Immediate) else operand.name

    return f"{one.opcode} {', '.join(map(word, one.operands))}".strip()


def _condition(decoder: Operands, one: Instruction) -> Fetch:
    assert one.guard is not None
    get = decoder.fetch(one.guard, "pred")
    return (lambda state: ~get(state)) if one.negated else get


def _guarded(decoder: Operands, one: Instruction, step: Step) -> Step:
    """The step for the threads whose guard holds."""
    if one.guard is None:
        return step
    condition = _condition(decoder, one)

    def guarded(state: State, threads: Threads) -> None:
        if (some := state.those(threads, condition(state))) is not None:
            step(state, some)

    return guarded


def _plain_step(decoder: Operands, one: Instruction) -> Step:
    """Lane-wise instructions: sources to a function to a destination."""
    root = one.opcode.split(".")[0]
    if root == "mov" and any(isinstance(operand, Vector) for operand in one.operands):
        return _packing(decoder, one)
    if root == "cvta":
        return _plain(decoder, one, "mov.b64" if one.opcode.endswith("64") else "mov.b32", one.operands)
    if root in ("membar", "fence", "nanosleep"):
        return lambda state, threads: None
    return _plain(decoder, one, one.opcode, one.operands)


def _plain(decoder: Operands, one: Instruction, opcode: str, operands: Sequence[Operand]) -> Step:
    found = operation(opcode)
    extra = len(operands) - len(found.sources) - 1
    if not (extra == 0 or (extra == 1 and opcode.startswith("setp"))):
        raise PtxError(f"{one.opcode} takes {len(found.sources)} sources, not {len(operands) - 1}")
    put, function = decoder.store(operands[0], found.result), found.function
    gets = [decoder.fetch(operand, kind) for operand, kind in zip(operands[1 + extra:], found.sources, strict=True)]
    if extra:
        if len(found.sources) != 2:
            raise PtxError("setp with two results and a third source is unknown")
        put_other = decoder.store(operands[1], "pred")

        def both(state: State, threads: Threads) -> None:
            result = function(*(get(state) for get in gets))
            put(state, result, threads)
            put_other(state, ~result, threads)

        return both
    if len(gets) == 1:
        (get,) = gets
        return lambda state, threads: put(state, function(get(state)), threads)
    if len(gets) == 2:
        get_a, get_b = gets
        return lambda state, threads: put(state, function(get_a(state), get_b(state)), threads)
    return lambda state, threads: put(state, function(*(get(state) for get in gets)), threads)


def _packing(decoder: Operands, one: Instruction) -> Step:
    """mov between a register and the registers of its parts, the lowest first."""
    to, of = one.operands
    width = int(one.opcode.split(".")[1][1:])
    if isinstance(of, Vector) and not isinstance(to, Vector):
        part = width // len(of.parts)
        gets = [decoder.fetch(operand, f"b{part}") for operand in of.parts]
        put = decoder.store(to, f"b{width}")

        def pack(state: State, threads: Threads) -> None:
            columns = np.broadcast_arrays(*(get(state) for get in gets))
            put(state, np.stack(columns, axis=1).view(f"u{width // 8}")[:, 0], threads)

        return pack
    if isinstance(to, Vector) and not isinstance(of, Vector):
        part = width // len(to.parts)
        get = decoder.fetch(of, f"b{width}")
        puts = [decoder.store(operand, f"b{part}") for operand in to.parts]

        def unpack(state: State, threads: Threads) -> None:
            parts = np.ascontiguousarray(get(state)).view(f"u{part // 8}").reshape(-1, len(puts))
            for i, put in enumerate(puts):
                put(state, parts[:, i], threads)

        return unpack
    raise PtxError("mov takes a register and its parts")


def leaves(block: DecodedBlock) -> bool:
    """Whether the block's last instruction takes threads elsewhere: a branch or an exit."""
    return block.block.last is not None and not is_barrier(block.block.last.opcode)

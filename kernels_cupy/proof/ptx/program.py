"""A function's PTX becomes a program: registers as numbered slots, blocks of steps that a machine runs one by one.

Decoding happens once a text; what depends on a launch (threads, arguments, shared memory) is the machine's. A step is
a function of the machine and of the threads that execute it. Operands become functions that fetch an array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kernels_cupy.proof.ptx.arithmetic import DTYPES, Array, operation
from kernels_cupy.proof.ptx.flow import Block, blocks_of, is_barrier
from kernels_cupy.proof.ptx.memory import Violation
from kernels_cupy.proof.ptx.parser import (
    Address,
    Function,
    Immediate,
    Instruction,
    Module,
    Operand,
    PtxError,
    Register,
    Special,
    Symbol,
    Variable,
    Vector,
)

if TYPE_CHECKING:
    from kernels_cupy.proof.ptx.machine import Machine, Threads

Step = Callable[["Machine", "Threads"], None]
Fetch = Callable[["Machine"], Array]
SPECIALS = ("%laneid", "%warpid", "WARP_SZ", *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid")
                                              for axis in "xyz"))


@dataclass
class DecodedBlock:
    """A block of the flow graph with its steps, each beside the instruction it came from."""

    steps: list[tuple[Step, Instruction]]
    block: Block
    condition: Fetch | None  # of a guarded branch or exit: who leaves by it


@dataclass
class Program:
    """What a machine needs to run a function.

    Attributes:
        storage: the dtype of each slot; names: for messages.
        constants: (slot, value) set before the first step; specials: (slot, name of a special register).
        shared_bytes: static shared memory a thread block; local_bytes: a thread.
    """

    function: Function
    storage: list[np.dtype[np.generic]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    constants: list[tuple[int, Array]] = field(default_factory=list)
    specials: list[tuple[int, str]] = field(default_factory=list)
    blocks: list[DecodedBlock] = field(default_factory=list)
    shared_bytes: int = 0
    dynamic_offset: int = 0
    local_bytes: int = 0


class Decoder:
    """Knows a function's slots and variables while its instructions are decoded."""

    def __init__(self, module: Module, function: Function, addresses: dict[str, int]) -> None:
        self.program = Program(function)
        self.addresses = dict(addresses)  # variables by name; global and constant ones are given
        self._slots: dict[object, int] = {}
        dynamic = []
        for variable in [*module.variables, *function.variables]:
            if variable.space == "shared" and variable.size == 0:
                dynamic.append(variable.name)
            elif variable.space == "shared":
                self.program.shared_bytes = self._put(variable, self.program.shared_bytes)
            elif variable.space == "local":
                self.program.local_bytes = self._put(variable, self.program.local_bytes)
        self.program.dynamic_offset = -(-self.program.shared_bytes // 16) * 16
        self.addresses |= dict.fromkeys(dynamic, self.program.dynamic_offset)

    def _put(self, variable: Variable, end: int) -> int:
        start = -(-end // variable.align) * variable.align
        self.addresses[variable.name] = start
        return start + variable.size

    # ----- operands

    def slot(self, register: Register) -> int:
        """The slot of a register."""
        if register not in self._slots:
            self._slots[register] = self._new(register.name, _storage(register.type))
        return self._slots[register]

    def _new(self, name: str, dtype: np.dtype[np.generic]) -> int:
        self.program.storage.append(dtype)
        self.program.names.append(name)
        return len(self.program.names) - 1

    def fetch(self, operand: Operand, kind: str) -> Fetch:
        """A function that gives the operand as an array of `kind`: [threads], or [1] if all threads have the same."""
        dtype = np.dtype(DTYPES[kind])
        slot = self._source(operand, kind)
        held, name = self.program.storage[slot], self.program.names[slot]
        if held.itemsize < dtype.itemsize or (held == np.bool_) != (kind == "pred"):
            raise PtxError(f"{name} is too narrow for .{kind}, or no predicate where one is needed")
        narrow = np.dtype(f"u{dtype.itemsize}") if held.itemsize > dtype.itemsize else None

        def get(machine: Machine) -> Array:
            value = machine.registers[slot]
            if not value.size:
                raise Violation("uninitialised read", f"reads register {name}, which nothing has written", 0)
            if narrow is not None:
                value = value.astype(narrow)
            return value if value.dtype == dtype else value.view(dtype)

        return get

    def _source(self, operand: Operand, kind: str) -> int:
        if isinstance(operand, Register):
            return self.slot(operand)
        if isinstance(operand, Special):
            if operand.name not in SPECIALS:
                raise PtxError(f"unknown special register {operand.name}")
            if operand not in self._slots:
                self._slots[operand] = self._new(operand.name, np.dtype(np.uint32))
                self.program.specials.append((self._slots[operand], operand.name))
            return self._slots[operand]
        if isinstance(operand, Immediate):
            value = np.array([_constant(operand, kind)], f"u{np.dtype(DTYPES[kind]).itemsize}")
            return self._constant(value if kind != "pred" else value != 0)
        if isinstance(operand, Symbol) and operand.name in self.addresses:
            return self._constant(np.array([self.addresses[operand.name]], f"u{np.dtype(DTYPES[kind]).itemsize}"))
        raise PtxError(f"{operand} is no value")

    def _constant(self, value: Array) -> int:
        key = (value.dtype.str, value.tobytes())
        if key not in self._slots:
            self._slots[key] = self._new(str(value[0]), value.dtype)
            self.program.constants.append((self._slots[key], value))
        return self._slots[key]

    def store(self, operand: Operand, kind: str) -> Callable[[Machine, Array, Threads], None]:
        """A function that puts an array of `kind` into a register; a wider register gets it extended by its sign."""
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} is no destination")
        slot, dtype = self.slot(operand), np.dtype(DTYPES[kind])
        held = self.program.storage[slot]
        if held.itemsize < dtype.itemsize:
            raise PtxError(f"{operand.name} is too narrow for .{kind}")
        extended = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{held.itemsize}")

        def put(machine: Machine, value: Array, threads: Threads) -> None:
            value = value.astype(dtype, copy=False)
            if dtype.itemsize != held.itemsize:
                value = value.astype(extended)
            machine.write(slot, value if value.dtype == held else value.view(held), threads)

        return put

    def address(self, operand: Operand) -> Fetch:
        """A function that gives the addresses of an operand in brackets, int64."""
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} is no address")
        offset = np.int64(operand.offset)
        base = operand.base
        wide = "b64" if not isinstance(base, Register) or base.type[1:] == "64" else "u32"
        get = self.fetch(base, wide)
        return lambda machine: get(machine).astype(np.int64) + offset

    def vector(self, operand: Operand) -> Sequence[Operand]:
        """The parts of {a, b}, or the operand itself."""
        return operand.parts if isinstance(operand, Vector) else (operand,)


def _storage(kind: str) -> np.dtype[np.generic]:
    if kind == "pred":
        return np.dtype(np.bool_)
    return np.dtype(f"u{max(int(kind.lstrip('bsuf')) // 8, 1)}")


def _constant(operand: Immediate, kind: str) -> int:
    """The bits of a number in the text as `kind`."""
    bits = 8 * np.dtype(DTYPES[kind]).itemsize
    if kind in ("f32", "f64") and operand.width == 0:
        raise PtxError(f"{operand.value} stands where a float is needed")
    if operand.width == 64 and kind == "f32":
        return int(np.array([operand.value], np.uint64).view(np.float64).astype(np.float32).view(np.uint32)[0])
    if operand.width and operand.width != bits:
        raise PtxError(f"a float of {operand.width} bits stands where {bits} are needed")
    return int(operand.value & ((1 << bits) - 1))


def decode(module: Module, name: str, addresses: dict[str, int]) -> Program:
    """Decodes a function.

    Args:
        addresses: of the module's global and constant variables.

    Raises:
        PtxError: it has no such function; or an instruction is unknown, with its PTX line.
    """
    from kernels_cupy.proof.ptx.access import memory_step
    from kernels_cupy.proof.ptx.warp import warp_step

    if name not in module.functions:
        raise PtxError(f"the PTX has no function {name}; it has {', '.join(module.functions) or 'none'}")
    function = module.functions[name]
    decoder = Decoder(module, function, addresses)
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


def _condition(decoder: Decoder, one: Instruction) -> Fetch:
    assert one.guard is not None
    get = decoder.fetch(one.guard, "pred")
    return (lambda machine: ~get(machine)) if one.negated else get


def _guarded(decoder: Decoder, one: Instruction, step: Step) -> Step:
    """The step for the threads whose guard holds."""
    if one.guard is None:
        return step
    condition = _condition(decoder, one)

    def guarded(machine: Machine, threads: Threads) -> None:
        if (some := machine.those(threads, condition(machine))) is not None:
            step(machine, some)

    return guarded


def _plain_step(decoder: Decoder, one: Instruction) -> Step:
    """Lane-wise instructions: sources to a function to a destination."""
    root = one.opcode.split(".")[0]
    if root == "mov" and any(isinstance(operand, Vector) for operand in one.operands):
        return _packing(decoder, one)
    if root == "cvta":
        return _plain(decoder, one, "mov.b64" if one.opcode.endswith("64") else "mov.b32", one.operands)
    if root in ("membar", "fence", "nanosleep"):
        return lambda machine, threads: None
    return _plain(decoder, one, one.opcode, one.operands)


def _plain(decoder: Decoder, one: Instruction, opcode: str, operands: Sequence[Operand]) -> Step:
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

        def both(machine: Machine, threads: Threads) -> None:
            result = function(*(get(machine) for get in gets))
            put(machine, result, threads)
            put_other(machine, ~result, threads)

        return both
    if len(gets) == 1:
        (get,) = gets
        return lambda machine, threads: put(machine, function(get(machine)), threads)
    if len(gets) == 2:
        get_a, get_b = gets
        return lambda machine, threads: put(machine, function(get_a(machine), get_b(machine)), threads)
    return lambda machine, threads: put(machine, function(*(get(machine) for get in gets)), threads)


def _packing(decoder: Decoder, one: Instruction) -> Step:
    """mov between a register and the registers of its parts, the lowest first."""
    to, of = one.operands
    width = int(one.opcode.split(".")[1][1:])
    if isinstance(of, Vector) and not isinstance(to, Vector):
        part = width // len(of.parts)
        gets = [decoder.fetch(operand, f"b{part}") for operand in of.parts]
        put = decoder.store(to, f"b{width}")

        def pack(machine: Machine, threads: Threads) -> None:
            columns = np.broadcast_arrays(*(get(machine) for get in gets))
            put(machine, np.stack(columns, axis=1).view(f"u{width // 8}")[:, 0], threads)

        return pack
    if isinstance(to, Vector) and not isinstance(of, Vector):
        part = width // len(to.parts)
        get = decoder.fetch(of, f"b{width}")
        puts = [decoder.store(operand, f"b{part}") for operand in to.parts]

        def unpack(machine: Machine, threads: Threads) -> None:
            parts = np.ascontiguousarray(get(machine)).view(f"u{part // 8}").reshape(-1, len(puts))
            for i, put in enumerate(puts):
                put(machine, parts[:, i], threads)

        return unpack
    raise PtxError("mov takes a register and its parts")


def leaves(block: DecodedBlock) -> bool:
    """Whether the block's last instruction takes threads elsewhere: a branch or an exit."""
    return block.block.last is not None and not is_barrier(block.block.last.opcode)

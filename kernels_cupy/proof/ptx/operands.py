"""A program under construction: registers as numbered slots, and operands as functions that fetch or put an array.

Decoding happens once for a text; what depends on a launch (threads, arguments, shared memory) is in a `State`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kernels_cupy.proof.ptx.arithmetic import DTYPES, Array
from kernels_cupy.proof.ptx.flow import Block
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
from kernels_cupy.proof.ptx.state import Fetch, Put, State, Step, Threads

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
        shared_bytes: static shared memory per thread block; local_bytes: per thread.
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


class Operands:
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

        def get(state: State) -> Array:
            value = state.registers[slot]
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

    def store(self, operand: Operand, kind: str) -> Put:
        """A function that puts an array of `kind` into a register; a wider register gets it extended by its sign."""
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} is no destination")
        slot, dtype = self.slot(operand), np.dtype(DTYPES[kind])
        held = self.program.storage[slot]
        if held.itemsize < dtype.itemsize:
            raise PtxError(f"{operand.name} is too narrow for .{kind}")
        extended = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{held.itemsize}")

        def put(state: State, value: Array, threads: Threads) -> None:
            value = value.astype(dtype, copy=False)
            if dtype.itemsize != held.itemsize:
                value = value.astype(extended)
            state.write(slot, value if value.dtype == held else value.view(held), threads)

        return put

    def address(self, operand: Operand) -> Fetch:
        """A function that gives the addresses of an operand in brackets, int64."""
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} is no address")
        offset = np.int64(operand.offset)
        base = operand.base
        wide = "b64" if not isinstance(base, Register) or base.type[1:] == "64" else "u32"
        get = self.fetch(base, wide)
        return lambda state: get(state).astype(np.int64) + offset

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

"""`PtxDevice`: runs the PTX that NVRTC emits for a GPU that is not here, and counts what it executes.

It works on copies of its tensors that lie apart; a launch that faults changes nothing. It needs NVRTC (compile.py), and
no C++ compiler. It cannot see races (the emulator does), time, or what ptxas makes of the PTX.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kernels_cupy.device import Argument, Dim3, Gpu, Kernel
from kernels_cupy.proof.compile import compile_ptx
from kernels_cupy.proof.ptx.arithmetic import Array
from kernels_cupy.proof.ptx.decode import decode
from kernels_cupy.proof.ptx.machine import Machine
from kernels_cupy.proof.ptx.memory import ALIGNMENT, GAP_BYTES, GLOBAL_START, Memory
from kernels_cupy.proof.ptx.operands import Program
from kernels_cupy.proof.ptx.parser import Instruction, Module, Variable, parse
from kernels_cupy.proof.ptx.state import Request

THREADS_AT_ONCE = 1 << 14  # more need much memory and gain nothing
MAX_BLOCK_THREADS = 1024
TURN_LIMIT = 200_000  # steps 0 to 2 take one turn for each token of the longest context
HALF_FORMATS = ("f16", "bf16", "f16x2", "bf16x2")
_TYPES: dict[str, tuple[type, str]] = {
    "u64": (torch.Tensor, "a tensor"), "b64": (torch.Tensor, "a tensor"), "u32": (np.int32, "np.int32"),
    "s32": (np.int32, "np.int32"), "b32": (np.int32, "np.int32"), "f32": (np.float32, "np.float32")}
# Classes of opcodes, with the first words that belong to each; `class_of` tells the others apart. A "move" gives a
# value another name (a register, a constant, the low half of one): no instruction is left of it once registers are
# given out. "packing" makes operands of tensor cores and outputs from float32.
CLASSES: dict[str, tuple[str, ...]] = {
    "tensor core": ("mma",), "matrix load": ("ldmatrix",), "asynchronous copy": ("cp",), "global": (), "shared": (),
    "parameter": (), "float": ("fma",),
    "special function": ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"), "packing": (),
    "conversion": ("cvt",), "move": ("mov", "cvta"), "warp": ("shfl", "vote", "activemask"),
    "control": ("bra", "ret", "exit", "bar", "barrier", "membar", "fence", "nanosleep"),
    "predicate": ("setp", "selp"), "integer": ()}

@dataclass(frozen=True)
class Traffic:
    """Memory traffic of one instruction over a launch; `source` is its line in the .cu text, if known."""

    ptx_line: int
    source: tuple[str, int] | None
    opcode: str
    space: str
    kind: str
    requests: int
    bytes: int
    sectors: int


@dataclass(frozen=True)
class PtxCounters:
    """What a launch executed, exactly.

    Attributes:
        opcodes: warp instructions by opcode: an instruction that a warp executes for any number of its lanes is one.
        traffic: per instruction that touched global or shared memory.
    """

    opcodes: Mapping[str, int]
    traffic: tuple[Traffic, ...]

    @property
    def instructions(self) -> int:
        """All warp instructions."""
        return sum(self.opcodes.values())

    def classes(self) -> dict[str, int]:
        """Warp instructions by class, in the order of CLASSES; those with none are left out."""
        found: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            found[class_of(opcode)] += count
        return {name: found[name] for name in CLASSES if found[name]}

    def total(self, field: str, space: str, kind: str | None = None) -> int:
        """Sum of "requests", "bytes" or "sectors" over all instructions of a space, and of a kind if given."""
        return sum(getattr(one, field) for one in self.traffic if one.space == space and kind in (None, one.kind))


def class_of(opcode: str) -> str:
    """The class of CLASSES that an opcode belongs to."""
    root, *parts = opcode.split(".")
    if root in ("ld", "st"):
        return "parameter" if "param" in parts else "shared" if "shared" in parts else "global"
    if root == "cvt" and parts[-2] in HALF_FORMATS:
        return "packing"
    if opcode == "cvt.u32.u64":
        return "move"
    named = next((name for name, roots in CLASSES.items() if root in roots), None)
    return named or ("float" if parts[-1:] in (["f32"], ["f64"]) else "integer")


class PtxDevice:
    """A device without a GPU: NVRTC compiles a kernel for `arch`, and its PTX is run instruction by instruction.

    Args:
        arch: compute capability, e.g. 80.
        counters: fill `counters` after every launch.
        sources: texts to use in place of files, by file name.
        turn_limit: turns of a launch's threads after which it is considered to hang.

    Attributes:
        gpu: what launchers ask of the GPU whose PTX is run.
        counters: PtxCounters of the last launch; None before, or without `counters=True`.
    """

    def __init__(self, arch: int = 80, counters: bool = False, sources: Mapping[str, str] | None = None,
                 turn_limit: int = TURN_LIMIT) -> None:
        self.gpu = Gpu.of(arch)
        self.count, self.sources, self.turn_limit = counters, dict(sources or {}), turn_limit
        self.counters: PtxCounters | None = None

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, arguments: Sequence[Argument]) -> None:
        """Compiles the kernel and runs it on CPU tensors in place.

        Raises:
            PtxFault: the kernel broke a rule; no tensor was changed.
            PtxError: its PTX holds what the interpreter does not know.
            ValueError, TypeError: the launch itself is impossible.
            CompileError, FileNotFoundError: as `compile_ptx`.
        """
        text = compile_ptx(kernel, self.gpu.arch, self.sources, line_info=True)
        self.run(text, kernel.function, grid, block, shared_bytes, arguments)

    def run(self, text: str, function: str, grid: Dim3, block: Dim3, shared_bytes: int,
            arguments: Sequence[Argument]) -> None:
        """Runs a function of a PTX text; raises as `launch`."""
        module, program = _program(text, function)
        threads = int(np.prod(block))
        if min(*grid, *block) < 1 or threads > MAX_BLOCK_THREADS:
            raise ValueError(f"grid {grid}, block {block}: sizes must be at least 1, a block at most "
                             f"{MAX_BLOCK_THREADS} threads")
        if not 0 <= program.shared_bytes + shared_bytes <= self.gpu.shared_bytes:
            raise ValueError(f"{program.shared_bytes} and {shared_bytes} bytes of shared memory: sm_{self.gpu.arch} "
                             f"has {self.gpu.shared_bytes // 1024} KiB for a block")
        _check_arguments(program, arguments)
        memory = _GlobalMemory(arguments, module)
        constants = _constant_memory(module)
        total, at_once = int(np.prod(grid)), max(1, THREADS_AT_ONCE // threads)
        executed = np.zeros(len(program.blocks), np.int64)
        requests: dict[tuple[int, str, str], Request] = {}
        for first in range(0, total, at_once):
            machine = Machine(program, grid, block, first, min(at_once, total - first),
                              {"global": memory.memory, "const": constants}, memory.parameters(program), shared_bytes,
                              self.count, self.turn_limit)
            machine.run()
            executed += machine.executed
            for key, one in machine.traffic.items():
                sums = requests.setdefault(key, Request())
                sums.requests, sums.bytes, sums.sectors = (sums.requests + one.requests, sums.bytes + one.bytes,
                                                           sums.sectors + one.sectors)
        memory.copy_back()
        self.counters = _counters(program, executed, requests) if self.count else None


@lru_cache(maxsize=64)
def _program(text: str, function: str) -> tuple[Module, Program]:
    """The module and the decoded function."""
    module = parse(text)
    addresses = {name: GLOBAL_START + offset for name, (offset, _) in _layout(module, "global").items()}
    addresses |= {name: offset for name, (offset, _) in _layout(module, "const").items()}
    return module, decode(module, function, addresses)


def _layout(module: Module, space: str) -> dict[str, tuple[int, Variable]]:
    """Where the module's variables of a space lie: name -> (offset, variable)."""
    found, end = {}, 0
    for variable in module.variables:
        if variable.space == space:
            start = -(-end // variable.align) * variable.align
            found[variable.name] = (start, variable)
            end = start + variable.size
    return found


def _image(layout: Mapping[str, tuple[int, Variable]]) -> Array:
    """The bytes of variables before a launch."""
    image = np.zeros(max((start + variable.size for start, variable in layout.values()), default=0), np.uint8)
    for start, variable in layout.values():
        image[start:start + len(variable.values)] = np.frombuffer(variable.values, np.uint8)
    return image


def _constant_memory(module: Module) -> Memory:
    image = _image(_layout(module, "const"))
    memory = Memory("constant", len(image))
    memory.bytes[:len(image)] = image
    return memory


class _GlobalMemory:
    """The module's variables, then a launch's tensors with gaps between them; overlapping ones share one copy."""

    def __init__(self, arguments: Sequence[Argument], module: Module) -> None:
        image = _image(_layout(module, "global"))
        tensors = sorted((a.data_ptr(), a.numel() * a.element_size(), i) for i, a in enumerate(arguments)
                         if isinstance(a, torch.Tensor))
        groups: list[list[tuple[int, int, int]]] = []
        for one in tensors:
            if groups and one[0] < max(start + size for start, size, _ in groups[-1]):
                groups[-1].append(one)
            else:
                groups.append([one])
        end, regions = len(image), [(0, len(image), "variables")]
        self._places: list[tuple[int, int, int]] = []  # address of the original, offset of the copy, bytes
        where: dict[int, int] = {}
        for group in groups:
            begin = group[0][0]
            size = max(start + length for start, length, _ in group) - begin
            offset = end + GAP_BYTES
            offset += (begin - offset) % ALIGNMENT  # what was aligned stays so, and what was not does too
            regions.append((offset, size, " and ".join(f"argument {i}" for _, _, i in group)))
            self._places.append((begin, offset, size))
            where |= {i: offset + start - begin for start, _, i in group}
            end = offset + size
        self._arguments, self._where = arguments, where
        self.memory = Memory("global", end, start=GLOBAL_START)
        self.memory.set_regions(regions)
        self.memory.bytes[:len(image)] = image
        for begin, offset, size in self._places:
            ctypes.memmove(self.memory.bytes.ctypes.data + offset, begin, size)

    def parameters(self, program: Program) -> dict[str, Array]:
        """The arguments' bytes by the function's parameter names."""
        found = {}
        for i, ((name, _), argument) in enumerate(zip(program.function.parameters, self._arguments, strict=True)):
            value = np.uint64(GLOBAL_START + self._where[i]) if isinstance(argument, torch.Tensor) else argument
            found[name] = np.array([value]).view(np.uint8)
        return found

    def copy_back(self) -> None:
        """Copies to the tensors what was stored."""
        for begin, offset, size in self._places:
            ctypes.memmove(begin, self.memory.bytes.ctypes.data + offset, size)


def _check_arguments(program: Program, arguments: Sequence[Argument]) -> None:
    name, wanted = program.function.name, program.function.parameters
    if len(wanted) != len(arguments):
        raise TypeError(f"{name} takes {len(wanted)} arguments, got {len(arguments)}")
    for i, ((_, kind), argument) in enumerate(zip(wanted, arguments, strict=True)):
        if kind not in _TYPES or not isinstance(argument, _TYPES[kind][0]):
            raise TypeError(f"{name}, argument {i}: takes {_TYPES[kind][1] if kind in _TYPES else '.' + kind}, got "
                            f"{type(argument)}")
        if isinstance(argument, torch.Tensor) and not (argument.device.type == "cpu" and argument.is_contiguous()):
            raise ValueError(f"{name}, argument {i}: the interpreter takes contiguous CPU tensors")


def _counters(program: Program, executed: Array, requests: Mapping[tuple[int, str, str], Request]) -> PtxCounters:
    opcodes: Counter[str] = Counter()
    by_line: dict[int, Instruction] = {}
    for decoded, times in zip(program.blocks, executed.tolist(), strict=True):
        of_block = [one for _, one in decoded.steps] + ([decoded.block.last] if decoded.block.last else [])
        for one in of_block:
            by_line[one.line] = one
            if times:
                opcodes[one.opcode] += times
    return PtxCounters(dict(opcodes.most_common()), tuple(
        Traffic(line, by_line[line].source, by_line[line].opcode, space, kind, one.requests, one.bytes, one.sectors)
        for (line, space, kind), one in sorted(requests.items())))

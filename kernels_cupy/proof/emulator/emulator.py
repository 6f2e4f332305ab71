"""`Emulator`, the device that runs kernels on the CPU and checks every access they make.

It knows C structures and nothing about attention. With checks on, a launch works on copies of its tensors that lie
far apart, so that running off the end of one cannot pass for an access to the next, and a launch that faults changes
nothing. `runtime/` does the work; `state.h` there mirrors the structures below.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kernels_cupy.device import Argument, Dim3, Gpu, Kernel
from kernels_cupy.proof.emulator.build import load
from kernels_cupy.proof.emulator.faults import KernelFault, Location, locate
from kernels_cupy.proof.emulator.stacks import reserve

GAP_BYTES = 1 << 20  # of untouched address space on either side of a tensor's copy; costs no memory
MAX_THREADS = 1024  # of a block
STEP_LIMIT = 20_000_000  # basic blocks of a thread; 16,384 tokens in step 0 take a third of that
ORDERS = {"forward": 0, "reverse": 1}
_launching = threading.Lock()  # a library's runtime holds one launch at a time
_KINDS = ("load", "store", "atomic")


class _Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32)]


class _Config(ctypes.Structure):
    _fields_ = [("grid", _Dim3), ("block", _Dim3), ("shared_bytes", ctypes.c_uint32),
                ("checks", ctypes.c_uint32), ("counters", ctypes.c_uint32), ("early_copies", ctypes.c_uint32),
                ("order", ctypes.c_uint32), ("record_limit", ctypes.c_uint32), ("step_limit", ctypes.c_uint32),
                ("serves", ctypes.c_void_p), ("stacks", ctypes.c_void_p)]


class _Region(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("slot_bytes", ctypes.c_uint64),
                ("readable", ctypes.c_void_p), ("writable", ctypes.c_void_p), ("cells", ctypes.c_void_p),
                ("granule", ctypes.c_uint32), ("written", ctypes.c_uint32), ("argument", ctypes.c_int32)]


class _Fault(ctypes.Structure):
    _fields_ = [("what", ctypes.c_char * 32), ("message", ctypes.c_char * 480),
                ("pc", ctypes.c_uint64), ("other_pc", ctypes.c_uint64), ("block", _Dim3), ("thread", _Dim3)]


_SITE = np.dtype([("pc", "u4"), ("shared", "u4"), ("kind", "u4"), ("worst", "u4"), ("requests", "u8"), ("bytes", "u8"),
                  ("sectors", "u8"), ("phases", "u8"), ("cycles", "u8")])
_RECORD = np.dtype([("block", "u4"), ("thread", "u4"), ("step", "u4"), ("kind", "u4"), ("argument", "i4"),
                    ("size", "u4"), ("offset", "u8"), ("pc", "u4"), ("unused", "u4")])


@dataclass(frozen=True)
class Access:
    """One load or store of one thread, for pictures.

    Attributes:
        block: linear index in the grid; warp, lane: of the thread inside its block.
        step: index of this access among the thread's, from 1; the same for lanes of a warp that do not diverge.
        kind: "load", "store" or "atomic".
        argument: index into the launch's arguments, -1 for shared memory.
        offset: in bytes from the argument's first element, or from the start of the runtime's shared arena.
        size: bytes.
        line: of the kernel's text; None if it cannot be found out.
    """

    block: int
    warp: int
    lane: int
    step: int
    kind: str
    argument: int
    offset: int
    size: int
    line: Location | None


@dataclass(frozen=True)
class SiteCounters:
    """Memory traffic of one instruction over a launch.

    Attributes:
        line: where it stands; space: "global" or "shared"; kind: "load", "store" or "atomic".
        requests: how often a warp executed it.
        bytes: asked for by all lanes, duplicates included.
        sectors: 32-byte sectors touched, each counted once per request (global only).
        worst_conflict: the most turns that any phase of a request took in a bank (shared only; 1: no conflict).
        mean_conflict: turns per phase (shared only).
    """

    line: Location | None
    space: str
    kind: str
    requests: int
    bytes: int
    sectors: int
    worst_conflict: int
    mean_conflict: float


@dataclass(frozen=True)
class LaunchCounters:
    """Memory traffic of a launch, per instruction, and its sums.

    Attributes:
        products: mma instructions.
        copies_under_way: groups of a warp's asynchronous copies under way when it multiplies, the mean over products.
    """

    sites: tuple[SiteCounters, ...]
    products: int
    copies_under_way: float

    def total(self, field: str, space: str, kind: str | None = None) -> int:
        """Sum of a field ("requests", "bytes" or "sectors") over all sites of a space, and of a kind if given."""
        return sum(getattr(site, field) for site in self.sites if site.space == space and kind in (None, site.kind))

    @property
    def sectors(self) -> int:
        """32-byte sectors of global memory, loads and stores."""
        return self.total("sectors", "global")

    @property
    def worst_conflict(self) -> int:
        """The worst bank conflict of any site; 1: no conflict, 0: no shared memory used."""
        return max((site.worst_conflict for site in self.sites if site.space == "shared"), default=0)


@dataclass(frozen=True)
class _Guard:
    tensor: torch.Tensor
    readable: np.ndarray  # [slots] int32
    writable: np.ndarray


class Emulator:
    """A device without a GPU: compiles a kernel's .cu text with a C++ compiler and runs it thread by thread.

    Args:
        checks: exact bounds, alignment, slot ownership (see `guard`), shared memory stored to before it is read, and
            races. Barriers and warp collectives are checked always.
        counters: fill `counters` after every launch. Implies checks.
        record: keep the first so many accesses of every launch in `accesses`; True means 100,000. Implies checks.
        cp_async: "late" lands copies when the program waits for them, "early" at once: a GPU may do either.
        order: of the threads of a warp: "forward", "reverse", or a seed.
        sources: texts to use in place of files, by file name: for kernels that are not in the folder, and mutants.
        step_limit: basic blocks that a thread may execute; one that executes more is taken to hang.
        arch: compute capability whose shared memory a block may have, and that the text finds as __CUDA_ARCH__.

    Attributes:
        gpu: what launchers ask of the GPU that is emulated.
        counters: LaunchCounters of the last launch; None before, or without `counters=True`.
        accesses: list of Access of the last launch; empty without `record`.
    """

    def __init__(self, checks: bool = True, counters: bool = False, record: bool | int = False, cp_async: str = "late",
                 order: str | int = "forward", sources: Mapping[str, str] | None = None,
                 step_limit: int = STEP_LIMIT, arch: int = 90) -> None:
        if cp_async not in ("late", "early"):
            raise ValueError(f"cp_async must be 'late' or 'early', not {cp_async!r}")
        if not 0 < step_limit < 1 << 32:
            raise ValueError(f"step_limit must be between 1 and 2^32 - 1, not {step_limit}")
        self.sources, self.step_limit, self.gpu = dict(sources or {}), step_limit, Gpu.of(arch)
        self.record_limit = 100_000 if record is True else int(record)
        self.checks = checks or counters or bool(record)
        self.count = counters
        self.early = cp_async == "early"
        self.order = ORDERS[order] if isinstance(order, str) else order + 2
        self.counters: LaunchCounters | None = None
        self.accesses: list[Access] = []
        self._guards: list[_Guard] = []
        self._serves: Callable[[int, int, int], int] | None = None

    def guard(self, tensor: torch.Tensor, readable: torch.Tensor, writable: torch.Tensor | None = None,
              serves: Callable[[int, int, int], int] | None = None) -> None:
        """Says who may touch which slots of a cache tensor in later launches. Even a masked-out read is then an error.

        Args:
            tensor: [num_blocks, B, K, D] or any tensor that divides evenly into the slots below; an argument of the
                launch. It is recognised by its address.
            readable: [slots] integers: -1 no block, -2 any block, s >= 0 only blocks of the grid for sequence s.
            writable: [slots], the same for stores; None forbids all stores.
            serves: (blockIdx.x, y, z) -> the sequence that block of the grid serves, -1 for any. Without it, s >= 0
                means any block.

        Raises:
            ValueError: the slots do not divide the tensor.
        """
        nobody = torch.full_like(readable, -1) if writable is None else writable
        for slots in (readable, nobody):
            if slots.dim() != 1 or slots.numel() == 0 or tensor.numel() % slots.numel():
                raise ValueError(f"{tuple(slots.shape)} slots do not divide a tensor of {tuple(tensor.shape)}")
        if len(nobody) != len(readable):
            raise ValueError(f"readable has {len(readable)} slots, writable {len(nobody)}")
        self._guards.append(_Guard(tensor, *(np.ascontiguousarray(slots.cpu().numpy(), np.int32)
                                             for slots in (readable, nobody))))
        self._serves = serves or self._serves

    def unguard(self) -> None:
        """Forgets all guards."""
        self._guards.clear()
        self._serves = None

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, arguments: Sequence[Argument]) -> None:
        """Runs the kernel on CPU tensors in place.

        Raises:
            KernelFault: the kernel broke a rule; with checks on, no tensor was changed.
            ValueError, TypeError: the launch itself is impossible: sizes, or arguments that do not fit the signature.
            CompilerMissing, RuntimeError: the kernel could not be built.
            MemoryError: the system has no room for the threads' stacks, or for the checks' bookkeeping.
        """
        _check_sizes(grid, block, shared_bytes, self.gpu)
        library, path = load(kernel, self.gpu.arch, self.checks, self.sources)
        _check_arguments(library, kernel, arguments)
        memory = _Memory(arguments, self.checks)
        regions = (_Region * max(len(memory.regions), 1))(*memory.regions)
        self._apply_guards(memory, regions)
        served = self._served(grid)
        config = _Config(_Dim3(*grid), _Dim3(*block), shared_bytes, self.checks, self.count, self.early, self.order,
                         self.record_limit, self.step_limit, None if served is None else served.ctypes.data)
        fault = _Fault()
        with _launching:
            config.stacks = reserve(int(np.prod(block)))
            failed = library.emu_launch(ctypes.byref(config), regions, len(memory.regions), memory.pointers,
                                        ctypes.byref(fault))
            self._collect(library, path, int(np.prod(block)))
        if failed < 0:
            raise MemoryError(f"no memory to check {sum(region.bytes for region in memory.regions)} bytes of tensors: "
                              "each element needs 44 bytes of bookkeeping; use smaller tensors or checks=False")
        if failed:
            raise KernelFault(kernel.function, fault.what.decode(), fault.message.decode(), locate(path, fault.pc),
                              locate(path, fault.other_pc), _index(fault.block), _index(fault.thread))
        memory.copy_back(regions)

    def _apply_guards(self, memory: _Memory, regions: ctypes.Array[_Region]) -> None:
        for guard in self._guards:
            for region, start in zip(regions, memory.starts, strict=False):
                if start == guard.tensor.data_ptr() and region.bytes == _num_bytes(guard.tensor) > 0:
                    region.slot_bytes = region.bytes // len(guard.readable)
                    region.readable, region.writable = guard.readable.ctypes.data, guard.writable.ctypes.data

    def _served(self, grid: Dim3) -> np.ndarray | None:
        if self._serves is None:
            return None
        return np.array([self._serves(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])],
                        np.int32)

    def _collect(self, library: ctypes.CDLL, path: Path, threads: int) -> None:
        self.counters, self.accesses = None, []
        if self.count:
            products = np.zeros(2, np.uint64)
            library.emu_products(ctypes.c_void_p(products.ctypes.data))
            self.counters = LaunchCounters(tuple(
                SiteCounters(locate(path, int(s["pc"])), "shared" if s["shared"] else "global", _KINDS[s["kind"]],
                             int(s["requests"]), int(s["bytes"]), int(s["sectors"]), int(s["worst"]),
                             float(s["cycles"] / s["phases"]) if s["phases"] else 0.0)
                for s in _read(library.emu_sites, _SITE)), int(products[0]),
                float(products[1]) / max(int(products[0]), 1))
        if self.record_limit:
            self.accesses = [
                Access(int(r["block"]), int(r["thread"]) // 32, int(r["thread"]) % 32, int(r["step"]),
                       _KINDS[r["kind"]], int(r["argument"]), int(r["offset"]), int(r["size"]),
                       locate(path, int(r["pc"])))
                for r in _read(library.emu_records, _RECORD)]


class _Memory:
    """A launch's tensors as regions, each a copy with gaps around it when checked; overlapping ones share one copy."""

    def __init__(self, arguments: Sequence[Argument], copied: bool) -> None:
        tensors = sorted(((a.data_ptr(), _num_bytes(a), i, a.element_size()) for i, a in enumerate(arguments)
                          if isinstance(a, torch.Tensor)))
        self.starts: list[int] = []
        self.regions: list[_Region] = []
        self._copies: list[np.ndarray] = []
        self._values: list[ctypes._SimpleCData[int] | ctypes._SimpleCData[float]] = []
        where: dict[int, int] = {}
        groups: list[list[tuple[int, int, int, int]]] = []
        for item in tensors:
            if groups and item[0] < max(start + size for start, size, _, _ in groups[-1]):
                groups[-1].append(item)
            else:
                groups.append([item])
        for group in groups:
            start, end = group[0][0], max(begin + size for begin, size, _, _ in group)
            base = self._copy(start, end - start) if copied else start
            self.starts.append(start)
            granule = min(element_bytes for _, _, _, element_bytes in group)
            self.regions.append(_Region(base, end - start, 0, None, None, None, granule, 0, group[0][2]))
            where |= {i: base + begin - start for begin, _, i, _ in group}
        self.pointers = (ctypes.c_void_p * len(arguments))()
        for i, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                self._values.append(ctypes.c_uint64(where[i]))
            elif isinstance(argument, np.int32):
                self._values.append(ctypes.c_int32(int(argument)))
            else:
                self._values.append(ctypes.c_float(float(argument)))
            self.pointers[i] = ctypes.addressof(self._values[-1])

    def _copy(self, start: int, size: int) -> int:
        space = np.empty(size + 2 * GAP_BYTES + 512, np.uint8)
        self._copies.append(space)
        base = space.ctypes.data + GAP_BYTES
        base += (start - base) % 256  # what was aligned stays so, and what was not does too
        ctypes.memmove(base, start, size)
        return base

    def copy_back(self, regions: ctypes.Array[_Region]) -> None:
        """Copies to the tensors what the kernel stored."""
        for region, start in zip(regions, self.starts, strict=False):
            if region.written and region.base != start:
                ctypes.memmove(start, region.base, region.bytes)


def _check_sizes(grid: Dim3, block: Dim3, shared_bytes: int, gpu: Gpu) -> None:
    if min(*grid, *block) < 1 or int(np.prod(block)) > MAX_THREADS:
        raise ValueError(f"grid {grid}, block {block}: sizes must be at least 1, a block at most {MAX_THREADS} threads")
    if not 0 <= shared_bytes <= gpu.shared_bytes:
        raise ValueError(f"{shared_bytes} bytes of shared memory: 0 to {gpu.shared_bytes} can be had on sm_{gpu.arch}")


def _check_arguments(library: ctypes.CDLL, kernel: Kernel, arguments: Sequence[Argument]) -> None:
    library.emu_parameters.restype = ctypes.c_char_p
    kinds = library.emu_parameters().decode()
    if len(kinds) != len(arguments):
        raise TypeError(f"{kernel.function} takes {len(kinds)} arguments, got {len(arguments)}")
    wanted = {"p": torch.Tensor, "i": np.int32, "f": np.float32}
    for i, (kind, argument) in enumerate(zip(kinds, arguments, strict=True)):
        if kind not in wanted or not isinstance(argument, wanted[kind]):
            raise TypeError(f"{kernel.function}, argument {i}: takes {wanted.get(kind)}, got {type(argument)}")
        if isinstance(argument, torch.Tensor) and not (argument.device.type == "cpu" and argument.is_contiguous()):
            raise ValueError(f"{kernel.function}, argument {i}: the emulator takes contiguous CPU tensors")


def _read(function: Callable[..., int], dtype: np.dtype) -> np.ndarray:
    out = np.empty(function(None, ctypes.c_uint64(0)), dtype)
    function(ctypes.c_void_p(out.ctypes.data), ctypes.c_uint64(len(out)))
    return out


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _index(value: _Dim3) -> Dim3:
    return (value.x, value.y, value.z)

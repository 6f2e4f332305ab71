"""What a step of a program works on: the threads that execute it, their registers and memories, copies under way.

A register is an array with a number for each thread of the blocks that run at once, or one number that all share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels_cupy.proof.ptx.arithmetic import Array
from kernels_cupy.proof.ptx.memory import WARP, Memory, sectors_touched
from kernels_cupy.proof.ptx.parser import Instruction

GONE = 1 << 30  # where a thread is that has exited


@dataclass
class Request:
    """Memory traffic of one instruction: warp requests, bytes asked for, 32-byte sectors (global memory only)."""

    requests: int = 0
    bytes: int = 0
    sectors: int = 0


@dataclass
class PendingCopy:
    """A cp.async of some threads that has not landed: their positions in shared memory, and the 16-byte rows.

    Attributes:
        lanes: the threads; groups: of each, which of its groups of copies this belongs to.
    """

    lanes: Array
    groups: Array
    where: Array
    rows: Array


class Threads:
    """The threads that execute a step. `mask` is None if that is all of them; `lanes` are their numbers."""

    __slots__ = ("_count", "_matrix", "lanes", "mask")

    def __init__(self, mask: Array | None, lanes: Array, count: int) -> None:
        self.mask, self.lanes, self._count = mask, lanes, count
        self._matrix: Array | None = None

    def of(self, value: Array) -> Array:
        """The values of these threads."""
        if len(value) == 1:
            return np.broadcast_to(value, self.lanes.shape)
        return value if self.mask is None else value[self.lanes]

    def spread(self, values: Array) -> Array:
        """Values of these threads as an array over all; the values of other threads are unspecified."""
        if self.mask is None:
            return values
        whole = np.zeros(self._count, values.dtype)
        whole[self.lanes] = values
        return whole

    def matrix(self) -> Array:
        """[warps, 32] booleans: which lanes are here."""
        if self._matrix is None:
            whole = np.ones(self._count, np.bool_) if self.mask is None else self.mask
            self._matrix = whole.reshape(-1, WARP)
        return self._matrix


class State:
    """Threads of some thread blocks and all they can see.

    Args:
        block_of: [threads] the thread block of each, counted from the first that runs here.
        registers: one array for each slot of the program, empty where nothing has been written.
        memories: by space: "global", "const", "shared", "local"; parameters: bytes by name.
        counting: fill `traffic`.

    Attributes:
        at: [threads] where each stands: a block of the program, or GONE.
        groups: [threads] the group that a thread's next cp.async belongs to; pending: copies that have not landed.
        traffic: (PTX line, space, kind) -> its requests.
    """

    def __init__(self, block_of: Array, registers: list[Array], memories: dict[str, Memory],
                 parameters: dict[str, Array], counting: bool) -> None:
        self.block_of, self.registers, self.memories = block_of, registers, memories
        self.parameters, self.counting = parameters, counting
        self.num_threads = len(block_of)
        self.at = np.zeros(self.num_threads, np.int64)
        self.groups = np.zeros(self.num_threads, np.int64)
        self.pending: list[PendingCopy] = []
        self.traffic: dict[tuple[int, str, str], Request] = {}

    def write(self, slot: int, value: Array, threads: Threads) -> None:
        """Puts a value into a register of these threads; it may be [1], the same for all."""
        if threads.mask is None:
            self.registers[slot] = value
            return
        old = self.registers[slot]
        if not old.size:
            old = np.full(1, True if value.dtype == np.bool_ else ~value.dtype.type(0))
        self.registers[slot] = np.where(threads.mask, value, old)

    def those(self, threads: Threads, condition: Array) -> Threads | None:
        """Those of the threads for which the condition holds; None if it holds for none."""
        if condition.all():
            return threads
        mask = np.broadcast_to(condition, (self.num_threads,))
        mask = mask if threads.mask is None else mask & threads.mask
        lanes = np.flatnonzero(mask)
        return Threads(mask, lanes, self.num_threads) if len(lanes) else None

    def alive(self) -> Array:
        """[threads] booleans: who has not exited."""
        return self.at < GONE

    def segments(self, space: str, threads: Threads) -> Array | None:
        """Which segment of a memory each thread sees."""
        if space == "shared":
            return self.block_of if threads.mask is None else self.block_of[threads.lanes]
        return threads.lanes if space == "local" else None

    def count_request(self, one: Instruction, space: str, kind: str, addresses: Array, lanes: Array, size: int) -> None:
        """Adds a request of these lanes, `size` bytes each, to the traffic of an instruction."""
        if not self.counting or not len(lanes):
            return
        request = self.traffic.setdefault((one.line, space, kind), Request())
        request.requests += len(np.unique(lanes // WARP))
        request.bytes += size * len(lanes)
        if space == "global":
            request.sectors += sectors_touched(addresses, lanes, size)


Step = Callable[[State, Threads], None]
Fetch = Callable[[State], Array]
Put = Callable[[State, Array, Threads], None]

"""Runs a program: all threads of some thread blocks at once, a register being an array with a number for each thread.

Threads of a launch stand at blocks of the program. Those at the block that is first in the program's order run it
together; a branch sends them on, a barrier holds them until all their thread block is there. A thread counts as one of
its warp's 32 lanes, and a warp executes an instruction once for all its lanes that are there. So counts do not depend
on how many thread blocks run at once, only on where lanes meet again (flow.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels_cupy.device import Dim3
from kernels_cupy.proof.ptx.arithmetic import Array
from kernels_cupy.proof.ptx.decode import leaves, text_of
from kernels_cupy.proof.ptx.faults import PtxFault
from kernels_cupy.proof.ptx.flow import EXIT
from kernels_cupy.proof.ptx.memory import WARP, Memory, Violation
from kernels_cupy.proof.ptx.operands import DecodedBlock, Program
from kernels_cupy.proof.ptx.parser import Instruction
from kernels_cupy.proof.ptx.state import GONE, State, Threads

WAITING = 1 << 20  # added to where a thread goes on after a barrier


class Machine(State):
    """One run of some thread blocks of a launch.

    Args:
        program: what to run.
        grid, block: of the launch; `first`, `count`: which of its thread blocks, by linear index.
        memories: "global" and "const"; shared and local ones are made here.
        parameters: bytes by name.
        shared_bytes: dynamic shared memory per thread block.
        counting: fill `traffic` too.
        turn_limit: turns after which the kernel is taken to hang; in a turn, threads execute a block of the program.

    Attributes:
        executed: of each block of the program, how many warps executed it.
    """

    def __init__(self, program: Program, grid: Dim3, block: Dim3, first: int, count: int, memories: dict[str, Memory],
                 parameters: dict[str, Array], shared_bytes: int, counting: bool, turn_limit: int) -> None:
        self.program, self.grid, self.block, self.first, self.turn_limit = program, grid, block, first, turn_limit
        self._real = int(np.prod(block))
        self._padded = -(-self._real // WARP) * WARP  # a block's last warp may have fewer threads
        static = program.dynamic_offset if shared_bytes else program.shared_bytes
        own = {"shared": Memory("shared", static + shared_bytes, count, tracked=True),
               "local": Memory("local", program.local_bytes, count * self._padded if program.local_bytes else 1,
                               tracked=True)}
        nothing = {dtype: np.empty(0, dtype) for dtype in set(program.storage)}
        super().__init__(np.repeat(np.arange(count), self._padded), [nothing[dtype] for dtype in program.storage],
                         memories | own, parameters, counting)
        for slot, value in program.constants:
            self.registers[slot] = value
        for slot, name in program.specials:
            self.registers[slot] = self._special(name)
        self.executed = np.zeros(len(program.blocks), np.int64)
        self.at = np.where(np.arange(self.num_threads) % self._padded < self._real, 0, GONE)
        self._all = Threads(None, np.arange(self.num_threads), self.num_threads)

    def _special(self, name: str) -> Array:
        thread = np.tile(np.arange(self._padded), self.num_threads // self._padded)
        block, axis = self.block_of + self.first, "xyz".find(name[-1])
        values: dict[str, Callable[[], Array]] = {
            "%tid": lambda: _coordinate(thread, self.block, axis),
            "%ctaid": lambda: _coordinate(block, self.grid, axis),
            "%ntid": lambda: np.array([self.block[axis]]), "%nctaid": lambda: np.array([self.grid[axis]]),
            "%laneid": lambda: thread % WARP, "%warpid": lambda: thread // WARP, "WARP_SZ": lambda: np.array([WARP])}
        return values[name.split(".")[0]]().astype(np.uint32)

    # ----- running

    def run(self) -> None:
        """Runs all threads to their end.

        Raises:
            PtxFault: one of them broke a rule.
        """
        with np.errstate(all="ignore"):
            for _ in range(self.turn_limit):
                at = int(self.at.min())
                if at >= GONE:
                    return
                if at >= WAITING:  # all that live wait at a barrier
                    self.at[self.at < GONE] -= WAITING
                    continue
                self._turn(at)
        thread = int(np.argmin(self.at))
        decoded = self.program.blocks[int(self.at[thread]) % WAITING]
        instruction = decoded.steps[0][1] if decoded.steps else decoded.block.last
        assert instruction is not None
        raise self._fault(instruction, Violation("endless loop", f"goes on after {self.turn_limit} turns; "
                                                 "PtxDevice(turn_limit=...) allows more", thread))

    def _turn(self, at: int) -> None:
        """Runs one block with all threads that are at it."""
        decoded, mask = self.program.blocks[at], self.at == at
        lanes = np.flatnonzero(mask)
        threads = self._all if len(lanes) == self.num_threads else Threads(mask, lanes, self.num_threads)
        self.executed[at] += self.num_threads // WARP if threads.mask is None else \
            int(threads.matrix().any(axis=1).sum())
        instruction = decoded.block.last
        try:
            for step, instruction in decoded.steps:  # noqa: B007
                step(self, threads)
            instruction = decoded.block.last
            self._go_on(decoded, threads)
        except Violation as violation:
            assert instruction is not None
            raise self._fault(instruction, violation) from None

    def _go_on(self, decoded: DecodedBlock, threads: Threads) -> None:
        block = decoded.block
        following = GONE if block.following == EXIT else block.following
        if not leaves(decoded):
            if block.last is not None:
                self._arrive(threads)
                following += WAITING
            self.at[threads.lanes] = following
            return
        taken = GONE if block.taken == EXIT else block.taken
        if decoded.condition is None:
            self.at[threads.lanes] = taken
        else:
            self.at[threads.lanes] = np.where(threads.of(decoded.condition(self)), taken, following)

    def _arrive(self, threads: Threads) -> None:
        """bar.sync takes whole warps: those of its lanes that live must come together."""
        if threads.mask is None:
            return
        here, alive = threads.matrix(), self.alive().reshape(-1, WARP)
        absent = here.any(axis=1) & (alive & ~here).any(axis=1)
        if absent.any():
            warp = int(np.flatnonzero(absent)[0])
            missing = np.flatnonzero(alive[warp] & ~here[warp]).tolist()
            raise Violation("divergent barrier", f"waits while lanes {missing} of its warp are elsewhere",
                            warp * WARP + int(np.flatnonzero(here[warp])[0]))

    def _fault(self, one: Instruction, violation: Violation) -> PtxFault:
        thread = violation.at % self._padded
        block = self.first + violation.at // self._padded
        return PtxFault(self.program.function.name, violation.what, violation.message, one.source, one.line,
                        text_of(one), _index(block, self.grid), _index(thread, self.block))


def _coordinate(linear: Array, sizes: Dim3, axis: int) -> Array:
    return linear // int(np.prod(sizes[:axis])) % sizes[axis]


def _index(linear: int, sizes: Dim3) -> Dim3:
    return (linear % sizes[0], linear // sizes[0] % sizes[1], linear // (sizes[0] * sizes[1]))

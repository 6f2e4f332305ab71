"""What a kernel did wrong when its PTX was run, and where: in the PTX, and in the .cu text it came from."""

from __future__ import annotations

from kernels_cupy.proof.emulator.faults import Index, KernelFault, Location


class PtxFault(KernelFault):
    """A rule was broken by an instruction.

    Attributes:
        ptx_line: the line of the PTX text; `instruction` is what stands there.
    """

    def __init__(self, kernel: str, what: str, message: str, source: tuple[str, int] | None, ptx_line: int,
                 instruction: str, block: Index, thread: Index) -> None:
        self.ptx_line, self.instruction = ptx_line, instruction
        super().__init__(kernel, what, f"{message} (PTX line {ptx_line}: {instruction})",
                         Location(*source) if source else None, None, block, thread)

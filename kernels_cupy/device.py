"""What a launch is: a kernel's source and constants, the properties of a GPU that launchers need, and the method that
every device has.

Three devices stand behind `Device`: a GPU through CuPy (`gpu.py`), the CPU emulator that compiles the same text with a
C++ compiler (`proof/emulator/`), and the interpreter of the PTX that NVRTC emits (`proof/ptx/`). This file knows no
kernel and no shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

FOLDER = Path(__file__).parent
Dim3 = tuple[int, int, int]
# What a kernel takes: a tensor becomes a pointer to its first element; numbers are passed by value, in their own width.
Argument = torch.Tensor | np.int32 | np.float32
# KiB of shared memory of a multiprocessor, by compute capability (CUDA programming guide, table of technical
# specifications). From sm_80 on the system keeps 1 KiB for each thread block.
SHARED_KIB = {75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100}
DEFAULT_SMS = 108  # an A100's: multiprocessors to fill where no GPU says how many it has


@dataclass(frozen=True)
class Kernel:
    """One `extern "C" __global__` function of one .cu file, at one choice of its compile-time constants.

    Attributes:
        file: name of the .cu file in this folder.
        function: the function's name.
        defines: (name, value) pairs, handed to the compiler as -Dname=value.
    """

    file: str
    function: str
    defines: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU that launchers need.

    Attributes:
        arch: compute capability, e.g. 80.
        shared_bytes: shared memory that one thread block may have, static and dynamic.
        sm_shared_bytes: shared memory of a multiprocessor, which its blocks divide among them.
        num_sms: multiprocessors.
    """

    arch: int
    shared_bytes: int
    sm_shared_bytes: int
    num_sms: int = DEFAULT_SMS

    @classmethod
    def of(cls, arch: int, num_sms: int = DEFAULT_SMS) -> Gpu:
        """A GPU of this compute capability. Raises ValueError if it is none of SHARED_KIB."""
        if arch not in SHARED_KIB:
            raise ValueError(f"arch must be one of {', '.join(map(str, SHARED_KIB))}, not {arch}")
        kib = SHARED_KIB[arch]
        return cls(arch, (kib - (arch >= 80)) * 1024, kib * 1024, num_sms)

    @property
    def reserved_bytes(self) -> int:
        """Shared memory that the system keeps for itself for each thread block."""
        return self.sm_shared_bytes - self.shared_bytes


class Device(Protocol):
    """Runs kernels. A device does not repeat the launchers' checks, but may check what a GPU cannot."""

    gpu: Gpu

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int,
               arguments: Sequence[Argument]) -> None:
        """Runs the kernel on the tensors in place. `shared_bytes` is the dynamic shared memory of a block."""
        ...


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def source_text(file: str, sources: Mapping[str, str] | None = None) -> str:
    """The text of a .cu file with the files it includes from this folder in place.

    So a compiler's cache that looks at nothing but the text (CuPy's does) sees a change in any of them. `#line` keeps
    names and numbers of lines. `sources` are texts that stand in for files, by name.
    """
    return _inline(file, sources or {}, set())


def _inline(name: str, sources: Mapping[str, str], seen: set[str]) -> str:
    seen.add(name)
    lines = [f'#line 1 "{name}"']
    text = sources[name] if name in sources else (FOLDER / name).read_text()
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r'\s*#\s*include\s+"([^"]+)"', line):
            if match[1] not in seen:
                lines.append(_inline(match[1], sources, seen))
            lines.append(f'#line {number + 1} "{name}"')
        elif re.match(r"\s*#\s*pragma\s+once", line):
            lines.append("")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"

"""What a launch is, said once: a kernel's source and constants, and the one call every device answers.

Three devices stand behind `Device`: a GPU through CuPy (`gpu.py`), the CPU emulator that compiles the same text with a
C++ compiler (`emulator/`), and the interpreter of the PTX that NVRTC emits (`ptx/`). It knows no kernel and no shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

FOLDER = Path(__file__).parent
Dim3 = tuple[int, int, int]
# What a kernel takes: a tensor becomes a pointer to its first element; numbers are passed by value, in their own width.
Argument = torch.Tensor | np.int32 | np.float32


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

    @property
    def path(self) -> Path:
        """The .cu file."""
        return FOLDER / self.file


class Device(Protocol):
    """Runs kernels. A device checks nothing that `launch.py` checks; it may check much that a GPU cannot."""

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int,
               arguments: Sequence[Argument]) -> None:
        """Runs the kernel on the tensors in place. `shared_bytes` is the dynamic shared memory of a block."""
        ...

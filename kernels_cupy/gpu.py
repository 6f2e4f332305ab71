"""The GPU device: CuPy compiles the very same .cu text and launches it on torch's current stream, on torch's memory.

Not measured here: no GPU was at hand when this was written. The kernels, their grids and their arguments are proven by
the emulator; what only a GPU can prove is this file, which is therefore short.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from kernels_cupy.device import FOLDER, Argument, Dim3, Kernel


def why_unavailable() -> str | None:
    """None if kernels can run on a GPU here, else the reason in a sentence."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed: pip install bros-ref[gpu]"
    return None if cupy.cuda.is_available() else "CuPy finds no CUDA device"


class CupyDevice:
    """Runs kernels on the GPU that torch's current device is.

    Raises:
        RuntimeError: there is none, or CuPy is missing; the message says which.
    """

    def __init__(self) -> None:
        if reason := why_unavailable():
            raise RuntimeError(reason)
        self.num_sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, arguments: Sequence[Argument]) -> None:
        """Queues the kernel on torch's current stream; does not wait."""
        import cupy

        function = _compiled(kernel)
        if shared_bytes > 48 * 1024 and function.max_dynamic_shared_size_bytes < shared_bytes:
            function.max_dynamic_shared_size_bytes = shared_bytes  # more than 48 KB must be asked for
        stream = torch.cuda.current_stream()
        pointers = tuple(argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
                         for argument in arguments)
        with cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index):
            function(grid, block, pointers, shared_mem=shared_bytes)


@cache
def _compiled(kernel: Kernel) -> Any:
    """The function, compiled once a process; CuPy keeps the binary on disk."""
    import cupy

    options = ("-std=c++17", f"-I{FOLDER}", *(f"-D{name}={value}" for name, value in kernel.defines))
    return cupy.RawModule(code=kernel.path.read_text(), options=options).get_function(kernel.function)

"""The GPU device: CuPy compiles the very same .cu text and launches it on torch's current stream, on torch's memory.

Not measured here: no GPU was available when this was written. The kernels, their grids and their arguments are tested
on the emulator, and this file with a stand-in for CuPy; only a GPU can show that CuPy behaves as documented.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch

from kernels_cupy.device import Argument, Dim3, Gpu, Kernel, source_text

FREE_SHARED_BYTES = 48 * 1024  # a block may have so much, static and dynamic, without asking


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
    """Runs kernels on one GPU.

    Args:
        index: of the GPU; torch's current device if None.

    Raises:
        RuntimeError: there is no GPU, or CuPy is missing; the message says which.
    """

    def __init__(self, index: int | None = None) -> None:
        if reason := why_unavailable():
            raise RuntimeError(reason)
        self.index = torch.cuda.current_device() if index is None else index
        found: Any = torch.cuda.get_device_properties(self.index)
        self.gpu = Gpu(found.major * 10 + found.minor, found.shared_memory_per_block_optin,
                       found.shared_memory_per_multiprocessor, found.multi_processor_count)

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, arguments: Sequence[Argument]) -> None:
        """Queues the kernel on torch's current stream of this GPU; does not wait.

        Raises:
            ValueError: a tensor lies on another device, or in host memory that is not pinned.
        """
        import cupy

        for i, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor) and not self._reaches(argument):
                raise ValueError(f"{kernel.function}, argument {i}: it lies on {argument.device}, the kernel runs on "
                                 f"cuda:{self.index}; tensors must lie there, or in pinned host memory")
        pointers = tuple(argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
                         for argument in arguments)
        with cupy.cuda.Device(self.index):
            function = _compiled(kernel, self.index)
            if shared_bytes + function.shared_size_bytes > FREE_SHARED_BYTES \
                    and function.max_dynamic_shared_size_bytes < shared_bytes:
                function.max_dynamic_shared_size_bytes = shared_bytes
            with _stream(torch.cuda.current_stream(self.index)):
                function(grid, block, pointers, shared_mem=shared_bytes)

    def _reaches(self, tensor: torch.Tensor) -> bool:
        if tensor.device.type == "cuda":
            return tensor.device.index == self.index
        return tensor.device.type == "cpu" and tensor.is_pinned()


@lru_cache(maxsize=64)
def _stream(stream: Any) -> Any:
    """CuPy's name for a stream of torch."""
    import cupy

    return cupy.cuda.Stream.from_external(stream)


@cache
def _compiled(kernel: Kernel, index: int) -> Any:
    """The function, loaded once per GPU and process; CuPy keeps the binary on disk. Its cache knows the text and the
    options only, so the text includes all it depends on."""
    import cupy

    options = ("-std=c++17", *(f"-D{name}={value}" for name, value in kernel.defines))
    return cupy.RawModule(code=source_text(kernel.file), options=options).get_function(kernel.function)

"""`Recorder`: counts the operations that a piece of code would run on an accelerator, without having one.

It is both a device for kernels and a mode for torch's operators. With tensors on torch's `meta` device, which have
shapes but no memory, it stands for a GPU, and uploads, downloads and waits are counted as such. With tensors on the CPU
and another device to run the kernels, everything is also computed, and can be replayed as a CUDA graph would be: the
same calls on the same tensors.

One kernel is counted for each launch of ours, and for each torch operator that computes (`linear`, `rms_norm` and the
like count as one each; CUDA may need more). Views and plain allocations are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kernels_cupy.device import Argument, Device, Dim3, Gpu, Kernel

ALLOCATORS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
COPIES = {"to", "_to_copy", "copy_"}
READERS = {"item", "_local_scalar_dense", "nonzero", "equal", "is_nonzero"}  # the host needs their result to continue


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Use it as a context manager around the code, and as the device of its launchers.

    Args:
        place: type of the torch device that stands for the accelerator: "meta" or "cpu".
        runs: device that computes the launches; None: they are only counted.
        gpu: the GPU that launchers see; an H100 unless `runs` has another.

    Attributes:
        kernels: names, in order.
        calls: per kernel, what a CUDA graph would store: its name, sizes, scalar arguments and memory addresses.
        allocations: names of the operators that allocated memory on the accelerator.
        uploads, downloads: bytes of each copy from and to the host.
        waits: names of the operators that made the host wait for the accelerator.
    """

    def __init__(self, place: str = "meta", runs: Device | None = None, gpu: Gpu | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place, self.runs = place, runs
        self.gpu = gpu or (runs.gpu if runs is not None else Gpu.of(90, 132))
        self._memory: dict[int, Any] = {}  # storages, kept so that no address comes twice
        self.clear()

    def clear(self) -> None:
        """Resets all counts."""
        self.kernels: list[str] = []
        self.calls: list[tuple[Any, ...]] = []
        self.allocations: list[str] = []
        self.uploads: list[int] = []
        self.downloads: list[int] = []
        self.waits: list[str] = []
        self._replay: list[Callable[[], object]] = []

    def replay(self) -> Callable[[], None]:
        """Returns a function that repeats the recorded calls.

        Raises:
            RuntimeError: something was recorded that a CUDA graph cannot contain.
        """
        if self.allocations or self.uploads or self.downloads or self.waits:
            raise RuntimeError(f"a graph cannot hold allocations {self.allocations}, waits {self.waits}, "
                               f"{len(self.uploads)} uploads or {len(self.downloads)} downloads")
        calls = list(self._replay)

        def again() -> None:
            for call in calls:
                call()

        return again

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int,
               arguments: Sequence[Argument]) -> None:
        """Counts a launch, and lets `runs` compute it."""
        kept = tuple(self._identity(value) for value in arguments)
        self._count(kernel.function, (kernel, grid, block, shared_bytes, kept))
        if self.runs is not None:
            runs, arguments = self.runs, tuple(arguments)
            self._replay.append(lambda: runs.launch(kernel, grid, block, shared_bytes, arguments))
            runs.launch(kernel, grid, block, shared_bytes, arguments)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if name in COPIES and (crossing := self._crossing(name, given, args, kwargs)) is not None:
            return crossing
        by_mask = name == "index" and any(value.dtype == torch.bool for value in given[1:])
        if (name in READERS or by_mask) and any(map(self._is_here, given)):
            self.waits.append(name)
            if self.place == "meta" and not by_mask:
                return torch.zeros((0, given[0].dim()), dtype=torch.long) if name == "nonzero" else 1
        result = func(*args, **kwargs)
        made = [value for value in tree_iter(result) if isinstance(value, Tensor) and self._is_here(value)]
        if not made or all(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns):
            return result  # on the host, or a view
        known = {value.untyped_storage()._cdata for value in given}
        if any(value.untyped_storage()._cdata not in known for value in made):
            self.allocations.append(name)
        if name not in ALLOCATORS:
            kept = tuple(self._identity(value) for value in tree_iter((args, kwargs)))
            self._count(name, (str(func), kept))
            self._replay.append(lambda: func(*args, **kwargs))
        return result

    def _crossing(self, name: str, given: list[Tensor], args: Any, kwargs: Any) -> Any:
        """The result of a copy between host and accelerator; None if it is none."""
        if self.place == "cpu":
            return None
        if name == "copy_":
            to, of = args[0], args[1]
            target = to.device
        else:
            of, target = given[0], torch.device(kwargs.get("device") or given[0].device)
            to = torch.empty(of.shape, dtype=kwargs.get("dtype") or of.dtype, device=target)
        if (of.device.type == self.place) == (target.type == self.place):
            return None
        if target.type == self.place:
            self.uploads.append(of.nbytes)
            if name != "copy_":
                self.allocations.append(name)
        else:
            self.downloads.append(of.nbytes)
            self.waits.append(name)
            to = to.fill_(1) if name == "copy_" else torch.ones(of.shape, dtype=to.dtype)
        return to

    def _count(self, name: str, call: tuple[Any, ...]) -> None:
        self.kernels.append(name)
        self.calls.append(call)

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.place

    def _identity(self, value: Any) -> Any:
        """A number itself; of a tensor, which memory it is."""
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        self._memory[storage._cdata] = storage
        return storage._cdata, value.storage_offset(), tuple(value.shape), tuple(value.stride())

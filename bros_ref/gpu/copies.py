"""Checkpoint, relocation and restore by `copy_slots`, on a separate stream: the host queues them without waiting.

    side stream   waits for queued work    | checkpoint, relocate | restore, layer by layer |
    main stream   ...                        waits for this         each layer waits for its own restore

The host store is pinned and allocated at the start, so that the kernel can read and write it over PCIe. All copies use
the same side stream, so host slots are read and written in the order that the scheduler decided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from bros_ref.config import KVCacheConfig
from bros_ref.kv_cache.storage import KVStorage, SlotPairs, check_pairs
from kernels_cupy.device import Device
from kernels_cupy.launch import copy_slots


class Streams(Protocol):
    """The order of copies and computation."""

    def side(self) -> Any:
        """A context whose launches begin after all work queued so far."""
        ...

    def record(self) -> Any:
        """An event after all work queued on the side stream; it has `query()`."""
        ...

    def wait(self, event: Any) -> None:
        """Work queued from now on waits for the event; the host does not."""
        ...


class CudaStreams:
    """Torch's current stream of a GPU, and one side stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def side(self) -> Iterator[None]:
        """See `Streams`."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            yield

    def record(self) -> Any:
        """See `Streams`."""
        return self._side.record_event()

    def wait(self, event: Any) -> None:
        """See `Streams`."""
        torch.cuda.current_stream(self._device).wait_event(event)


class Done:
    """The event of a device that has no streams: all work is complete immediately."""

    def query(self) -> bool:
        """Always true."""
        return True


class OneAfterAnother:
    """A device that executes each launch immediately, as the emulator does."""

    @contextmanager
    def side(self) -> Iterator[None]:
        """See `Streams`."""
        yield

    def record(self) -> Any:
        """See `Streams`."""
        return Done()

    def wait(self, event: Any) -> None:
        """See `Streams`."""


class KernelKVStorage(KVStorage):
    """A `KVStorage` whose copies are kernels.

    Args:
        kernels: the device that runs the copy kernels.
        streams: the order of copies; by default CUDA streams on a GPU, and one copy after another elsewhere.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, config: KVCacheConfig, dtype: torch.dtype,
                 device: torch.device, kernels: Device, streams: Streams | None = None) -> None:
        super().__init__(num_layers, num_kv_heads, head_dim, config, dtype, device)
        self._kernels = kernels
        on_gpu = device.type == "cuda"
        self._streams: Streams = streams or (CudaStreams(device) if on_gpu else OneAfterAnother())
        shape = (num_layers, 2, config.host_blocks * config.block_size, num_kv_heads, head_dim)
        self._store = torch.zeros(shape, dtype=self._slots.dtype, pin_memory=on_gpu)
        self._layer_events: list[Any] = [None] * num_layers
        self._pairs: deque[tuple[Any, list[Tensor]]] = deque()  # kernels read these until the event

    @property
    def host_data(self) -> Tensor:
        """See `KVStorage`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._store.clone().view(self.data.dtype)

    def run_copies(self, checkpoint: SlotPairs = (), relocate: SlotPairs = (), restore: SlotPairs = ()) -> None:
        """See `KVStorage`: the same lists, order and errors. This call never waits for the device."""
        device_slots, host_slots = self._slots.shape[2], self._store.shape[2]
        check_pairs("checkpoint", checkpoint, device_slots, host_slots)
        check_pairs("relocate", relocate, device_slots, device_slots)
        check_pairs("restore", restore, host_slots, device_slots)
        self.wait_for_restores()  # an earlier restore whose layers were not read yet
        while self._pairs and self._pairs[0][0].query():
            self._pairs.popleft()
        used: list[Tensor] = []
        with self._streams.side():
            if checkpoint:
                copy_slots(self._kernels, self._slots, self._store, self._integers(checkpoint, used))
            if relocate:
                self._relocate(relocate, used)
            moved = self._streams.record()
            if restore:
                pairs = self._integers(restore, used)
                for layer in range(len(self._slots)):
                    copy_slots(self._kernels, self._store[layer:layer + 1], self._slots[layer:layer + 1], pairs)
                    self._layer_events[layer] = self._streams.record()
            self._pairs.append((self._streams.record(), used))
        if checkpoint or relocate:
            self._streams.wait(moved)

    def wait_for_restores(self) -> None:
        """Work queued from now on sees every layer restored."""
        for layer in range(len(self._layer_events)):
            self._wait_for_restore(layer)

    def _relocate(self, relocate: SlotPairs, used: list[Tensor]) -> None:
        """All reads before all writes: goes through a buffer if a slot is both a source and a destination."""
        sources, destinations = zip(*relocate, strict=True)
        if not set(sources) & set(destinations):
            copy_slots(self._kernels, self._slots, self._slots, self._integers(relocate, used))
            return
        between = self._slots.new_empty(*self._slots.shape[:2], len(relocate), *self._slots.shape[3:])
        used.append(between)
        copy_slots(self._kernels, self._slots, between, self._integers(list(zip(sources, range(len(relocate)),
                                                                                strict=True)), used))
        copy_slots(self._kernels, between, self._slots, self._integers(list(enumerate(destinations)), used))

    def _integers(self, pairs: Sequence[tuple[int, int]], used: list[Tensor]) -> Tensor:
        """[n, 2] int32 in memory that the kernel can read; `used` keeps it alive."""
        used.append(torch.tensor(pairs, dtype=torch.int32, pin_memory=self.device.type == "cuda"))
        return used[-1]

    def _wait_for_restore(self, layer: int) -> None:
        event = self._layer_events[layer]
        if event is not None:
            self._streams.wait(event)
            self._layer_events[layer] = None

"""Where keys and values live: one device allocation for all layers, and the host store that checkpoints go to.

It knows slots, but nothing about requests, owners or the reasons for a copy. Invariant: after `run_copies` every slot
holds what the three lists say, in the order checkpoint, relocate, restore, and any later read of a layer through this
class sees its restored slots, on a GPU too.

    slot = block * block_size + (block_size - 1 - offset if reversed else offset),   offset = position % block_size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bros_ref.config import KVCacheConfig

HOST_SEGMENT_BYTES = 4 << 20  # the host store grows by so much at a time: a millisecond, pinned or not
SlotPairs = Sequence[tuple[int, int]]  # (source slot, destination slot)
FP8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of fraction
FP8_MAX = 448.0


def gather_dense(cache: Tensor, block_table: Sequence[int] | Tensor, num_tokens: int, reversed_: bool) -> Tensor:
    """One sequence's rows of a paged cache in logical order: slow but simple, the reference for the faster versions.

    Args:
        cache: [num_blocks, block_size, num_kv_heads, head_dim], any dtype.
        block_table: block ids in logical order, at least ceil(num_tokens / block_size) of them; a list or a [n] tensor.

    Returns:
        [num_tokens, num_kv_heads, head_dim], a copy.
    """
    block_size = cache.shape[1]
    rows = []
    for position in range(num_tokens):
        offset = position % block_size
        rows.append(cache[block_table[position // block_size], block_size - 1 - offset if reversed_ else offset])
    return torch.stack(rows) if rows else cache.new_empty((0, *cache.shape[2:]))


class KVStorage:
    """The K/V tensors of all layers, and their checkpoint store in host memory.

    Attributes:
        data: [num_layers, 2 (K, V), num_blocks, block_size, num_kv_heads, head_dim]. Starts as zeros; slots that no
            live token owns may hold anything, NaN included.
        slot_bytes: size of one token's K and V over all layers.
        scales: of each layer, what the stored K and the stored V must be multiplied by. 1, unless `dtype` is FP8.

    Raises:
        ValueError: the device has no memory for a pool of that size; it says how much that is.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, config: KVCacheConfig,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.slot_bytes = 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
        shape = (num_layers, 2, config.num_blocks, config.block_size, num_kv_heads, head_dim)
        try:
            self.data = _zeros(shape, dtype, self.device)
        except (RuntimeError, TypeError, ValueError, MemoryError) as error:  # no memory, or more than 64 bits can count
            raise ValueError(f"a KV pool of {config.num_blocks} blocks of {config.block_size} tokens takes "
                             f"{config.num_slots * self.slot_bytes / 1e9:,.1f} GB, which {self.device} cannot give; "
                             "use fewer KV blocks") from error
        self.scales: list[tuple[float, float]] = [(1.0, 1.0)] * num_layers
        # [num_layers, 2, num_slots, num_kv_heads, head_dim], a view; bytes if FP8, which torch cannot index_copy_.
        self._slots = (self.data.view(torch.uint8) if dtype == FP8 else self.data).flatten(2, 3)
        # Layer views are made once: a view costs microseconds, and a step asks for 4 * num_layers of them.
        self._blocks_of: list[tuple[Tensor, Tensor]] = [(layer[0], layer[1]) for layer in self.data]
        self._slots_of: list[tuple[Tensor, Tensor]] = [(layer[0], layer[1]) for layer in self._slots]
        self._host: dict[int, Tensor] = {}  # segment -> [num_layers, 2, segment_slots, num_kv_heads, head_dim]
        self._segment_slots = max(1, HOST_SEGMENT_BYTES // self.slot_bytes)
        self._side_stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._side_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._restored: list[torch.cuda.Event | None] = [None] * num_layers

    @property
    def host_data(self) -> Tensor:
        """A copy of the checkpoint store, [num_layers, 2, host_slots, num_kv_heads, head_dim]; 0 where nothing was
        ever stored. For tests and teaching."""
        num_layers, two, _, num_kv_heads, head_dim = self._slots.shape
        whole = torch.zeros(num_layers, two, self.config.host_blocks * self.config.block_size, num_kv_heads, head_dim,
                            dtype=self._slots.dtype)
        for number, segment in self._host.items():
            part = whole[:, :, number * self._segment_slots:(number + 1) * self._segment_slots]
            part.copy_(segment[:, :, :part.shape[2]])
        return whole.view(self.data.dtype)

    def k(self, layer: int) -> Tensor:
        """[num_blocks, block_size, num_kv_heads, head_dim], a view."""
        self._wait_for_restore(layer)
        return self._blocks_of[layer][0]

    def v(self, layer: int) -> Tensor:
        """[num_blocks, block_size, num_kv_heads, head_dim], a view."""
        self._wait_for_restore(layer)
        return self._blocks_of[layer][1]

    def encoded(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of new tokens as `write` takes them: unchanged, or the bytes of FP8."""
        if self.data.dtype != FP8:
            return k, v
        k_scale, v_scale = self.scales[layer]
        return to_fp8(k, k_scale).view(torch.uint8), to_fp8(v, v_scale).view(torch.uint8)

    def write(self, layer: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Stores new tokens. Touches no other slot.

        Args:
            k, v: [num_tokens, num_kv_heads, head_dim], the storage's dtype.
            slot_mapping: [num_tokens] int64, no slot twice.
        """
        self._wait_for_restore(layer)
        k_slots, v_slots = self._slots_of[layer]
        k_slots.index_copy_(0, slot_mapping, k)
        v_slots.index_copy_(0, slot_mapping, v)

    def gather_dense(self, layer: int, block_table: Sequence[int] | Tensor, num_tokens: int,
                     reversed_: bool) -> tuple[Tensor, Tensor]:
        """K and V of one sequence in logical order, each [num_tokens, num_kv_heads, head_dim]: the oracle."""
        return (gather_dense(self.k(layer), block_table, num_tokens, reversed_),
                gather_dense(self.v(layer), block_table, num_tokens, reversed_))

    def run_copies(self, checkpoint: SlotPairs = (), relocate: SlotPairs = (), restore: SlotPairs = ()) -> None:
        """Moves slots, all layers at once, in this order: device -> host, device -> device, host -> device.

        Within a list every read comes before any write. On CUDA the restore runs on a side stream, layer by layer;
        the first reader of a layer waits for that layer alone, so early layers compute while late ones still copy.

        Raises:
            ValueError: a slot lies outside its store, or one list writes a slot twice; nothing was copied.
        """
        device_slots, host_slots = self._slots.shape[2], self.config.host_blocks * self.config.block_size
        check_pairs("checkpoint", checkpoint, device_slots, host_slots)
        check_pairs("relocate", relocate, device_slots, device_slots)
        check_pairs("restore", restore, host_slots, device_slots)
        if self._side_stream is not None:  # an earlier restore whose layers nobody read yet
            torch.cuda.current_stream(self.device).wait_stream(self._side_stream)
        if checkpoint:
            source, destination = self._indices(checkpoint)
            saved = self._slots.index_select(2, source.to(self.device)).cpu()
            for segment, rows, offsets in self._host_segments(destination):
                segment.index_copy_(2, offsets, saved.index_select(2, rows))
        if relocate:
            source, destination = (index.to(self.device) for index in self._indices(relocate))
            self._slots.index_copy_(2, destination, self._slots.index_select(2, source))
        if restore:
            self._restore(*self._indices(restore))

    def _restore(self, source: Tensor, destination: Tensor) -> None:
        num_layers, two, _, num_kv_heads, head_dim = self._slots.shape
        saved = torch.empty(num_layers, two, len(source), num_kv_heads, head_dim, dtype=self._slots.dtype)
        for segment, rows, offsets in self._host_segments(source):
            saved.index_copy_(2, rows, segment.index_select(2, offsets))
        if self._side_stream is None:
            self._slots.index_copy_(2, destination, saved)
            return
        saved = saved.pin_memory()
        # Work already queued may still read or write the destinations, so the side stream starts after it.
        self._side_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side_stream):
            destination = destination.to(self.device)
            for layer in range(len(saved)):
                self._slots[layer].index_copy_(1, destination, saved[layer].to(self.device, non_blocking=True))
                self._restored[layer] = self._side_stream.record_event()

    def _host_segments(self, host_slots: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The segments of the host store that hold these slots [n], created if needed: (segment, the indices into
        `host_slots` that lie in it, their slots within it)."""
        numbers = host_slots // self._segment_slots
        for number in sorted(set(numbers.tolist())):
            if number not in self._host:
                num_layers, two, _, num_kv_heads, head_dim = self._slots.shape
                self._host[number] = torch.zeros(num_layers, two, self._segment_slots, num_kv_heads, head_dim,
                                                 dtype=self._slots.dtype, pin_memory=self._side_stream is not None)
            rows = (numbers == number).nonzero().flatten()
            yield self._host[number], rows, host_slots[rows] - number * self._segment_slots

    def _wait_for_restore(self, layer: int) -> None:
        event = self._restored[layer]
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
            self._restored[layer] = None

    @staticmethod
    def _indices(pairs: SlotPairs) -> tuple[Tensor, Tensor]:
        source, destination = torch.tensor(pairs, dtype=torch.int64).T.contiguous()
        return source, destination


def to_fp8(x: Tensor, scale: float) -> Tensor:
    """x / scale in FP8, rounded to the nearest; what exceeds the range becomes the largest value of its sign."""
    return (x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. In host memory the operating system allocates pages when they are first written, so the unused part of a
    large pool costs neither time nor memory; `torch.zeros` would write all of it."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(*shape)


def check_pairs(name: str, pairs: SlotPairs, source_slots: int, destination_slots: int) -> None:
    """Raises ValueError: a slot lies outside its store, or one is written twice. `name` says which list it is."""
    for source, destination in pairs:
        if not (0 <= source < source_slots and 0 <= destination < destination_slots):
            raise ValueError(f"{name} copy {source} -> {destination}: slots must lie in 0..{source_slots - 1} "
                             f"(source) and 0..{destination_slots - 1} (destination)")
    if len({destination for _, destination in pairs}) != len(pairs):
        raise ValueError(f"{name} copies write a slot twice: {sorted(destination for _, destination in pairs)}")

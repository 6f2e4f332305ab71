"""Memories that lanes address by number: bounds, alignment, whether a byte was ever written, checked at each access.

One class serves all spaces. A memory consists of equal segments, one per thread block (shared) or per thread (local),
or of a single one (global, constant); an address counts from the start of the lane's own segment. Global memory holds
copies of a launch's tensors with gaps between them, so running off the end of one is never an access to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
GAP_BYTES = 1 << 16
GLOBAL_START = 1 << 40  # addresses of global memory start here: a small number is no pointer
ALIGNMENT = 256
WARP = 32
NEVER, WRITTEN, UNDER_WAY = 0, 1, 2  # what is known of a byte
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Violation(Exception):
    """An access broke a rule. `at` is its position among the lanes that made it; the machine knows who they are."""

    def __init__(self, what: str, message: str, at: int) -> None:
        super().__init__(message)
        self.what, self.message, self.at = what, message, at


class Memory:
    """Bytes in segments.

    Args:
        name: for messages.
        segment_bytes: size of a segment; segments: how many.
        start: address of a segment's first byte.
        tracked: whether reading a byte that nothing wrote is an error.
    """

    def __init__(self, name: str, segment_bytes: int, segments: int = 1, start: int = 0, tracked: bool = False) -> None:
        self.name, self.size, self.start = name, segment_bytes, start
        self.stride = -(-segment_bytes // ALIGNMENT) * ALIGNMENT
        self.bytes = np.zeros(max(self.stride * segments, ALIGNMENT), np.uint8)
        self.known = np.zeros(len(self.bytes), np.uint8) if tracked else None
        self._begins = np.array([0], np.int64)
        self._ends = np.array([segment_bytes], np.int64)
        self._names = [name]

    def set_regions(self, regions: Sequence[tuple[int, int, str]]) -> None:
        """Only these (offset, bytes, name) of a segment may be touched; ascending, and apart."""
        self._begins = np.array([region[0] for region in regions], np.int64)
        self._ends = np.array([region[0] + region[1] for region in regions], np.int64)
        self._names = [region[2] for region in regions]

    def load(self, addresses: Array, segments: Array | None, size: int, count: int) -> Array:
        """[lanes, count] raw unsigned numbers of `size` bytes, next to each other from each lane's address on."""
        where = self.place(addresses, segments, size * count, size * count, "loads")
        if self.known is not None:
            self._check_known(where, size * count)
        rows = self.bytes.view(_RAW[size]).reshape(-1, count) if count > 1 else self.bytes.view(_RAW[size])[:, None]
        found: Array = rows[where // (size * count)]
        return found

    def store(self, addresses: Array, segments: Array | None, values: Array) -> None:
        """Stores [lanes, count] raw unsigned numbers. Of lanes that store to one place, the last wins."""
        count, size = values.shape[1], values.itemsize
        where = self.place(addresses, segments, size * count, size * count, "stores")
        self.bytes.view(values.dtype).reshape(-1, count)[where // (size * count)] = values
        self.mark(where, size * count, WRITTEN)

    def place(self, addresses: Array, segments: Array | None, size: int, alignment: int, verb: str) -> Array:
        """Positions in `bytes` of accesses of `size` bytes, checked; `read` and `put` take them.

        Raises:
            Violation: one of them is misaligned or out of bounds.
        """
        offsets = addresses.astype(np.int64) - self.start
        if np.count_nonzero(offsets & (alignment - 1)):
            at = int(np.flatnonzero(offsets & (alignment - 1))[0])
            raise Violation("misaligned access", f"{verb} {size} bytes at {self._words(int(offsets[at]))}", at)
        region = np.searchsorted(self._begins, offsets, "right") - 1
        bad = (region < 0) | (offsets + size > self._ends[region])
        if np.count_nonzero(bad):
            at = int(np.flatnonzero(bad)[0])
            raise Violation("out of bounds", f"{verb} {size} bytes at {self._words(int(offsets[at]))}", at)
        return offsets if segments is None else offsets + segments * self.stride

    def read(self, where: Array, size: int) -> Array:
        """[lanes, size] bytes at places that `place` gave, of any size."""
        return self.bytes[where[:, None] + np.arange(size)]

    def put(self, where: Array, rows: Array) -> None:
        """Writes [lanes, n] bytes to places that `place` gave."""
        self.bytes.reshape(-1, rows.shape[1])[where // rows.shape[1]] = rows
        self.mark(where, rows.shape[1], WRITTEN)

    def mark(self, where: Array, size: int, what: int) -> None:
        """Records the state `what` of `size` bytes at each place."""
        if self.known is not None:
            self.known.reshape(-1, size)[where // size] = what

    def _words(self, offset: int) -> str:
        region = int(np.searchsorted(self._begins, offset, "right")) - 1
        if region < 0:
            return f"address {offset + self.start:#x}, before all {self.name} memory"
        size = int(self._ends[region] - self._begins[region])
        return f"byte {offset - int(self._begins[region])} of {self._names[region]}, which has {size}"

    def _check_known(self, where: Array, size: int) -> None:
        assert self.known is not None
        worst = self.known.reshape(-1, size)[where // size]
        if (worst == WRITTEN).all():
            return
        at = int(np.flatnonzero((worst != WRITTEN).any(axis=1))[0])
        if (worst[at] == UNDER_WAY).any():
            raise Violation("copy under way", f"loads from {self.name} memory what a cp.async has not been waited for",
                            at)
        raise Violation("uninitialised read", f"loads from {self.name} memory what nothing has stored", at)


def sectors_touched(addresses: Array, lanes: Array, size: int) -> int:
    """32-byte sectors of a global access, each once per warp, by `lanes`; `size` bytes each, aligned."""
    if size > WARP:
        raise ValueError(f"an access of {size} bytes spans sectors")
    keys = (lanes // WARP).astype(np.int64) << 48 | (addresses.astype(np.int64) // 32 & ((1 << 48) - 1))
    return len(np.unique(keys))

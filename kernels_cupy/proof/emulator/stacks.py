"""The stacks of the emulator's fibers: one arena per process, shared by all kernels.

Each kernel is a separate library, and hundreds of them stay loaded. If each had its own stacks, with a guard page below
each stack, the process would soon exceed the system's limit of memory maps (65,530 by default on Linux).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

STACK_BYTES = 128 * 1024  # runtime/fibers.h says the same
GUARD_BYTES = 16 * 1024  # at the low end of a stack: an overflow ends the process instead of spoiling a neighbour
MAX_STACKS = 1024

_arenas: list[mmap.mmap] = []  # one, once a kernel ran
_guarded = 0  # its stacks whose lowest bytes are protected


def reserve(threads: int) -> int:
    """The address of stacks for so many threads, STACK_BYTES apart. Later calls return the same address.

    Raises:
        ValueError: more threads than a block may have.
        MemoryError: the system gives no memory, or no more memory maps; nothing was run.
    """
    global _guarded
    if not 0 < threads <= MAX_STACKS:
        raise ValueError(f"{threads} threads: a block has 1 to {MAX_STACKS}")
    try:
        if not _arenas:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            _arenas.append(mmap.mmap(-1, MAX_STACKS * STACK_BYTES, flags))
        start = ctypes.addressof(ctypes.c_char.from_buffer(_arenas[0]))
        while _guarded < threads:
            _protect(start + _guarded * STACK_BYTES, GUARD_BYTES)
            _guarded += 1
    except OSError as error:
        raise MemoryError(f"no stacks for {threads} emulated threads: {error}. The system allows a process only so "
                          "much memory and so many memory maps (Linux: ulimit -v, /proc/sys/vm/max_map_count); end "
                          "other work in this process, or raise the limit") from error
    return start


def _protect(address: int, size: int) -> None:
    library: Any = ctypes.CDLL(None, use_errno=True)
    if library.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

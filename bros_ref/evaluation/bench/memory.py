"""The peak memory of one stretch of work, apart from what the process held before.

Linux keeps the peak of a process's resident memory and lets the process set it back. What was resident already (the
weights of every model that is loaded, libraries) is part of each peak; what earlier work left free is given back first.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

_PROCESS = Path("/proc/self")


class PeakMemory:
    """Use it as a context: `with PeakMemory() as peak: work()`.

    Attributes:
        bytes: the peak of resident memory within the context; None where the system does not tell.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._is_reset = False

    def __enter__(self) -> PeakMemory:
        gc.collect()
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")
            self._is_reset = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_reset:
            [line] = [line for line in (_PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM:")]
            self.bytes = int(line.split()[1]) * 1024

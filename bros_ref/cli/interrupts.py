"""What Ctrl-C does: ends the process at once while it only imports and reads, raises KeyboardInterrupt once it works.

Imports take seconds, need no cleanup, and run foreign code in which a KeyboardInterrupt may be shown as a traceback or
swallowed. This module itself imports almost nothing, because the console script imports it first.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def end_at_once() -> None:
    """From here on Ctrl-C ends the process with status 130; not where the caller has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, if `end_at_once` had changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(signal_number: int, frame: FrameType | None) -> None:
    os._exit(128 + signal_number)

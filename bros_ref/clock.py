"""The only two sources of the current time. A policy never reads a clock: the engine passes the time to it.

So the same scheduler runs live on a `WallClock` and simulated on a `VirtualClock`, and a test can stop time.
"""

from __future__ import annotations

import time
from typing import Protocol

LONGEST_SLEEP_S = 1e6  # operating systems count a sleep in nanoseconds, and refuse centuries


class Clock(Protocol):
    """Seconds since the clock was made. Never goes backwards."""

    def now_s(self) -> float: ...

    def sleep_until(self, time_s: float) -> None:
        """Returns once `now_s() >= time_s`; at once if that has passed."""
        ...


class WallClock:
    """Real seconds, from the monotonic clock."""

    def __init__(self) -> None:
        self._origin_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._origin_s

    def sleep_until(self, time_s: float) -> None:
        while (remaining_s := time_s - self.now_s()) > 0:
            time.sleep(min(remaining_s, LONGEST_SLEEP_S))


class VirtualClock:
    """Time that moves only when told to: simulated runs and tests are exact and repeatable."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, duration_s: float) -> None:
        if not duration_s >= 0:
            raise ValueError(f"time cannot run backwards: advance({duration_s})")
        self._now_s += duration_s

    def sleep_until(self, time_s: float) -> None:
        self._now_s = max(self._now_s, time_s)

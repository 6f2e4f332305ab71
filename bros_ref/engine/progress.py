"""A progress bar for work that takes long. Nothing is shown for short work, or if the output is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONG_S = 2.0


@contextmanager
def long_task(label: str, total: float, *, show: bool = True) -> Iterator[Callable[[float], None]]:
    """Yields a function that takes how much of `total` is done. The bar appears on standard error, if that is a
    terminal, once LONG_S seconds have passed, and goes when the task ends."""
    if not (show and sys.stderr.isatty()):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task, start_s = bar.add_task(label, total=total), time.perf_counter()

    def advance_to(done: float) -> None:
        if not bar.live.is_started and time.perf_counter() - start_s > LONG_S:
            bar.start()
        bar.update(task, completed=done)

    try:
        yield advance_to
    finally:
        bar.stop()

"""How many threads torch should use on a CPU that other processes use too."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bros_ref.config import cdiv

THREAD_ROUNDS = 9
THREAD_MARGIN = 1.15  # more threads are taken if they read at most this much slower than the best: they help prefills


def compute_threads(wanted: int = 0, seconds: Callable[[int], float] | None = None) -> int:
    """How many threads torch should use on a CPU: `wanted`, or for 0 what OMP_NUM_THREADS has set, or the most that are
    worth it now.

    A parallel operation ends with its slowest thread. Beside a process that keeps one of two cores busy, decoding took
    2.6 times as long with two threads as with one; on the quiet machine it took 0.7 times as long. So a short trial
    decides, every time, because neighbours come and go.

    Args:
        seconds: number of threads -> time of the trial's work; by default, that of reading 64 MiB of weights.
    """
    most = torch.get_num_threads()
    if wanted or "OMP_NUM_THREADS" in os.environ:
        return wanted or most
    candidates = sorted({1, cdiv(most, 2), max(1, most - 1), most})
    if len(candidates) == 1:
        return most
    try:
        taken: dict[int, list[float]] = {count: [] for count in candidates}
        seconds = seconds or partial(_read_seconds, torch.ones(32, 1 << 19))
        for _ in range(THREAD_ROUNDS):
            for count in candidates:
                taken[count].append(seconds(count))
    finally:
        torch.set_num_threads(most)
    medians = {count: statistics.median(times) for count, times in taken.items()}
    return max(count for count in candidates if medians[count] <= THREAD_MARGIN * min(medians.values()))


def _read_seconds(data: Tensor, threads: int) -> float:
    """Reads a matrix row by row, each in one parallel operation: this is how decoding reads weights."""
    torch.set_num_threads(threads)
    data[0].sum()  # threads are created here
    start_s = time.perf_counter()
    for row in data:
        row.sum()
    return time.perf_counter() - start_s

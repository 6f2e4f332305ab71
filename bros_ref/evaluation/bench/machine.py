"""The peak rates of a device, and how to time work on it: measured rates are reported as shares of these peaks.

A GPU computes while Python continues, so a time is correct only if the device is idle before the clock starts and
before it stops. `best_seconds` ensures this, and makes a warm-up call first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CPU_READ_BYTES, GPU_READ_BYTES = 1 << 28, 1 << 30  # several times the size of their caches
SMALLEST_MATRIX, LARGEST_MATRIX = 1024, 8192
LONG_ENOUGH_S = 0.005  # a product that takes this long is no longer dominated by its launch


@dataclass(frozen=True)
class Roof:
    """The two measured limits of a device: no program computes faster than the lower of the two allows.

    Attributes:
        flops_per_s: floating-point operations per second of a large matrix product.
        bytes_per_s: bytes per second read by a sum over data that exceeds the caches.
    """

    flops_per_s: float
    bytes_per_s: float

    @classmethod
    def measure(cls, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Roof:
        """Measures both, which takes a second or two. `dtype` is that of the matrices."""
        num_bytes = CPU_READ_BYTES if torch.device(device).type == "cpu" else GPU_READ_BYTES
        return cls(matrix_flops_per_s(device, dtype), read_bytes_per_s(num_bytes, device))

    @property
    def ridge(self) -> float:
        """FLOPs per byte at which arithmetic takes as long as reading."""
        return self.flops_per_s / self.bytes_per_s

    def limit(self, flops_per_byte: float) -> float:
        """The maximum FLOP/s for work of this arithmetic intensity."""
        return min(self.flops_per_s, flops_per_byte * self.bytes_per_s)


def best_seconds(work: Callable[[], Any], device: torch.device | str = "cpu", rounds: int = 3) -> float:
    """Seconds of the fastest of `rounds` calls after one warm-up call; the device is idle before and after each.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    work()
    return min(_seconds(work, torch.device(device)) for _ in range(rounds))


def measured(sizes: Sequence[int], seconds_of: Callable[[int], float], longest_s: float,
             always: int = 3) -> dict[int, float]:
    """Seconds by size, in ascending order. Stops before the first size that would take longer than `longest_s` if time
    grew in proportion to size, so one list of sizes suits a laptop and a GPU. The `always` smallest are never skipped.

    Raises:
        ValueError: there is no size, or `always` is below 1.
    """
    if not sizes or always < 1:
        raise ValueError(f"need at least one size and always >= 1, got {len(sizes)} sizes and always {always}")
    taken: dict[int, float] = {}
    for size in sorted(sizes):
        last = max(taken, default=0)
        if len(taken) >= always and taken[last] * size / last > longest_s:
            break
        taken[size] = seconds_of(size)
    return taken


def read_bytes_per_s(num_bytes: int, device: torch.device | str = "cpu") -> float:
    """Memory bandwidth: the best of fifteen sums over `num_bytes` bytes of float32."""
    data = torch.ones(num_bytes // 4, device=device)
    return num_bytes / best_seconds(data.sum, device, rounds=15)


def matrix_flops_per_s(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of products of square matrices: the best of five rounds per size. Sizes double from SMALLEST_MATRIX until
    a product takes LONG_ENOUGH_S."""
    size, best = SMALLEST_MATRIX, 0.0
    while size <= LARGEST_MATRIX:
        a = torch.randn(size, size, device=device).to(dtype)
        time_s = best_seconds(lambda a=a: a @ a, device, rounds=5)  # type: ignore[misc]
        best = max(best, 2 * size**3 / time_s)
        if time_s >= LONG_ENOUGH_S:
            break
        size *= 2
    return best


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    _wait_for(device)
    start_s = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - start_s


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

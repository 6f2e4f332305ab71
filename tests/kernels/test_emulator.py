"""The emulator: right answers, every check shown to fail where it must, and silence on correct programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels_cupy.device import Kernel
from kernels_cupy.emulator import Emulator, KernelFault

VECTOR_ADD = """
extern "C" __global__ void add(const float* a, const float* b, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = a[i] + b[i];
}
"""
BLOCK_SUM = """
extern "C" __global__ void total(const float* a, float* out, int n) {
    __shared__ float part[64];
    int t = threadIdx.x;
    part[t] = t < n ? a[t] : 0.0f;
    __syncthreads();
    for (int half = 32; half > 0; half /= 2) {
        if (t < half) part[t] += part[t + half];
        __syncthreads();
    }
    if (t == 0) out[0] = part[0];
}
"""
WARP_SUM = """
extern "C" __global__ void total(const float* a, float* out, int n) {
    float x = a[threadIdx.x];
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    out[threadIdx.x] = x;
}
"""


def run(text: str, function: str, arguments: list, grid: int = 1, block: int = 32, shared: int = 0,
        **options: object) -> Emulator:
    """Runs a kernel given as text; returns the device, for its counters."""
    emulator = Emulator(sources={"test.cu": text}, **options)  # type: ignore[arg-type]
    emulator.launch(Kernel("test.cu", function), (grid, 1, 1), (block, 1, 1), shared, arguments)
    return emulator


def line_of(text: str, fragment: str) -> int:
    """The number of the only line that holds the fragment."""
    lines = [number for number, line in enumerate(text.splitlines(), 1) if fragment in line]
    assert len(lines) == 1, (fragment, lines)
    return lines[0]


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("order", ["forward", "reverse", 7])
def test_vector_add(checks: bool, order: str | int) -> None:
    a, b, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    run(VECTOR_ADD, "add", [a, b, out, np.int32(1000)], grid=8, block=128, checks=checks, order=order)
    assert torch.equal(out, a + b)


@pytest.mark.parametrize("order", ["forward", "reverse", 7])
def test_shared_memory_reduction(order: str | int) -> None:
    a, out = torch.arange(64.0), torch.zeros(1)
    run(BLOCK_SUM, "total", [a, out, np.int32(64)], block=64, order=order)
    assert out.item() == 2016


def test_warp_shuffle() -> None:
    a, out = torch.arange(32.0), torch.zeros(32)
    run(WARP_SUM, "total", [a, out, np.int32(32)])
    assert (out == 496).all()


def test_missing_barrier_is_named_with_its_line() -> None:
    text = BLOCK_SUM.replace("    __syncthreads();\n    for", "    for")
    with pytest.raises(KernelFault) as caught:
        run(text, "total", [torch.arange(64.0), torch.zeros(1), np.int32(64)], block=64)
    assert caught.value.what in ("race", "uninitialised read")
    assert caught.value.location.line == line_of(text, "part[t] +=")

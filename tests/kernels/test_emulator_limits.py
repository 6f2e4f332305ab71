"""What the emulator takes of the process: one set of stacks for all kernels; and an end for a kernel that has none."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kernels.support import needs_emulator

from kernels_cupy.device import Kernel
from kernels_cupy.proof.emulator import Emulator, KernelFault, stacks

pytestmark = needs_emulator
NUM_KERNELS = 12
SCALE = """
extern "C" __global__ void scale(const float* a, float* out, float factor) {
    out[threadIdx.x] = a[threadIdx.x] * factor;
    __syncthreads();
}
"""
ENDLESS = {
    "with an access": "for (int i = 0; i < 8; i += n) out[0] = a[i];",
    "with a shuffle": "float x = a[0]; while (x < 9) x = __shfl_xor_sync(0xffffffffu, x, 1); out[threadIdx.x] = x;",
    "with a barrier": "for (int i = 0; i < 8; i += n) __syncthreads();",
    "empty": "for (volatile int i = 0; i < 8; i += n) {}",
    "of one thread": "if (threadIdx.x == 3) for (volatile int i = 0; i < 8; i += n) {}",
}


def num_maps() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def scaled(device: Emulator, text: str, threads: int) -> None:
    a, out = torch.randn(threads), torch.zeros(threads)
    device.launch(Kernel("scale.cu", "scale"), (1, 1, 1), (threads, 1, 1), 0, [a, out, np.float32(3)])
    assert torch.equal(out, a * 3)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the lines of /proc/self/maps")
def test_many_kernels_share_one_set_of_stacks() -> None:
    def run(i: int) -> None:
        text = f"// kernel {i}{SCALE}"
        scaled(Emulator(sources={"scale.cu": text}), text, 256)

    run(0)  # the stacks are made
    before = num_maps()
    for i in range(1, NUM_KERNELS + 1):
        run(i)
    per_kernel = (num_maps() - before) / NUM_KERNELS
    # a library of its own has code, constants, data, variables and room for them: not two maps for each of 256 threads
    assert per_kernel < 12, per_kernel


def test_stacks_that_cannot_be_had_are_an_error_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(stacks, "_arenas", [])
    monkeypatch.setattr(stacks, "_guarded", 0)
    monkeypatch.setattr(stacks, "_protect", refuse)
    with pytest.raises(MemoryError, match=r"64 emulated threads.*Cannot allocate memory.*max_map_count"):
        scaled(Emulator(sources={"scale.cu": SCALE}), SCALE, 64)
    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(stacks, "_arenas", [])
    with pytest.raises(MemoryError, match="no stacks"):
        scaled(Emulator(sources={"scale.cu": SCALE}), SCALE, 64)
    monkeypatch.undo()
    scaled(Emulator(sources={"scale.cu": SCALE}), SCALE, 64)


LITTLE_MEMORY = """
import resource, numpy as np, torch
from kernels_cupy.device import Kernel
from kernels_cupy.proof.emulator import Emulator
text = 'extern "C" __global__ void f(char* a) { a[threadIdx.x] = 1; }'
device, a = Emulator(sources={"f.cu": text}), torch.zeros(1 << 26, dtype=torch.int8)
device.launch(Kernel("f.cu", "f"), (1, 1, 1), (32, 1, 1), 0, [a[:64]])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), -1))
try:
    device.launch(Kernel("f.cu", "f"), (1, 1, 1), (32, 1, 1), 0, [a])
except MemoryError as error:
    print(error, int(a[:64].sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_tensors_too_large_to_check_are_an_error_and_not_a_crash() -> None:
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no memory to check 67108864 bytes" in done.stdout
    assert done.stdout.strip().endswith(" 32")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_every_stack_has_a_guard_below_it() -> None:
    start = stacks.reserve(3)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    guards = {int(span.split("-")[0], 16) for span, access, *_ in maps if access.startswith("---")}
    assert {start + i * stacks.STACK_BYTES for i in range(3)} <= guards
    for threads in (0, stacks.MAX_STACKS + 1):
        with pytest.raises(ValueError, match="a block has 1 to"):
            stacks.reserve(threads)


def test_the_header_and_python_agree_on_a_stack() -> None:
    header = (Path(stacks.__file__).parent / "runtime" / "fibers.h").read_text()
    assert f"STACK_BYTES = {stacks.STACK_BYTES // 1024} * 1024" in header


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_loop_is_a_fault(name: str, checks: bool) -> None:
    text = f'extern "C" __global__ void f(const float* a, float* out, int n) {{\n{ENDLESS[name]}\n}}'
    device = Emulator(checks=checks, sources={"loop.cu": text}, step_limit=10_000)
    with pytest.raises(KernelFault, match="goes on") as caught:
        device.launch(Kernel("loop.cu", "f"), (1, 1, 1), (32, 1, 1), 0, [torch.zeros(8), torch.zeros(32), np.int32(0)])
    assert caught.value.what == "endless loop"
    assert caught.value.location is None or caught.value.location.line == 2
    if name == "of one thread":
        assert caught.value.thread == (3, 0, 0)


def test_a_long_loop_that_ends_is_none() -> None:
    text = 'extern "C" __global__ void f(float* out, int n) { for (volatile int i = 0; i < n; i++) {} out[0] = 1; }'
    out = torch.zeros(1)
    for limit, fits in ((1 << 20, True), (1 << 10, False)):
        device = Emulator(sources={"loop.cu": text}, step_limit=limit)
        arguments = [out.zero_(), np.int32(10_000)]
        if fits:
            device.launch(Kernel("loop.cu", "f"), (1, 1, 1), (1, 1, 1), 0, arguments)
            assert out.item() == 1
        else:
            with pytest.raises(KernelFault):
                device.launch(Kernel("loop.cu", "f"), (1, 1, 1), (1, 1, 1), 0, arguments)
    with pytest.raises(ValueError, match="step_limit"):
        Emulator(step_limit=0)

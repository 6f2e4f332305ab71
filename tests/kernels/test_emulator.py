"""The emulator: right answers, every check shown to fail where it must, and silence on correct programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels.support import needs_emulator

from kernels_cupy.device import Kernel
from kernels_cupy.proof.emulator import CompilerMissing, Emulator, KernelFault, build

pytestmark = needs_emulator
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


# ---- every check can fail: a kernel, the rule it breaks, and a piece of the line to be named
HEAD = 'extern "C" __global__ void k(float* a, float* out) {\n    int t = threadIdx.x;\n'
FAULTS = {
    "no barrier before a neighbour's value": ("race", "out[t] =", """
    __shared__ float s[64];
    s[t] = 0;
    __syncthreads();
    s[t] = a[t];
    out[t] = s[63 - t];
}"""),
    "no barrier before it is overwritten": ("race", "s[t] = 0;", """
    __shared__ float s[64];
    s[t] = a[t];
    __syncthreads();
    out[t] = s[(t + 32) % 64];
    s[t] = 0;
}"""),
    "no __syncwarp": ("race", "out[t] =", """
    __shared__ float s[64];
    s[t] = 0;
    __syncthreads();
    s[t] = a[t];
    out[t] = s[t ^ 1];
}"""),
    "a __syncwarp of too few lanes": ("race", "out[t] =", """
    __shared__ float s[64];
    s[t] = 0;
    __syncthreads();
    s[t] = a[t];
    __syncwarp(t % 32 < 16 ? 0xffffu : 0xffff0000u);
    out[t] = s[t ^ 16];
}"""),
    "a __syncwarp where a __syncthreads is needed": ("race", "out[t] =", """
    __shared__ float s[64];
    s[t] = 0;
    __syncthreads();
    s[t] = a[t];
    __syncwarp();
    out[t] = s[t ^ 32];
}"""),
    "a shuffle is no barrier": ("race", "out[t] =", """
    __shared__ float s[64];
    s[t] = a[t];
    float x = __shfl_xor_sync(0xffffffffu, a[t], 1);
    out[t] = s[t ^ 1] + x;
}"""),
    "two threads store one place": ("race", "out[0] =", "    out[0] = a[t];\n}"),
    "barrier in divergent code": ("divergent barrier", "__syncthreads(); // odd", """
    if (t & 1) {
        __syncthreads(); // odd
    } else {
        __syncthreads();
    }
    out[t] = 0;
}"""),
    "barrier that some threads skip": ("divergent barrier", "__syncthreads()", """
    if (t < 40) __syncthreads();
    out[t] = 0;
}"""),
    "shuffle in divergent code": ("deadlock", "__shfl", """
    float x = a[t];
    if (t != 5) x = __shfl_xor_sync(0xffffffffu, x, 1);
    __syncthreads();
    out[t] = x;
}"""),
    "two different collectives": ("divergent collective", "__any_sync", """
    float x = a[t];
    if (t % 32 < 31) x = __shfl_xor_sync(0xffffffffu, x, 1);
    else x = __any_sync(0xffffffffu, x > 0);
    out[t] = x;
}"""),
    "a mask without the caller": ("divergent collective", "__ballot", """
    out[t] = __ballot_sync(0xfffffffeu, 1);
}"""),
    "a shuffle from a lane that has left": ("undefined shuffle", "__shfl", """
    if (t % 32 == 31) return;
    out[t] = __shfl_down_sync(0x7fffffffu, a[t], 1);
}"""),
    "read past the end": ("out of bounds", "out[t] =", "    out[t] = a[t + 1];\n}"),
    "read before the start": ("out of bounds", "out[t] =", "    out[t] = a[t - 1];\n}"),
    "store past the end": ("out of bounds", "out[t + 1]", "    out[t + 1] = a[t];\n}"),
    "shared memory past the end": ("out of bounds", "s[t + 1]", """
    __shared__ float s[64];
    __shared__ float other[64];
    other[t] = 0;
    s[t + 1] = a[t];
    out[t] = 0;
}"""),
    "dynamic shared memory past the end": ("out of bounds", "d[t + 1]", """
    extern __shared__ float d[];
    d[t + 1] = a[t];
    out[t] = 0;
}"""),
    "uninitialised shared memory": ("uninitialised read", "out[t] =", """
    __shared__ float s[65];
    s[t] = a[t];
    __syncthreads();
    out[t] = s[t + 1];
}"""),
    "unaligned vector": ("misaligned access", "*(float4*)", """
    float4 v = *(float4*)(a + (t % 8) * 2);
    out[t] = v.x;
}"""),
    "cp.async read before it is waited for": ("race", "out[t] =", """
    __shared__ float s[64];
    emu_cp_async(s + t, a + t, 4, 4);
    emu_cp_async_commit();
    out[t] = s[t];
}"""),
    "cp.async waited for one group too late": ("race", "out[t] =", """
    __shared__ float s[2][64];
    for (int i = 0; i < 2; i++) emu_cp_async(s[i] + t, a + t, 4, 4), emu_cp_async_commit();
    emu_cp_async_wait(1);
    out[t] = s[1][t];
}"""),
    "another thread's cp.async without a barrier": ("race", "out[t] =", """
    __shared__ float s[64];
    s[t] = 0;
    __syncthreads();
    emu_cp_async(s + t, a + t, 4, 4);
    emu_cp_async_commit();
    emu_cp_async_wait(0);
    out[t] = s[63 - t];
}"""),
    "cp.async into what others still read": ("race", "emu_cp_async(s", """
    __shared__ float s[64];
    s[t] = a[t];
    __syncthreads();
    out[t] = s[t ^ 32];
    emu_cp_async(s + t, a + t, 4, 4);
}"""),
    "a trap": ("trap", "__trap", "    if (t == 3) __trap();\n}"),
    "a stray pointer": ("out of bounds", "out[t] =", "    out[t] = *(float*)(size_t)(8 * t + 64);\n}"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_check_can_fail(name: str) -> None:
    what, fragment, body = FAULTS[name]
    text = HEAD + body
    a, out = torch.randn(64), torch.zeros(64)
    for order in ("forward", "reverse", 11):
        with pytest.raises(KernelFault) as caught:
            run(text, "k", [a, out], block=64, shared=256, order=order)
        assert caught.value.what == what, str(caught.value)
        assert caught.value.location is not None
        lines = {caught.value.location.line, *([caught.value.other.line] if caught.value.other else [])}
        assert line_of(text, fragment) in lines, str(caught.value)
        assert caught.value.location.file == "test.cu"
        assert (out == 0).all(), "a launch that faults changes nothing"


CORRECT = {
    "barriers": """
    __shared__ float s[64], other[2][64];
    for (int i = 0; i < 3; i++) {
        s[t] = a[t];
        __syncthreads();
        other[i % 2][t] = s[63 - t];
        __syncthreads();
    }
    out[t] = other[0][t];
}""",
    "warp barriers of halves": """
    __shared__ float s[64];
    s[t] = a[t];
    __syncwarp(t % 32 < 16 ? 0xffffu : 0xffff0000u);
    float x = s[t ^ 8];
    __syncwarp();
    s[t ^ 16] = x;
    __syncwarp();
    out[t] = s[t];
}""",
    "a ring of cp.async": """
    extern __shared__ float d[];
    __shared__ float s[2][64];
    d[t] = 0;
    for (int i = 0; i < 4; i++) {
        emu_cp_async(s[i % 2] + t, a + t, 4, i == 3 ? 0 : 4);
        emu_cp_async_commit();
        if (i == 0) continue;
        emu_cp_async_wait(1);
        __syncthreads();
        d[t] += s[(i + 1) % 2][63 - t];
        __syncthreads();
    }
    out[t] = d[t];
}""",
    "atomics": "    atomicAdd(out + t % 4, a[t]);\n}",
    "lanes that leave early": """
    if (t % 32 > 15) return;
    out[t] = __shfl_xor_sync(0xffffffffu, a[t], 1);
}""",
}


@pytest.mark.parametrize("name", CORRECT)
def test_correct_programs_raise_nothing(name: str) -> None:
    a, results = torch.randn(64), []
    for order in ("forward", "reverse", 11):
        for cp_async in ("late", "early"):
            for _ in range(2):  # what one launch left in shared memory is nothing to the next
                out = torch.zeros(64)
                run(HEAD + CORRECT[name], "k", [a, out], grid=1, block=64, shared=256, order=order, cp_async=cp_async)
                results.append(out)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_shared_memory_of_another_block_is_not_initialised() -> None:
    text = HEAD + """
    __shared__ float s[64];
    if (blockIdx.x == 0) s[t] = a[t];
    __syncthreads();
    if (blockIdx.x == 1) out[t] = s[t];
}"""
    with pytest.raises(KernelFault, match="uninitialised read") as caught:
        run(text, "k", [torch.randn(64), torch.zeros(64)], grid=2, block=64)
    assert caught.value.block == (1, 0, 0)


def test_tensors_that_touch_are_kept_apart() -> None:
    both = torch.randn(2, 64)
    with pytest.raises(KernelFault, match="byte offset 256 of argument 0"):
        run(HEAD + "    out[t] = a[t + 1];\n}", "k", [both[0], both[1]], block=64)


# ---- races between blocks: only a fence and an atomic order them
LAST_BLOCK = """
extern "C" __global__ void k(float* part, int* arrived, float* out) {
    __shared__ int last;
    part[blockIdx.x * 32 + threadIdx.x] = blockIdx.x + threadIdx.x;
    FENCE
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(arrived, 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    float sum = 0;
    for (int b = 0; b < gridDim.x; b++) sum += part[b * 32 + (threadIdx.x ^ 1)];
    out[threadIdx.x] = sum;
    if (threadIdx.x == 0) *arrived = 0;
}
"""


def test_the_last_block_may_read_what_the_others_published() -> None:
    arrived, out = torch.zeros(1, dtype=torch.int32), torch.zeros(32)
    for _ in range(2):
        run(LAST_BLOCK.replace("FENCE", "__threadfence();"), "k", [torch.zeros(128), arrived, out], grid=4)
        assert out[0] == 6 + 4
        assert arrived.item() == 0


def test_without_a_fence_the_last_block_races() -> None:
    text = LAST_BLOCK.replace("FENCE", "")
    with pytest.raises(KernelFault, match="no fence and atomic in between") as caught:
        run(text, "k", [torch.zeros(128), torch.zeros(1, dtype=torch.int32), torch.zeros(32)], grid=4)
    assert caught.value.location.line == line_of(text, "sum += part")
    assert caught.value.other.line == line_of(text, "part[blockIdx.x * 32 + threadIdx.x] =")


# ---- ownership of slots
READ_SLOT = """
extern "C" __global__ void k(const float* cache, const int* slots, float* out) {
    int slot = slots[blockIdx.x];
    float x = cache[slot * 32 + threadIdx.x];
    out[blockIdx.x * 32 + threadIdx.x] = slot < 100 ? 0 : x;  // masked out: the answer never shows the read
}
"""


def read_slots(slots: list[int], readable: list[int], serves: object = None) -> None:
    cache, emulator = torch.randn(4, 32), Emulator(sources={"test.cu": READ_SLOT})
    emulator.guard(cache, torch.tensor(readable), serves=serves)  # type: ignore[arg-type]
    emulator.launch(Kernel("test.cu", "k"), (len(slots), 1, 1), (32, 1, 1), 0,
                    [cache, torch.tensor(slots, dtype=torch.int32), torch.zeros(len(slots) * 32)])


def test_own_slots_may_be_read() -> None:
    read_slots([0, 2], [0, -1, 1, -2], serves=lambda x, y, z: x)
    read_slots([3, 3], [0, -1, 1, -2], serves=lambda x, y, z: x)


def test_a_foreign_slot_may_not_be_read_even_if_masked_out() -> None:
    with pytest.raises(KernelFault, match=r"foreign slot .* reads slot 1 of argument 0, which no thread") as caught:
        read_slots([0, 1], [0, -1, 1, -2])
    assert caught.value.block == (1, 0, 0)
    with pytest.raises(KernelFault, match="it is sequence 1's, this block serves 0"):
        read_slots([2, 2], [0, -1, 1, -2], serves=lambda x, y, z: x)


def test_a_guarded_tensor_is_stored_to_only_where_allowed() -> None:
    a, out, slots = torch.randn(64), torch.zeros(64), torch.full((2,), -2)
    for writable in (None, torch.tensor([-2, -1])):
        emulator = Emulator(sources={"test.cu": HEAD + "    out[t] = a[t];\n}"})
        emulator.guard(out, slots, writable)
        with pytest.raises(KernelFault, match=f"stores to slot {0 if writable is None else 1}"):
            emulator.launch(Kernel("test.cu", "k"), (1, 1, 1), (64, 1, 1), 0, [a, out])
        emulator.unguard()
        emulator.launch(Kernel("test.cu", "k"), (1, 1, 1), (64, 1, 1), 0, [a, out])


# ---- counters and the access log
def sites(body: str, **options: object) -> Emulator:
    return run(HEAD + body, "k", [torch.randn(64 * 64), torch.zeros(64 * 64)], block=32, shared=64 * 1024, **options)


@pytest.mark.parametrize(("index", "sectors"), [("t", 4), ("t * 2", 8), ("t * 8", 32), ("0", 1), ("t + 1", 5)])
def test_sectors_of_a_load(index: str, sectors: int) -> None:
    counters = sites(f"    out[t] = a[{index}];\n}}", counters=True).counters
    assert counters is not None
    assert counters.total("sectors", "global", "load") == sectors
    assert counters.total("sectors", "global", "store") == 4
    assert counters.total("requests", "global") == 2


def test_a_vector_load_is_one_request() -> None:
    counters = sites("    float4 v = ((float4*)a)[t];\n    out[t] = v.x + v.y + v.z + v.w;\n}", counters=True).counters
    assert counters is not None
    assert counters.total("requests", "global", "load") == 1
    assert counters.total("bytes", "global", "load") == 512
    assert counters.total("sectors", "global", "load") == 16


@pytest.mark.parametrize(("index", "worst"), [("t", 1), ("t * 2", 2), ("t * 32", 32), ("t * 33", 1), ("0 * t + 5", 1)])
def test_bank_conflicts(index: str, worst: int) -> None:
    body = f"""
    extern __shared__ float s[];
    for (int i = t; i < 1100; i += 32) s[i] = 0;
    __syncwarp();
    out[t] = s[{index}];
}}"""
    counters = sites(body, counters=True).counters
    assert counters is not None
    assert counters.worst_conflict == worst


def test_the_access_log() -> None:
    log = run(VECTOR_ADD, "add", [torch.randn(50), torch.randn(50), torch.zeros(50), np.int32(50)], grid=2,
              record=True).accesses
    assert len(log) == 150
    entry = next(e for e in log if e.block == 1 and e.lane == 7 and e.kind == "store")
    assert (entry.warp, entry.step, entry.argument, entry.offset, entry.size) == (0, 3, 2, 39 * 4, 4)
    assert entry.line is not None
    assert entry.line.line == line_of(VECTOR_ADD, "out[i] =")
    assert len(run(VECTOR_ADD, "add", [torch.randn(50), torch.randn(50), torch.zeros(50), np.int32(50)], grid=2,
                   record=10).accesses) == 10


# ---- tensor cores and 16-bit numbers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_and_ldmatrix_multiply_matrices(dtype: torch.dtype) -> None:
    text = """
extern "C" __global__ void k(const unsigned* a, const unsigned* b, float* d) {
    __shared__ unsigned sa[128], sb[64];
    for (int i = threadIdx.x; i < 128; i += 32) sa[i] = a[i];
    for (int i = threadIdx.x; i < 64; i += 32) sb[i] = b[i];
    __syncwarp();
    int l = threadIdx.x;
    unsigned fa[4], fb[2];
    float acc[4] = {};
    emu_ldmatrix_x4(fa, sa + (l % 16) * 8 + l / 16 * 4);
    emu_ldmatrix_x2_trans(fb, sb + (l % 16) * 4);
    MMA(acc, fa, fb);
    for (int i = 0; i < 4; i++) d[(l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2] = acc[i];
}
""".replace("MMA", "emu_mma_m16n8k16_" + ("f16" if dtype == torch.float16 else "bf16"))
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.zeros(16, 8)
    run(text, "k", [a, b, d])
    torch.testing.assert_close(d, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "scalar"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_every_16_bit_number_converts_as_torch_does(dtype: torch.dtype, scalar: int) -> None:
    text = """
#include "common.cuh"
extern "C" __global__ void k(const scalar_t* in, float* wide, const float* from, scalar_t* narrow) {
    int i = blockIdx.x * 256 + threadIdx.x;
    wide[i] = to_float(in[i]);
    narrow[i] = from_float(from[i]);
}
"""
    every = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    exact = every.float()
    bits = exact.view(torch.int32)
    ties = torch.where(exact.isfinite(), bits + torch.randint(0, 1 << 17, bits.shape, dtype=torch.int32), bits)
    wide, narrow = torch.zeros(2**16), torch.zeros(2**16, dtype=dtype)
    emulator = Emulator(checks=False, sources={"test.cu": text})
    emulator.launch(Kernel("test.cu", "k", (("SCALAR", str(scalar)),)), (256, 1, 1), (256, 1, 1), 0,
                    [every, wide, ties.view(torch.float32), narrow])
    torch.testing.assert_close(wide, exact, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(narrow, ties.view(torch.float32).to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- what the text may look like, and what a launch must
def test_shared_arrays_in_templates_and_headers() -> None:
    text = """
template <int N> __device__ float reversed(float x) {
    __shared__ float s[N][2];
    s[threadIdx.x][N % 2] = x;
    __syncthreads();
    float r = s[N - 1 - threadIdx.x][N % 2];
    __syncthreads();
    return r;
}
extern "C" __global__ void k(const float* a, float* out) {
    extern __shared__ __align__(16) unsigned char raw[];
    __shared__ __align__(16) float x[
        64], y[64];
    x[threadIdx.x] = a[threadIdx.x];
    y[threadIdx.x] = 0;
    ((float*)raw)[threadIdx.x] = reversed<64>(x[threadIdx.x]) + y[threadIdx.x];
    out[threadIdx.x] = ((float*)raw)[threadIdx.x];
}
"""
    a, out = torch.randn(64), torch.zeros(64)
    run(text, "k", [a, out], block=64, shared=256)
    assert torch.equal(out, a.flip(0))


def test_a_launch_that_cannot_be_is_refused() -> None:
    a, n = torch.zeros(4), np.int32(4)
    with pytest.raises(TypeError, match="takes 4 arguments, got 3"):
        run(VECTOR_ADD, "add", [a, a, n])
    with pytest.raises(TypeError, match="argument 3"):
        run(VECTOR_ADD, "add", [a, a, a, np.float32(4)])
    with pytest.raises(ValueError, match="contiguous"):
        run(VECTOR_ADD, "add", [a, a, torch.zeros(4, 2)[:, 0], n])
    with pytest.raises(ValueError, match="1024"):
        run(VECTOR_ADD, "add", [a, a, a, n], block=2048)
    with pytest.raises(ValueError, match="shared"):
        run(VECTOR_ADD, "add", [a, a, a, n], shared=1 << 20)
    with pytest.raises(RuntimeError, match="refused the kernel"):
        run("nonsense", "add", [a])
    with pytest.raises(ValueError, match="cp_async"):
        Emulator(cp_async="never")
    with pytest.raises(ValueError, match="do not divide"):
        Emulator().guard(a, torch.zeros(3))


def test_without_a_compiler_the_error_names_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing, match="apt-get install g"):
        build.compiler.__wrapped__()


def test_one_tensor_may_be_two_arguments() -> None:
    both = torch.arange(64.0)
    run(HEAD + "    float x = a[t];\n    __syncthreads();\n    out[63 - t] = x;\n}", "k", [both, both], block=64)
    assert torch.equal(both, torch.arange(64.0).flip(0))

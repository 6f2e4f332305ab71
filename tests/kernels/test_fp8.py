"""An fp8 KV cache: every kernel that reads or writes one, emulated and through its PTX, against float64 on the numbers
that the cache holds; conversions against torch's, byte by byte; and what fp8 itself costs in accuracy."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from kernels.support import needs_emulator

from kernels_cupy.device import Gpu, Kernel
from kernels_cupy.heads import FP8, Heads
from kernels_cupy.launch import Problem, best_step, copy_slots, paged_attention, store_kv, why_not, workspace_floats
from kernels_cupy.launch_fused import rope_store
from kernels_cupy.launch_prefill import PLAIN, TENSOR_CORES, prefill_attention, prefill_launch
from kernels_cupy.proof.compile import why_unavailable
from kernels_cupy.proof.contract import FP8_LARGEST, FP8_NANS, FP8_SCALES, Batch, decode, prefill, quantised
from kernels_cupy.proof.emulator import Emulator
from kernels_cupy.proof.far import check_far_store_fp8, far_batch
from kernels_cupy.proof.fused import check_rope_store, check_store_fp8
from kernels_cupy.proof.ptx import PtxDevice

WHY_NOT = why_unavailable()
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT], ids=str)
SMALL = Heads(8, 2, 64, 16, HALF, FP8)


@pytest.fixture(params=["emulated", "PTX of sm_75", "PTX of sm_80", "PTX of sm_90"])
def device(request):
    if request.param == "emulated":
        if needs_emulator.args[0]:
            pytest.skip(needs_emulator.kwargs["reason"])
        return Emulator()
    if WHY_NOT is not None:
        pytest.skip(WHY_NOT)
    return PtxDevice(int(request.param[-2:]))


def fp8(num_heads, num_kv_heads, head_dim, block_size, dtype=HALF):
    return Heads(num_heads, num_kv_heads, head_dim, block_size, dtype, FP8)


def ragged(rng, heads, steepness=1.0):
    size = heads.block_size
    lengths = [1, size - 1, size, size + 1, 3 * size + 2, int(rng.integers(30, 90))]
    return Batch.draw(rng, heads, [1] * len(lengths), [max(1, length) for length in lengths], steepness=steepness)


def mixed(rng, heads):
    """A decode of one token, whole prompts, chunks, a decode of a longer context."""
    size = heads.block_size
    contexts = [1, max(size - 1, 1), size, size + 1, int(rng.integers(65, 100))]
    return Batch.draw(rng, heads, [1, max(size - 1, 1), 1, min(size, 7), int(rng.integers(20, 60))], contexts)


# ----- conversions


DECODE_ALL = """
#include "common.cuh"
extern "C" __global__ void k(const unsigned char* bytes, float* single, float* four) {
    single[threadIdx.x] = to_float(bytes[threadIdx.x]);
    if (threadIdx.x < 64) decode(((const unsigned*)bytes)[threadIdx.x], four + 4 * threadIdx.x);
}
"""


def test_every_byte_is_decoded_exactly(device):
    every, found = torch.arange(256).to(torch.uint8), [torch.zeros(256), torch.zeros(256)]
    device.sources["test.cu"] = DECODE_ALL
    kernel = Kernel("test.cu", "k", (("SCALAR", "1"), ("KV_FP8", "1")))
    device.launch(kernel, (1, 1, 1), (256, 1, 1), 0, [every, *found])
    wanted = every.view(FP8).float()
    assert wanted.isnan().nonzero().flatten().tolist() == list(FP8_NANS)
    wanted[list(FP8_NANS)] = torch.tensor([480.0, -480.0])  # finite, so that a weight of 0 cancels them
    for values in found:
        assert torch.equal(values * 256, wanted)
        assert torch.equal(values.signbit(), wanted.signbit()), "zeros keep their sign"


def values_of(dtype):
    """[T, 2, 64]: every number of a 16-bit dtype, or floats at, beside and between the numbers that fp8 can hold."""
    if dtype is FLOAT:
        held = torch.arange(256).to(torch.uint8).view(FP8).float()
        held = held[held.isfinite()].sort().values
        ties = (held[1:] + held[:-1]) / 2
        beside = [torch.nextafter(each, torch.tensor(to)) for each in (held, ties) for to in (-torch.inf, torch.inf)]
        more = torch.tensor([464.0, -464.0, 465.0, 1e4, -1e38, torch.inf, -torch.inf, 1e-40, -1e-40, 2.0**-10, -0.0])
        values = torch.cat([held, ties, *beside, more])
    else:
        values = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)
        values = values[~values.isnan()]
    return torch.cat([values, torch.zeros(-len(values) % 128, dtype=dtype)]).view(-1, 2, 64)


@DTYPES
@pytest.mark.parametrize("scales", [(1.0, 1.0), FP8_SCALES], ids=str)
def test_rows_are_stored_as_torch_converts_them(device, dtype, scales):
    store = partial(store_kv, device)
    check_store_fp8(lambda *tensors: store(*tensors, *scales), values_of(dtype), scales)


@DTYPES
def test_rope_store_converts_as_torch_does_where_nothing_turns(device, dtype):
    values = values_of(dtype)
    values = values.nan_to_num(posinf=0.0, neginf=0.0)  # times a sine of 0 they would be no numbers
    values[values.float().abs() < 1e-37] = 0.0  # and zeros change their sign
    at, cos, sin = torch.zeros(len(values), dtype=torch.int32), torch.ones(1, 32), torch.zeros(1, 32)

    def store(k, v, slots, k_cache, v_cache):
        q, qkv = torch.zeros(len(k), 2, 64, dtype=dtype), torch.cat([k, k, v], dim=1)
        rope_store(device, qkv, at, slots, cos, sin, k_cache, v_cache, q, None, 0.0, *FP8_SCALES)
        assert torch.equal(q, k), "queries are not quantised"

    check_store_fp8(store, values, FP8_SCALES)


@DTYPES
@pytest.mark.parametrize(("shape", "rotary", "qk_norm"), [
    ((4, 2, 64, 16), 64, False), ((3, 1, 80, 16), 32, True), ((2, 1, 128, 16), 128, True)])
def test_keys_are_turned_and_rounded_once(device, rng, dtype, shape, rotary, qk_norm):
    for num_tokens in (1, 17):
        check_rope_store(device, rng, Heads(*shape, dtype, FP8), num_tokens, rotary, qk_norm)


def test_what_is_no_number_is_stored_as_such(device):
    rows = torch.full((1, 1, 16), torch.nan)
    caches = [torch.zeros(1, 1, 1, 16, dtype=FP8) for _ in range(2)]
    store_kv(device, rows, rows, torch.zeros(1, dtype=torch.int32), *caches, 2.0, 2.0)
    assert all(bool(cache.float().isnan().all()) for cache in caches)


# ----- attention


@DTYPES
def test_decode_step_3(device, rng, dtype):
    batch = ragged(rng, fp8(8, 2, 64, 16, dtype))
    for num_splits in (1, 3):
        batch.check(decode(device, batch, 3, num_splits))


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_decode_step_5(device, rng, dtype):
    if dtype is BF16 and isinstance(device, PtxDevice) and device.gpu.arch < 80:
        pytest.skip("no bf16 on its tensor cores")
    batch = ragged(rng, fp8(8, 2, 64, 16, dtype))
    for num_sms in (1, 7):
        batch.check(decode(device, batch, 5, num_sms=num_sms))


@DTYPES
def test_prefill_0(device, rng, dtype):
    batch = mixed(rng, fp8(4, 2, 64, 16, dtype))
    batch.check(prefill(device, batch, False))


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_prefill_1(device, rng, dtype):
    if dtype is BF16 and isinstance(device, PtxDevice) and device.gpu.arch < 80:
        pytest.skip("no bf16 on its tensor cores")
    batch = mixed(rng, fp8(4, 2, 64, 16, dtype))
    batch.check(prefill(device, batch))


SHAPES = [fp8(4, 4, 96, 32, BF16), fp8(12, 1, 128, 16), fp8(20, 1, 32, 64, BF16), fp8(6, 2, 256, 16),
          fp8(9, 1, 160, 16), fp8(4, 2, 128, 16, BF16)]
ODD = [fp8(4, 2, 80, 16), fp8(2, 2, 16, 5, FLOAT), fp8(4, 1, 48, 1, BF16), fp8(8, 1, 256, 16, FLOAT),
       fp8(10, 1, 112, 7), fp8(9, 3, 64, 16, FLOAT)]


@needs_emulator
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_tensor_cores_on_other_shapes(rng, heads):
    device = Emulator(cp_async="early" if rng.integers(2) else "late")
    batch = ragged(rng, heads)
    batch.check(decode(device, batch, 5, num_sms=int(rng.integers(1, 9))))
    batch.check(decode(device, batch, 3))
    batch = mixed(rng, heads)
    batch.check(prefill(device, batch))


@needs_emulator
@pytest.mark.parametrize("heads", ODD, ids=str)
def test_what_tensor_cores_refuse_runs_on_the_scalar_kernels(rng, heads):
    gpu, batch = Gpu.of(90), ragged(rng, heads)
    assert best_step(Problem(heads, 6, batch.tables.shape[1]), gpu) == 3
    assert prefill_launch(heads, gpu, 9, 2)[0].file == PLAIN
    batch.check(decode(Emulator(), batch))
    batch = mixed(rng, heads)
    batch.check(prefill(Emulator(), batch))


@pytest.mark.skipif(WHY_NOT is not None, reason=f"nothing can be compiled here: {WHY_NOT}")
@pytest.mark.parametrize(("heads", "arch"), [(fp8(12, 1, 128, 16), 75), (fp8(2, 1, 256, 16, BF16), 80),
                                             (fp8(2, 1, 96, 16), 100), (fp8(16, 1, 128, 32), 120)], ids=str)
def test_the_ptx_of_other_shapes_and_architectures(rng, heads, arch):
    batch = Batch.draw(rng, heads, [1, 1], [heads.block_size + 1, 40])
    for step in (3, 5):
        batch.check(decode(PtxDevice(arch), batch, step, 1, num_sms=1))
    batch = Batch.draw(rng, heads, [3, 20], [heads.block_size + 1, 40])
    for fast in (False, True):
        batch.check(prefill(PtxDevice(arch), batch, fast))


@needs_emulator
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_equal_weights_give_the_mean_rounded_once(rng, dtype):
    """So each scale is applied once, in pieces of a sequence too."""
    lengths = [1, 15, 17, int(rng.integers(100, 300))]
    batch = Batch.draw(rng, fp8(4, 2, 64, 16, dtype), [1] * 4, lengths, steepness=0.0)
    for step, splits in ((3, 1), (3, 3), (5, None)):
        batch.check_rounding(decode(Emulator(), batch, step, splits, num_sms=1))
    several = Batch.draw(rng, fp8(4, 2, 64, 16, dtype), [1, 15, 4, 40], lengths, steepness=0.0)
    for fast in (True, False):
        several.check_rounding(prefill(Emulator(), several, fast))


@needs_emulator
@pytest.mark.parametrize("steepness", [0.1, 8.0])
def test_a_maximum_that_is_passed_by_little_or_by_much(rng, steepness):
    batch = Batch.draw(rng, SMALL, [1, 1], [17, 300], steepness=steepness)
    for step in (3, 5):
        batch.check(decode(Emulator(), batch, step, num_sms=1))
    batch = Batch.draw(rng, SMALL, [17, 40], [17, 300], steepness=steepness)
    batch.check(prefill(Emulator(), batch))


@needs_emulator
@pytest.mark.parametrize("scale", [2.0**-60, 1e-9, 3e7, 2.0**60])
def test_scales_of_any_size(rng, scale):
    """Queries so small or large that scores stay as they are; values so scaled that float32 holds them."""
    batch = ragged(rng, fp8(4, 2, 64, 16, FLOAT))
    stored = batch.k_scale
    q = batch.q * (stored / scale)
    out = torch.full_like(q, torch.nan)
    paged_attention(Emulator(), q, batch.k, batch.v, *batch.integers(), out, k_scale=scale, v_scale=scale)
    batch.check(out * (batch.v_scale / scale))


@needs_emulator
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_no_bank_conflicts_and_half_the_sectors(rng, head_dim):
    batch = Batch.draw(rng, fp8(4, 1, head_dim, 16), [1], [2048])
    minimum = 2048 * batch.heads.token_bytes / 32
    for step in (3, 5):
        device = Emulator(counters=True)
        decode(device, batch, step, 1, num_sms=1)
        loaded = device.counters.total("sectors", "global", "load")
        assert minimum <= loaded <= (1.1 if step == 3 else 1.05) * minimum, "a table's entry is a sector to each team"
        if step == 5:
            in_loop = [site for site in device.counters.sites if site.space == "shared" and "cuh" in str(site.line)]
            assert in_loop
            assert max(site.worst_conflict for site in in_loop) == 1


@needs_emulator
@pytest.mark.parametrize("step", [3, 5, None], ids=lambda step: "prefill" if step is None else f"step {step}")
def test_slots_beyond_2_to_the_32_elements(rng, step):
    batch = far_batch(Batch.draw(rng, SMALL, [1, 1] if step else [5, 1], [70, 33]))
    far = Emulator(checks=False)
    batch.check(decode(far, batch, step, 1, num_sms=1) if step else prefill(far, batch))


@needs_emulator
def test_rows_beyond_2_to_the_32_pieces():
    check_far_store_fp8(Emulator(checks=False))


@needs_emulator
def test_slots_are_copied_byte_by_byte(rng):
    source = torch.from_numpy(rng.integers(0, 256, (3, 2, 20, 2, 24)).astype(np.uint8)).view(FP8)
    destination, pairs = torch.zeros(3, 2, 30, 2, 24, dtype=FP8), torch.tensor([[4, 29], [0, 0], [19, 7]]).int()
    copy_slots(Emulator(), source, destination, pairs)
    bytes_of, wanted = source.view(torch.uint8), torch.zeros(3, 2, 30, 2, 24, dtype=torch.uint8)
    wanted[:, :, pairs[:, 1].long()] = bytes_of[:, :, pairs[:, 0].long()]
    assert torch.equal(destination.view(torch.uint8), wanted)
    with pytest.raises(ValueError, match="a slot of 24 bytes is not a whole number of 16-byte pieces"):
        copy_slots(Emulator(), source[:, :, :, :1].contiguous(), destination[:, :, :, :1].contiguous(), pairs)


# ----- choices and refusals


def test_kernels_of_other_caches_keep_their_names():
    plain = Heads(8, 2, 64, 16, HALF)
    assert plain == Heads(8, 2, 64, 16, HALF, HALF)
    assert "KV_FP8" not in dict(plain.kernel("f.cu", "f").defines)
    assert dict(SMALL.kernel("f.cu", "f").defines)["KV_FP8"] == "1"
    assert (plain.token_bytes, SMALL.token_bytes) == (512, 256)


@pytest.mark.parametrize(("heads", "arch", "step", "fast"), [
    (fp8(8, 2, 128, 16), 75, 5, True), (fp8(8, 2, 256, 16), 75, 5, True), (fp8(8, 2, 64, 16, BF16), 75, 3, False),
    (fp8(8, 2, 80, 16), 90, 3, False), (fp8(8, 2, 64, 5), 90, 3, False), (fp8(8, 2, 64, 16, FLOAT), 90, 3, False),
    (fp8(8, 2, 256, 16, BF16), 90, 5, True)], ids=str)
def test_the_best_kernel_is_one_that_the_gpu_can_run(heads, arch, step, fast):
    gpu, problem = Gpu.of(arch), Problem(heads, 3, 4)
    assert best_step(problem, gpu) == step
    assert workspace_floats(heads, 3, 4, gpu) >= 1
    kernel, shape = prefill_launch(heads, gpu, 100, 2)
    assert (kernel.file == TENSOR_CORES) == fast
    assert shape.shared_bytes <= gpu.shared_bytes


def test_what_does_not_fit_is_refused_with_the_reason(rng):
    class Never:
        gpu = Gpu.of(90)

        def launch(self, *_):
            raise AssertionError("launched")

    batch, never = ragged(rng, SMALL), Never()
    for step in (0, 1, 2, 4):
        assert "only 3 and 5" in why_not(step, Problem(SMALL, 1, 4), never.gpu)
        with pytest.raises(ValueError, match=f"step {step} does not serve these sizes: .* only 3 and 5 read"):
            decode(never, batch, step)
    out = torch.empty_like(batch.q)

    def attend(k, v, **scales):
        paged_attention(never, batch.q, k, v, *batch.integers(), out, **scales)

    with pytest.raises(TypeError, match=r"v_cache is torch\.float16, expected torch\.float8_e4m3fn"):
        attend(batch.k, batch.v.half())
    with pytest.raises(TypeError, match=r"k_cache is torch\.float8_e5m2"):
        attend(batch.k.view(torch.float8_e5m2), batch.v.view(torch.float8_e5m2))
    for wrong in (0.0, -1.0, torch.nan, torch.inf, 2.0**61, 1e-30):
        with pytest.raises(ValueError, match="v_scale must lie between"):
            attend(batch.k, batch.v, v_scale=wrong)
        with pytest.raises(ValueError, match="k_scale must lie between"):
            prefill_attention(never, batch.q, batch.k, batch.v, *batch.integers(), batch.starts, out, k_scale=wrong)
    with pytest.raises(ValueError, match=r"k_scale is 0\.5, but a cache of torch\.float16 holds its values as"):
        attend(batch.k.half(), batch.v.half(), k_scale=0.5)
    with pytest.raises(ValueError, match="head_dim 24: rows must be whole 16-byte pieces"):
        fp8(4, 2, 24, 16)
    with pytest.raises(TypeError, match=r"with torch\.float16 queries a cache holds"):
        Heads(4, 2, 64, 16, HALF, BF16)
    rows = torch.zeros(2, 1, 24, dtype=HALF)
    caches = [torch.zeros(1, 16, 1, 24, dtype=FP8) for _ in range(2)]
    with pytest.raises(ValueError, match="a slot of 24 bytes"):
        store_kv(never, rows, rows, torch.zeros(2).int(), *caches)
    with pytest.raises(TypeError, match=r"takes rows of .* not torch\.float64"):
        store_kv(never, torch.zeros(2, 1, 16).double(), torch.zeros(2, 1, 16).double(), torch.zeros(2).int(),
                 *(cache[..., :16].contiguous() for cache in caches))


# ----- what fp8 costs


def attention_error(rng, spread, scaled):
    """Mean L2 error of a row, relative, of exact attention over a quantised cache: 64 queries on 512 tokens, D = 128,
    all numbers normal, K and V with this spread and the queries so that scores have a spread of 1."""
    q, k, v = (torch.from_numpy(rng.standard_normal((n, 128))) for n in (64, 512, 512))
    q, k, v = q / spread, k * spread, v * spread
    held = []
    for each in (k, v):
        scale = float(each.abs().max()) / FP8_LARGEST if scaled else 1.0
        held.append(quantised(each, scale).double() * scale)

    def attend(keys, values):
        return (q @ keys.T / 128**0.5).softmax(-1) @ values

    exact = attend(k, v)
    return float(((attend(*held) - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())


@pytest.mark.parametrize(("spread", "without"), [(1.0, 0.038), (2.0**-9, 0.42), (200.0, 0.12)])
def test_what_fp8_costs_in_accuracy_and_what_a_scale_saves(rng, spread, without):
    """The README says so."""
    plain, scaled = (np.mean([attention_error(rng, spread, scaled) for _ in range(20)]) for scaled in (False, True))
    assert plain == pytest.approx(without, rel=0.05)
    assert scaled == pytest.approx(0.038, rel=0.05)

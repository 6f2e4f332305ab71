"""rope_store, add_norm, silu_mul against their formulas in float64: emulated, through their PTX, and compiled."""

from __future__ import annotations

import pytest
import torch
from kernels.support import needs_emulator

from kernels_cupy.device import Kernel
from kernels_cupy.heads import Heads
from kernels_cupy.launch_fused import add_norm, rope_store, silu_mul
from kernels_cupy.proof.compile import compile_cubin, machine_code, resources, why_unavailable
from kernels_cupy.proof.emulator import Emulator
from kernels_cupy.proof.fused import added_and_normed, check_add_norm, check_rope_store, check_silu_mul, gated, turned
from kernels_cupy.proof.ptx import PtxDevice

WHY_NOT = why_unavailable()
needs_compiler = pytest.mark.skipif(WHY_NOT is not None, reason=f"nothing can be compiled here: {WHY_NOT}")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT], ids=str)


@pytest.fixture(params=["emulated", "PTX of sm_75", "PTX of sm_90"])
def device(request):
    if request.param == "emulated":
        if needs_emulator.args[0]:
            pytest.skip(needs_emulator.kwargs["reason"])
        return Emulator()
    if WHY_NOT is not None:
        pytest.skip(WHY_NOT)
    return PtxDevice(75 if "75" in request.param else 90)


@DTYPES
@pytest.mark.parametrize(("shape", "rotary", "qk_norm"), [
    ((4, 2, 64, 16), 64, False), ((3, 1, 80, 16), 32, True), ((2, 2, 8, 5), 8, False), ((2, 1, 128, 16), 128, True)])
def test_queries_keys_and_values_go_where_they_should(device, rng, dtype, shape, rotary, qk_norm):
    for num_tokens in (1, 15, 17):
        check_rope_store(device, rng, Heads(*shape, dtype), num_tokens, rotary, qk_norm)


@DTYPES
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("hidden", [8, 576, 4096])
def test_sums_and_norms(device, rng, dtype, hidden, add):
    check_add_norm(device, rng, 3, hidden, dtype, add)


@DTYPES
def test_gated_products(device, rng, dtype):
    for rows, inner in ((1, 8), (3, 96), (2, 2048 + 8)):
        check_silu_mul(device, rng, rows, inner, dtype)


@pytest.mark.parametrize("arch", [75, 80, 90, 120])
@pytest.mark.parametrize(("name", "constants", "vectors"), [
    ("rope_store", {"HEAD_DIM": 128, "NUM_HEADS": 32, "NUM_KV_HEADS": 8, "BLOCK_SIZE": 16, "ROTARY": 128, "QK_NORM": 1},
     False),
    ("add_norm", {"HIDDEN": 4096, "ADD": 1}, True), ("add_norm", {"HIDDEN": 8192, "ADD": 1}, True),
    ("silu_mul", {"INNER": 14336}, True)])
@needs_compiler
def test_they_spill_nothing_and_the_rows_move_16_bytes_at_a_time(name, constants, vectors, arch):
    defines = tuple((key, str(value)) for key, value in {"SCALAR": 1, **constants}.items())
    cubin = compile_cubin(Kernel(f"{name}.cu", name, defines), arch)
    assert resources(cubin, name).spill_bytes == 0
    text = "\n".join(machine_code(cubin, name)[0])
    if vectors:
        assert "LDG.E.128" in text
        assert "STG.E.128" in text


def test_nothing_is_launched_for_no_rows_and_bad_arguments_are_named():
    class Never:
        def launch(self, *_):
            raise AssertionError("launched")

    def of(*shape, dtype=HALF):
        return torch.zeros(shape, dtype=dtype)

    def integers(*shape):
        return of(*shape, dtype=torch.int32)

    never, angles = Never(), of(9, 32, dtype=FLOAT)
    cache = of(2, 16, 2, 64)
    rope_store(never, of(0, 8, 64), integers(0), integers(0), angles, angles, cache, cache, of(0, 4, 64))
    add_norm(never, of(0, 64), of(0, 64), of(64), of(0, 64), 1e-5)
    silu_mul(never, of(0, 128), of(0, 64))
    one = integers(1)
    for match, call in (
            ("qkv", lambda: rope_store(never, of(1, 7, 64), one, one, angles, angles, cache, cache, of(1, 4, 64))),
            ("positions", lambda: rope_store(never, of(1, 8, 64), integers(2), one, angles, angles, cache, cache,
                                             of(1, 4, 64))),
            ("cos", lambda: rope_store(never, of(1, 8, 64), one, one, angles.half(), angles.half(), cache, cache,
                                       of(1, 4, 64))),
            ("norms", lambda: rope_store(never, of(1, 8, 64), one, one, angles, angles, cache, cache, of(1, 4, 64),
                                         (of(32), of(64)))),
            ("weight", lambda: add_norm(never, of(2, 64), of(2, 64), of(32), of(2, 64), 1e-5)),
            ("16-byte pieces", lambda: add_norm(never, of(2, 12), of(2, 12), of(12), of(2, 12), 1e-5)),
            ("gate_up", lambda: silu_mul(never, of(2, 120), of(2, 64)))):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="float64"):
        silu_mul(never, of(2, 128, dtype=torch.float64), of(2, 64, dtype=torch.float64))


def test_the_formulas_are_those_of_the_readable_decoder(rng):
    from bros_ref.model.decoder import rms_norm
    from bros_ref.model.rotary import rotate_

    rows = torch.from_numpy(rng.standard_normal((5, 3, 16)))
    angles = torch.from_numpy(rng.uniform(0, 6, (5, 4)))
    wanted = rows.clone()
    rotate_(wanted[..., :8], angles.cos()[:, None], angles.sin()[:, None])
    torch.testing.assert_close(turned(rows, angles.cos(), angles.sin()), wanted)
    x, weight = rows[:, 0], rows[0, 1]
    total, normed = added_and_normed(x, x, weight, 1e-5)
    torch.testing.assert_close(total, 2 * x)
    torch.testing.assert_close(normed, rms_norm(2 * x, weight, 1e-5))
    gate, up = x.chunk(2, dim=1)
    torch.testing.assert_close(gated(x), torch.nn.functional.silu(gate) * up)

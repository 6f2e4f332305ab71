"""Kernels compile for GPUs that are not here, spill nothing, and cost what the README's ladder says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernels.support import needs_emulator

import kernels_cupy
from bros_ref.cli.kernels import ladder_rows, with_ladder
from kernels_cupy.device import Kernel
from kernels_cupy.heads import FP8, Heads
from kernels_cupy.launch import DECODE_STEPS
from kernels_cupy.proof.compile import (
    CompileError,
    Resources,
    compile_cubin,
    compile_ptx,
    machine_code,
    resources,
    why_unavailable,
)
from kernels_cupy.proof.static_report import (
    LADDER,
    MainLoop,
    compiled,
    executed,
    launch_of,
    main_loop,
    occupancy,
)

WHY_NOT = why_unavailable()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"nothing can be compiled here: {WHY_NOT}")
HALF = Heads(8, 2, 128, 16, torch.float16)
BY_NAME = {rung.name: rung for rung in LADDER}


@pytest.mark.parametrize(("arch", "head_dim"), [(75, 64), (75, 128), (75, 256), (80, 128), (90, 64), (90, 128),
                                                (120, 128)])
@pytest.mark.parametrize("name", BY_NAME)
def test_nothing_that_would_be_launched_spills_or_does_not_fit(name, arch, head_dim):
    heads = Heads(8, 2, head_dim, 16, torch.float16)
    if not BY_NAME[name].supports(heads, arch):
        pytest.skip(f"step {name} is not for head_dim {head_dim} on sm_{arch}")
    row = compiled(BY_NAME[name], heads, arch)
    assert row.used.spill_bytes == 0
    assert row.occupancy > 0


@pytest.mark.parametrize(("arch", "head_dim", "dtype"), [
    (75, 64, torch.float16), (75, 128, torch.float16), (75, 256, torch.float16), (80, 128, torch.float16),
    (80, 256, torch.bfloat16), (90, 64, torch.float16), (90, 96, torch.float16), (90, 128, torch.float16),
    (90, 128, torch.bfloat16), (90, 128, torch.float32), (120, 128, torch.float16)])
@pytest.mark.parametrize("name", ["3", "5", "prefill 0", "prefill 1"])
def test_nothing_that_reads_an_fp8_cache_spills_or_does_not_fit(name, arch, head_dim, dtype):
    heads, rung = Heads(16, 2, head_dim, 16, dtype, FP8), BY_NAME[name]
    if not rung.supports(heads, arch):
        pytest.skip(f"step {name} is not for {dtype} and head_dim {head_dim} on sm_{arch}")
    kernel, shape = launch_of(rung, heads, arch)
    used = resources(compile_cubin(kernel, arch), rung.function)
    assert used.spill_bytes == 0
    assert occupancy(used, shape.block[0], shape.shared_bytes, arch) > 0


def test_what_the_t4_runs_is_what_the_launchers_say():
    wide, bfloat = Heads(8, 2, 256, 16, torch.float16), Heads(8, 2, 64, 16, torch.bfloat16)
    runs = {heads: [name for name in BY_NAME if BY_NAME[name].supports(heads, 75)] for heads in (HALF, wide, bfloat)}
    assert runs[HALF] == ["0", "1", "2", "3", "4", "prefill 0", "prefill 1"]
    assert runs[wide] == ["1", "2", "3", "prefill 0", "prefill 1"]
    assert runs[bfloat] == ["0", "1", "2", "3", "prefill 0"]


@pytest.mark.parametrize(("arch", "reserved"), [(80, 0), (90, 1024)])
def test_step_2_has_the_static_shared_memory_that_its_launcher_adds(arch, reserved):
    used = compiled(BY_NAME["2"], HALF, arch).used
    assert used.shared_bytes - reserved == DECODE_STEPS[2].static_bytes(HALF)


def test_a_product_of_the_prefill_needs_half_the_shared_memory_of_one_in_step_4():
    four, prefill = (executed(BY_NAME[name], HALF, 90).mma_per_shared_kib for name in ("4", "prefill 1"))
    assert prefill > 2 * four
    assert prefill > 4, "more than an A100's tensor cores can use"
    assert executed(BY_NAME["3"], HALF, 90).mma_per_shared_kib is None


def test_the_loads_of_an_fp8_cache_are_found_where_they_can_be_told_apart():
    half, single = (compiled(BY_NAME["3"], Heads(8, 2, 128, 16, dtype, FP8), 90).loop
                    for dtype in (torch.float16, torch.float32))
    assert half.kib == 2 * 8 * 32 / 1024, "8 bytes of K and of V a lane"
    assert single is None


def test_rows_of_an_fp8_cache_are_stored_8_bytes_at_a_time():
    kernel = Kernel("store_kv.cu", "store_kv", (("ROW_VECTORS", "16"), ("SCALAR", "1"), ("KV_FP8", "1")))
    instructions, _ = machine_code(compile_cubin(kernel, 90), "store_kv")
    for kind in ("LDG.E.128", "STG.E.64"):
        assert any(kind in text for text in instructions)


@pytest.mark.parametrize("file", ["store_kv", "copy_slots"])
def test_copies_move_16_bytes_at_a_time(file):
    instructions, _ = machine_code(compile_cubin(Kernel(f"{file}.cu", file, (("ROW_VECTORS", "16"),)), 90), file)
    for kind in ("LDG.E.128", "STG.E.128"):
        assert any(kind in text for text in instructions)


@pytest.mark.parametrize(("name", "per_kib", "direction"), [("3", 285, 0.015), ("4", 80, 0.03), ("5", 80, 0.03)])
def test_the_targets_that_are_met(name, per_kib, direction):
    loop, run = compiled(BY_NAME[name], HALF, 90).loop, executed(BY_NAME[name], HALF, 90)
    assert 0 < loop.per_kib <= per_kib
    assert run.per_kib <= per_kib
    assert run.per_kib < run.with_moves_per_kib
    assert abs(run.direction_overhead) <= direction


@pytest.mark.parametrize(("name", "times"), [("5", 1.8), ("prefill 1", 2.1)])
def test_what_decoding_an_fp8_cache_costs_in_instructions(name, times):
    """The README says so."""
    plain, fp8 = (executed(BY_NAME[name], Heads(8, 2, 128, 16, torch.float16, cache), 90).classes
                  for cache in (None, FP8))
    per_token = [sum(count for kind, count in one.items() if kind != "move") for one in (plain, fp8)]
    assert per_token[1] / per_token[0] == pytest.approx(times, abs=0.05)
    assert 0.45 < (fp8["integer"] - plain["integer"]) / per_token[1] < 0.6, "about half of all decode"


def test_heads_as_the_narrow_side_halve_the_products():
    four, five = (executed(BY_NAME[name], HALF, 90).classes["tensor core"] for name in "45")
    assert five < 0.55 * four


def test_tensor_cores_are_used_and_copies_are_asynchronous():
    ptx = compile_ptx(launch_of(BY_NAME["4"], HALF, 80)[0], 80)
    for text in ("mma.sync.aligned.m16n8k16", "cp.async.cg.shared.global", "ldmatrix.sync.aligned.m8n8.x4"):
        assert text in ptx


@needs_emulator
def test_the_readme_s_ladder_is_what_the_command_writes():
    readme = (Path(kernels_cupy.__file__).parent / "README.md").read_text()
    assert with_ladder(readme, ladder_rows(seed=0)) == readme, "run: bros-ref kernels --write-readme"
    with pytest.raises(ValueError, match="ladder"):
        with_ladder("no markers", [])


def test_a_text_that_does_not_compile_says_where():
    with pytest.raises(CompileError, match=r"store_kv\.cu\(1\)"):
        compile_cubin(Kernel("store_kv.cu", "store_kv"), 90, {"store_kv.cu": "int main( { }"})


def test_the_main_loop_is_the_shortest_way_that_does_the_work():
    code = ["MOV R1, R2", "LDG.E.128 R4, [R2]", "@P0 BRA `(.L_rare)", "HMMA.16816.F32 R8, R4, R6, R8",
            "ISETP.GE P1, R1, 4", "@P1 BRA `(.L_head)", "EXIT", "NOP", "NOP", "BRA `(.L_head)"]
    loop = main_loop(code, {".L_head": 1, ".L_rare": 3}, "LDG")
    assert (loop.instructions, loop.kib, loop.multiplications) == (5, 0.5, 1)
    with pytest.raises(LookupError, match="LDGSTS"):
        main_loop(code, {".L_head": 1, ".L_rare": 3}, "LDGSTS")


def test_the_main_loop_may_have_a_part_behind_its_end_and_is_not_the_one_that_only_loads():
    code = ["LDG.E.128 R4, [R2]", "@P0 BRA `(.L_first)", "MOV R1, R2", "@!P0 BRA `(.L_cold)", "HMMA R8, R4, R6, R8",
            "@P1 BRA `(.L_head)", "EXIT", "LDG.E.128 R4, [R2]", "LDG.E.128 R5, [R2]", "BRA `(.L_back)"]
    loop = main_loop(code, {".L_first": 0, ".L_head": 2, ".L_cold": 7, ".L_back": 4}, "LDG")
    assert (loop.instructions, loop.kib, loop.multiplications) == (7, 1.0, 1)


def test_a_loop_whose_way_around_loads_nothing_has_no_rate():
    assert MainLoop(instructions=4, kib=2.0, multiplications=1, feeding=1).per_kib == 2.0
    assert MainLoop(instructions=4, kib=0.0, multiplications=1, feeding=1).per_kib is None


@pytest.mark.parametrize("arch", [100, 103, 120])  # on the first two, the prefill's loads have a loop of their own
def test_the_report_reads_the_newest_architectures(arch):
    loop = compiled(BY_NAME["prefill 1"], HALF, arch).loop
    assert loop.multiplications > 0
    assert loop.per_kib is None or loop.per_kib > 0


@pytest.mark.parametrize(("used", "threads", "shared", "arch", "wanted"), [
    (Resources(32, 0, 0), 128, 0, 80, 1.0), (Resources(128, 0, 0), 128, 0, 80, 0.25),
    (Resources(32, 0, 0), 128, 160 * 1024, 80, 4 / 64), (Resources(32, 0, 0), 32, 0, 86, 16 / 48),
    (Resources(32, 0, 0), 128, 200 * 1024, 80, 0.0), (Resources(32, 0, 18 * 1024), 128, 20 * 1024, 90, 6 * 4 / 64),
    (Resources(32, 0, 17 * 1024), 128, 20 * 1024, 80, 4 * 4 / 64)])
def test_occupancy(used, threads, shared, arch, wanted):
    assert occupancy(used, threads, shared, arch) == pytest.approx(wanted)

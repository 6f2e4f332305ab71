"""Every kernel through the PTX that NVRTC emits for it: right, counted, and wrong where its text is made wrong."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from kernels.support import needs_emulator

from kernels_cupy.device import FOLDER
from kernels_cupy.heads import Heads
from kernels_cupy.launch import STEPS, copy_slots, store_kv
from kernels_cupy.proof.compile import compile_ptx, why_unavailable
from kernels_cupy.proof.contract import Batch, decode, prefill
from kernels_cupy.proof.emulator import Emulator
from kernels_cupy.proof.ptx import PtxDevice, PtxFault
from kernels_cupy.proof.ptx.parser import parse
from kernels_cupy.proof.static_report import LADDER, launch_of

WHY_NOT = why_unavailable()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no PTX can be made here: {WHY_NOT}")
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
SMALL = Heads(4, 2, 64, 16, HALF)


def ragged(rng, heads):
    size = heads.block_size
    lengths = [1, size - 1, size, size + 1, int(rng.integers(40, 70))]
    return Batch.draw(rng, heads, [1] * len(lengths), [max(1, length) for length in lengths])


def several(rng, heads):
    return Batch.draw(rng, heads, [1, 3, heads.block_size, 21], [1, 16, heads.block_size + 1, 45])


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_every_step_equals_float64(step, dtype, arch, rng):
    if step >= 4 and dtype is FLOAT:
        pytest.skip("tensor cores take fp16 and bf16")
    batch = ragged(rng, Heads(4, 2, 64, 16, dtype))
    batch.check(decode(PtxDevice(arch), batch, step, 2 if step in (3, 4) else None, num_sms=1))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("dtype", "tensor_cores"), [(HALF, True), (BF16, True), (FLOAT, False), (HALF, False)])
def test_every_prefill_equals_float64(dtype, tensor_cores, arch, rng):
    batch = several(rng, Heads(4, 2, 64, 16, dtype))
    batch.check(prefill(PtxDevice(arch), batch, tensor_cores))


@pytest.mark.parametrize("arch", [75, 100, 120])
def test_older_and_newer_architectures(arch, rng):
    # sm_75 has no cp.async and half the mma
    for step in (3, 4, 5):
        batch = ragged(rng, SMALL)
        batch.check(decode(PtxDevice(arch), batch, step, 1, num_sms=1))
    batch = several(rng, SMALL)
    batch.check(prefill(PtxDevice(arch), batch))


@pytest.mark.parametrize(("heads", "step"), [
    (Heads(2, 2, 80, 16, HALF), 5), (Heads(4, 1, 96, 32, HALF), 4), (Heads(2, 1, 256, 16, BF16), 5),
    (Heads(2, 1, 256, 16, HALF), 4), (Heads(9, 1, 64, 16, HALF), 5), (Heads(6, 2, 80, 5, FLOAT), 3),
    (Heads(20, 1, 64, 16, HALF), 4)], ids=lambda value: f"{value.num_heads}x{value.num_kv_heads}x{value.head_dim}"
    if isinstance(value, Heads) else f"step {value}")
def test_shapes_beside_the_usual(heads, step, rng):
    batch = Batch.draw(rng, heads, [1, 1], [heads.block_size + 1, 40])
    batch.check(decode(PtxDevice(80), batch, step, 1, num_sms=1))


def test_copies_go_where_they_should(rng):
    k, v = (torch.from_numpy(rng.standard_normal((17, 2, 64))).half() for _ in range(2))
    caches = [torch.full((3, 16, 2, 64), torch.nan, dtype=HALF) for _ in range(2)]
    slots = torch.from_numpy(rng.permutation(48)[:17].astype(np.int32))
    store_kv(PtxDevice(80), k, v, slots, *caches)
    for rows, cache in zip((k, v), caches, strict=True):
        assert torch.equal(cache.view(48, 2, 64)[slots.long()], rows)
        assert int(cache.view(48, 2, 64).isnan().all(dim=(1, 2)).sum()) == 48 - 17
    store, pairs = torch.randn(2, 2, 20, 2, 8), torch.tensor([[4, 19], [0, 7]]).int()
    wanted = store.clone()
    wanted[:, :, [19, 7]] = store[:, :, [4, 0]]
    copy_slots(PtxDevice(90), store, store, pairs)  # one store is source and destination: they share memory
    assert torch.equal(store, wanted)


@needs_emulator
@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_sectors_are_those_that_the_emulator_counts(step, rng):
    # two devices that share no code: one runs C++ of the text with hooks, the other PTX. One sequence: with more, one
    # compiler loads a length again where the other keeps it
    batch = Batch.draw(rng, Heads(8, 2, 128, 16, HALF), [1], [int(rng.integers(50, 90))])
    interpreter, emulator = PtxDevice(90, counters=True), Emulator(counters=True)
    for device in (interpreter, emulator):
        decode(device, batch, step, 1, num_sms=1)
    for field in ("sectors", "requests", "bytes"):
        for kind in ("load", "store"):
            assert interpreter.counters.total(field, "global", kind) == emulator.counters.total(field, "global", kind)


def test_instructions_of_a_small_kernel_counted_by_hand():
    # two threads blocks of 256 threads copy 17 rows of 16 pieces: the last warps have less to do, or nothing
    k = torch.zeros(17, 2, 64, dtype=HALF)
    device = PtxDevice(80, counters=True)
    store_kv(device, k, k, torch.arange(17).int(), *(torch.zeros(2, 16, 2, 64, dtype=HALF) for _ in range(2)))
    opcodes, classes = device.counters.opcodes, device.counters.classes()
    warps_with_work = -(-17 * 16 // 32)
    assert opcodes["ret"] == opcodes["bra"] == 2 * 8
    assert opcodes["ld.global.v4.u32"] == opcodes["st.global.v4.u32"] == 2 * warps_with_work
    assert classes["global"] == (2 + 2 + 1) * warps_with_work, "K and V in and out, and the slot"
    assert sum(classes.values()) == device.counters.instructions
    assert device.counters.total("sectors", "global", "store") == 2 * 17 * 2 * 64 * 2 // 32


@pytest.mark.parametrize("name", ["3", "5", "prefill 1"])
def test_line_numbers_change_no_instruction(name):
    kernel, _ = launch_of(next(rung for rung in LADDER if rung.name == name), SMALL, 90)

    def instructions(text):
        return [(one.opcode, one.operands, one.guard) for one in parse(text).functions[kernel.function].instructions]

    assert instructions(compile_ptx(kernel, 90)) == instructions(compile_ptx(kernel, 90, line_info=True))


# ----- defects in what the emulator replaces by its own: the inline assembly of mma.cuh


DEFECTS = [  # (what is wrong, text, becomes, what sees it: a check by name, or the comparison with float64)
    ("operands of a product swapped",
     '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));\n#elif',
     '"r"(a[0]), "r"(a[2]), "r"(a[1]), "r"(a[3]), "r"(b[0]), "r"(b[1]));\n#elif', "bf16"),
    ("halves of B swapped", '"r"(b[0]), "r"(b[1]));\n#else', '"r"(b[1]), "r"(b[0]));\n#else', "numerics"),
    ("no .trans", "m8n8.x4.trans.shared.b16", "m8n8.x4.shared.b16", "numerics"),
    ("one group too many left", ':: "n"(GROUPS_LEFT)', ':: "n"(GROUPS_LEFT + 1)', "copy under way"),
    ("no wait at all", 'asm volatile("cp.async.wait_group %0;" :: "n"(GROUPS_LEFT) : "memory");', "",
     "copy under way"),
    ("copies that are in no group", 'asm volatile("cp.async.commit_group;" ::: "memory");', "",
     "copy under way"),
    ("zero-fill ignored", '16, %2;"', '16;"', "numerics"),
    ("half of each copy", '"r"(source_bytes)', '"r"(source_bytes / 2)', "numerics"),
]


@pytest.mark.parametrize(("old", "new", "flagged"), [defect[1:] for defect in DEFECTS], ids=[d[0] for d in DEFECTS])
def test_defects_that_only_the_ptx_shows_are_flagged(old, new, flagged):
    text = (FOLDER / "mma.cuh").read_text()
    assert text.count(old) == 1
    heads = Heads(4, 2, 64, 16, BF16 if flagged == "bf16" else HALF)
    batch = Batch.draw(np.random.default_rng(4), heads, [1, 1], [40, 90], [False, True])
    device = PtxDevice(80, sources={"mma.cuh": text.replace(old, new)})
    if flagged in ("numerics", "bf16"):
        with pytest.raises(AssertionError, match="relative error"):
            batch.check(decode(device, batch, 4, 1))
    else:
        with pytest.raises(PtxFault) as caught:
            decode(device, batch, 4, 1)
        assert caught.value.what == flagged
    batch.check(decode(PtxDevice(80), batch, 4, 1))


def test_a_fault_names_kernel_ptx_line_source_line_block_and_thread():
    file = "paged_attention_1_warp.cu"
    text = (FOLDER / file).read_text()
    guard = "if (row >= num_seqs * NUM_HEADS) return;"
    line = 1 + text[:text.index("out[")].count("\n")
    batch = Batch.draw(np.random.default_rng(4), Heads(3, 3, 64, 16, HALF), [1], [1])
    with pytest.raises(PtxFault) as caught:
        decode(PtxDevice(90, sources={file: text.replace(guard, "")}), batch, 1)
    fault = caught.value
    assert (fault.kernel, fault.what, fault.block, fault.thread) == ("paged_attention", "out of bounds", (0, 0, 0),
                                                                     (96, 0, 0))
    assert fault.location.file == file
    assert 0 < fault.location.line <= line
    assert re.search(rf"PTX line {fault.ptx_line}: ld\.global", str(fault))

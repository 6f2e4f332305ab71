"""Threads together: ways that part and meet, barriers, warps, matrices, memory, copies, counts, complaints."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.ptx_lanes import kernel, lanes, run, tensor

from kernels_cupy.proof.ptx import PtxDevice, PtxError, PtxFault
from kernels_cupy.proof.ptx.flow import blocks_of
from kernels_cupy.proof.ptx.parser import parse

TID, LANE = np.arange(64, dtype=np.uint32), np.arange(64) % 32
STORE = "mul.wide.u32 %rd10, %tid, 4; add.s64 %rd11, %rd0, %rd10; st.global.u32 [%rd11], %r1;"


# ----- ways that part and meet


def test_loops_of_different_lengths_and_their_count():
    body = f"""mov.u32 %r1, 0; mov.u32 %r2, 0;
LOOP: setp.ge.u32 %p1, %r2, %tid; @%p1 bra DONE; add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1; bra LOOP;
DONE: {STORE}"""
    out = np.zeros(40, np.uint32)
    device = run(kernel(body, 1), out, counters=True)
    assert out.tolist() == [t * (t - 1) // 2 for t in range(40)]
    # a warp goes round as often as its longest lane: 31 and 39 times; the second warp has 8 lanes
    opcodes = device.counters.opcodes
    assert opcodes["setp.ge.u32"] == 32 + 40
    assert opcodes["bra"] == (32 + 31) + (40 + 39)
    assert opcodes["st.global.u32"] == opcodes["ret"] == 2
    assert device.counters.instructions == sum(opcodes.values()) == 2 * (2 + 2 + 3 + 1) + (32 + 40) * 2 + (31 + 39) * 3


def test_a_cold_block_behind_the_end_still_meets_the_others():
    # the compiler may put one side of an `if` behind everything; both sides must be there for the shuffle
    body = f"""and.b32 %r2, %tid, 1; mov.u32 %r1, %tid; setp.eq.u32 %p1, %r2, 1; @%p1 bra ODD;
JOIN: shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1; {STORE}
ret;
ODD: add.u32 %r1, %r1, 100; bra JOIN;"""
    out = np.zeros(64, np.uint32)
    device = run(kernel(body, 1), out, counters=True)
    assert out.tolist() == [t + 101 if t % 2 == 0 else t - 1 for t in range(64)]
    assert device.counters.opcodes["shfl.sync.bfly.b32"] == 2


def test_what_follows_a_loop_comes_after_it_in_the_order():
    text = kernel("""OUTER: add.u32 %r1, %r1, 1;
INNER: add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 3; @%p1 bra INNER;
setp.lt.u32 %p2, %r1, 3; @%p2 bra OUTER; setp.lt.u32 %p3, %r1, 9; @%p3 bra OUTER; bra END;
END: add.u32 %r3, %r3, 1;""", 0)
    blocks = blocks_of(parse(text).functions["k"])
    order = [block.body[0].opcode if block.body else block.last.opcode for block in blocks]
    assert order == ["mov.u32", "add.u32", "add.u32", "setp.lt.u32", "setp.lt.u32", "bra", "add.u32"]


def test_guards_hold_for_lanes_and_count_for_warps():
    body = f"mov.u32 %r1, 5; setp.lt.u32 %p1, %tid, 3; @%p1 mov.u32 %r1, 6; @!%p1 add.u32 %r1, %r1, 2; {STORE}"
    out = np.zeros(32, np.uint32)
    assert run(kernel(body, 1), out, counters=True).counters.opcodes["add.u32"] == 1
    assert out.tolist() == [6] * 3 + [7] * 29


def test_a_barrier_orders_shared_memory_over_warps_and_grids():
    body = """mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mad.lo.u32 %r4, %r2, %r3, %tid; mov.u32 %r9, room;
mad.lo.u32 %r5, %tid, 4, %r9; st.shared.u32 [%r5], %r4;
bar.sync 0;
sub.u32 %r6, %r3, %tid; sub.u32 %r6, %r6, 1; mad.lo.u32 %r6, %r6, 4, %r9; ld.shared.u32 %r1, [%r6];
mul.wide.u32 %rd10, %r4, 4; add.s64 %rd11, %rd0, %rd10; st.global.u32 [%rd11], %r1;"""
    out = np.zeros(150, np.uint32)
    run(kernel(body, 1, ".shared .align 4 .b8 room[200];\n"), out, grid=3, block=50)
    assert out.tolist() == [b * 50 + 49 - t for b in range(3) for t in range(50)]


def test_a_barrier_that_some_lanes_miss_is_named():
    body = "setp.lt.u32 %p1, %tid, 40; @%p1 bra OVER;\nbar.sync 0;\nOVER: mov.u32 %r1, 1;"
    with pytest.raises(PtxFault, match=r"divergent barrier in k .* waits while lanes \[0, 1, 2, 3, 4, 5, 6, 7\] of its "
                                       r"warp .*bar\.sync 0") as caught:
        run(kernel(body, 1), TID.copy())
    assert caught.value.what == "divergent barrier"


@pytest.mark.parametrize("body", ["L: bra L;", "L: bar.sync 0; bra L;", "setp.eq.u32 %p1, %tid, 3; L: @%p1 bra L;"])
def test_an_endless_loop_is_a_fault(body):
    device = PtxDevice(80, turn_limit=50)
    with pytest.raises(PtxFault, match="goes on after 50 turns") as caught:
        device.run(kernel(body, 1), "k", (1, 1, 1), (64, 1, 1), 0, [tensor(TID.copy())])
    assert caught.value.what == "endless loop"
    assert caught.value.thread == ((3, 0, 0) if "setp" in body else (0, 0, 0))


# ----- warps


@pytest.mark.parametrize(("mode", "by", "clamp", "partner"), [
    ("bfly", 5, 31, lambda i: i ^ 5), ("up", 3, 0, lambda i: i - 3 if i >= 3 else i), ("idx", 7, 31, lambda i: 7),
    ("down", 2, 31, lambda i: i + 2 if i < 30 else i), ("down", 2, 7 | 24 << 8, lambda i: i + 2 if i % 8 < 6 else i),
    ("idx", 1, 31 | 24 << 8, lambda i: i // 8 * 8 + 1), ("up", 1, 16 << 8, lambda i: i - 1 if i % 16 else i)])
def test_shuffles(mode, by, clamp, partner):
    values = np.arange(64, dtype=np.uint32) * 10
    found = lanes(f"shfl.sync.{mode}.b32 %out, %a, {by}, {clamp}, -1;", "b32", values)
    assert found.tolist() == [10 * (t // 32 * 32 + partner(t % 32)) for t in range(64)]
    valid = lanes(f"shfl.sync.{mode}.b32 %r1|%out, %a, {by}, {clamp}, -1;", "pred", values)
    assert all(valid[t] or partner(t % 32) == t % 32 for t in range(64))
    bring = lanes("shfl.sync.idx.b32 %out, %a, %b, 31, -1;", "b32", values, (TID * 7) % 32)
    assert bring.tolist() == [10 * (t // 32 * 32 + t * 7 % 32) for t in range(64)], "lanes may ask different lanes"


def test_votes():
    def voted(mode, result):
        return lanes(f"setp.lt.u32 %p1, %a, 5; vote.sync.{mode} %out, %p1, -1;", result, TID).tolist()

    assert voted("any.pred", "pred") == [1] * 32 + [0] * 32
    assert voted("all.pred", "pred") == [0] * 64
    assert voted("uni.pred", "pred") == [0] * 32 + [1] * 32
    assert voted("ballot.b32", "b32") == [31] * 32 + [0] * 32


def test_lanes_that_a_collective_misses_are_named():
    shuffle = "setp.lt.u32 %p1, %tid, 30; @!%p1 bra OVER;\nshfl.sync.bfly.b32 %r1, %tid, 1, 31, {};\nOVER: ret;"
    with pytest.raises(PtxFault, match=r"divergent collective .* thread \(0, 0, 0\) .* lanes \[30, 31\]"):
        run(kernel(shuffle.format(-1) + "add.u32 %r2, %r2, %tid;", 1), TID[:32].copy())
    run(kernel(shuffle.format((1 << 30) - 1), 1), TID[:32].copy())
    with pytest.raises(PtxFault, match="not named by its own mask"):
        run(kernel("shfl.sync.bfly.b32 %r1, %tid, 1, 31, 7;", 1), TID[:32].copy())
    gone = "setp.gt.u32 %p1, %tid, 29; @%p1 ret;\nshfl.sync.bfly.b32 %r1, %tid, 2, 31, -1;"
    with pytest.raises(PtxFault, match=r"undefined shuffle .* thread \(28, 0, 0\) .* lane 30"):
        run(kernel(gone, 1), TID[:32].copy())


def pairs(matrix):
    """A matrix [8, 8] of 16-bit numbers as the register of a warp."""
    return np.ascontiguousarray(matrix).view(np.uint32).reshape(-1)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_spreads_rows_or_columns(trans):
    words = np.arange(128, dtype=np.uint32) * 65537  # 32 rows of 16 bytes
    body = f"""mul.lo.u32 %r1, %tid, 16; mul.wide.u32 %rd10, %tid, 16; add.s64 %rd11, %rd0, %rd10;
ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%rd11]; st.shared.v4.u32 [%r1], {{%r2, %r3, %r4, %r5}}; bar.warp.sync -1;
ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r1];
add.s64 %rd12, %rd1, %rd10; st.global.v4.u32 [%rd12], {{%r2, %r3, %r4, %r5}};"""
    out = np.zeros(128, np.uint32)
    run(kernel(body, 2, ".shared .align 16 .b8 room[512];\n"), words, out, block=32)
    for i, matrix in enumerate(words.view(np.uint16).reshape(4, 8, 8)):
        assert out.reshape(32, 4)[:, i].tolist() == pairs(matrix.T if trans else matrix).tolist()


@pytest.mark.parametrize(("kind", "depth"), [("f16", 16), ("bf16", 16), ("f16", 8)])
def test_mma_is_a_matrix_product(kind, depth):
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-8, 8, shape).astype(np.float32) / 4 for shape in ((16, depth), (depth, 8)))
    c = rng.standard_normal((16, 8)).astype(np.float32)

    def raw(x):  # the numbers are exact in both types
        return x.astype(np.float16).view(np.uint16) if kind == "f16" else (x.view(np.uint32) >> 16).astype(np.uint16)

    halves = depth // 8
    registers = [pairs(raw(a)[i % 2 * 8:i % 2 * 8 + 8, i // 2 * 8:i // 2 * 8 + 8]) for i in range(2 * halves)]
    registers += [pairs(raw(b)[8 * i:8 * i + 8].T) for i in range(halves)]
    inputs = np.stack([*registers, *(c.view(np.uint32)[8 * (i // 2):8 * (i // 2) + 8, i % 2::2].reshape(-1)
                                     for i in range(4))])
    out, n = np.zeros((4, 32), np.uint32), len(registers)
    names = [f"%r{i}" for i in range(n)]
    body = "mul.wide.u32 %rd10, %tid, 4; add.s64 %rd11, %rd0, %rd10; add.s64 %rd12, %rd1, %rd10;\n"
    body += "\n".join(f"ld.global.u32 {name}, [%rd11+{128 * i}];" for i, name in enumerate(names))
    body += "\n".join(f"ld.global.f32 %f{i}, [%rd11+{128 * (n + i)}];" for i in range(4))
    body += (f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{%f0, %f1, %f2, %f3}}, "
             f"{{{', '.join(names[:2 * halves])}}}, {{{', '.join(names[2 * halves:])}}}, {{%f0, %f1, %f2, %f3}};\n")
    body += "\n".join(f"st.global.f32 [%rd12+{128 * i}], %f{i};" for i in range(4))
    run(kernel(body, 2), inputs, out, block=32)
    found = np.zeros((16, 8), np.float32)
    for i in range(4):
        found[8 * (i // 2):8 * (i // 2) + 8, i % 2::2] = out[i].view(np.float32).reshape(8, 4)
    np.testing.assert_allclose(found, a.astype(np.float64) @ b + c, rtol=1e-6, atol=1e-6)


# ----- memory


def test_local_and_constant_memory():
    body = """mov.u64 %rd10, depot; mul.wide.u32 %rd11, %tid, 4; and.b64 %rd12, %rd11, 12; add.s64 %rd13, %rd10, %rd12;
st.local.u32 [%rd13], %tid; mov.u64 %rd14, table; add.s64 %rd15, %rd14, %rd12; ld.const.u32 %r2, [%rd15];
ld.local.u32 %r3, [%rd13]; ld.global.u32 %r4, [seven]; mad.lo.u32 %r1, %r2, %r4, %r3;""" + STORE
    text = kernel(body, 1, ".local .align 16 .b8 depot[16];\n").replace(
        ".visible", ".const .align 4 .u32 table[4] = {10, 20, 30, 40};\n.global .align 4 .u32 seven = 7;\n.visible", 1)
    out = np.zeros(64, np.uint32)
    run(text, out)
    assert out.tolist() == [t + 70 * (t % 4 + 1) for t in range(64)]


@pytest.mark.parametrize(("line", "what", "message"), [
    ("ld.global.u32 %r1, [%rd11+4];", "out of bounds",
     r"thread \(63, 0, 0\) of block \(0, 0, 0\) loads 4 bytes at byte 256 of argument 0, which has 256"),
    ("ld.global.u32 %r1, [%rd11+-4];", "out of bounds", r"thread \(0, 0, 0\)"),
    ("st.global.u32 [12], %tid;", "out of bounds", "before all global memory"),
    ("ld.global.u32 %r1, [%rd11+2];", "misaligned access", "loads 4 bytes at byte 2 of argument 0"),
    ("ld.shared.u32 %r1, [room+60];", "uninitialised read", "what nothing has stored"),
    ("ld.shared.u32 %r1, [room+64];", "out of bounds", "which has 64"),
    ("add.u32 %r1, %r2, 1;", "uninitialised read", "register %r2")])
def test_a_bad_access_is_named(line, what, message):
    body = f"mul.wide.u32 %rd10, %tid, 4; add.s64 %rd11, %rd0, %rd10;\nst.global.u32 [%rd11], %tid;\n{line}"
    out = np.full(64, 9, np.uint32)
    with pytest.raises(PtxFault, match=message) as caught:
        run(kernel(body, 1, ".shared .align 4 .b8 room[64];\n"), out)
    assert caught.value.what == what
    assert line.split(";")[0].split()[0] in str(caught.value)
    assert (out == 9).all(), "a launch that faults changes nothing"


COPY = """mul.lo.u32 %r1, %tid, 16; mul.wide.u32 %rd10, %tid, 16;
add.s64 %rd11, %rd0, %rd10; add.s64 %rd12, %rd1, %rd10;
mov.u32 %r9, 0; st.shared.v4.u32 [%r1], {{%r9, %r9, %r9, %r9}};
cp.async.cg.shared.global [%r1], [%rd11], 16, {size}; cp.async.commit_group;
cp.async.cg.shared.global [%r1+512], [%rd11+{second}], 16; cp.async.commit_group;
cp.async.wait_group {left};
ld.shared.v4.u32 {{%r2, %r3, %r4, %r5}}, [%r1+{read}]; st.global.v4.u32 [%rd12], {{%r2, %r3, %r4, %r5}};"""


def copied(size=16, second=0, left=1, read=0):
    words, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    run(kernel(COPY.format(size=size, second=second, left=left, read=read), 2, ".shared .align 16 .b8 room[1024];\n"),
        words, out, block=32)
    return out


def test_copies_land_when_they_are_waited_for():
    assert copied().tolist() == list(range(128))
    assert copied(left=0, read=512).tolist() == list(range(128))
    for left, read in ((2, 0), (1, 512)):
        with pytest.raises(PtxFault, match=r"cp\.async has not been waited for") as caught:
            copied(left=left, read=read)
        assert caught.value.what == "copy under way"


def test_a_short_copy_is_filled_with_zeros_and_reads_no_more():
    assert copied(size=0).tolist() == [0] * 128
    assert copied(size=4).tolist() == [4 * t if i == 0 else 0 for t in range(32) for i in range(4)]
    with pytest.raises(PtxFault, match="out of bounds"):
        copied(second=16)
    body = COPY.replace("[%rd11]", "[%rd11+4096]").format(size=0, second=0, left=1, read=0)
    out = np.ones(128, np.uint32)
    run(kernel(body, 2, ".shared .align 16 .b8 room[1024];\n"), np.arange(128, dtype=np.uint32), out, block=32)
    assert not out.any(), "nothing is read from an address that copies no byte"


def test_sectors_are_counted_once_a_warp():
    def sectors(line):
        body = f"mov.u32 %r1, 3;\n{line}"
        room = np.zeros(4096 + 8, np.uint32)
        aligned = room[-(room.ctypes.data // 4) % 8:][:4096]  # numpy aligns to 16 bytes only, a sector to 32
        traffic = run(kernel(body, 1), aligned, block=64, counters=True).counters.traffic
        assert len(traffic) == 1
        assert traffic[0].requests == 2
        return traffic[0].sectors, traffic[0].bytes

    base = "mul.wide.u32 %rd10, %tid, {}; add.s64 %rd11, %rd0, %rd10; "
    assert sectors(base.format(4) + "st.global.u32 [%rd11], %r1;") == (8, 256), "neighbours share sectors"
    assert sectors(base.format(32) + "ld.global.u32 %r2, [%rd11];") == (64, 256), "a sector a lane"
    assert sectors(base.format(0) + "ld.global.u32 %r2, [%rd11];") == (2, 256), "all lanes the same"
    assert sectors(base.format(16) + "ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd11];") == (32, 1024)


# ----- what is refused


@pytest.mark.parametrize(("line", "message"), [
    ("frob.u32 %r1, %r2;", r"PTX line 11, `frob\.u32 %r1, %r2`: unknown instruction frob\.u32"),
    ("add.sat.s32 %r1, %r1, %r1;", "unknown instruction add.sat.s32"),
    ("fma.rz.f32 %f1, %f1, %f1, %f1;", "unknown instruction fma.rz.f32"),
    ("ld.u32 %r1, [%rd0];", "generic addresses"), ("mov.u32 %r1, %clock;", "unknown special register %clock"),
    ("add.s64 %rd1, %r1, %rd1;", "%r1 is too narrow"), ("add.u32 %r1, %r2;", "takes 2 sources, not 1"),
    ("mov.f32 %f1, 3;", "where a float is needed"), ("bra NOWHERE;", "a label that is not there"),
    ("bar.sync 1;", "only barrier 0"), ("mov.u32 %r1, nothing;", "is no value"),
    ("add.u32 %r1, %r1, @;", "is no operand"),
    ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r1}, {%f1};", "unknown instruction mma"),
    ("cp.async.bulk.shared.global [%r1], [%rd0], 16;", "unknown instruction cp.async.bulk"),
    ("shfl.sync.bfly.b32 %r1, %r1;", "unknown instruction shfl")])
def test_what_nobody_taught_it_is_refused_with_its_line(line, message):
    with pytest.raises(PtxError, match=message):
        run(kernel(f"\n\n{line}", 1), TID.copy())


def test_impossible_launches_are_refused():
    text, device, words = kernel("", 1), PtxDevice(80), TID.copy()
    with pytest.raises(PtxError, match="has no function f; it has k"):
        device.run(text, "f", (1, 1, 1), (1, 1, 1), 0, [])
    with pytest.raises(TypeError, match="takes 1 arguments, got 0"):
        device.run(text, "k", (1, 1, 1), (1, 1, 1), 0, [])
    with pytest.raises(TypeError, match="argument 0: takes a tensor"):
        device.run(text, "k", (1, 1, 1), (1, 1, 1), 0, [np.int32(3)])
    with pytest.raises(ValueError, match="at most 1024 threads"):
        run(text, words, block=1025)
    with pytest.raises(ValueError, match="sm_80 has 163 KiB"):
        run(text, words, shared_bytes=164 * 1024)
    with pytest.raises(ValueError, match="arch must be one of"):
        PtxDevice(70)

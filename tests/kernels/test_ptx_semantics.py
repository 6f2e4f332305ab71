"""Every class of PTX instructions, one at a time, against Python's integers, exact fractions and numpy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.ptx_lanes import lanes

WORDS = np.array([0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 0x7FFF_FFFF, 0x8000_0000, 0x8000_0001, 0xFFFF_FFFE, 0xFFFF_FFFF,
                  0x1234_5678], np.uint32)
A, B = (grid.reshape(-1).copy() for grid in np.meshgrid(WORDS, WORDS))
MASK = 0xFFFF_FFFF


def signed(x, bits=32):
    return (int(x) ^ 1 << bits - 1) - (1 << bits - 1) if int(x) < 1 << bits else int(x)


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


S = signed
INTEGERS = {  # opcode: the same in Python, on unsigned numbers
    "add.s32": lambda a, b: a + b, "sub.s32": lambda a, b: a - b, "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: S(a) * S(b) >> 32, "mul.hi.u32": lambda a, b: a * b >> 32, "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b, "xor.b32": lambda a, b: a ^ b, "min.s32": lambda a, b: min(S(a), S(b)),
    "max.u32": max, "max.s32": lambda a, b: max(S(a), S(b)), "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0, "shr.s32": lambda a, b: S(a) >> min(b, 31),
    "div.s32": lambda a, b: truncated(S(a), S(b)) if b else -1, "div.u32": lambda a, b: a // b if b else -1,
    "rem.s32": lambda a, b: S(a) - truncated(S(a), S(b)) * S(b) if b else a, "rem.u32": lambda a, b: a % b if b else a}


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers_of_two_operands(opcode):
    wanted = [INTEGERS[opcode](int(a), int(b)) & MASK for a, b in zip(A, B, strict=True)]
    assert lanes(f"{opcode} %out, %a, %b;", "b32", A, B).tolist() == wanted


UNARY = {
    "neg.s32": lambda a: -a, "abs.s32": lambda a: abs(S(a)), "not.b32": lambda a: ~a,
    "brev.b32": lambda a: int(f"{a:032b}"[::-1], 2), "popc.b32": lambda a: a.bit_count(),
    "clz.b32": lambda a: 32 - a.bit_length(), "bfind.u32": lambda a: a.bit_length() - 1,
    "bfind.s32": lambda a: (S(a) if S(a) >= 0 else ~S(a)).bit_length() - 1,
    "bfind.shiftamt.u32": lambda a: 32 - a.bit_length() if a else -1}


@pytest.mark.parametrize("opcode", UNARY)
def test_integers_of_one_operand(opcode):
    assert lanes(f"{opcode} %out, %a;", "b32", WORDS).tolist() == [UNARY[opcode](int(a)) & MASK for a in WORDS]


@pytest.mark.parametrize("opcode", ["mul.wide.s32", "mul.wide.u32", "mad.wide.s32"])
def test_wide_products(opcode):
    number = S if "s32" in opcode else int
    c = np.arange(len(A), dtype=np.uint64) * np.uint64(0x1_0000_0001)
    wanted = [(number(a) * number(b) + (int(x) if "mad" in opcode else 0)) % (1 << 64)
              for a, b, x in zip(A, B, c, strict=True)]
    line = f"{opcode} %out, %a, %b{', %c' if 'mad' in opcode else ''};"
    assert lanes(line, "b64", A, B, c).tolist() == wanted


def test_bit_fields():
    for start, count in ((0, 8), (4, 28), (29, 3), (31, 1), (0, 32), (8, 0), (32, 4), (20, 32)):
        field = (((1 << count) - 1) << start) & MASK
        wanted = [int(b) & ~field & MASK | int(a) << start & field for a, b in zip(A, B, strict=True)]
        assert lanes(f"bfi.b32 %out, %a, %b, {start}, {count};", "b32", A, B).tolist() == wanted
        wanted = [(int(a) >> start) & ((1 << count) - 1) for a in WORDS]
        assert lanes(f"bfe.u32 %out, %a, {start}, {count};", "b32", WORDS).tolist() == wanted
        if count > 0 and start < 32:
            width = min(count, 32 - start)
            wanted = [S((int(a) >> start) & ((1 << width) - 1), width) & MASK for a in WORDS]
            assert lanes(f"bfe.s32 %out, %a, {start}, {count};", "b32", WORDS).tolist() == wanted


def test_permuted_bytes():
    for selector in (0x3210, 0x0123, 0x7654, 0x5410, 0x8888, 0xF0F0):
        def byte(a, b, nibble):
            value = (a | b << 32) >> 8 * (nibble & 7) & 255
            return (255 if value & 128 else 0) if nibble & 8 else value
        wanted = [sum(byte(int(a), int(b), selector >> 4 * i & 15) << 8 * i for i in range(4))
                  for a, b in zip(A, B, strict=True)]
        assert lanes(f"prmt.b32 %out, %a, %b, {selector};", "b32", A, B).tolist() == wanted


def test_comparisons_and_selection():
    for opcode, python in (("lt.s32", lambda a, b: S(a) < S(b)), ("hi.u32", lambda a, b: a > b),
                           ("eq.s32", lambda a, b: a == b), ("ge.u32", lambda a, b: a >= b)):
        wanted = [python(int(a), int(b)) for a, b in zip(A, B, strict=True)]
        assert lanes(f"setp.{opcode} %out, %a, %b;", "pred", A, B).astype(bool).tolist() == wanted
    both = lanes("setp.lt.u32 %p1|%p2, %a, %b; setp.eq.or.u32 %out, %a, 7, %p2;", "pred", A, B)
    assert both.astype(bool).tolist() == [a == 7 or a >= b for a, b in zip(A.tolist(), B.tolist(), strict=True)]
    wanted = np.where(A < B, A, B)
    assert lanes("setp.lt.u32 %p1, %a, %b; selp.b32 %out, %a, %b, %p1;", "b32", A, B).tolist() == wanted.tolist()


FLOATS = np.array([0.0, -0.0, 1.0, -1.5, 3.0e38, 1.0e-39, -1.0e-40, 1.2e-38, np.inf, -np.inf, np.nan, 7.25], np.float32)
X, Y = (grid.reshape(-1).copy() for grid in np.meshgrid(FLOATS, FLOATS))


def same(found, wanted):
    np.testing.assert_array_equal(np.asarray(found).view(np.float32), np.asarray(wanted, np.float32))


@pytest.mark.parametrize(("opcode", "function"), [
    ("add.f32", np.add), ("sub.f32", np.subtract), ("mul.f32", np.multiply), ("div.rn.f32", np.divide),
    ("min.f32", np.fmin), ("max.f32", np.fmax)])
def test_floats_of_two_operands(opcode, function):
    with np.errstate(all="ignore"):
        same(lanes(f"{opcode} %out, %a, %b;", "f32", X, Y), function(X, Y))


def test_subnormals_are_flushed_only_if_the_opcode_says_so():
    tiny = np.array([1e-39, -1e-39, 1.2e-38, -2e-38], np.float32)
    same(lanes("mul.ftz.f32 %out, %a, 0f3F800000;", "f32", tiny), [0.0, -0.0, 1.2e-38, -2e-38])
    assert np.signbit(lanes("mul.ftz.f32 %out, %a, 0f3F800000;", "f32", tiny).view(np.float32)).tolist() == [0, 1, 0, 1]
    same(lanes("mul.ftz.f32 %out, %a, 0f3F000000;", "f32", tiny), [0.0, -0.0, 0.0, -0.0])
    same(lanes("mul.f32 %out, %a, 0f3F000000;", "f32", tiny), tiny * np.float32(0.5))
    assert lanes("setp.gt.ftz.f32 %out, %a, 0f00000000;", "pred", tiny).tolist() == [0, 0, 1, 0]


def nearest_float32(exact: Fraction) -> np.float32:
    near = np.float32(float(exact))
    options = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    return min(options, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 3), min_size=1, max_size=64))
def test_fused_multiply_add_rounds_once(rows):
    # and sums that lie so close to half-way between two float32 that float64 cannot tell
    rows = [*rows, (1 + 2 ** -23, 1 + 2 ** -23, 2.0 ** -60), (1.0, 1 + 2 ** -23, 2.0 ** -24 + 2.0 ** -47),
            (2.0 ** -24, 1 + 2 ** -20, 1.0), (-(2.0 ** -30), 2.0 ** -30, 1 + 2 ** -23), (2.0 ** -24, 1.0, 1.0)]
    a, b, c = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    keep = [i for i, e in enumerate(exact) if e == 0 or abs(e) > 2 ** -120]
    found = lanes("fma.rn.f32 %out, %a, %b, %c;", "f32", a, b, c).view(np.float32)
    assert [float(found[i]) for i in keep] == [float(nearest_float32(exact[i])) for i in keep]


@pytest.mark.parametrize(("opcode", "function"), [
    ("ex2.approx.ftz.f32", lambda x: 2.0 ** x), ("lg2.approx.f32", math.log2), ("rcp.rn.ftz.f32", lambda x: 1 / x),
    ("rsqrt.approx.f32", lambda x: x ** -0.5), ("sqrt.rn.f32", math.sqrt), ("tanh.approx.f32", math.tanh),
    ("sin.approx.f32", math.sin), ("cos.approx.f32", math.cos), ("rcp.approx.f32", lambda x: 1 / x)])
def test_special_functions(opcode, function):
    x = np.linspace(0.01, 30, 301).astype(np.float32)
    found = lanes(f"{opcode} %out, %a;", "f32", x).view(np.float32)
    np.testing.assert_allclose(found, [function(float(v)) for v in x], rtol=1e-7, atol=1e-7)


def test_conversions_between_floats():
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.standard_normal(200).astype(np.float32) * np.float32(100), FLOATS[:10],
                        np.float32([65519, 65520, 1 + 2 ** -11, 1 + 3 * 2 ** -11, 1 + 2 ** -8, 1 + 3 * 2 ** -8])])
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    np.testing.assert_array_equal(lanes("cvt.rn.f16.f32 %out, %a;", "b16", x), half.view(np.uint16))
    brain = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(lanes("cvt.rn.bf16.f32 %out, %a;", "b16", x), brain)
    same(lanes("cvt.f32.f16 %out, %a;", "f32", half.view(np.uint16)), half.astype(np.float32))
    same(lanes("cvt.f32.bf16 %out, %a;", "f32", brain), (brain.astype(np.uint32) << 16).view(np.float32))
    pair = lanes("cvt.rn.f16x2.f32 %out, %a, %b;", "b32", x, -x)
    np.testing.assert_array_equal(pair, half.view(np.uint16).astype(np.uint32) << 16 | (-half).view(np.uint16))
    assert lanes("cvt.rn.bf16x2.f32 %out, %a, %a;", "b32", np.float32([np.nan])).tolist() == [0x7FFF_7FFF]


def test_conversions_of_integers():
    x = np.float32([0.5, 1.5, 2.5, -1.5, 3e9, -3e9, np.nan, 1e20])
    assert lanes("cvt.rzi.s32.f32 %out, %a;", "b32", x).view(np.int32).tolist() == [
        0, 1, 2, -1, 2 ** 31 - 1, -(2 ** 31), 0, 2 ** 31 - 1]
    assert lanes("cvt.rni.u32.f32 %out, %a;", "b32", x).tolist() == [0, 2, 2, 0, 3_000_000_000, 0, 0, MASK]
    same(lanes("cvt.rn.f32.s32 %out, %a;", "f32", WORDS), WORDS.view(np.int32).astype(np.float32))
    assert lanes("cvt.s64.s32 %out, %a;", "b64", WORDS).view(np.int64).tolist() == WORDS.view(np.int32).tolist()
    assert lanes("cvt.u64.u32 %out, %a;", "b64", WORDS).tolist() == WORDS.tolist()
    assert lanes("cvt.u32.u64 %out, %a;", "b32", np.uint64([2 ** 32 + 5])).tolist() == [5]
    # a 16-bit register that holds an 8-bit number keeps its sign
    assert lanes("cvt.s8.s32 %rs1, %a; cvt.s32.s16 %out, %rs1;", "b32", np.uint32([200, 100])).view(
        np.int32).tolist() == [-56, 100]


def test_moves_pack_and_unpack():
    found = lanes("mov.b32 {%rs1, %rs2}, %a; mov.b32 %out, {%rs2, %rs1};", "b32", WORDS)
    assert found.tolist() == (WORDS << 16 | WORDS >> 16).tolist()
    found = lanes("mov.b64 %rd20, {%a, %b}; mov.b64 {%r1, %r2}, %rd20; mov.b32 %out, %r2;", "b32", A, B)
    assert found.tolist() == B.tolist()
    assert lanes("{.reg .b16 low; cvt.u16.u32 low, %a; {.reg .b32 low; mov.b32 low, 9;} cvt.u32.u16 %out, low;}",
                 "b32", WORDS).tolist() == (WORDS & 0xFFFF).tolist(), "a name inside braces ends with them"

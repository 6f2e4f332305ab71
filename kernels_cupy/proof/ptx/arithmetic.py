"""What instructions compute, lane by lane: functions from arrays to arrays, chosen by opcode. No registers, no memory.

Integers wrap, shifts clamp, floats round once to nearest even as the opcode says. `.ftz` flushes subnormal inputs and
results to zero of the same sign. The `.approx` functions return the correctly rounded value; a GPU's differ from it in
the last two or three bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels_cupy.proof.ptx.parser import PtxError

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES: dict[str, Any] = {
    "pred": np.bool_, "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64,
    "f16x2": np.uint32, "bf16x2": np.uint32, **{f"b{n}": np.dtype(f"u{n // 8}").type for n in (8, 16, 32, 64)},
    **{f"u{n}": np.dtype(f"u{n // 8}").type for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}").type for n in (8, 16, 32, 64)}}
SMALLEST_NORMAL = np.float32(2.0 ** -126)


@dataclass(frozen=True)
class Operation:
    """What an opcode computes: types of its sources, of its result, and the function between them."""

    sources: tuple[str, ...]
    result: str
    function: Callable[..., Any]


def operation(opcode: str) -> Operation:
    """The lane-wise operation of an opcode.

    Raises:
        PtxError: the opcode, or one of its modifiers, is not supported.
    """
    root, *parts = opcode.split(".")
    types = [part for part in parts if part in DTYPES]
    modifiers = {part for part in parts if part not in DTYPES}
    found: Operation | None = None
    if root == "cvt" and len(types) == 2:
        found = _conversion(types[0], types[1], modifiers)
    elif root == "setp" and types:
        found = _comparison(types[-1], [part for part in parts if part not in DTYPES and part != "ftz"])
    elif types and types[-1] in ("f32", "f64"):
        found = _float(root, types[-1], modifiers)
    elif types:
        found = _integer(root, types[-1], modifiers)
    if found is None:
        raise PtxError(f"unknown instruction {opcode}")
    return _flushing(found) if "ftz" in modifiers else found


# ----- floats


def flush(x: Array) -> Array:
    """Subnormal float32 become zero and keep their sign."""
    small = np.abs(x) < SMALLEST_NORMAL
    if not np.count_nonzero(small):  # much the fastest of numpy's ways to ask
        return x
    return np.multiply(x, np.float32(0), out=x.copy(), where=small)


def _flushing(one: Operation) -> Operation:
    def function(*values: Array) -> Array:
        result: Array = one.function(*(flush(value) if value.dtype == np.float32 else value for value in values))
        return flush(result) if result.dtype == np.float32 else result

    return Operation(one.sources, one.result, function)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once. The product is exact in float64; the sum is not, and rounding it again would
    be wrong where it lies half-way between two float32: there the lost part decides."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    half_way = (total.view(np.uint64) & np.uint64(0x1FFF_FFFF)) == np.uint64(0x1000_0000)
    if np.count_nonzero(half_way):
        back = total - product
        lost = (product - (total - back)) + (addend - back)
        towards = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        total = np.where(half_way & (lost != 0), towards, total)
    return total.astype(np.float32)


def _through_double(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


_FLOAT: dict[str, tuple[int, set[str], Callable[..., Array]]] = {  # arity, modifiers that change nothing here, function
    "add": (2, {"rn"}, np.add), "sub": (2, {"rn"}, np.subtract), "mul": (2, {"rn"}, np.multiply),
    "div": (2, {"rn", "approx", "full"}, np.divide), "neg": (1, set(), np.negative), "abs": (1, set(), np.abs),
    "min": (2, set(), np.fmin), "max": (2, set(), np.fmax), "rcp": (1, {"rn", "approx"}, lambda x: 1 / x),
    "sqrt": (1, {"rn", "approx"}, np.sqrt), "fma": (3, {"rn"}, fused_multiply_add), "mov": (1, set(), lambda x: x),
    "rsqrt": (1, {"approx"}, _through_double(lambda x: 1 / np.sqrt(x))),
    "ex2": (1, {"approx"}, _through_double(np.exp2)), "lg2": (1, {"approx"}, _through_double(np.log2)),
    "sin": (1, {"approx"}, _through_double(np.sin)), "cos": (1, {"approx"}, _through_double(np.cos)),
    "tanh": (1, {"approx"}, _through_double(np.tanh)),
}


def _float(root: str, kind: str, modifiers: set[str]) -> Operation | None:
    if root == "selp":
        return _select(kind) if not modifiers else None
    if root not in _FLOAT:
        return None
    arity, harmless, function = _FLOAT[root]
    if modifiers - harmless - {"ftz"} or (kind == "f64" and root in ("fma", "ex2")):
        return None
    return Operation((kind,) * arity, kind, function)


# ----- integers, bits and predicates


def _shift_left(x: Array, by: Array) -> Array:
    bits = 8 * x.itemsize
    shifted: Array = x << np.minimum(by, bits - 1).astype(x.dtype)
    return np.where(by < bits, shifted, x.dtype.type(0))


def _shift_right(x: Array, by: Array) -> Array:
    bits = 8 * x.itemsize
    shifted: Array = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(by < bits, shifted, x.dtype.type(0))


def _divide(a: Array, b: Array) -> Array:
    """Truncates towards zero; by zero it gives all ones, as GPUs do, although PTX leaves it undefined."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, b.dtype.type(-1) if a.dtype.kind == "i" else ~b.dtype.type(0), quotient).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, a - _divide(a, b) * b).astype(a.dtype)


def _widen(function: Callable[..., Array]) -> Callable[..., Array]:
    """Of the two factors, twice as wide; the third operand of mad is wide already."""
    def wide(a: Array, b: Array, *c: Array) -> Array:
        to = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
        return function(a.astype(to), b.astype(to), *c)

    return wide


def _high(a: Array, b: Array) -> Array:
    to = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    high: Array = ((a.astype(to) * b.astype(to)) >> (8 * a.itemsize)).astype(a.dtype)
    return high


def _bits_of(x: Array, reverse: bool = False) -> Array:
    """[lanes, width] of 0 and 1, lowest first; highest first if reversed."""
    order = range(8 * x.itemsize)
    shifts = np.array(order[::-1] if reverse else order, x.dtype)
    bits: Array = (x[:, None] >> shifts) & x.dtype.type(1)
    return bits


def _reverse_bits(x: Array) -> Array:
    weights = x.dtype.type(1) << np.arange(8 * x.itemsize, dtype=x.dtype)
    reversed_: Array = (_bits_of(x, reverse=True) * weights).sum(axis=1, dtype=x.dtype)
    return reversed_


def _leading_zeros(x: Array) -> Array:
    bits = _bits_of(x, reverse=True)
    zeros: Array = np.where(bits.any(axis=1), bits.argmax(axis=1), bits.shape[1]).astype(np.uint32)
    return zeros


def _find_highest(x: Array) -> Array:
    """Position of the highest bit that is not the sign; all ones if there is none."""
    unsigned = np.where(x < 0, ~x, x).view(f"u{x.itemsize}") if x.dtype.kind == "i" else x
    found: Array = (np.uint32(8 * x.itemsize - 1) - _leading_zeros(unsigned)).astype(np.uint32)
    return found


def _find_highest_shift(x: Array) -> Array:
    """The left shift that brings the bit of `_find_highest` to the top."""
    highest = _find_highest(x)
    shift: Array = np.where(highest == 0xFFFF_FFFF, highest, np.uint32(8 * x.itemsize - 1) - highest)
    return shift


def _mask(count: Array, like: Array) -> Array:
    ones = ~like.dtype.type(0)
    lowest: Array = ~_shift_left(np.broadcast_to(ones, count.shape), count)
    return lowest


def _insert_field(a: Array, b: Array, start: Array, count: Array) -> Array:
    """b with `count` bits from `start` on replaced by the lowest of a."""
    start, count = start & np.uint32(255), count & np.uint32(255)
    hole = _shift_left(_mask(count, b), start)
    return (b & ~hole) | (_shift_left(a, start) & hole)


def _extract_field(a: Array, start: Array, count: Array) -> Array:
    """`count` bits of a from `start` on, sign-extended for signed types."""
    start, count = np.minimum(start & np.uint32(255), 64), count & np.uint32(255)
    unsigned, bits = a.view(f"u{a.itemsize}"), 8 * a.itemsize
    low = _shift_right(unsigned, start) & _mask(count, unsigned)
    if a.dtype.kind == "u":
        return low
    top = np.minimum(start + count - 1, bits - 1)  # past the end, the number's own sign goes on
    negative = (_shift_right(unsigned, top) & unsigned.dtype.type(1) != 0) & (count > 0)
    width = np.minimum(count, bits - np.minimum(start, bits)) if bits else count
    return np.where(negative, low | ~_mask(width, unsigned), low).astype(unsigned.dtype).view(a.dtype)


def _permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint32)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((both >> (8 * (choice & np.uint32(7))).astype(np.uint64)) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(choice & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result


def _select(kind: str) -> Operation:
    return Operation((kind, kind, "pred"), kind, lambda a, b, p: np.where(p, a, b))


_INTEGER: dict[str, tuple[int, Callable[..., Array]]] = {
    "add": (2, np.add), "sub": (2, np.subtract), "mul.lo": (2, np.multiply), "mul.hi": (2, _high),
    "mad.lo": (3, lambda a, b, c: a * b + c), "mad.hi": (3, lambda a, b, c: _high(a, b) + c), "div": (2, _divide),
    "rem": (2, _remainder), "neg": (1, lambda x: (-x.view(f"i{x.itemsize}")).view(x.dtype)), "abs": (1, np.abs),
    "min": (2, np.minimum), "max": (2, np.maximum), "and": (2, np.bitwise_and), "or": (2, np.bitwise_or),
    "xor": (2, np.bitwise_xor), "not": (1, np.invert), "mov": (1, lambda x: x), "brev": (1, _reverse_bits),
}
_COUNTING: dict[str, Callable[[Array], Array]] = {
    "clz": _leading_zeros, "bfind": _find_highest, "bfind.shiftamt": _find_highest_shift,
    "popc": lambda x: _bits_of(x).sum(axis=1).astype(np.uint32)}


def _integer(root: str, kind: str, modifiers: set[str]) -> Operation | None:
    name = ".".join((root, *sorted(modifiers)))
    if name in ("mul.wide", "mad.wide") and kind[1:] in ("16", "32"):
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        if root == "mul":
            return Operation((kind, kind), wide, _widen(np.multiply))
        return Operation((kind, kind, wide), wide, _widen(lambda a, b, c: a * b + c))
    if name in ("mul.hi", "mad.hi") and kind[1:] == "64":
        return None
    if name in _INTEGER:
        arity, function = _INTEGER[name]
        return Operation((kind,) * arity, kind, function)
    if name in ("shl", "shr"):
        return Operation((kind, "u32"), kind, _shift_left if name == "shl" else _shift_right)
    if name in _COUNTING and kind[1:] in ("32", "64"):
        return Operation((kind,), "u32", _COUNTING[name])
    fields = {"selp": _select(kind), "bfi": Operation((kind, kind, "u32", "u32"), kind, _insert_field),
              "bfe": Operation((kind, "u32", "u32"), kind, _extract_field),
              "prmt": Operation(("b32",) * 3, "b32", _permute_bytes)}
    return fields.get(name)


_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_JOIN: dict[str, Callable[[Array, Array], Array]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(kind: str, modifiers: list[str]) -> Operation | None:
    if not modifiers or len(modifiers) > 2 or (len(modifiers) == 2 and modifiers[1] not in _JOIN):
        return None
    test = _test(modifiers[0], kind in ("f32", "f64"))
    if test is None:
        return None
    if len(modifiers) == 1:
        return Operation((kind, kind), "pred", test)
    join = _JOIN[modifiers[1]]
    return Operation((kind, kind, "pred"), "pred", lambda a, b, p: join(test(a, b), p))


def _test(name: str, is_float: bool) -> Callable[[Array, Array], Array] | None:
    """A comparison. Of floats, those with a final u are true too if an operand is no number, the others false."""
    if is_float and name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if is_float and name.endswith("u") and name[:-1] in _COMPARE:
        return lambda a, b: _COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    if is_float and name == "ne":
        return lambda a, b: (a < b) | (a > b)
    return _COMPARE.get(name)


# ----- conversions


def to_bfloat16(x: Array) -> Array:
    """float32 to the bits of the nearest bfloat16, ties to even; no number becomes 0x7fff."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bfloat16(bits: Array) -> Array:
    """The bits of bfloat16 to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _half_bits(x: Array) -> Array:
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


_ROUND: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(kind: str, rounding: str) -> Callable[[Array], Array]:
    limits = np.iinfo(DTYPES[kind])

    def convert(x: Array) -> Array:
        wide = _ROUND[rounding](x.astype(np.float64))
        inside = np.where(np.isnan(wide) | (wide >= float(limits.max)) | (wide <= float(limits.min)), 0, wide)
        result = inside.astype(DTYPES[kind])
        return np.where(wide >= float(limits.max), limits.max, np.where(wide <= float(limits.min), limits.min, result))

    return convert


def _conversion(to: str, of: str, modifiers: set[str]) -> Operation | None:
    rounding = modifiers - {"ftz"}
    if of in ("f32", "f64") and to[0] in "su" and len(rounding) == 1 and rounding <= set(_ROUND):
        return Operation((of,), to, _to_integer(to, rounding.pop()))
    if of == "f32" and to == "f32" and len(rounding) == 1 and rounding <= set(_ROUND):
        return Operation((of,), to, _ROUND[rounding.pop()])
    if rounding - {"rn"}:
        return None
    if to in ("f16x2", "bf16x2") and of == "f32":
        bits = _half_bits if to == "f16x2" else to_bfloat16
        return Operation(("f32", "f32"), to,
                         lambda high, low: bits(high).astype(np.uint32) << np.uint32(16) | bits(low))
    functions: dict[tuple[str, str], Callable[[Array], Array]] = {
        ("f16", "f32"): lambda x: _half_bits(x).view(np.float16), ("bf16", "f32"): to_bfloat16,
        ("f32", "f16"): lambda x: x.astype(np.float32), ("f32", "bf16"): from_bfloat16,
        ("f64", "f32"): lambda x: x.astype(np.float64), ("f32", "f64"): lambda x: x.astype(np.float32)}
    if (to, of) in functions:
        return Operation((of,), to, functions[to, of])
    if of[0] in "su" and (to[0] in "su" or to in ("f32", "f64", "f16")):
        return Operation((of,), to, lambda x: x.astype(DTYPES[to]))
    return None

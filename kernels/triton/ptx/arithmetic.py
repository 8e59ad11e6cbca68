"""What each instruction without memory makes of its operands, for all threads at once, on NumPy arrays.

Numbers follow the PTX manual but for the approximations (ex2.approx and its kin, div.full), which are exact to the last
place here, and fused multiply-adds of doubles, whose product has 64 bits.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: NumPy's type of a PTX type; bf16 and numbers that share a register are kept as bits.
KINDS: dict[str, Any] = {
    "f32": np.float32, "f64": np.float64, "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "s32": np.int32,
    "u32": np.uint32, "b32": np.uint32, "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "pred": np.bool_,
    "s8": np.int8, "u8": np.uint8, "b8": np.uint8, "bf16": np.uint16, "bf16x2": np.uint32, "f16": np.float16,
    "s16x2": np.uint32, "f32x2": np.uint64,
}  # fmt: skip
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_ROUNDED: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil
}  # fmt: skip
_COMPARED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_SMALLEST = np.float32(2.0**-126)

Compute = Callable[..., Array]
#: Types of the operands, type of the result, and what is computed.
Rule = tuple[tuple[str, ...], str, Compute]


def bf16_bits(values: Array) -> Array:
    """float32 → bf16, nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def bf16_values(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bf16_bits_of_doubles(values: Array) -> Array:
    """float64 → bf16, nearest, ties to even: by way of a float32 that is rounded to odd, so that nothing is rounded
    twice."""
    near = values.astype(np.float32)
    bits = np.ascontiguousarray(near).view(np.uint32)
    inexact = near.astype(np.float64) != values
    bits = bits - (np.abs(near).astype(np.float64) > np.abs(values)).astype(np.uint32)
    return bf16_bits(np.where(inexact, bits | np.uint32(1), bits).view(np.float32))


def _flush(values: Array) -> Array:
    return np.where(np.abs(values) < _SMALLEST, np.copysign(np.float32(0), values), values).astype(np.float32)


def _flushing(compute: Compute) -> Compute:
    return lambda *values: _flush(compute(*(_flush(value) for value in values)))


#: What may stand between an instruction's name and its type; another word would say something that is not done.
_MODIFIERS = {"rn", "rz", "approx", "full", "ftz", "lo", "hi", "wide", "NaN", "nan", "num", *_ROUNDED}


def rule(op: tuple[str, ...], count: int) -> Rule | None:
    """How an instruction with `count` operands computes; None for those that this file does not have."""
    name, kind = op[0], op[-1]
    known = _MODIFIERS | set(KINDS) | {how + also for how in _COMPARED for also in ("", "u")}
    if set(op[1:]) - known:
        return None
    if name in ("add", "sub") and op[-2:] == ("f32", "bf16") and "ftz" not in op:
        real = np.add if name == "add" else np.subtract
        return ("b16", "f32"), "f32", lambda a, b: real(bf16_values(a), b)
    if name in _BINARY and kind in KINDS and op[1] not in ("wide", "hi"):
        compute = _BINARY[name](kind, op)
        if compute is None or (kind in _HALVES and "ftz" in op):
            return None
        if kind in _HALVES:
            compute = _halves(compute, kind)
        if name in ("min", "max") and count == 3:
            two = compute
            compute = lambda a, b, c: two(two(a, b), c)  # noqa: E731
        return (kind,) * count, kind, _flushing(compute) if "ftz" in op else compute
    if name in _UNARY and kind in KINDS:
        compute = _UNARY[name](kind)
        return (kind,), kind, _flushing(compute) if "ftz" in op else compute
    if name == "mul":
        return _product(op)
    if name in ("mad", "fma"):
        return _product_sum(op)
    if name in ("shl", "shr"):
        return (kind, "u32"), kind, _shift(name, kind)
    if name == "bfe":
        return (kind, "u32", "u32"), kind, _field
    if name == "prmt" and len(op) == 2:
        return ("b32", "b32", "b32"), "b32", _permute
    if op == ("lop3", "b32"):
        return ("b32", "b32", "b32", "u32"), "b32", _three_bits
    if name == "selp":
        return (kind, kind, "pred"), kind, _choice
    if name == "setp":
        return _comparison(op)
    if name == "cvt":
        return _conversion(op)
    return None


def _choice(a: Array, b: Array, first: Array) -> Array:
    return np.where(first, a, b)


def _signed_division(a: Array, b: Array) -> Array:
    quotient = np.floor_divide(a, np.where(b == 0, 1, b))
    return np.where((quotient < 0) & (quotient * b != a), quotient + 1, quotient).astype(a.dtype)


def _divide(kind: str, op: tuple[str, ...]) -> Compute:
    if kind[0] == "f":
        return np.divide
    return _signed_division if kind[0] == "s" else lambda a, b: np.floor_divide(a, np.where(b == 0, 1, b))


def _extreme(real: Compute, strict: Compute) -> Callable[[str, tuple[str, ...]], Compute]:
    return lambda kind, op: strict if kind[0] != "f" or "NaN" in op else real


#: The numbers of which a register of such a type holds two.
_HALVES: dict[str, Any] = {"s16x2": np.uint16, "f32x2": np.float32, "bf16x2": np.uint16}


def _halves(compute: Compute, kind: str) -> Compute:
    """On both numbers of a register that holds two."""

    def both(*values: Array) -> Array:
        held = np.broadcast_arrays(*values)
        parts = (np.ascontiguousarray(value).view(_HALVES[kind]) for value in held)
        return np.ascontiguousarray(compute(*parts)).view(KINDS[kind]).reshape(held[0].shape)

    return both


def _bf16_product(a: Array, b: Array) -> Array:
    return bf16_bits(bf16_values(a) * bf16_values(b))  # 16 bits, which a float32 holds


def _multiply(kind: str, op: tuple[str, ...]) -> Compute | None:
    if "bf" not in kind:
        return np.multiply
    return _bf16_product if op[1:] == ("rn", "bf16") else None


def _sum(compute: Compute) -> Callable[[str, tuple[str, ...]], Compute | None]:
    return lambda kind, op: None if kind.startswith("bf16") else compute


_BINARY: dict[str, Callable[[str, tuple[str, ...]], Compute | None]] = {
    "add": _sum(np.add), "sub": _sum(np.subtract), "mul": _multiply,
    "div": _divide, "rem": lambda kind, op: lambda a, b: np.fmod(a, np.where(b == 0, 1, b)).astype(a.dtype),
    "min": _extreme(np.fmin, np.minimum), "max": _extreme(np.fmax, np.maximum),
    "and": lambda kind, op: np.bitwise_and, "or": lambda kind, op: np.bitwise_or,
    "xor": lambda kind, op: np.bitwise_xor,
}  # fmt: skip
_UNARY: dict[str, Callable[[str], Compute]] = {
    "abs": lambda kind: np.abs, "neg": lambda kind: np.negative, "not": lambda kind: np.invert,
    "ex2": lambda kind: lambda a: np.exp2(a.astype(np.float64)).astype(a.dtype),
    "lg2": lambda kind: lambda a: np.log2(a.astype(np.float64)).astype(a.dtype),
    "rcp": lambda kind: lambda a: (1 / a).astype(a.dtype), "sqrt": lambda kind: np.sqrt,
    "rsqrt": lambda kind: lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype),
    "popc": lambda kind: lambda a: np.bitwise_count(a).astype(np.uint32),
}  # fmt: skip


def _product(op: tuple[str, ...]) -> Rule | None:
    kind = op[-1]
    if op[1] == "wide":
        wide = KINDS[WIDER[kind]]
        return (kind, kind), WIDER[kind], lambda a, b: a.astype(wide) * b.astype(wide)
    if op[1] == "hi" and kind in WIDER:
        own, wide = KINDS[kind], KINDS[WIDER[kind]]
        bits = wide(8 * np.dtype(own).itemsize)
        return (kind, kind), kind, lambda a, b: ((a.astype(wide) * b.astype(wide)) >> bits).astype(own)
    if op[1] == "hi" and kind in ("s64", "u64"):
        return (kind, kind), kind, _high_half
    return None


def _high_half(a: Array, b: Array) -> Array:
    """The upper 64 bits of a product of 128, of halves of 32 bits."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    (x1, x0), (y1, y0) = ((number >> half, number & low) for number in (x, y))
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + (x0 * y1 + (middle & low) >> half)
    if a.dtype == np.int64:  # a negative number stands 2^64 above itself
        high -= np.where(a < 0, y, np.uint64(0)) + np.where(b < 0, x, np.uint64(0))
    return high.astype(a.dtype)


def _product_sum(op: tuple[str, ...]) -> Rule | None:
    kind = op[-1]
    if op[0] == "mad" and op[1] == "wide":
        result, wide = WIDER[kind], KINDS[WIDER[kind]]
        return (kind, kind, result), result, lambda a, b, c: a.astype(wide) * b.astype(wide) + c
    if op[0] == "mad" and op[1] == "lo":
        return (kind, kind, kind), kind, lambda a, b, c: a * b + c
    if op[0] == "fma" and (kind in ("f32", "f64") or (kind == "f32x2" and "ftz" not in op)):
        wider: Any = np.longdouble if kind == "f64" else np.float64
        own = _HALVES.get(kind, KINDS[kind])

        def fused(a: Array, b: Array, c: Array) -> Array:
            return (a.astype(wider) * b.astype(wider) + c.astype(wider)).astype(own)

        compute: Compute = _halves(fused, kind) if kind in _HALVES else fused
        return (kind, kind, kind), kind, _flushing(fused) if "ftz" in op else compute
    if op[0] == "fma" and op[1:] in (("rn", "bf16"), ("rn", "bf16x2")):
        return (kind, kind, kind), kind, _halves(_bf16_fused, kind) if kind in _HALVES else _bf16_fused
    return None


def _bf16_fused(a: Array, b: Array, c: Array) -> Array:
    """fma of bf16 numbers as bits; subnormal ones count. (A sum of more than 53 bits is rounded to them first.)"""
    x, y, z = (bf16_values(value).astype(np.float64) for value in (a, b, c))
    return _bf16_bits_of_doubles(x * y + z)


def _shift(name: str, kind: str) -> Compute:
    bits = 8 * np.dtype(KINDS[kind]).itemsize

    def shifted(a: Array, by: Array) -> Array:
        held = np.minimum(by, bits - 1).astype(a.dtype)
        if name == "shr":
            result = a >> held
            return result if kind[0] == "s" else np.where(by >= bits, a.dtype.type(0), result)
        return np.where(by >= bits, a.dtype.type(0), a << held)

    return shifted


def _field(a: Array, begin: Array, length: Array) -> Array:
    """bfe: `length` bits from `begin` on."""
    wide = a.astype(np.int64) >> begin.astype(np.int64)
    size = length.astype(np.int64)
    field = wide & ((np.int64(1) << size) - 1)
    if a.dtype.kind == "i":
        negative = (size > 0) & ((field >> np.maximum(size - 1, 0)) & 1 == 1)
        field = np.where(negative, field - (np.int64(1) << size), field)
    return field.astype(a.dtype)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each of four bytes chosen out of the eight of b:a; a set fourth bit copies its sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint64)
    for place in range(4):
        choice = (selector.astype(np.uint64) >> np.uint64(4 * place)) & np.uint64(15)
        byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        result |= np.where(choice >= 8, sign, byte) << np.uint64(8 * place)
    return result.astype(np.uint32)


def _three_bits(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: each bit is that of the table at a·4 + b·2 + c."""
    result = np.zeros(np.broadcast(a, b, c, table).shape, np.uint32)
    for place in range(8):
        same = [value if place >> bit & 1 else ~value for bit, value in ((2, a), (1, b), (0, c))]
        chosen = np.where(table >> np.uint32(place) & np.uint32(1) == 1, np.uint32(0xFFFFFFFF), np.uint32(0))
        result |= same[0] & same[1] & same[2] & chosen
    return result


def _comparison(op: tuple[str, ...]) -> Rule | None:
    compared, kind = op[1], op[-1]
    if len(op) > 3 and op[2] not in ("ftz",):
        return None
    if compared in ("nan", "num"):
        none = compared == "num"
        return (kind, kind), "pred", lambda a, b: (np.isnan(a) | np.isnan(b)) ^ none
    if kind[0] == "f" and len(compared) == 3:  # unordered: true beside a NaN
        base = _COMPARED[compared[:2]]
        return (kind, kind), "pred", lambda a, b: base(a, b) | np.isnan(a) | np.isnan(b)
    if kind[0] == "f" and compared == "ne":
        return (kind, kind), "pred", lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return (kind, kind), "pred", _COMPARED[compared]


def _conversion(op: tuple[str, ...]) -> Rule | None:
    target, source, how = op[-2], op[-1], set(op[1:-2])
    if target == "bf16x2" and source == "f32":
        low = np.uint32(16)
        return ("f32", "f32"), "b32", lambda a, b: (
            (bf16_bits(a).astype(np.uint32) << low) | bf16_bits(b).astype(np.uint32)
        )  # fmt: skip
    if target == "bf16" and source == "f32":
        return ("f32",), "b16", bf16_bits
    if target == "bf16" and source[0] in "su":  # rounded twice from 2^24 on, which no code of a weight reaches
        return (source,), "b16", lambda a: bf16_bits(a.astype(np.float32))
    if source == "bf16" and target == "f32":
        return ("b16",), "f32", bf16_values
    if target not in KINDS or source not in KINDS or {target, source} & {"bf16x2", "s16x2", "bf16"}:
        return None
    kind = KINDS[target]
    rounded = next((_ROUNDED[name] for name in _ROUNDED if name in how), None)

    def convert(a: Array) -> Array:
        if rounded is not None:
            a = rounded(a)
        if rounded is not None and np.dtype(kind).kind != "f":  # out of range: the nearest; NaN: 0
            limits = np.iinfo(kind)
            inside = np.clip(np.where(np.isnan(a), 0, a), float(limits.min), float(limits.max))
            result = inside.astype(kind)
            return np.where(a >= float(limits.max), limits.max, result).astype(kind)
        return a.astype(kind)

    return (source,), target, _flushing(convert) if "ftz" in how and target == source == "f32" else convert

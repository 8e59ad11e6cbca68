"""How weights lie in a package for these kernels: plain rows, and for quantised forms codes, scales and zero points as
tensors of their own. Packers and unpackers in numpy.

| dtype | codes | beside them |
| --- | --- | --- |
| f32 bf16 | rows as the program has them | |
| f8g128 | u8 [.., m, K128]: e4m3 codes | scales f32 [.., m, K128/128] |
| i8g32 | u8 [.., m, K32]: code, value = scale·(code - 128) | scales f16 [.., m, K32/32] |
| i4g32 i4g64 | u8 [.., m, Kg/2] | scales f16, zeros u8 [.., m, Kg/g]; value = scale·(code - zero/16) |

Kg is K rounded up to whole groups. In a group of g 4-bit codes byte i holds code i in its low and code i + g/2 in its
high half: both halves are runs of inputs. Behind K there are codes that stand for about zero; kernels multiply them
with zeros. The tensors are `name`, `name.scales` and `name.zeros`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from tmlc.kernels.triton.launch import ITEM_BYTES, Operand, Pointer

Array = np.ndarray


@dataclass(frozen=True)
class Form:
    """How one weight dtype is stored.

    Attributes:
        family: what `weight_product` calls it.
        group: values that share a scale (0: none).
        bits: of a code.
        scales, zeros: dtypes of what lies beside the codes ("" where there is none).
    """

    dtype: str
    family: str
    group: int
    bits: int
    scales: str = ""
    zeros: str = ""

    def groups(self, k: int) -> int:
        return -(-k // self.group)


FORMS = {
    form.dtype: form
    for form in (
        Form("f32", "f32", 0, 32),
        Form("bf16", "bf16", 0, 16),
        Form("f8g128", "f8", 128, 8, "f32"),
        Form("i8g32", "i8", 32, 8, "f16"),
        Form("i4g32", "i4", 32, 4, "f16", "u8"),
        Form("i4g64", "i4", 64, 4, "f16", "u8"),
    )
}


@dataclass(frozen=True)
class Part:
    """One stored tensor of a weight."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def weight_parts(name: str, dtype: str, shape: Sequence[int]) -> tuple[Part, ...]:
    """The tensors that a weight of [.., m, k] is stored as: codes, scales, zero points."""
    form, lead, k = FORMS[dtype], tuple(shape[:-1]), shape[-1]
    if not form.group:
        return (Part(name, dtype, tuple(shape)),)
    groups = form.groups(k)
    parts = [Part(name, "u8", (*lead, groups * form.group * form.bits // 8))]
    parts.append(Part(f"{name}.scales", form.scales, (*lead, groups)))
    if form.zeros:
        parts.append(Part(f"{name}.zeros", form.zeros, (*lead, groups)))
    return tuple(parts)


def weight_pointers(weight: Operand) -> tuple[Pointer, Pointer | None, Pointer | None, int, int]:
    """(codes, scales, zeros, stride of a row of codes, stride of a row of scales), strides in elements."""
    parts = weight_parts(weight.name, weight.dtype, weight.shape)
    pointers = [Pointer("weight", p.name, 0, p.dtype, prod(p.shape) * ITEM_BYTES[p.dtype]) for p in parts]
    scales = pointers[1] if len(pointers) > 1 else None
    zeros = pointers[2] if len(pointers) > 2 else None
    return pointers[0], scales, zeros, parts[0].shape[-1], parts[1].shape[-1] if scales is not None else 0


# Packing.


def pack(dtype: str, values: Array, scales: Array | None = None, zeros: Array | None = None) -> list[Array]:
    """The stored tensors of a weight, in the order of `weight_parts`.

    Args:
        values: for f32 and bf16 (uint16 patterns) the rows themselves; for quantised forms codes uint8
            [.., groups, group] (4-bit codes one a byte).
        scales, zeros: [.., groups].
    """
    form = FORMS[dtype]
    if not form.group:
        return [np.ascontiguousarray(values)]
    lead = values.shape[:-2]
    if form.bits == 4:
        half = form.group // 2
        values = values[..., :half] | (values[..., half:] << 4)
    codes = np.ascontiguousarray(values, np.uint8).reshape(*lead, -1)
    return [codes, *(np.ascontiguousarray(a) for a in (scales, zeros) if a is not None)]


def unpack(dtype: str, parts: Sequence[Array], k: int) -> Array:
    """float64 [.., k]: what the stored tensors stand for."""
    form, codes = FORMS[dtype], parts[0]
    if dtype == "f32":
        return codes.astype(np.float64)
    if dtype == "bf16":
        return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    lead = codes.shape[:-1]
    if form.bits == 4:
        pairs = codes.reshape(*lead, -1, form.group // 2)
        wide = np.concatenate([pairs & 15, pairs >> 4], -1).astype(np.float64)
    else:
        wide = codes.reshape(*lead, -1, form.group).astype(np.float64)
    if form.family == "f8":
        wide = FP8_VALUES[wide.astype(np.uint8)]
    elif form.family == "i8":
        wide = wide - 128
    else:
        wide = wide - parts[2].astype(np.float64)[..., None] / 16
    return (wide * parts[1].astype(np.float64)[..., None]).reshape(*lead, -1)[..., :k]


def _fp8_values() -> Array:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code >= 128, -value, value)


#: float64 value of every e4m3 code (no infinities; 127 and 255 are NaN).
FP8_VALUES = _fp8_values()
_POSITIVE = FP8_VALUES[:127]


def quantise_fp8(values: Array) -> tuple[Array, Array]:
    """(codes uint8 [.., groups, 128], scales float32 [.., groups]) of float rows [.., k]: the largest value of a group
    becomes 448; nearest, ties to the even code."""
    k = values.shape[-1]
    groups = FORMS["f8g128"].groups(k)
    padded = np.zeros((*values.shape[:-1], groups * 128), np.float64)
    padded[..., :k] = values
    blocks = padded.reshape(*values.shape[:-1], groups, 128)
    scales = (np.abs(blocks).max(-1) / 448.0).astype(np.float32)
    wide = np.where(scales > 0, scales, 1).astype(np.float64)
    sizes = np.minimum(np.abs(blocks) / wide[..., None], 448.0)
    above = np.clip(np.searchsorted(_POSITIVE, sizes), 1, 126)
    low, high = sizes - _POSITIVE[above - 1], _POSITIVE[above] - sizes
    up = (high < low) | ((high == low) & (above % 2 == 0))
    codes = np.where(up, above, above - 1)
    return (codes | np.where(blocks < 0, 128, 0)).astype(np.uint8), scales

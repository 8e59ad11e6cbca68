"""The arithmetic of the weight op `dequantize`: stored codes and scales become numbers, as the writing library has it.

Every scheme is one formula, element by element:

    value = ((code - zero_point) * scale) → dtype

where `code`, `zero_point` and `scale` are first converted to the `compute` dtype, in which both operations round, and
`scale` is the block's scale, divided by or multiplied with the tensor's global scale where there is one; a "ratio" of
two global numbers, or of two a matrix, is multiplied with the product instead. The elements
of a weight [..., rows, cols] share scales in blocks of `block` = [block rows, block cols]; 0 stands for the whole axis.

Work is done in chunks of rows, so that the memory needed beside the stored tensors and the result is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch

from tmlc.errors import CheckpointError, IRError
from tmlc.ir.types import TensorType

__all__ = ["Dequantize", "dequantize_into", "dequantized_type"]

COMPUTE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
#: scheme → the dtypes in which its codes are stored
SCHEMES = {
    "fp8": ("f8e4m3", "f8e5m2"),  # one code an element
    "fp4": ("u8", "i8"),  # e2m1, two codes a byte, the low four bits first
    "int": ("i8",),  # one code an element
    "packed_int": ("i32",),  # codes + 2^(bits-1), bits after bits along the last axis, from the lowest
}
GLOBAL = ("", "divide", "multiply", "ratio")
ZERO = ("", "plain", "packed")
_SCALES = ("f32", "bf16", "f8e4m3")
_EXPONENTS = ("u8", "f8e8m0")  # 2^(code - 127), 255 is NaN
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_CHUNK = 1 << 20  # elements that are worked on at a time
#: For a source or an argument of the weight op that means nothing.
_FIX_ENTRY = "correct the entry: docs/ir.md lists the sources and arguments of dequantize"
_FIX = "the checkpoint is damaged or was quantised badly: download or quantise it again"


@dataclass(frozen=True)
class Dequantize:
    """The arguments of a `dequantize` entry.

    Attributes:
        scheme: how codes are stored (SCHEMES).
        shape: of the weight.
        block: rows and columns that share a scale, 0 for all.
        bits: of a code, for `packed_int`.
        compute: dtype of the arithmetic (f32, bf16, f16).
        dtype: of the result.
        global_scale: "divide" or "multiply" the scales; "ratio": of two sources, with which the products of codes and
            scales are multiplied; "" where there is none.
        zero_point: "plain" (one a scale), "packed" (in int32 along the rows, as codes are along the columns), or "".
    """

    scheme: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    bits: int = 8
    compute: str = "f32"
    dtype: str = "f32"
    global_scale: str = ""
    zero_point: str = ""

    @property
    def blocks(self) -> tuple[int, int]:
        """Block rows and columns, none of them 0."""
        return self.block[0] or self.shape[-2], self.block[1] or self.shape[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """How many scales a matrix has along rows and columns."""
        rows, cols = self.blocks
        return -(-self.shape[-2] // rows), -(-self.shape[-1] // cols)

    @property
    def leading(self) -> tuple[int, ...]:
        return self.shape[:-2]

    def stored_shape(self) -> tuple[int, ...]:
        """Of the tensor of codes."""
        *rest, cols = self.shape
        if self.scheme == "fp4":
            return (*rest, -(-cols // 2))
        if self.scheme == "packed_int":
            return (*rest, _words(cols, self.bits))
        return (*rest, cols)

    @property
    def globals(self) -> int:
        """How many sources the global scale is made of."""
        return {"": 0, "ratio": 2}.get(self.global_scale, 1)

    def zero_shape(self) -> tuple[int, ...]:
        rows, cols = self.grid
        return (*self.leading, _words(rows, self.bits) if self.zero_point == "packed" else rows, cols)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def dequantized_type(
    types: Sequence[TensorType],
    scheme: str,
    shape: Sequence[int],
    block: Sequence[int],
    bits: int = 8,
    compute: str = "f32",
    dtype: str = "f32",
    global_scale: str = "",
    zero_point: str = "",
) -> TensorType:
    """The type of the weight that `dequantize` makes of tensors of the given types: codes, scales, then zero points and
    global scale where the arguments speak of them. IRError where they do not fit each other."""
    _arguments(scheme, shape, block, bits, compute, dtype, global_scale, zero_point)
    spec = Dequantize(scheme, tuple(shape), (block[0], block[1]), bits, compute, dtype, global_scale, zero_point)
    wanted = 2 + bool(zero_point) + spec.globals
    if len(types) != wanted:
        what = f"dequantize of {scheme} takes {wanted} sources here, not {len(types)}"
        raise IRError(what, fix="give codes, scales, then zero points and global scale where the arguments name them")
    codes, scales, *rest = types
    if codes.dtype not in SCHEMES[scheme] or not _codes_fit(tuple(codes.shape), spec):
        shown = TensorType(SCHEMES[scheme][0], spec.stored_shape())
        raise IRError(f"the codes are {codes}, a {scheme} weight of {list(shape)} has {shown}", fix=_FIX_ENTRY)
    grid = (*spec.leading, *spec.grid)
    if scales.dtype not in (*_SCALES, *_EXPONENTS) or not _scale_fits(tuple(scales.shape), grid):
        blocks = "x".join(map(str, spec.blocks))
        what = f"the scales are {scales}, blocks of {blocks} of {list(shape)} have {list(grid)}"
        raise IRError(what, fix=_FIX_ENTRY)
    if zero_point:
        zeros = rest.pop(0)
        kind = "i32" if zero_point == "packed" else "i8"
        if zeros.dtype != kind or not _scale_fits(tuple(zeros.shape), spec.zero_shape()):
            what = f"the zero points are {zeros}, not {TensorType(kind, spec.zero_shape())}"
            raise IRError(what, fix=_FIX_ENTRY)
    for one in rest:
        each = global_scale == "ratio" and _squeezed(tuple(one.shape)) == _squeezed(spec.leading)
        if one.dtype not in ("f32", "bf16") or not (prod(one.shape) == 1 or each):
            more = " or one a matrix" if global_scale == "ratio" else ""
            raise IRError(f"the global scale is {one}, not one number{more}", fix=_FIX_ENTRY)
    return TensorType(dtype, tuple(shape))


def _arguments(
    scheme: str,
    shape: Sequence[int],
    block: Sequence[int],
    bits: int,
    compute: str,
    dtype: str,
    global_scale: str,
    zero_point: str,
) -> None:
    """IRError for arguments that mean nothing, whatever the sources."""
    if scheme not in SCHEMES:
        raise IRError(f"unknown scheme {scheme!r}", fix=f"use one of {', '.join(SCHEMES)}")
    if len(shape) < 2 or any(type(size) is not int or size < 1 for size in shape):
        what = f"a quantised weight is a matrix, or a stack of them, not {list(shape)}"
        raise IRError(what, fix="give `shape` as [..., rows, cols], whole numbers from 1")
    if len(block) != 2 or any(type(size) is not int or size < 0 for size in block):
        raise IRError(f"a block is [rows, cols], not {list(block)}", fix="give two whole numbers, 0 for a whole axis")
    if type(bits) is not int or not 1 <= bits <= 8:
        raise IRError(f"codes of {bits} bits: 1 to 8 are read", fix="give `bits` from 1 to 8, or leave it out for 8")
    for value, known in ((compute, COMPUTE), (dtype, ("f32", "bf16")), (global_scale, GLOBAL), (zero_point, ZERO)):
        if value not in known:
            raise IRError(f"{value!r} is not one of {', '.join(filter(None, known))}", fix=_FIX_ENTRY)


def _codes_fit(found: tuple[int, ...], spec: Dequantize) -> bool:
    """The bytes of fp4 codes may lie in blocks: [..., rows, blocks, bytes of a block]."""
    stored = spec.stored_shape()
    split = spec.scheme == "fp4" and len(found) == len(stored) + 1 and found[-1] * 2 == spec.blocks[1]
    return found == stored or (split and found[:-2] == stored[:-1] and prod(found) == prod(stored))


def _scale_fits(found: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Axes of size one may be missing: a scale of the whole tensor is often a scalar, one a row often a vector."""
    return found == grid or (prod(found) == prod(grid) and _squeezed(found) == _squeezed(grid))


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def dequantize_into(spec: Dequantize, tensors: Sequence[torch.Tensor], names: Sequence[str], out: torch.Tensor) -> None:
    """Writes the weight into `out` (of `spec.shape`, perhaps a view, perhaps of another dtype: then the result of dtype
    `spec.dtype` is converted).

    Raises:
        CheckpointError: a code or scale is NaN or infinite, or a value is too large for the dtype; names the tensor.
    """
    compute, dtype = COMPUTE[spec.compute], COMPUTE[spec.dtype]
    rows, cols = spec.shape[-2:]
    grid = (-1, *spec.grid)
    codes = tensors[0].reshape(-1, *spec.stored_shape()[-2:])
    scales = _scales(tensors[1], names[1], compute).reshape(grid)
    rest = list(zip(tensors[2:], names[2:], strict=True))
    zeros = _zeros(spec, rest.pop(0)[0]).reshape(grid).to(compute) if spec.zero_point else None
    factors = None
    if spec.global_scale == "ratio":
        factors = _ratio(rest, prod(spec.leading)).to(compute)
    elif spec.global_scale:
        tensor, name = rest.pop(0)
        scales = _globally_scaled(spec, scales, tensor.reshape(()), name).to(compute)
    for index, place in enumerate(product(*map(range, spec.leading))):
        target = out[place]
        for begin, end in _chunks(rows, cols, spec.blocks[0]):
            values = _codes(spec, codes[index, begin:end], compute)
            if zeros is not None:
                values -= _spread(zeros[index], spec, begin, end)
            values *= _spread(scales[index], spec, begin, end)
            if factors is not None:
                values *= factors[index]
            values = values.to(dtype)
            low, high = torch.aminmax(values)  # both carry a NaN on
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise _not_finite(tensors[0], names[0], spec.dtype)
            target[begin:end].copy_(values)


def _chunks(rows: int, cols: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about _CHUNK elements."""
    step = max(1, _CHUNK // cols)
    if step > block_rows:
        step -= step % block_rows
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def _spread(values: torch.Tensor, spec: Dequantize, begin: int, end: int) -> torch.Tensor:
    """One number a block → one for every element of some rows."""
    block_rows, block_cols = spec.blocks
    first = begin // block_rows
    picked = values[first : -(-end // block_rows)]
    if picked.shape[0] > 1:
        picked = picked.repeat_interleave(block_rows, 0)[begin - first * block_rows :][: end - begin]
    if picked.shape[1] > 1:
        picked = picked.repeat_interleave(block_cols, 1)[:, : spec.shape[-1]]
    return picked


def _codes(spec: Dequantize, stored: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """Some rows of codes as numbers."""
    cols = spec.shape[-1]
    if spec.scheme == "fp4":
        return _pairs(stored.view(torch.uint8), torch.tensor(_E2M1, dtype=compute))[:, :cols]
    if spec.scheme == "fp8":  # torch converts these one by one
        table = torch.arange(256, dtype=torch.uint8).view(stored.dtype).to(compute)
        return table.index_select(0, stored.reshape(-1).view(torch.uint8).int()).view(stored.shape)
    if spec.scheme == "packed_int" and spec.bits == 4:
        return _pairs(stored.view(torch.uint8), torch.arange(-8, 8).to(compute))[:, :cols]
    if spec.scheme == "packed_int":
        return unpacked(stored, spec.bits, cols).to(compute)
    return stored.to(compute)


def _pairs(stored: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Bytes [r, b] of two codes, the low one first → numbers [r, 2·b]. Both are looked up as one."""
    both = torch.stack([table.repeat(16), table.repeat_interleave(16)], 1)
    both = both.view(torch.int64 if table.itemsize == 4 else torch.int32).flatten()
    return both.index_select(0, stored.reshape(-1).int()).view(table.dtype).view(stored.shape[0], -1)


def _not_finite(stored: torch.Tensor, name: str, dtype: str) -> CheckpointError:
    """Why a value came out so: a code, or a product."""
    bad = 0
    if stored.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        first = 0x7F if stored.dtype == torch.float8_e4m3fn else 0x7C
        bad = int(((stored.view(torch.uint8) & 0x7F) >= first).sum())
    return CheckpointError(
        f"{bad} of {stored.numel()}: codes that are NaN or infinite"
        if bad
        else f"values too large for {dtype} come of its codes and scales",
        where=name,
        fix=_FIX,
    )


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [r, w] → int64 [r, count]: `bits` after `bits` of each row, less 2^(bits-1). A code may be in two words."""
    wide = torch.nn.functional.pad(words, (0, 1)).long()
    at = torch.arange(count) * bits
    word, shift = at // 32, at % 32
    both = (wide[:, word] & 0xFFFFFFFF) | (wide[:, word + 1] << 32)
    return ((both >> shift) & ((1 << bits) - 1)) - (1 << (bits - 1))


def _zeros(spec: Dequantize, stored: torch.Tensor) -> torch.Tensor:
    if spec.zero_point == "plain":
        return stored
    rows, cols = spec.grid
    words = stored.reshape(-1, spec.zero_shape()[-2], cols).transpose(1, 2)
    values = [unpacked(matrix, spec.bits, rows).t() for matrix in words]
    return torch.stack(values)


def _scales(stored: torch.Tensor, name: str, compute: torch.dtype) -> torch.Tensor:
    """Block scales as numbers; bytes are exponents."""
    if stored.dtype in (torch.uint8, torch.float8_e8m0fnu):
        code = stored.view(torch.uint8)
        _refuse(code == 255, "scales that are NaN (e8m0 code 255)", name)
        word = code.int() << 23
        word[code == 0] = 1 << 22  # 2^-127 is subnormal
        return word.view(torch.float32).to(compute)
    scales = stored.float()
    _refuse(~torch.isfinite(scales), "scales that are NaN or infinite", name)
    return scales.to(compute)


def _globally_scaled(spec: Dequantize, scales: torch.Tensor, value: torch.Tensor, name: str) -> torch.Tensor:
    _refuse(~torch.isfinite(value.float()), "a global scale that is NaN or infinite", name)
    value = value.to(scales.dtype)
    if spec.global_scale == "multiply":
        return scales * value
    _refuse(value == 0, "a global scale of zero to divide by", name)
    return scales / value


def _ratio(sources: Sequence[tuple[torch.Tensor, str]], count: int) -> torch.Tensor:
    """Of two global numbers, for each matrix."""
    (above, above_name), (below, below_name) = sources
    _refuse(~torch.isfinite(above.float()), "a global scale that is NaN or infinite", above_name)
    _refuse(
        ~torch.isfinite(below.float()) | (below == 0),
        "a global scale of zero, NaN or infinity to divide by",
        below_name,
    )
    return (above.float().reshape(-1) / below.float().reshape(-1)).expand(count)


def _refuse(bad: torch.Tensor, what: str, name: str) -> None:
    if bool(bad.any()):
        raise CheckpointError(f"{int(bad.sum())} of {bad.numel()}: {what}", where=name, fix=_FIX)

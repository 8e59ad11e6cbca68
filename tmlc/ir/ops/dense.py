"""Dense ops: lookups, norms, projections, elementwise arithmetic, and the two views."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tmlc.ir.ops.registry import exact, matrix, need, one_element, op, vector, wide
from tmlc.ir.types import QUANTISED, TensorType

TABLE = ("f32", "bf16", "f16")
MATRIX = (*TABLE, *QUANTISED)
_MOST = torch.finfo(torch.float32).max


def _embedding(table: TensorType, ids: TensorType) -> TensorType:
    _, d = matrix(table, "table", TABLE)
    n, one = matrix(ids, "ids", ("i64",))
    need(one == 1, f"ids must be a column, not {ids}")
    return TensorType("f32", (n, d))


@op("embedding(Tensor table, Tensor ids) -> Tensor", _embedding)
def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """Row lookup: out[i] = table[ids[i]]."""
    if bool((ids < 0).any()):  # torch would count from the end
        raise IndexError(f"an id outside 0..{table.shape[0] - 1}")
    return _float(table[ids[:, 0]])


def _bag_embedding(table: TensorType, levels: TensorType, per_bin: int) -> TensorType:
    rows, d = matrix(table, "table", TABLE)
    n, bins = matrix(levels, "levels", ("i64",))
    need(rows == bins * per_bin, f"table must have {bins} x {per_bin} rows, not {rows}")
    return TensorType("f32", (n, d))


@op("bag_embedding(Tensor table, Tensor levels, int per_bin) -> Tensor", _bag_embedding)
def bag_embedding(table: Tensor, levels: Tensor, per_bin: int) -> Tensor:
    """Sum over the bins b (ascending) of table[b·per_bin + levels[:, b]]."""
    if bool(((levels < 0) | (levels >= per_bin)).any()):
        raise IndexError(f"a level outside 0..{per_bin - 1}")
    rows = levels + per_bin * torch.arange(levels.shape[1], device=levels.device)
    return _float(table[rows]).sum(1)


def _float(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows


def _rms_norm(x: TensorType, weight: TensorType, eps: float) -> TensorType:
    _, cols = matrix(x, "x")
    exact(cols, vector(weight, "weight"), "columns of x per group")
    return x


@op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x·rsqrt(mean(x²) + eps)·weight, each group of d columns on its own (d = length of the weight)."""
    d = weight.shape[-1]
    groups = x.reshape(x.shape[0], x.shape[1] // d, d)
    normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return (normed * wide(weight.reshape(d), x)).reshape(x.shape)


def _add_rms_norm(x: TensorType, residual: TensorType, weight: TensorType, eps: float) -> tuple[TensorType, ...]:
    same(x, residual)
    need(vector(weight, "weight") == x.shape[1], f"weight must have {x.shape[1]} columns, not {weight}")
    return x, x


@op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    from_pass=True,
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual, rms_norm(x + residual))."""
    total = x + residual
    return total, rms_norm(total, weight, eps)


def linear_type(x: TensorType, weight: TensorType, bias: TensorType | None) -> TensorType:
    n, k = matrix(x, "x")
    m, k_weight = matrix(weight, "weight", MATRIX)
    need(k == k_weight, f"weight must have {k} columns, not {k_weight}")
    need(bias is None or vector(bias, "bias") == m, f"bias must have {m} columns, not {bias}")
    return TensorType("f32", (n, m))


@op("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear_type)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ (+ bias), accumulated in float32 whatever the weight's dtype."""
    return nnf.linear(x, wide(weight, x), None if bias is None else wide(bias.reshape(-1), x))


def same(a: TensorType, b: TensorType, *more: Any) -> TensorType:
    """The common type of float32 matrices of one shape; the arguments after them are numbers."""
    matrix(a, "the first operand")
    matrix(b, "the second operand")
    need(a.shape[0] == b.shape[0] and a.shape[1] == b.shape[1], f"shapes differ: {a} and {b}")
    return a


def _like(x: TensorType, *more: Any) -> TensorType:
    matrix(x, "x")
    return x


@op("add(Tensor a, Tensor b) -> Tensor", same)
def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b."""
    return a + b


@op("mul(Tensor a, Tensor b) -> Tensor", same)
def mul(a: Tensor, b: Tensor) -> Tensor:
    """a · b, element by element."""
    return a * b


@op("add_scaled(Tensor a, Tensor b, float alpha) -> Tensor", same)
def add_scaled(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """a + alpha·b: an Euler step."""
    return a + alpha * b


@op("scale(Tensor x, float alpha) -> Tensor", _like)
def scale(x: Tensor, alpha: float) -> Tensor:
    """alpha·x."""
    return x * alpha


def _scale_by(x: TensorType, s: TensorType) -> TensorType:
    one_element(s, "s")
    return _like(x)


@op("scale_by(Tensor x, Tensor s) -> Tensor", _scale_by)
def scale_by(x: Tensor, s: Tensor) -> Tensor:
    """s·x, s one learned number."""
    return x * wide(s.reshape(1, 1), x)


def _add_row(x: TensorType, rows: TensorType, index: int) -> TensorType:
    _, cols = matrix(x, "x")
    count = rows.shape[0] if len(rows.shape) == 2 else 1
    need(rows.dtype == "f32" and rows.cols == cols, f"rows must be f32 of {cols} columns, not {rows}")
    need(0 <= index < count, f"index {index} is outside the {count} rows")
    return x


@op("add_row(Tensor x, Tensor rows, int index) -> Tensor", _add_row)
def add_row(x: Tensor, rows: Tensor, index: int) -> Tensor:
    """x + rows[index], the same row added to every row of x."""
    return x + wide(rows.reshape(-1, x.shape[1])[index], x)


@op("silu(Tensor x) -> Tensor", _like)
def silu(x: Tensor) -> Tensor:
    """x·sigmoid(x)."""
    return nnf.silu(x)


@op("gelu(Tensor x) -> Tensor", _like)
def gelu(x: Tensor) -> Tensor:
    """The exact GELU, x·Φ(x) by erf."""
    return nnf.gelu(x)


@op("swiglu(Tensor gate, Tensor up) -> Tensor", same)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up."""
    return nnf.silu(gate) * up


def _clamp(x: TensorType, lo: float, hi: float) -> TensorType:
    need(abs(lo) <= _MOST and abs(hi) <= _MOST and lo <= hi, f"{lo}..{hi} is no range of float32 numbers")
    return _like(x)


@op("clamp(Tensor x, float lo, float hi) -> Tensor", _clamp)
def clamp(x: Tensor, lo: float, hi: float) -> Tensor:
    """min(max(x, lo), hi); a NaN stays one."""
    return x.clamp(lo, hi)


def _modulate(x: TensorType, scale: TensorType, shift: TensorType) -> TensorType:
    same(x, scale)
    return same(x, shift)


@op("modulate(Tensor x, Tensor scale, Tensor shift) -> Tensor", _modulate)
def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x·(1 + scale) + shift."""
    return x * (1 + scale) + shift


def _columns(x: TensorType, start: int, stop: int) -> TensorType:
    need(len(x.shape) == 2, f"x must be two-dimensional, not {x}")
    need(0 <= start < stop <= x.shape[1], f"columns {start}..{stop} are not inside {x}")
    return TensorType(x.dtype, (x.shape[0], stop - start))


@op("columns(Tensor x, int start, int stop) -> Tensor", _columns, view=True)
def columns(x: Tensor, start: int, stop: int) -> Tensor:
    """x[:, start:stop]; a view in every engine."""
    return x[:, start:stop]


def _reshape(x: TensorType, cols: int) -> TensorType:
    need(len(x.shape) == 2, f"x must be two-dimensional, not {x}")
    return TensorType(x.dtype, (exact(x.shape[0] * x.shape[1], cols, "elements of x per new row"), cols))


@op("reshape(Tensor x, int cols) -> Tensor", _reshape, view=True)
def reshape(x: Tensor, cols: int) -> Tensor:
    """[r, c] read row-major as [r·c/cols, cols]; a view in every engine."""
    return x.reshape(-1, cols)

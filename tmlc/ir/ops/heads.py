"""Work on the heads inside a row: rotary positions, the columns of every head, heads joined from two parts."""

from __future__ import annotations

import torch
from torch import Tensor

from tmlc.ir.ops.registry import exact, matrix, need, op, vector, wide
from tmlc.ir.types import TensorType

_ROPE = "int num_heads, int offset, bool interleaved, float scaling"


def _rope(
    x: TensorType, inv_freq: TensorType, num_heads: int, offset: int, interleaved: bool, scaling: float
) -> TensorType:
    _, cols = matrix(x, "x")
    width, rotated = exact(cols, num_heads, "columns of x per head"), 2 * vector(inv_freq, "inv_freq")
    need(offset >= 0 and offset + rotated <= width, f"{rotated} columns from {offset} are not inside heads of {width}")
    return x


@op(f"rope(Tensor x, Tensor inv_freq, {_ROPE}) -> Tensor", _rope)
def rope(x: Tensor, inv_freq: Tensor, num_heads: int, offset: int, interleaved: bool, scaling: float) -> Tensor:
    """Rotates columns offset..offset+R of every head by the angles position·inv_freq[R/2], row i being position i.

    The pair (a, b) becomes (a·cos - b·sin, b·cos + a·sin), cos and sin times `scaling`; pair j is (j, j + R/2) of the
    rotated columns, or (2j, 2j + 1) when interleaved. The angle is a float32 product, as in transformers.
    """
    table = _table(x, torch.arange(x.shape[0], device=x.device), inv_freq, scaling)
    return turned_heads(x, table, num_heads, offset, interleaved)


def _table(x: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float) -> Tensor:
    """Cosines and then sines of each position: [n, R]."""
    angle = wide(positions[:, None].float() * inv_freq.reshape(1, -1).float(), x)
    return torch.cat([angle.cos(), angle.sin()], -1) * scaling


def turned_heads(x: Tensor, table: Tensor, num_heads: int, offset: int, interleaved: bool) -> Tensor:
    """rope of x [n, H·D] by the cosines and sines of its rows, table [n, R]."""
    n, half = x.shape[0], table.shape[-1] // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    heads = x.reshape(n, num_heads, -1)
    turned = heads[..., offset : offset + 2 * half]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    first, second = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        both = torch.stack([first, second], -1).reshape(n, num_heads, 2 * half)
    else:
        both = torch.cat([first, second], -1)
    return torch.cat([heads[..., :offset], both, heads[..., offset + 2 * half :]], -1).reshape(x.shape)


def _rope_state(
    x: TensorType,
    position: TensorType,
    inv_freq: TensorType,
    num_heads: int,
    offset: int,
    interleaved: bool,
    scaling: float,
) -> TensorType:
    need(position == TensorType("i64", (1, 1)), f"position must be i64[1, 1], not {position}")
    return _rope(x, inv_freq, num_heads, offset, interleaved, scaling)


@op(f"rope_state(Tensor x, Tensor position, Tensor inv_freq, {_ROPE}) -> Tensor", _rope_state, from_pass=True)
def rope_state(
    x: Tensor, position: Tensor, inv_freq: Tensor, num_heads: int, offset: int, interleaved: bool, scaling: float
) -> Tensor:
    """rope of new positions: row i is at position + i. It reads the position; `advance` changes it."""
    table = rope_table_state(x, position, inv_freq, scaling)
    return turned_heads(x, table, num_heads, offset, interleaved)


def _rope_table_state(x: TensorType, position: TensorType, inv_freq: TensorType, scaling: float) -> TensorType:
    need(position == TensorType("i64", (1, 1)), f"position must be i64[1, 1], not {position}")
    return TensorType("f32", (matrix(x, "x")[0], 2 * vector(inv_freq, "inv_freq")))


@op(
    "rope_table_state(Tensor x, Tensor position, Tensor inv_freq, float scaling) -> Tensor",
    _rope_table_state,
    from_pass=True,
)
def rope_table_state(x: Tensor, position: Tensor, inv_freq: Tensor, scaling: float) -> Tensor:
    """What rope_state turns x's rows by, [n, R]: the cosines of R/2 angles and then their sines, times `scaling`."""
    positions = int(position) + torch.arange(x.shape[0], device=x.device)
    return _table(x, positions, inv_freq, scaling)


def _head_columns(x: TensorType, num_heads: int, start: int, stop: int) -> TensorType:
    n, cols = matrix(x, "x")
    width = exact(cols, num_heads, "columns of x per head")
    need(0 <= start < stop <= width, f"columns {start}..{stop} are not inside heads of {width}")
    return TensorType("f32", (n, num_heads * (stop - start)))


@op("head_columns(Tensor x, int num_heads, int start, int stop) -> Tensor", _head_columns)
def head_columns(x: Tensor, num_heads: int, start: int, stop: int) -> Tensor:
    """Columns start..stop of every head: [n, H·W] → [n, H·(stop - start)]."""
    return x.reshape(x.shape[0], num_heads, -1)[..., start:stop].reshape(x.shape[0], -1)


def _concat_heads(a: TensorType, b: TensorType, num_heads: int, shared: int) -> TensorType:
    n, a_cols = matrix(a, "a")
    rows, b_cols = matrix(b, "b")
    need(rows == n, f"a has {n} rows, b has {rows}")
    need(num_heads > 0 and shared in (0, 1, 2), f"num_heads {num_heads}, shared {shared}: shared is 0, 1 (a) or 2 (b)")
    a_width = a_cols if shared == 1 else exact(a_cols, num_heads, "columns of a per head")
    b_width = b_cols if shared == 2 else exact(b_cols, num_heads, "columns of b per head")
    return TensorType("f32", (n, num_heads * (a_width + b_width)))


@op("concat_heads(Tensor a, Tensor b, int num_heads, int shared) -> Tensor", _concat_heads)
def concat_heads(a: Tensor, b: Tensor, num_heads: int, shared: int) -> Tensor:
    """Per head [a_h, b_h]; the one that is `shared` (1: a, 2: b, 0: none) holds one head, which all heads get."""
    n = a.shape[0]
    left = a.reshape(n, 1 if shared == 1 else num_heads, -1).expand(n, num_heads, -1)
    right = b.reshape(n, 1 if shared == 2 else num_heads, -1).expand(n, num_heads, -1)
    return torch.cat([left, right], -1).reshape(n, -1)

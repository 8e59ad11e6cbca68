"""What Inkling-2 adds: mixing of residual blocks, L2 clips, soft caps, a short convolution whose taps are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from tmlc.ir.ops.registry import exact, matrix, need, op, wide
from tmlc.ir.types import TensorType

#: What an engine keeps on the stack while it mixes one row.
MAX_BLOCKS, MAX_QUERIES = 64, 8


def _like(x: TensorType, *more: float) -> TensorType:
    matrix(x, "x")
    return x


@op("sigmoid(Tensor x) -> Tensor", _like)
def sigmoid(x: Tensor) -> Tensor:
    """1/(1 + e^-x)."""
    return torch.sigmoid(x)


def _softcap(x: TensorType, cap: float) -> TensorType:
    need(cap > 0, f"cap {cap} must be positive")
    return _like(x)


@op("softcap(Tensor x, float cap) -> Tensor", _softcap)
def softcap(x: Tensor, cap: float) -> Tensor:
    """cap·tanh(x/cap)."""
    return cap * torch.tanh(x / cap)


def _l2_clip(x: TensorType, scale: TensorType | None, num_heads: int, threshold: float) -> TensorType:
    _, cols = matrix(x, "x")
    exact(cols, num_heads, "columns of x per head")
    need(scale is None or (scale.dtype == "f32" and scale.numel() == cols), f"scale must have {cols} numbers")
    need(threshold > 0, f"threshold {threshold} must be positive")
    return x


@op("l2_clip(Tensor x, Tensor? scale, int num_heads, float threshold) -> Tensor", _l2_clip)
def l2_clip(x: Tensor, scale: Tensor | None, num_heads: int, threshold: float) -> Tensor:
    """x (times scale), each head shortened to the length `threshold` when it is longer: times
    min(1, threshold/(‖head‖ + 1e-6)). The scale has one number a column."""
    scaled = x if scale is None else x * wide(scale.reshape(1, -1), x)
    heads = scaled.reshape(x.shape[0], num_heads, -1)
    length = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
    return (heads * (threshold / (length + 1e-6)).clamp(max=1.0)).reshape(x.shape)


def _concat_columns(a: TensorType, b: TensorType) -> TensorType:
    n, left = matrix(a, "a")
    rows, right = matrix(b, "b")
    need(n == rows, f"{a} and {b} differ in rows")
    return TensorType("f32", (n, left + right))


@op("concat_columns(Tensor a, Tensor b) -> Tensor", _concat_columns)
def concat_columns(a: Tensor, b: Tensor) -> Tensor:
    """Each row of a, then the row of b."""
    return torch.cat([a, b], 1)


def _mix_blocks(x: TensorType, queries: TensorType, eps: float) -> TensorType:
    n, cols = matrix(x, "x")
    need(queries.dtype == "f32" and len(queries.shape) <= 2, f"queries must be f32[q, d], not {queries}")
    d = queries.shape[-1]
    blocks, count = exact(cols, d, "columns of x per block"), queries.numel() // d
    need(blocks <= MAX_BLOCKS and count <= MAX_QUERIES, f"{blocks} blocks and {count} queries are too many")
    return TensorType("f32", (n, count * d))


@op("mix_blocks(Tensor x, Tensor queries, float eps) -> Tensor", _mix_blocks)
def mix_blocks(x: Tensor, queries: Tensor, eps: float) -> Tensor:
    """Attention of fixed queries[q, d] over the blocks of d columns of each row: with b̂ = b·rsqrt(mean(b²) + eps), the
    result for a query is Σ softmax_b(q·b̂/√d)·b̂. The results of the queries lie side by side."""
    d = queries.shape[-1]
    blocks = x.reshape(x.shape[0], -1, d)
    normed = blocks * torch.rsqrt(blocks.square().mean(-1, keepdim=True) + eps)
    shares = torch.softmax(wide(queries.reshape(-1, d), x) @ normed.transpose(1, 2) * d**-0.5, dim=-1)
    return (shares @ normed).reshape(x.shape[0], -1)


def _dynamic_conv(x: TensorType, weight: TensorType, taps: TensorType, residual: bool) -> TensorType:
    n, cols = matrix(x, "x")
    kernel, channels = matrix(weight, "weight")
    rows, dynamic = matrix(taps, "taps")
    need(channels == cols and rows == n, f"{x} does not fit the weight {weight} and taps {taps}")
    exact(cols, exact(dynamic, kernel, "columns of taps per lag"), "columns of x per head")
    return x


@op("dynamic_conv(Tensor x, Tensor weight, Tensor taps, bool residual) -> Tensor", _dynamic_conv)
def dynamic_conv(x: Tensor, weight: Tensor, taps: Tensor, residual: bool) -> Tensor:
    """Causal convolution Σ_j (weight[j] + taps[t, head·k + j])·x[t - j] (+ x[t]), zeros before the first row.

    weight[k, c] counts backwards (row 0 is this position); taps[n, H·k] holds k numbers a head of c/H columns.
    """
    return _convolve(x, x.new_zeros(weight.shape[0] - 1, x.shape[1]), weight, taps, residual)


def _convolve(x: Tensor, tail: Tensor, weight: Tensor, taps: Tensor, residual: bool) -> Tensor:
    n, kernel = x.shape[0], weight.shape[0]
    padded = torch.cat([tail, x])
    dynamic = taps.reshape(n, -1, kernel).repeat_interleave(x.shape[1] * kernel // taps.shape[1], 1)
    out = torch.zeros_like(x)
    for j in range(kernel):
        out = out + (wide(weight[j], x) + dynamic[:, :, j]) * padded[kernel - 1 - j : kernel - 1 - j + n]
    return out + x if residual else out


def _dynamic_conv_state(
    x: TensorType, weight: TensorType, taps: TensorType, tail: TensorType, residual: bool
) -> TensorType:
    kernel, channels = matrix(weight, "weight")
    need(tail == TensorType("f32", (kernel - 1, channels)), f"tail must be f32[{kernel - 1}, {channels}], not {tail}")
    return _dynamic_conv(x, weight, taps, residual)


@op(
    "dynamic_conv_state(Tensor x, Tensor weight, Tensor taps, Tensor(a!) tail, bool residual) -> Tensor",
    _dynamic_conv_state,
    from_pass=True,
)
def dynamic_conv_state(x: Tensor, weight: Tensor, taps: Tensor, tail: Tensor, residual: bool) -> Tensor:
    """dynamic_conv that continues after the rows in `tail`, which becomes the last k-1 rows of x."""
    out = _convolve(x, tail, weight, taps, residual)
    tail.copy_(torch.cat([tail, x])[x.shape[0] :])
    return out

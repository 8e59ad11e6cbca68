"""Attention with learned relative bias, the causal short convolution, and their streaming forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tmlc.errors import ContextFullError
from tmlc.ir.ops.kv import from_int8_rows, int8_columns, to_int8_rows
from tmlc.ir.ops.registry import conv_taps, exact, matrix, need, op, vector, wide
from tmlc.ir.types import TensorType


def _attention(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    rel: TensorType | None,
    rel_table: TensorType | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    sinks: int,
    log_floor: float,
    log_alpha: float,
    sink_logits: TensorType | None,
    softcap: float,
) -> TensorType:
    n, cols = matrix(q, "q")
    d = exact(cols, num_heads, "columns of q per head")
    need(num_kv_heads > 0 and num_heads % num_kv_heads == 0, f"{num_heads} heads over {num_kv_heads} kv heads")
    rows, k_cols = matrix(k, "k")
    need(rows == n and k_cols == num_kv_heads * d, f"k must be [{n}, {num_kv_heads * d}], not {k}")
    rows, v_cols = matrix(v, "v")
    v_width = exact(v_cols, num_kv_heads, "columns of v per kv head")
    need(rows == n, f"v must have {n} rows, not {v}")
    if sink_logits is not None and len(sink_logits.shape) == 2 and sink_logits.shape[0] != 1:
        need(matrix(sink_logits, "sink_logits") == (n, num_heads), f"{sink_logits} for {num_heads} heads")
    elif sink_logits is not None:
        need(vector(sink_logits, "sink_logits") == num_heads, f"{sink_logits} for {num_heads} heads")
    need(softcap >= 0, f"softcap {softcap} must not be negative")
    need((rel is None) == (rel_table is None), "rel and rel_table come together")
    if rel is not None and rel_table is not None:
        rows, rel_cols = matrix(rel, "rel")
        ranks, _ = matrix(rel_table, "rel_table")
        need(rows == n and rel_cols == num_heads * ranks, f"rel must be [{n}, {num_heads}·{ranks}], not {rel}")
    need(window >= 0 and sinks >= 0, f"window {window} and sinks {sinks} must not be negative")
    return TensorType("f32", (n, num_heads * v_width))


_HEADS = (
    "int num_heads, int num_kv_heads, float scale, int window, int sinks, float log_floor, float log_alpha, "
    "Tensor? sink_logits=None, float softcap=0.0"
)


@op(f"attention(Tensor q, Tensor k, Tensor v, Tensor? rel, Tensor? rel_table, {_HEADS}) -> Tensor", _attention)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor | None,
    rel_table: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    sinks: int,
    log_floor: float,
    log_alpha: float,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention over one sequence from position 0, with learned relative bias; window 0 = all keys."""
    positions = torch.arange(q.shape[0], device=q.device)
    return attend(
        q,
        k,
        v,
        rel,
        rel_table,
        positions,
        positions,
        num_heads,
        num_kv_heads,
        scale,
        window,
        sinks,
        log_floor,
        log_alpha,
        sink_logits,
        softcap,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor | None,
    rel_table: Tensor | None,
    q_pos: Tensor,
    k_pos: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    sinks: int,
    log_floor: float,
    log_alpha: float,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
    rounded: bool = False,
) -> Tensor:
    """One dense masked softmax of queries at absolute positions q_pos[n] over keys at k_pos[m] (int64).

    A key at j is visible from p when j <= p and (window = 0, or j > p - window, or j < sinks).
    score = scale·(q·τ)·k_j + τ·(rel @ rel_table)[p - j] (0 beyond the table's extent),
    τ = 1 + log_alpha·ln(max(1, (p + 1)/log_floor)), or 1 when log_floor is 0. softcap c > 0: score → c·tanh(score/c).
    sink_logits[H] or [n, H]: one more score a head in the softmax, whose share goes to no value.
    rounded: the products are of bf16 numbers (docs/plan-format.md, "Caches"): queries, scaled, in units of ln 2 unless
    there is a soft cap, and the weights of values are rounded.
    """
    n, m, group = q.shape[0], k.shape[0], num_heads // num_kv_heads
    heads = q.reshape(n, num_heads, -1).transpose(0, 1)
    keys = k.reshape(m, num_kv_heads, -1).transpose(0, 1).repeat_interleave(group, 0)
    values = v.reshape(m, num_kv_heads, -1).transpose(0, 1).repeat_interleave(group, 0)
    distance = q_pos[:, None] - k_pos[None, :]
    tau = torch.ones(n, 1, dtype=q.dtype, device=q.device)
    if log_floor > 0:
        tau = 1 + log_alpha * torch.log(((q_pos[:, None] + 1).to(q.dtype) / log_floor).clamp(min=1.0))
    if rounded:
        unit = 1.0 if softcap > 0 else _LOG2_E
        scores = _bf16(heads * (scale * tau * unit)) @ keys.transpose(1, 2) / unit
    else:
        scores = scale * ((heads * tau) @ keys.transpose(1, 2))
    if rel is not None and rel_table is not None:
        extent = rel_table.shape[1]
        table = rel.reshape(n, num_heads, -1).transpose(0, 1) @ wide(rel_table, q)
        bias = table.gather(2, distance.clamp(0, extent - 1).expand(num_heads, n, m))
        scores = scores + tau * torch.where(distance < extent, bias, 0.0)
    visible = distance >= 0
    if window > 0:
        visible = visible & ((distance < window) | (k_pos[None, :] < sinks))
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sink_logits is not None:
        sink = wide(sink_logits.reshape(-1, num_heads, 1), q).transpose(0, 1).expand(num_heads, n, 1)
        scores = torch.cat([scores, sink], -1)
    if rounded:  # relative to a whole power of two, which no rounding depends on
        powers = scores * _LOG2_E
        weights = torch.exp2(powers - powers.amax(-1, keepdim=True).ceil())
        weights = torch.cat([_bf16(weights[..., :m]), weights[..., m:]], -1)
        probabilities = (weights / weights.sum(-1, keepdim=True))[..., :m]
    else:
        probabilities = torch.softmax(scores, dim=-1)[..., :m]
    return (probabilities @ values).transpose(0, 1).reshape(n, -1)


_LOG2_E = 1.4426950408889634


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def _attention_state(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    position: TensorType,
    k_cache: TensorType,
    v_cache: TensorType,
    rel: TensorType | None,
    rel_table: TensorType | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    sinks: int,
    log_floor: float,
    log_alpha: float,
    sink_logits: TensorType | None,
    softcap: float,
) -> TensorType:
    heads = (num_heads, num_kv_heads, scale, window, sinks, log_floor, log_alpha)
    result = _attention(q, k, v, rel, rel_table, *heads, sink_logits, softcap)
    need(position == TensorType("i64", (1, 1)), f"position must be i64[1, 1], not {position}")
    for t, name, new in ((k_cache, "k_cache", k), (v_cache, "v_cache", v)):
        rows, cols = matrix(t, name, ("f32", "bf16", "f16", "u8"))
        like = t.dtype == k_cache.dtype and rows == k_cache.shape[0]
        wanted = new.shape[1]
        if t.dtype == "u8":
            wanted = num_kv_heads * int8_columns(int(wanted) // num_kv_heads)
        need(cols == wanted and like, f"{name} must be [C, {wanted}] like k_cache, not {t}")
        need(
            window == 0 or rows - sinks >= window,
            f"a cache of {rows} rows cannot hold {sinks} sinks and {window}",
        )
    return result


@op(
    "attention_state(Tensor q, Tensor k, Tensor v, Tensor position, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    f"Tensor? rel, Tensor? rel_table, {_HEADS}) -> Tensor",
    _attention_state,
    from_pass=True,
)
def attention_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rel: Tensor | None,
    rel_table: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    sinks: int,
    log_floor: float,
    log_alpha: float,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """attention of n new positions, whose keys and values are first written to the cache (linear or ring): float32,
    bf16, f16, or int8 codes (uint8, tmlc/ir/ops/kv.py)."""
    n, capacity, start = q.shape[0], k_cache.shape[0], int(position)
    held = min(start + n, capacity) if window == 0 else min(window - 1 + n, start + n)
    if held > capacity - (sinks if window else 0) or (window == 0 and start + n > capacity):
        raise ContextFullError(
            f"{n} new positions after {start} do not fit a cache of {capacity} rows (window {window}, sinks {sinks})",
            fix="append fewer positions at a time, or compile with a larger context or max_append",
        )
    new = torch.arange(start, start + n, device=q.device)
    at = cache_index(new, capacity, window, sinks)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        cache[at] = to_int8_rows(rows, num_kv_heads) if cache.dtype == torch.uint8 else rows.to(cache.dtype)
    first = 0 if window == 0 else max(0, start - window + 1)
    seen = torch.arange(first, start + n, device=q.device)
    if first > 0:
        seen = torch.cat([torch.arange(min(sinks, first), device=q.device), seen])
    at = cache_index(seen, capacity, window, sinks)

    def held_rows(cache: Tensor, like: Tensor) -> Tensor:
        if cache.dtype == torch.uint8:
            return wide(from_int8_rows(cache[at], num_kv_heads, like.shape[1] // num_kv_heads), q)
        return wide(cache[at], q)

    return attend(
        q,
        held_rows(k_cache, k),
        held_rows(v_cache, v),
        rel,
        rel_table,
        new,
        seen,
        num_heads,
        num_kv_heads,
        scale,
        window,
        sinks,
        log_floor,
        log_alpha,
        sink_logits,
        softcap,
        rounded=k_cache.dtype == torch.bfloat16,
    )


def cache_index(positions: Tensor, capacity: int, window: int, sinks: int) -> Tensor:
    """Cache rows of the given absolute positions: linear (window 0), or sinks first and then a ring."""
    if window == 0:
        return positions
    return torch.where(positions < sinks, positions, sinks + (positions - sinks) % (capacity - sinks))


def _advance(position: TensorType, x: TensorType, limit: int) -> tuple[TensorType, ...]:
    need(position == TensorType("i64", (1, 1)), f"position must be i64[1, 1], not {position}")
    need(len(x.shape) == 2 and limit >= 0, f"limit {limit} must not be negative, x must be two-dimensional")
    return ()


@op("advance(Tensor(a!) position, Tensor x, int limit) -> ()", _advance, from_pass=True)
def advance(position: Tensor, x: Tensor, limit: int) -> None:
    """position += rows of x; with limit > 0 a call that would pass it fails."""
    if limit > 0 and int(position) + x.shape[0] > limit:
        raise ContextFullError(
            f"{x.shape[0]} new positions after {int(position)} pass the context of {limit}",
            fix="close the session, or compile with a larger context or the policy ring_with_sinks",
        )
    position += x.shape[0]


def _short_conv(x: TensorType, weight: TensorType, residual: bool) -> TensorType:
    _, cols = matrix(x, "x")
    channels, _ = conv_taps(weight, "weight")
    need(channels == cols, f"weight must have {cols} channels, not {channels}")
    return x


@op("short_conv(Tensor x, Tensor weight, bool residual) -> Tensor", _short_conv)
def short_conv(x: Tensor, weight: Tensor, residual: bool) -> Tensor:
    """Causal depthwise convolution Σ_j w[:, j]·x[t-(k-1)+j] (+ x[t]), zeros before the first row."""
    return _convolve(x, x.new_zeros(weight.shape[-1] - 1, x.shape[1]), weight, residual)


def _convolve(x: Tensor, tail: Tensor, weight: Tensor, residual: bool) -> Tensor:
    n, taps = x.shape[0], wide(weight.reshape(weight.shape[0], -1), x)
    padded = torch.cat([tail, x])
    out = torch.zeros_like(x)
    for j in range(taps.shape[1]):
        out = out + taps[:, j] * padded[j : j + n]
    return out + x if residual else out


def _short_conv_state(x: TensorType, weight: TensorType, tail: TensorType, residual: bool) -> TensorType:
    channels, taps = conv_taps(weight, "weight")
    need(
        tail == TensorType("f32", (taps - 1, channels)),
        f"tail must be f32[{taps - 1}, {channels}], not {tail}",
    )
    return _short_conv(x, weight, residual)


@op(
    "short_conv_state(Tensor x, Tensor weight, Tensor(a!) tail, bool residual) -> Tensor",
    _short_conv_state,
    from_pass=True,
)
def short_conv_state(x: Tensor, weight: Tensor, tail: Tensor, residual: bool) -> Tensor:
    """short_conv that continues after the rows in `tail`, which becomes the last k-1 rows of x."""
    out = _convolve(x, tail, weight, residual)
    tail.copy_(torch.cat([tail, x])[x.shape[0] :])
    return out

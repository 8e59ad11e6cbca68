"""The canonical ops as plain functions, for models to call: `from tmlc.ir.ops import functional as F`.

While a model is exported, or on the meta device, a call becomes `torch.ops.tmlc.<name>`; otherwise it runs
the reference directly, so that the same model trains under autograd. Arguments are those of docs/ir.md, in
its order; shapes and arithmetic are documented with the references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tmlc.ir.ops import attention as _attention
from tmlc.ir.ops import blocks as _blocks
from tmlc.ir.ops import dense as _dense
from tmlc.ir.ops import heads as _heads
from tmlc.ir.ops import media as _media
from tmlc.ir.ops import moe as _moe
from tmlc.ir.ops import random as _random
from tmlc.ir.ops import topk as _topk

_ops = torch.ops.tmlc


def _call(name: str, reference: Callable[..., Any], like: Tensor, *args: Any) -> Any:
    """`like` decides: one of the tensors among `args`."""
    if torch.compiler.is_compiling() or like.device.type == "meta":
        return getattr(_ops, name).default(*args)
    return reference(*args)


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    return _call("embedding", _dense.embedding, table, table, ids)


def bag_embedding(table: Tensor, levels: Tensor, per_bin: int) -> Tensor:
    return _call("bag_embedding", _dense.bag_embedding, table, table, levels, per_bin)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _call("rms_norm", _dense.rms_norm, x, x, weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _call("linear", _dense.linear, x, x, weight, bias)


def add(a: Tensor, b: Tensor) -> Tensor:
    return _call("add", _dense.add, a, a, b)


def mul(a: Tensor, b: Tensor) -> Tensor:
    return _call("mul", _dense.mul, a, a, b)


def add_scaled(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return _call("add_scaled", _dense.add_scaled, a, a, b, alpha)


def scale(x: Tensor, alpha: float) -> Tensor:
    return _call("scale", _dense.scale, x, x, alpha)


def scale_by(x: Tensor, s: Tensor) -> Tensor:
    return _call("scale_by", _dense.scale_by, x, x, s)


def add_row(x: Tensor, rows: Tensor, index: int) -> Tensor:
    return _call("add_row", _dense.add_row, x, x, rows, index)


def silu(x: Tensor) -> Tensor:
    return _call("silu", _dense.silu, x, x)


def gelu(x: Tensor) -> Tensor:
    return _call("gelu", _dense.gelu, x, x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _call("swiglu", _dense.swiglu, gate, gate, up)


def clamp(x: Tensor, lo: float, hi: float) -> Tensor:
    return _call("clamp", _dense.clamp, x, x, lo, hi)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _call("modulate", _dense.modulate, x, x, scale, shift)


def columns(x: Tensor, start: int, stop: int) -> Tensor:
    return _call("columns", _dense.columns, x, x, start, stop)


def reshape(x: Tensor, cols: int) -> Tensor:
    return _call("reshape", _dense.reshape, x, x, cols)


def short_conv(x: Tensor, weight: Tensor, residual: bool = True) -> Tensor:
    return _call("short_conv", _attention.short_conv, x, x, weight, residual)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor | None,
    rel_table: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int = 0,
    sinks: int = 0,
    log_floor: float = 0.0,
    log_alpha: float = 0.0,
    sink_logits: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    heads = (num_heads, num_kv_heads, scale, window, sinks, log_floor, log_alpha)
    return _call("attention", _attention.attention, q, q, k, v, rel, rel_table, *heads, sink_logits, softcap)


def rope(
    x: Tensor, inv_freq: Tensor, num_heads: int, offset: int = 0, interleaved: bool = False, scaling: float = 1.0
) -> Tensor:
    return _call("rope", _heads.rope, x, x, inv_freq, num_heads, offset, interleaved, scaling)


def head_columns(x: Tensor, num_heads: int, start: int, stop: int) -> Tensor:
    return _call("head_columns", _heads.head_columns, x, x, num_heads, start, stop)


def concat_heads(a: Tensor, b: Tensor, num_heads: int, shared: int = 0) -> Tensor:
    return _call("concat_heads", _heads.concat_heads, a, a, b, num_heads, shared)


def topk_router(
    logits: Tensor,
    bias: Tensor | None,
    scores: int,
    top_k: int,
    normalise: bool = False,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    args = (logits, bias, scores, top_k, normalise, groups, top_groups, scale)
    return _call("topk_router", _topk.topk_router, logits, *args)


def sink_router(
    logits: Tensor, bias: Tensor, scale: Tensor, top_k: int, n_shared: int, route_scale: float
) -> tuple[Tensor, Tensor]:
    args = (logits, bias, scale, top_k, n_shared, route_scale)
    return _call("sink_router", _moe.sink_router, logits, *args)


def moe(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 0.0,
    limit: float = 0.0,
    gate_cap: float = 0.0,
    up_cap: float = 0.0,
) -> Tensor:
    args = (x, weights, experts, gate_up, down, gate_up_bias, down_bias, alpha, limit, gate_cap, up_cap, 0)
    return _call("moe", _moe.moe, x, *args)


def shared_experts(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return _call("shared_experts", _moe.shared_experts, x, x, weights, gate, up, down)


def dmel(pcm: Tensor, window: Tensor, filters: Tensor, lo: float, hi: float, levels: int) -> Tensor:
    return _call("dmel", _media.dmel, pcm, pcm, window, filters, lo, hi, levels)


def patchify(
    video: Tensor,
    frames: int,
    height: int,
    patch: int,
    folds: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    args = (video, frames, height, patch, list(folds), list(mean), list(std))
    return _call("patchify", _media.patchify, video, *args)


def philox_normal(key: Tensor, size: int) -> Tensor:
    return _call("philox_normal", _random.philox_normal, key, key, size)


def sample(logits: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
    return _call("sample", _random.sample, logits, logits, key, temperature)


def overlap_add(frames: Tensor, window: Tensor, hop: int) -> Tensor:
    return _call("overlap_add", _media.overlap_add, frames, frames, window, hop)


def sigmoid(x: Tensor) -> Tensor:
    return _call("sigmoid", _blocks.sigmoid, x, x)


def softcap(x: Tensor, cap: float) -> Tensor:
    return _call("softcap", _blocks.softcap, x, x, cap)


def l2_clip(x: Tensor, scale: Tensor | None, num_heads: int, threshold: float) -> Tensor:
    return _call("l2_clip", _blocks.l2_clip, x, x, scale, num_heads, threshold)


def concat_columns(a: Tensor, b: Tensor) -> Tensor:
    return _call("concat_columns", _blocks.concat_columns, a, a, b)


def mix_blocks(x: Tensor, queries: Tensor, eps: float) -> Tensor:
    return _call("mix_blocks", _blocks.mix_blocks, x, x, queries, eps)


def dynamic_conv(x: Tensor, weight: Tensor, taps: Tensor, residual: bool = True) -> Tensor:
    return _call("dynamic_conv", _blocks.dynamic_conv, x, x, weight, taps, residual)

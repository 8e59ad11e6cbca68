"""Ops that fusing passes make: the meaning of each is the ops that it stands for, one after the other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tmlc.ir.ops.attention import short_conv_state
from tmlc.ir.ops.blocks import softcap
from tmlc.ir.ops.dense import linear, linear_type, same, scale_by, swiglu
from tmlc.ir.ops.moe import moe, moe_type
from tmlc.ir.ops.random import sample, sample_type
from tmlc.ir.ops.registry import conv_taps, exact, need, one_element, op
from tmlc.ir.types import TensorType

#: What an engine keeps in registers and on the stack while it convolves a column.
MAX_TAPS = 64


def _head_logits(
    x: TensorType, weight: TensorType, bias: TensorType | None, alpha: float, cap: float, entries: int
) -> TensorType:
    logits = linear_type(x, weight, bias)
    need(0 < entries <= logits.shape[1], f"{entries} entries of {logits.shape[1]} rows of the weight")
    need(math.isfinite(alpha), f"alpha {alpha} must be finite")
    need(cap >= 0, f"cap {cap} must not be negative")
    return replace(logits, shape=(logits.shape[0], entries))


@op(
    "head_logits(Tensor x, Tensor weight, Tensor? bias, float alpha, float cap, int entries) -> Tensor",
    _head_logits,
    from_pass=True,
)
def head_logits(x: Tensor, weight: Tensor, bias: Tensor | None, alpha: float, cap: float, entries: int) -> Tensor:
    """The first `entries` logits softcap(linear(alpha·x)); alpha 1: x itself, cap 0: no soft cap."""
    logits = linear(x * alpha if alpha != 1 else x, weight, bias)
    if cap > 0:
        logits = softcap(logits, cap)
    return logits[:, :entries].contiguous()


def _head_sample(
    x: TensorType,
    weight: TensorType,
    bias: TensorType | None,
    key: TensorType,
    temperature: TensorType,
    alpha: float,
    cap: float,
    entries: int,
) -> TensorType:
    _head_logits(x, weight, bias, alpha, cap, entries)
    return sample_type(linear_type(x, weight, bias), key, temperature)


@op(
    "head_sample(Tensor x, Tensor weight, Tensor? bias, Tensor key, Tensor temperature, float alpha, float cap,"
    " int entries) -> Tensor",
    _head_sample,
    from_pass=True,
)
def head_sample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key: Tensor,
    temperature: Tensor,
    alpha: float,
    cap: float,
    entries: int,
) -> Tensor:
    """sample of the first `entries` logits softcap(linear(alpha·x)); alpha 1: x itself, cap 0: no soft cap."""
    return sample(head_logits(x, weight, bias, alpha, cap, entries), key, temperature)


def _linear_swiglu(x: TensorType, weight: TensorType, bias: TensorType | None) -> TensorType:
    both = linear_type(x, weight, bias)
    return replace(both, shape=(both.shape[0], exact(both.shape[1], 2, "gates and ups")))


@op("linear_swiglu(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear_swiglu, from_pass=True)
def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """swiglu of the two halves of linear(x): weight has the rows of the gates, and then those of the ups."""
    gate, up = linear(x, weight, bias).chunk(2, 1)
    return swiglu(gate, up)


def _after(
    y: TensorType,
    scale: TensorType | None,
    taps: TensorType | None,
    tail: TensorType | None,
    start: int,
    level: float,
    addend: TensorType | None,
) -> TensorType:
    if scale is not None:
        one_element(scale, "scale")
    if taps is not None and tail is not None:
        channels, count = conv_taps(taps, "taps")
        need(2 <= count <= MAX_TAPS, f"{count} taps; a fused convolution has 2..{MAX_TAPS}")
        need(start >= 0 and start + channels <= y.shape[1], f"columns {start}..{start + channels} are not inside {y}")
        need(tail == TensorType("f32", (count - 1, channels)), f"tail must be f32[{count - 1}, {channels}], not {tail}")
        need(math.isfinite(level), f"level {level} must be finite")
    if addend is not None:
        same(addend, y)
    return y


def _finish(
    y: Tensor,
    scale: Tensor | None,
    taps: Tensor | None,
    tail: Tensor | None,
    start: int,
    residual: bool,
    level: float,
    addend: Tensor | None,
) -> Tensor:
    """What an epilogue does to a product y."""
    if scale is not None:
        y = scale_by(y, scale)
    if taps is not None and tail is not None:
        stop = start + taps.shape[0]
        mixed = short_conv_state(y[:, start:stop].contiguous(), taps, tail, residual)
        mixed = mixed if level == 1 else mixed * level
        y = torch.cat([y[:, :start], mixed, y[:, stop:]], 1)
    return y if addend is None else addend + y


def _linear_add(
    x: TensorType, weight: TensorType, bias: TensorType | None, scale: TensorType | None, addend: TensorType
) -> TensorType:
    return _after(linear_type(x, weight, bias), scale, None, None, 0, 1.0, addend)


@op(
    "linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor addend) -> Tensor",
    _linear_add,
    from_pass=True,
)
def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, addend: Tensor) -> Tensor:
    """addend + scale·linear(x): a projection and the residual addition behind it."""
    return _finish(linear(x, weight, bias), scale, None, None, 0, False, 1.0, addend)


def _linear_conv_state(
    x: TensorType,
    weight: TensorType,
    bias: TensorType | None,
    scale: TensorType | None,
    taps: TensorType,
    tail: TensorType,
    start: int,
    residual: bool,
    level: float,
    addend: TensorType | None,
) -> TensorType:
    return _after(linear_type(x, weight, bias), scale, taps, tail, start, level, addend)


@op(
    "linear_conv_state(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor taps, Tensor(a!) tail, int start,"
    " bool residual, float level, Tensor? addend) -> Tensor",
    _linear_conv_state,
    from_pass=True,
)
def linear_conv_state(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    taps: Tensor,
    tail: Tensor,
    start: int,
    residual: bool,
    level: float,
    addend: Tensor | None,
) -> Tensor:
    """(addend +) scale·linear(x), of which the columns from `start` on, as many as taps has channels, go through
    level·short_conv_state."""
    return _finish(linear(x, weight, bias), scale, taps, tail, start, residual, level, addend)


def _linear_and_conv_state(
    x: TensorType,
    weight: TensorType,
    bias: TensorType | None,
    scale: TensorType | None,
    addend: TensorType | None,
    taps: TensorType,
    tail: TensorType,
    residual: bool,
) -> tuple[TensorType, TensorType]:
    y = _after(linear_type(x, weight, bias), scale, taps, tail, 0, 1.0, addend)
    need(conv_taps(taps, "taps")[0] == y.shape[1], f"taps must have {y.shape[1]} channels, not {taps}")
    return y, y


@op(
    "linear_and_conv_state(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? addend, Tensor taps,"
    " Tensor(a!) tail, bool residual) -> (Tensor, Tensor)",
    _linear_and_conv_state,
    from_pass=True,
)
def linear_and_conv_state(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    addend: Tensor | None,
    taps: Tensor,
    tail: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """(y, short_conv_state(y)) of y = (addend +) scale·linear(x): a product that others read beside its convolution."""
    y = _finish(linear(x, weight, bias), scale, None, None, 0, False, 1.0, addend)
    return y, short_conv_state(y, taps, tail, residual)


def _moe_add(addend: TensorType, *args: Any) -> TensorType:
    return _after(moe_type(*args), None, None, None, 0, 1.0, addend)


_MOE = (
    "Tensor x, Tensor weights, Tensor experts, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias,"
    " float alpha, float limit, float gate_cap, float up_cap, int grouped_from"
)


@op(f"moe_add(Tensor addend, {_MOE}) -> Tensor", _moe_add, from_pass=True)
def moe_add(addend: Tensor, *args: Any) -> Tensor:
    """addend + moe(…): experts and the residual addition behind them."""
    return addend + moe(*args)


def _moe_conv_state(
    taps: TensorType, tail: TensorType, residual: bool, level: float, addend: TensorType | None, *args: Any
) -> TensorType:
    y = moe_type(*args)
    need(conv_taps(taps, "taps")[0] == y.shape[1], f"taps must have {y.shape[1]} channels, not {taps}")
    return _after(y, None, taps, tail, 0, level, addend)


@op(
    f"moe_conv_state(Tensor taps, Tensor(a!) tail, bool residual, float level, Tensor? addend, {_MOE}) -> Tensor",
    _moe_conv_state,
    from_pass=True,
)
def moe_conv_state(
    taps: Tensor, tail: Tensor, residual: bool, level: float, addend: Tensor | None, *args: Any
) -> Tensor:
    """(addend +) level·short_conv_state(moe(…))."""
    return _finish(moe(*args), None, taps, tail, 0, residual, level, addend)

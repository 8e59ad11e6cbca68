"""Attention and the product that alone reads it (fuse.attention_linear): the meaning is the ops that it stands for, one
after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tmlc.ir.ops.attention import attention_state
from tmlc.ir.ops.fused import linear_add, linear_conv_state
from tmlc.ir.ops.normed import norm_attention_state
from tmlc.ir.ops.registry import OPS, need, op
from tmlc.ir.ops.turned import rope_attention_state
from tmlc.ir.types import TensorType, ValueType

#: The ops that append to a cache of keys and values.
ATTENTION_WITH_CACHE = ("attention_state", "norm_attention_state", "rope_attention_state", "attention_linear_state")
#: Arguments of attention between its values and the product's weight: those of `attention_state` from position on.
BEHIND_VALUES = 14


def _attention_linear_state(
    q: TensorType, q_norm: TensorType | None, k: TensorType, k_norm: TensorType | None, eps: float,
    table: TensorType | None, offset: int, interleaved: bool, shared: TensorType | None, v: TensorType, *args: Any,
) -> ValueType:  # fmt: skip
    behind, product = args[:BEHIND_VALUES], args[BEHIND_VALUES:]
    weight, bias, factor, taps, tail, start, residual, level, addend = product
    need((q_norm is None) == (k_norm is None), "q_norm and k_norm come together")
    need((taps is None) == (tail is None), "taps and tail come together")
    need(shared is None or table is not None, "a shared part of keys is turned by a table")
    heads: Any
    if table is not None:
        shapes: Any = OPS["rope_attention_state"].shapes
        heads = shapes(q, q_norm, k, k_norm, eps, table, offset, interleaved, shared, v, *behind)
    elif q_norm is None:
        heads = OPS["attention_state"].shapes(q, k, v, *behind)
    else:
        heads = OPS["norm_attention_state"].shapes(q, q_norm, k, k_norm, eps, v, *behind)
    after = (factor, taps, tail, start, residual, level, addend)
    return OPS["linear_conv_state"].shapes(heads, weight, bias, *after)


@op(
    "attention_linear_state(Tensor q, Tensor? q_norm, Tensor k, Tensor? k_norm, float eps, Tensor? table, int offset,"
    " bool interleaved, Tensor? shared, Tensor v, Tensor position, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? rel,"
    " Tensor? rel_table, int num_heads, int num_kv_heads, float scale, int window, int sinks, float log_floor,"
    " float log_alpha, Tensor? sink_logits, float softcap, Tensor weight, Tensor? bias, Tensor? factor, Tensor? taps,"
    " Tensor(c!)? tail, int start, bool residual, float level, Tensor? addend) -> Tensor",
    _attention_linear_state,
    from_pass=True,
)
def attention_linear_state(
    q: Tensor, q_norm: Tensor | None, k: Tensor, k_norm: Tensor | None, eps: float, table: Tensor | None, offset: int,
    interleaved: bool, shared: Tensor | None, v: Tensor, *args: Any,
) -> Tensor:  # fmt: skip
    """(addend +) factor·linear of attention (of normed heads with q_norm, of turned ones with a table), with taps
    through linear_conv_state."""
    behind, product = args[:BEHIND_VALUES], args[BEHIND_VALUES:]
    weight, bias, factor, taps, tail, start, residual, level, addend = product
    if table is not None:
        heads = rope_attention_state(q, q_norm, k, k_norm, eps, table, offset, interleaved, shared, v, *behind)
    elif q_norm is None or k_norm is None:
        heads = attention_state(q, k, v, *behind)
    else:
        heads = norm_attention_state(q, q_norm, k, k_norm, eps, v, *behind)
    if taps is None:
        return linear_add(heads, weight, bias, factor, addend)
    return linear_conv_state(heads, weight, bias, factor, taps, tail, start, residual, level, addend)

"""Attention that turns its queries and keys itself (fuse.rope_attention): the meaning is the ops that it stands for,
one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tmlc.ir.ops.attention import attention_state
from tmlc.ir.ops.dense import rms_norm
from tmlc.ir.ops.heads import concat_heads, turned_heads
from tmlc.ir.ops.registry import OPS, exact, matrix, need, op
from tmlc.ir.types import TensorType


def _rope_attention_state(
    q: TensorType, q_norm: TensorType | None, k: TensorType, k_norm: TensorType | None, eps: float, table: TensorType,
    offset: int, interleaved: bool, shared: TensorType | None, *args: Any,
) -> TensorType:  # fmt: skip
    need((q_norm is None) == (k_norm is None), "q_norm and k_norm come together")
    if shared is not None:
        need(q_norm is None, "a shared part of keys is not normed")
        k = _joined(k, shared, args[7])
        need(offset == k.cols // args[7] - shared.cols, f"heads are turned from {offset} on, not in their shared part")
    made: Any
    if q_norm is None:
        made = OPS["attention_state"].shapes(q, k, *args)
    else:
        made = OPS["norm_attention_state"].shapes(q, q_norm, k, k_norm, eps, *args)
    _v, _position, _k_cache, _v_cache, _rel, _rel_table, num_heads, *_ = args
    rows, turned = matrix(table, "table")
    need(rows == q.shape[0], f"the table has {rows} rows, q has {q.shape[0]}")
    need(turned % 2 == 0, f"the table must have cosines and as many sines, not {turned} columns")
    width = exact(q.cols, num_heads, "columns of q per head")
    need(offset >= 0 and offset + turned <= width, f"{turned} columns from {offset} are not inside heads of {width}")
    heads: TensorType = made
    return heads


def _joined(k: TensorType, shared: TensorType, num_kv_heads: int) -> TensorType:
    made: Any = OPS["concat_heads"].shapes(k, shared, num_kv_heads, 2)
    keys: TensorType = made
    return keys


@op(
    "rope_attention_state(Tensor q, Tensor? q_norm, Tensor k, Tensor? k_norm, float eps, Tensor table, int offset,"
    " bool interleaved, Tensor? shared, Tensor v, Tensor position, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? rel,"
    " Tensor? rel_table, int num_heads, int num_kv_heads, float scale, int window, int sinks, float log_floor,"
    " float log_alpha, Tensor? sink_logits, float softcap) -> Tensor",
    _rope_attention_state,
    from_pass=True,
)
def rope_attention_state(
    q: Tensor, q_norm: Tensor | None, k: Tensor, k_norm: Tensor | None, eps: float, table: Tensor, offset: int,
    interleaved: bool, shared: Tensor | None, *args: Any,
) -> Tensor:  # fmt: skip
    """attention_state of the heads of q and of k, normed where there are norms, then turned as `rope` turns them by the
    cosines and sines of `table` (rope_table_state). shared: columns behind those of every head of k, the same for all
    (latent attention), and the only ones that are turned."""
    _v, _position, _k_cache, _v_cache, _rel, _rel_table, num_heads, num_kv_heads, *_ = args
    if shared is not None:
        k = concat_heads(k, shared, num_kv_heads, 2)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    turned = (turned_heads(x, table, heads, offset, interleaved) for x, heads in ((q, num_heads), (k, num_kv_heads)))
    return attention_state(*turned, *args)

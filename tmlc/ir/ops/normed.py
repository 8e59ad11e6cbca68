"""Ops that norm the rows that they read (fuse.norm_router, fuse.norm_topk_router, fuse.norm_linear,
fuse.norm_attention, fuse.norm_moe): the meaning of each is rms_norm of whole rows (and `modulate` where it takes a gain
and a shift), or of the heads of queries and keys, and then the op behind it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tmlc.ir.ops.attention import attention_state
from tmlc.ir.ops.dense import linear, modulate, rms_norm
from tmlc.ir.ops.fused import linear_conv_state, linear_swiglu, moe_add, moe_conv_state
from tmlc.ir.ops.moe import moe, router
from tmlc.ir.ops.registry import OPS, need, op, vector
from tmlc.ir.ops.steps import linear_steps
from tmlc.ir.ops.topk import append_experts, topk_router
from tmlc.ir.types import TensorType


def _behind(name: str, x: TensorType, norm: TensorType, *args: Any) -> Any:
    """What the op `name` makes of the normed rows."""
    need(vector(norm, "norm") == x.shape[1], f"norm must have {x.shape[1]} columns, not {norm}")
    return OPS[name].shapes(x, *args)


def _norm_router(x: TensorType, norm: TensorType, eps: float, *args: Any) -> tuple[TensorType, ...]:
    return (*_behind("router", x, norm, *args), x)


@op(
    "norm_router(Tensor x, Tensor norm, float eps, Tensor weight, Tensor bias, Tensor scale, int top_k, int n_shared,"
    " float route_scale) -> (Tensor, Tensor, Tensor)",
    _norm_router,
    from_pass=True,
)
def norm_router(x: Tensor, norm: Tensor, eps: float, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """router of rms_norm(x), and the normed rows themselves, for the experts: (weights, experts, normed)."""
    normed = rms_norm(x, norm, eps)
    return (*router(normed, *args), normed)


def _norm_topk_router(
    x: TensorType, norm: TensorType, eps: float, weight: TensorType, logit_bias: TensorType | None, *args: Any
) -> tuple[TensorType, ...]:
    *settings, shared = args
    shapes: Any = OPS["topk_router"].shapes
    routes = shapes(_behind("linear", x, norm, weight, logit_bias), *settings)
    need(shared >= 0, f"n_shared is {shared}")
    if shared:
        more: Any = OPS["append_experts"].shapes
        routes = more(*routes, weight.shape[0], shared)
    return (*routes, x)


@op(
    "norm_topk_router(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? logit_bias, Tensor? bias, int scores,"
    " int top_k, bool normalise, int groups, int top_groups, float scale, int n_shared) -> (Tensor, Tensor, Tensor)",
    _norm_topk_router,
    from_pass=True,
)
def norm_topk_router(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, logit_bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """topk_router of linear of rms_norm(x), with `n_shared` experts behind the chosen (append_experts), and the normed
    rows themselves, for the experts: (weights, experts, normed)."""
    *settings, shared = args
    normed = rms_norm(x, norm, eps)
    routes = topk_router(linear(normed, weight, logit_bias), *settings)
    if shared:
        routes = append_experts(*routes, weight.shape[0], shared)
    return (*routes, normed)


def _norm_linear(x: TensorType, norm: TensorType, eps: float, *args: Any) -> TensorType:
    made: TensorType = _behind("linear", x, norm, *args)
    return made


@op(
    "norm_linear(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias) -> Tensor", _norm_linear, from_pass=True
)
def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear of rms_norm(x)."""
    return linear(rms_norm(x, norm, eps), weight, bias)


def _norm_linear_steps(x: TensorType, norm: TensorType, eps: float, *args: Any) -> TensorType:
    made: TensorType = _behind("linear_steps", x, norm, *args)
    return made


@op(
    "norm_linear_steps(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, Tensor? c,"
    " str steps, float[] numbers) -> Tensor",
    _norm_linear_steps,
    from_pass=True,
)
def norm_linear_steps(x: Tensor, norm: Tensor, eps: float, *args: Any) -> Tensor:
    """linear_steps of rms_norm(x)."""
    return linear_steps(rms_norm(x, norm, eps), *args)


def _norm_linear_swiglu(x: TensorType, norm: TensorType, eps: float, *args: Any) -> TensorType:
    made: TensorType = _behind("linear_swiglu", x, norm, *args)
    return made


@op(
    "norm_linear_swiglu(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias) -> Tensor",
    _norm_linear_swiglu,
    from_pass=True,
)
def norm_linear_swiglu(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear_swiglu of rms_norm(x)."""
    return linear_swiglu(rms_norm(x, norm, eps), weight, bias)


def _norm_linear_conv_state(x: TensorType, norm: TensorType, eps: float, *args: Any) -> TensorType:
    made: TensorType = _behind("linear_conv_state", x, norm, *args)
    return made


@op(
    "norm_linear_conv_state(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias, Tensor? scale, Tensor taps,"
    " Tensor(a!) tail, int start, bool residual, float level, Tensor? addend) -> Tensor",
    _norm_linear_conv_state,
    from_pass=True,
)
def norm_linear_conv_state(x: Tensor, norm: Tensor, eps: float, *args: Any) -> Tensor:
    """linear_conv_state of rms_norm(x)."""
    return linear_conv_state(rms_norm(x, norm, eps), *args)


def _modulated(
    name: str, x: TensorType, norm: TensorType, eps: float, gain: TensorType, shift: TensorType, *args: Any
) -> TensorType:
    OPS["modulate"].shapes(x, gain, shift)
    made: TensorType = _behind(name, x, norm, *args)
    return made


def _modulated_linear(x: TensorType, *args: Any) -> TensorType:
    return _modulated("linear", x, *args)


@op(
    "modulated_linear(Tensor x, Tensor norm, float eps, Tensor gain, Tensor shift, Tensor weight, Tensor? bias)"
    " -> Tensor",
    _modulated_linear,
    from_pass=True,
)
def modulated_linear(x: Tensor, norm: Tensor, eps: float, gain: Tensor, shift: Tensor, *args: Any) -> Tensor:
    """linear of modulate(rms_norm(x), gain, shift)."""
    return linear(modulate(rms_norm(x, norm, eps), gain, shift), *args)


def _modulated_linear_steps(x: TensorType, *args: Any) -> TensorType:
    return _modulated("linear_steps", x, *args)


@op(
    "modulated_linear_steps(Tensor x, Tensor norm, float eps, Tensor gain, Tensor shift, Tensor weight, Tensor? bias,"
    " Tensor? a, Tensor? b, Tensor? c, str steps, float[] numbers) -> Tensor",
    _modulated_linear_steps,
    from_pass=True,
)
def modulated_linear_steps(x: Tensor, norm: Tensor, eps: float, gain: Tensor, shift: Tensor, *args: Any) -> Tensor:
    """linear_steps of modulate(rms_norm(x), gain, shift)."""
    return linear_steps(modulate(rms_norm(x, norm, eps), gain, shift), *args)


def _norm_attention_state(
    q: TensorType, q_norm: TensorType, k: TensorType, k_norm: TensorType, eps: float, *args: Any
) -> TensorType:
    shapes: Any = OPS["attention_state"].shapes
    made: TensorType = shapes(q, k, *args)
    _v, _position, _k_cache, _v_cache, _rel, _rel_table, num_heads, *_ = args
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        need(vector(norm, name) * num_heads == q.shape[1], f"{name} must have the columns of a head, not {norm}")
    return made


@op(
    "norm_attention_state(Tensor q, Tensor q_norm, Tensor k, Tensor k_norm, float eps, Tensor v, Tensor position,"
    " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? rel, Tensor? rel_table, int num_heads, int num_kv_heads,"
    " float scale, int window, int sinks, float log_floor, float log_alpha, Tensor? sink_logits, float softcap)"
    " -> Tensor",
    _norm_attention_state,
    from_pass=True,
)
def norm_attention_state(
    q: Tensor, q_norm: Tensor, k: Tensor, k_norm: Tensor, eps: float, v: Tensor, *args: Any
) -> Tensor:
    """attention_state of the heads of q and of k, each normed: rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)."""
    return attention_state(rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps), v, *args)


def _norm_moe_conv_state(x: TensorType, *args: Any) -> TensorType:
    weights, experts, normed = _norm_router(x, *args[:8])
    shapes: Any = OPS["moe_conv_state"].shapes
    made: TensorType = shapes(*args[8:13], normed, weights, experts, *args[13:])
    return made


@op(
    "norm_moe_conv_state(Tensor x, Tensor norm, float eps, Tensor weight, Tensor bias, Tensor scale, int top_k,"
    " int n_shared, float route_scale, Tensor taps, Tensor(a!) tail, bool residual, float level, Tensor? addend,"
    " Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, float alpha, float limit, float gate_cap,"
    " float up_cap, int grouped_from) -> Tensor",
    _norm_moe_conv_state,
    from_pass=True,
)
def norm_moe_conv_state(x: Tensor, *args: Any) -> Tensor:
    """moe_conv_state of the rows, weights and experts that norm_router gives."""
    weights, experts, normed = norm_router(x, *args[:8])
    return moe_conv_state(*args[8:13], normed, weights, experts, *args[13:])


def _norm_topk_moe(x: TensorType, *args: Any) -> TensorType:
    weights, experts, normed = _norm_topk_router(x, *args[:12])
    addend, *stacked = args[12:]
    given = () if addend is None else (addend,)
    shapes: Any = OPS["moe_add" if given else "moe"].shapes
    made: TensorType = shapes(*given, normed, weights, experts, *stacked)
    return made


@op(
    "norm_topk_moe(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? logit_bias, Tensor? bias, int scores,"
    " int top_k, bool normalise, int groups, int top_groups, float scale, int n_shared, Tensor? addend, Tensor gate_up,"
    " Tensor down, Tensor? gate_up_bias, Tensor? down_bias, float alpha, float limit, float gate_cap, float up_cap,"
    " int grouped_from) -> Tensor",
    _norm_topk_moe,
    from_pass=True,
)
def norm_topk_moe(x: Tensor, *args: Any) -> Tensor:
    """moe, or moe_add where there is an addend, of the rows, weights and experts that norm_topk_router gives."""
    weights, experts, normed = norm_topk_router(x, *args[:12])
    addend, *stacked = args[12:]
    if addend is None:
        return moe(normed, weights, experts, *stacked)
    return moe_add(addend, normed, weights, experts, *stacked)

"""Mixture of experts: the router with its shared-expert sink, and the experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tmlc.ir.ops.registry import matrix, need, one_element, op, vector, wide
from tmlc.ir.types import QUANTISED, TensorType

EXPERT = ("f32", "bf16", "f16")
STACKED = (*EXPERT, *QUANTISED)


def _sink_router(
    logits: TensorType, bias: TensorType, scale: TensorType, top_k: int, n_shared: int, route_scale: float
) -> tuple[TensorType, ...]:
    n, total = matrix(logits, "logits")
    experts = vector(bias, "bias")
    one_element(scale, "scale")
    need(total == experts + n_shared, f"{total} logits are not {experts} experts and {n_shared} shared ones")
    need(0 < top_k <= experts and n_shared >= 0, f"top_k {top_k} of {experts} experts, {n_shared} shared")
    return TensorType("f32", (n, top_k + n_shared)), TensorType("i64", (n, top_k + n_shared))


@op(
    "sink_router(Tensor logits, Tensor bias, Tensor scale, int top_k, int n_shared, float route_scale)"
    " -> (Tensor, Tensor)",
    _sink_router,
)
def sink_router(
    logits: Tensor, bias: Tensor, scale: Tensor, top_k: int, n_shared: int, route_scale: float
) -> tuple[Tensor, Tensor]:
    """(weights, experts): top_k by sigmoid(logit) + bias (ties: lowest index first), then the shared experts.

    Weights are the softmax over the log-sigmoids of the chosen and the shared logits, times
    route_scale·scale.
    """
    n, routed = logits.shape[0], logits.shape[1] - n_shared
    choice = torch.sigmoid(logits[:, :routed]) + wide(bias.reshape(1, -1), logits)
    chosen = torch.sort(choice, dim=1, descending=True, stable=True).indices[:, :top_k]
    shared = torch.arange(routed, routed + n_shared, device=logits.device).expand(n, n_shared)
    experts = torch.cat([chosen, shared], 1)
    weights = torch.softmax(nnf.logsigmoid(logits.gather(1, experts)), dim=1)
    return weights * route_scale * wide(scale.reshape(1, 1), logits), experts


def _router(
    x: TensorType,
    weight: TensorType,
    bias: TensorType,
    scale: TensorType,
    top_k: int,
    n_shared: int,
    route_scale: float,
) -> tuple[TensorType, ...]:
    n, d = matrix(x, "x")
    total, d_weight = matrix(weight, "weight")
    need(d == d_weight, f"weight must have {d} columns, not {d_weight}")
    return _sink_router(TensorType("f32", (n, total)), bias, scale, top_k, n_shared, route_scale)


@op(
    "router(Tensor x, Tensor weight, Tensor bias, Tensor scale, int top_k, int n_shared, float route_scale)"
    " -> (Tensor, Tensor)",
    _router,
    from_pass=True,
)
def router(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, top_k: int, n_shared: int, route_scale: float
) -> tuple[Tensor, Tensor]:
    """sink_router of the logits x · weightᵀ."""
    return sink_router(nnf.linear(x, wide(weight, x)), bias, scale, top_k, n_shared, route_scale)


def moe_type(
    x: TensorType,
    weights: TensorType,
    experts: TensorType,
    gate_up: TensorType,
    down: TensorType,
    gate_up_bias: TensorType | None,
    down_bias: TensorType | None,
    alpha: float,
    limit: float,
    gate_cap: float,
    up_cap: float,
    grouped_from: int,
) -> TensorType:
    n, d = matrix(x, "x")
    _routes(n, weights, "weights", "f32")
    _routes(n, experts, "experts", "i64")
    need(weights.shape[1] == experts.shape[1], f"weights {weights} and experts {experts} differ in columns")
    need(
        gate_up.dtype in STACKED and down.dtype in STACKED,
        f"gate_up {gate_up} and down {down} must be {' or '.join(STACKED)}",
    )
    need(len(gate_up.shape) == 3 and len(down.shape) == 3, f"experts must be stacked: {gate_up}, {down}")
    count, wide_rows, cols = gate_up.shape
    need(cols == d and wide_rows % 2 == 0, f"gate_up must be [E, 2f, {d}], not {gate_up}")
    need(
        tuple(down.shape) == (count, d, wide_rows // 2),
        f"down must be [{count}, {d}, {wide_rows // 2}], not {down}",
    )
    need((gate_up_bias is None) == (down_bias is None), "gate_up_bias and down_bias come together")
    if gate_up_bias is not None and down_bias is not None:
        for t, cols, name in ((gate_up_bias, wide_rows, "gate_up_bias"), (down_bias, d, "down_bias")):
            need(t == TensorType("f32", (count, cols)), f"{name} must be f32[{count}, {cols}], not {t}")
    need(alpha >= 0 and (alpha == 0 or limit > 0), f"alpha {alpha} and limit {limit} must be positive, or alpha 0")
    need(
        (gate_cap == up_cap == 0) or (gate_cap > 0 and up_cap > 0 and alpha == 0),
        f"gate_cap {gate_cap} and up_cap {up_cap} must both be positive, with alpha 0",
    )
    need(grouped_from >= 0, f"grouped_from {grouped_from} must not be negative")
    return x


def _routes(n: Any, t: TensorType, what: str, dtype: str) -> None:
    rows, _ = matrix(t, what, (dtype,))
    need(rows == n, f"{what} must have {n} rows, not {rows}")


@op(
    "moe(Tensor x, Tensor weights, Tensor experts, Tensor gate_up, Tensor down, Tensor? gate_up_bias=None, "
    "Tensor? down_bias=None, float alpha=0.0, float limit=0.0, float gate_cap=0.0, float up_cap=0.0,"
    " int grouped_from=0) -> Tensor",
    moe_type,
)
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
    grouped_from: int = 0,
) -> Tensor:
    """Σ_j weights_j · (down_e·act(gate_e x + bias, up_e x + bias) + bias), e = experts_j, j ascending.

    alpha 0: act(g, u) = silu(g)·u. Else, with g = min(g, limit) and u = clamp(u, -limit, limit):
    (u + 1)·g·sigmoid(alpha·g).
    gate_cap c > 0: act(g, u) = c·tanh(g/c)·sigmoid(g)·C·tanh(u/C), C = up_cap.
    grouped_from says how an engine runs it, and changes nothing here: from so many rows on it groups them by expert.
    """
    f = down.shape[2]
    parts = x.new_zeros(*experts.shape, x.shape[1])
    for e in experts.unique().tolist():
        if not 0 <= e < gate_up.shape[0]:
            raise IndexError(f"expert {e} outside 0..{gate_up.shape[0] - 1}")
        row, j = torch.where(experts == e)
        both = nnf.linear(x[row], wide(gate_up[e], x), None if gate_up_bias is None else wide(gate_up_bias[e], x))
        hidden = _gated(both[:, :f], both[:, f:], alpha, limit, gate_cap, up_cap)
        bias = None if down_bias is None else wide(down_bias[e], x)
        parts[row, j] = weights[row, j, None] * nnf.linear(hidden, wide(down[e], x), bias)
    out = torch.zeros_like(x)
    for column in range(experts.shape[1]):
        out = out + parts[:, column]
    return out


def _gated(gate: Tensor, up: Tensor, alpha: float, limit: float, gate_cap: float, up_cap: float) -> Tensor:
    if gate_cap > 0:
        return gate_cap * torch.tanh(gate / gate_cap) * torch.sigmoid(gate) * (up_cap * torch.tanh(up / up_cap))
    if alpha == 0:
        return nnf.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def _shared_experts(
    x: TensorType, weights: TensorType, gate: TensorType, up: TensorType, down: TensorType
) -> TensorType:
    n, d = matrix(x, "x")
    _routes(n, weights, "weights", "f32")
    for t, name in ((gate, "gate"), (up, "up"), (down, "down")):
        need(len(t.shape) == 3 and t.dtype in EXPERT, f"{name} must be a stack of experts, not {t}")
    count, f = weights.shape[1], gate.shape[1]
    need(tuple(gate.shape) == (count, f, d), f"gate must be [{count}, f, {d}], not {gate}")
    need(tuple(up.shape) == (count, f, d), f"up must be [{count}, {f}, {d}], not {up}")
    need(tuple(down.shape) == (count, d, f), f"down must be [{count}, {d}, {f}], not {down}")
    return x


@op("shared_experts(Tensor x, Tensor weights, Tensor gate, Tensor up, Tensor down) -> Tensor", _shared_experts)
def shared_experts(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Σ_s weights_s · down_s(silu(gate_s x)·up_s x): the experts that every position uses."""
    out = torch.zeros_like(x)
    for s in range(gate.shape[0]):
        hidden = nnf.silu(nnf.linear(x, wide(gate[s], x))) * nnf.linear(x, wide(up[s], x))
        out = out + weights[:, s, None] * nnf.linear(hidden, wide(down[s], x))
    return out

"""Matchers of Mixture-of-Experts layers: the call of the chosen experts, and the routers that choose them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tmlc.frontend.foreign.dense import bounds
from tmlc.frontend.foreign.graph import dtype_of, inputs_of, name_of, number, shape_of, under
from tmlc.frontend.foreign.lift import Lifter, Near, matcher
from tmlc.frontend.foreign.rows import N, Param, Rows, Value
from tmlc.ir.program import items, type_of

SOFTMAX, SIGMOID, RAW = range(3)


@matcher("sum")
def experts(lift: Lifter, node: fx.Node) -> Value | None:
    """Σ over the chosen of weight · down(act(gate_up(x))), as transformers' `batched_mm` experts write it"""
    stacked, axes = inputs_of(node, 2)
    weighted = under(stacked, "reshape")
    if name_of(weighted) != "mul" or name_of(weighted.args[1]) != "unsqueeze" or list(axes or ()) != [1]:
        return None
    down = _expert_linear(lift, weighted.args[0])
    if down is None:
        return None
    gated = _gated(down.x)
    gate_up = _expert_linear(lift, gated.both)
    if gate_up is None:
        raise Near("what the experts' gates read is not a projection by chosen experts")
    spread, flat = gate_up.x, weighted.args[1].args[0]
    if name_of(spread) != "repeat_interleave" or inputs_of(spread, 3)[2] != 0:
        raise Near("the experts do not read every position once for each of its experts")
    x, top_k = lift.rows(spread.args[0]), spread.args[1]
    if x is None:
        return None
    if not x.matrix:
        raise Near("the experts' input is not one row a position")
    ids = _unclamped(down.ids, down.weight.shape[0])
    if gate_up.ids is not down.ids or name_of(flat) != "reshape" or name_of(ids) != "reshape":
        raise Near("weights and experts are not the flattened result of one router")
    if shape_of(stacked)[1:] != (top_k, x.dims[-1]):
        raise Near(f"the sum runs over {list(shape_of(stacked)[1:])}, not over {top_k} experts")
    routed = route(lift, flat.args[0], ids.args[0], int(top_k))
    if routed is None:
        return None
    if (scored := type_of(routed[0].args[0].args[0]).cols) != down.weight.shape[0]:  # type: ignore[union-attr, arg-type]
        raise Near(f"the router chooses among {scored} experts, the layer has {down.weight.shape[0]}")
    stacks = _stacks(lift, gate_up, down, gated.interleaved)
    out = lift.emit("moe", x.node, *routed, *stacks, gated.alpha, gated.limit)
    return Rows(out, (N, 0), x.dims)


@dataclass
class _Linear:
    """One projection of rows by the expert of each: x[s, k], weight[E, m, k] (or [E, k, m] when transposed)."""

    x: Any
    weight: Param
    ids: fx.Node
    bias: Param | None
    transposed: bool


def _expert_linear(lift: Lifter, node: Any) -> _Linear | None:
    bias = None
    if name_of(node) == "add" and name_of(node.args[1]) == "index":
        bias = _chosen(lift, node.args[1])
        if bias is None:
            return None
        node = node.args[0]
    product = under(node, "squeeze")
    if name_of(product) != "bmm":
        return None
    for at, (stack, vector) in enumerate((product.args[:2], product.args[1::-1])):
        found = _chosen(lift, stack)
        if found is None or name_of(vector) != "unsqueeze":
            continue
        weight, ids = found
        if bias is not None and bias[1] is not ids:
            raise Near("weights and biases are chosen by different experts")
        if (vector.args[1] % 3, node.args[1] % 3) != ((2, 2) if at == 0 else (1, 1)):
            raise Near("the experts' product has axes that were not understood")
        return _Linear(vector.args[0], weight, ids, bias and bias[0], at == 1)
    return None


def _unclamped(ids: Any, count: int) -> Any:
    """Expert numbers without a clamp to 0..count-1, which changes none of a router's (transformers 5.17 keeps numbers
    from elsewhere inside the stack with it)."""
    return ids.args[0] if name_of(ids) == "clamp" and inputs_of(ids, 3)[1:] == (0, count - 1) else ids


def _chosen(lift: Lifter, node: Any) -> tuple[Param, fx.Node] | None:
    """(parameter, ids) of parameter[ids]."""
    if name_of(node) != "index" or len(node.args[1]) != 1:
        return None
    param = lift.param(node.args[0])
    return None if param is None else (param, node.args[1][0])


def _stacks(lift: Lifter, gate_up: _Linear, down: _Linear, interleaved: bool) -> tuple[fx.Node | None, ...]:
    """gate_up[E, 2f, d] (gate rows first), down[E, d, f] and the biases, rearranged where needed."""
    steps: list[tuple[str, Any]] = []
    count, rows, cols = gate_up.weight.shape
    if gate_up.transposed:
        rows, cols = cols, rows
    half, whole = rows // 2, ("reshape", (count, rows, cols))
    if interleaved and gate_up.transposed:  # [E, d, f, 2] → [E, 2, f, d]
        steps = [("reshape", (count, cols, half, 2)), ("transpose", (0, 3, 2, 1)), whole]
    elif interleaved:  # [E, f, 2, d] → [E, 2, f, d]
        steps = [("reshape", (count, half, 2, cols)), ("transpose", (0, 2, 1, 3)), whole]
    elif gate_up.transposed:
        steps = [("transpose", (0, 2, 1))]
    first = lift.weight(gate_up.weight, *steps)
    second = lift.weight(down.weight, *([("transpose", (0, 2, 1))] if down.transposed else []))
    if (gate_up.bias is None) != (down.bias is None):
        raise Near("only one of the experts' projections has a bias")
    if gate_up.bias is None or down.bias is None:
        return first, second, None, None
    steps = []
    if interleaved:
        steps = [("reshape", (count, half, 2)), ("transpose", (0, 2, 1)), ("reshape", (count, rows))]
    return first, second, lift.weight(gate_up.bias, *steps), lift.weight(down.bias)


@dataclass
class _Gated:
    both: Any
    interleaved: bool
    alpha: float = 0.0
    limit: float = 0.0


def _gated(node: Any) -> _Gated:
    """silu(gate)·up, or (clamp(up) + 1)·gate·sigmoid(alpha·gate) of a clamped gate."""
    if name_of(node) != "mul":
        raise Near(f"the experts' activation ends in {name_of(node)}, not in a product of gate and up")
    for gate, up in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if name_of(gate) == "silu":
            return _halves(gate.args[0], up)
        if name_of(gate) == "add" and number(gate.args[1]) == 1.0:
            return _clamped(up, gate.args[0])
    raise Near("the experts' activation is neither silu(gate)·up nor the clamped form of gpt-oss")


def _clamped(glu: Any, up: Any) -> _Gated:
    gate: Any
    sigmoid: Any
    gate, sigmoid = inputs_of(glu, 2) if name_of(glu) == "mul" else (None, None)
    scaled = under(sigmoid, "sigmoid")
    if name_of(gate) != "clamp" or name_of(up) != "clamp" or name_of(scaled) != "mul" or scaled.args[0] is not gate:
        raise Near("the experts' gate is not clamp(gate)·sigmoid(alpha·clamp(gate)) beside clamp(up) + 1")
    (gate_in, low, limit), (up_in, least, most) = inputs_of(gate, 3), inputs_of(up, 3)
    if low is not None or limit is None or most != limit or least != -limit or limit <= 0:
        raise Near(f"the gate is clamped to {low}..{limit}, up to {least}..{most}")
    alpha = number(scaled.args[1])
    if alpha is None or alpha <= 0:
        raise Near("the factor in the sigmoid is not a positive number")
    parts = _halves(gate_in, up_in)
    return _Gated(parts.both, parts.interleaved, alpha, float(limit))


def _halves(gate: Any, up: Any) -> _Gated:
    """gate and up as the halves, or the even and the odd columns, of one projection."""
    if name_of(gate) == "getitem" and name_of(up) == "getitem" and gate.args[0] is up.args[0]:
        whole = gate.args[0]
        if name_of(whole) == "chunk" and whole.args[1] == 2 and (gate.args[1], up.args[1]) == (0, 1):
            return _Gated(whole.args[0], False)
    if name_of(gate) == "slice" and name_of(up) == "slice" and gate.args[0] is up.args[0]:
        size = int(shape_of(gate.args[0])[-1])
        cuts = bounds(gate, size), bounds(up, size)
        if cuts == ((0, size, 2), (1, size, 2)):
            return _Gated(gate.args[0], True)
        if cuts == ((0, size // 2, 1), (size // 2, size, 1)):
            return _Gated(gate.args[0], False)
    raise Near("gate and up are not the two halves of one projection")


def route(lift: Lifter, weights: Any, chosen: Any, top_k: int) -> tuple[fx.Node, ...] | None:
    """The router that gives these weights and experts: [n, k] each, in the IR.

    After the choice may come a division by the sum of the chosen scores and a multiplication by a number.
    """
    scale, normalise, epsilon = 1.0, False, 0.0
    while name_of(weights) == "mul" and number(weights.args[1]) is not None:
        scale, weights = scale * float(weights.args[1]), weights.args[0]
    if name_of(weights) == "div":
        total = weights.args[1]
        if name_of(total) == "add" and number(total.args[1]) is not None:
            epsilon, total = float(total.args[1]), total.args[0]
        if name_of(total) != "sum" or total.args[0] is not weights.args[0] or list(total.args[1]) != [-1]:
            raise Near("the router's weights are divided by something else than their sum")
        normalise, weights = True, weights.args[0]
    choice = _first_of(chosen, "topk", 1)
    if choice is None or inputs_of(choice, 2)[1] != top_k or not _last_axis(choice, 2):
        raise Near("the experts are not the result of a topk over the router's scores")
    bias: Param | None = None
    groups, top_groups = 1, 1
    if name_of(weights) == "softmax" and _first_of(weights.args[0], "topk", 0) is choice and _last_axis(weights, 1):
        kind, logits = RAW, choice.args[0]
    elif _first_of(weights, "topk", 0) is choice and name_of(choice.args[0]) == "softmax":
        kind, logits = SOFTMAX, choice.args[0].args[0]
        if not _last_axis(choice.args[0], 1):
            raise Near("the router's softmax is not over the experts")
    elif name_of(under(weights, "gather")) == "sigmoid" and weights.args[2] is chosen:
        score = weights.args[0]
        kind, logits = SIGMOID, score.args[0]
        bias, groups, top_groups = _choice(lift, choice.args[0], score)
    else:
        raise Near("the router's weights are not softmax, sigmoid or raw scores of its choice")
    if normalise and epsilon != (1e-20 if kind == SIGMOID else 0.0):
        raise Near(f"{epsilon} is added to the sum that the router's weights are divided by")
    rows = lift.rows(logits)
    if rows is None:
        return None
    if not rows.matrix:
        raise Near("the router's logits are not one row a position")
    settings = (kind, top_k, normalise, groups, top_groups, scale)
    made = lift.emit("topk_router", rows.node, None if bias is None else lift.weight(bias), *settings)
    return items(made)


def _choice(lift: Lifter, node: Any, score: fx.Node) -> tuple[Param | None, int, int]:
    """(bias, groups, top_groups) of what the experts are chosen by: scores, biased, masked outside the best groups."""
    groups = top_groups = 1
    if name_of(node) == "masked_fill":
        biased, outside, value = inputs_of(node, 3)
        if value != -math.inf:
            raise Near(f"experts outside the best groups get {value} instead of -inf, and may still be chosen")
        groups, top_groups = _groups(outside, biased)
        node = biased
    if node is score:
        return None, groups, top_groups
    bias = lift.param(node.args[1]) if name_of(node) == "add" and node.args[0] is score else None
    if bias is None:
        raise Near("the experts are chosen by something else than scores plus a bias")
    return bias, groups, top_groups


def _groups(outside: Any, biased: fx.Node) -> tuple[int, int]:
    """(groups, top_groups) of the mask of experts that are not in the groups with the best sum of two scores."""
    inside = under(outside, "bitwise_not", "logical_not")
    if name_of(inside) == "to" and dtype_of(inside) == torch.bool:
        inside = inside.args[0]
    spread = under(inside, "reshape")
    column = under(spread, "expand")
    scatter = under(column, "unsqueeze")
    if name_of(scatter) != "scatter" or scatter.args[3] != 1 or name_of(scatter.args[0]) not in ("zeros_like", "zeros"):
        raise Near("the mask of the experts' groups was not understood")
    best = _first_of(scatter.args[2], "topk", 1)
    total: Any = under(best, "topk") if best is not None and _last_axis(best, 2) else None
    scored = name_of(total) == "sum" and list(total.args[1]) == [-1]
    pair = _first_of(total.args[0], "topk", 0) if scored else None
    grouped: Any = under(pair, "topk") if scored and pair and pair.args[1] == 2 and _last_axis(pair, 2) else None
    if best is None or grouped is None or under(grouped, "reshape") is not biased:
        raise Near("groups of experts are not scored by the sum of their two best")
    _, groups, each = shape_of(grouped)
    if shape_of(spread)[1:] != (groups, each):
        raise Near("the mask of the experts' groups has another shape than the groups")
    return int(groups), int(best.args[1])


def _first_of(node: Any, op: str, index: int) -> Any:
    """The call of `op` whose result number `index` the node is."""
    found = name_of(node) == "getitem" and node.args[1] == index and name_of(node.args[0]) == op
    return node.args[0] if found else None


def _last_axis(node: fx.Node, at: int) -> bool:
    axis = node.args[at] if len(node.args) > at else -1
    return axis in (-1, len(shape_of(node.args[0])) - 1)  # type: ignore[arg-type]

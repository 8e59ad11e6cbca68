"""Routers in float32, and experts by gathering those that a row needs."""

from __future__ import annotations

import numpy as np

from tmlc.emit.tensorrt.graph import Graph, Tensor
from tmlc.emit.tensorrt.lower_dense import code_constant, code_parts, finish, linear, silu, softcap
from tmlc.emit.tensorrt.network import SCRATCH_BYTES, Call, Lower
from tmlc.ir.ops.topk import RAW, SIGMOID, SOFTMAX
from tmlc.ir.types import ITEM_BYTES

FORBIDDEN = -3e38


def _sink_router(c: Call, logits: Tensor) -> tuple[Tensor, Tensor]:
    g, shared, top_k = c.g, int(c.args["n_shared"]), int(c.args["top_k"])
    routed = int(logits.shape[1]) - shared
    choice = g.activation("SIGMOID", g.columns(logits, 1, 0, routed) if shared else logits)
    _, experts = g.topk(g.add(choice, c.floats("bias", (1, routed))), top_k, 1)
    if shared:
        zero = g.times(g.columns(experts, 1, 0, 1), 0)
        experts = g.concat([experts, g.add(zero, g.integers(np.arange(routed, routed + shared)[None]))], 1)
    chosen = g.pick(logits, experts, 1)
    # log-sigmoid: min(x, 0) - log(1 + e^-|x|)
    tail = g.unary("LOG", g.plus(g.unary("EXP", g.unary("NEG", g.unary("ABS", chosen))), 1.0))
    weights = g.softmax(g.sub(g.minimum(chosen, g.number(0.0, chosen)), tail), 1)
    return g.mul(g.times(weights, c.args["route_scale"]), c.floats("scale", (1, 1))), experts


def _router(c: Call) -> tuple[Tensor, Tensor]:
    return _sink_router(c, linear(c, c.x("x"), bias=None))


def _topk_router(c: Call) -> tuple[Tensor, Tensor]:
    g, logits, top_k, kind = c.g, c.x("logits"), int(c.args["top_k"]), int(c.args["scores"])
    experts, groups = int(logits.shape[1]), int(c.args["groups"])
    score = {
        SOFTMAX: lambda: g.softmax(logits, 1),
        SIGMOID: lambda: g.activation("SIGMOID", logits),
        RAW: lambda: logits,
    }[kind]()
    choice = g.add(score, c.floats("bias", (1, experts))) if c.has("bias") else score
    if groups > 1:
        choice = _open_groups(g, choice, groups, int(c.args["top_groups"]))
    _, chosen = g.topk(choice, top_k, 1)
    weights = g.pick(score, chosen, 1)
    if kind == RAW:
        weights = g.softmax(weights, 1)
    if c.args["normalise"]:
        total = g.reduce("SUM", weights, 1)
        weights = g.div(weights, g.plus(total, 1e-20) if kind == SIGMOID else total)
    return g.times(weights, c.args["scale"]), chosen


def _open_groups(g: Graph, choice: Tensor, groups: int, top_groups: int) -> Tensor:
    """The scores, with those of all but the best groups out of reach."""
    each = int(choice.shape[1]) // groups
    parts = g.reshape(choice, (-1, groups, each))
    best = g.reduce("SUM", g.topk(parts, min(2, each), 2)[0], 2)
    _, chosen = g.topk(g.reshape(best, (-1, groups)), top_groups, 1)
    names = g.integers(np.arange(groups).reshape(1, groups, 1))
    hits = g.equal(names, g.reshape(chosen, (-1, 1, top_groups)))
    ones = g.cast(hits, "i32")
    open_ = g.greater(g.reduce("SUM", ones, 2), g.number(0, ones))
    return g.reshape(g.select(open_, parts, g.number(FORBIDDEN, parts)), (-1, groups * each))


def _gathered(c: Call, x: Tensor, experts: Tensor, name: str) -> Tensor:
    """x [n, 1 or K, 1, k] times the gathered experts [n, K, m, k], transposed: float32 [n, K, 1, m]."""
    g, quantised = c.g, c.codes(name)
    if quantised is None:
        stack, dtype = c.heavy(name)
        return g.cast(g.matmul(g.cast(x, dtype), g.gather(stack, experts, 0), transpose_b=True), "f32")
    weight = c.weight_name(name)
    count, rows, width = quantised.shape
    group, bits = quantised.codes.scheme.group, quantised.codes.scheme.bits
    codes, scales, terms = code_parts(quantised)
    wide = codes.shape[1]
    if wide != width:
        x = g.columns(x, 3, 0, wide)
    stack = g.once(("codes", weight), lambda: g.dequantize(
        code_constant(g, codes, (count, rows, wide), bits),
        g.constant(scales.reshape(count, rows, -1), "f16"), "f16",
    ))  # fmt: skip
    y = g.cast(g.matmul(g.cast(x, "f16"), g.gather(stack, experts, 0), transpose_b=True), "f32")
    if terms is None:
        return y
    shift = g.once(("zeros", weight), lambda: g.constant(terms.reshape(count, rows, -1), "f16"))
    blocks = wide // group
    many = int(x.shape[1])
    sums = g.reduce("SUM", g.reshape(x, (-1, many, blocks, group)), 3)
    sums = g.cast(g.reshape(sums, (-1, many, 1, blocks)), "f16")
    return g.add(y, g.cast(g.matmul(sums, g.gather(shift, experts, 0), transpose_b=True), "f32"))


def moe(c: Call) -> Tensor:
    """Σ_j weights_j · expert_j(x), over the chosen experts in the order of the router."""
    g, x, experts = c.g, c.x("x"), c.x("experts")
    width, top_k = int(x.shape[1]), int(experts.shape[1])
    _, _, f = (int(size) for size in c.args["down"].meta["type"].shape)
    _bound(c, top_k * 3 * f * width)
    h = _gathered(c, g.reshape(x, (-1, 1, 1, width)), experts, "gate_up")
    if c.has("gate_up_bias"):
        bias = g.gather(c.floats("gate_up_bias", (-1, 2 * f)), experts, 0)
        h = g.add(h, g.reshape(bias, (-1, top_k, 1, 2 * f)))
    h = _gate(c, g.columns(h, 3, 0, f), g.columns(h, 3, f, f))
    y = _gathered(c, h, experts, "down")
    if c.has("down_bias"):
        y = g.add(y, g.reshape(g.gather(c.floats("down_bias", (-1, width)), experts, 0), (-1, top_k, 1, width)))
    y = g.mul(y, g.reshape(c.x("weights"), (-1, top_k, 1, 1)))
    return g.reshape(g.reduce("SUM", y, 1), (-1, width))


def _bound(c: Call, elements: int) -> None:
    """Cuts the positions of a run so that what it gathers fits."""
    dtype = c.args["gate_up"].meta["type"].dtype
    nbytes = elements * ITEM_BYTES.get(dtype, 2)
    c.writer.most = max(1, min(c.writer.most, SCRATCH_BYTES // nbytes))


def _gate(c: Call, gate: Tensor, up: Tensor) -> Tensor:
    g, alpha, limit = c.g, float(c.args["alpha"]), float(c.args["limit"])
    if c.args["gate_cap"] > 0:
        capped = g.mul(softcap(g, gate, c.args["gate_cap"]), g.activation("SIGMOID", gate))
        return g.mul(capped, softcap(g, up, c.args["up_cap"]))
    if alpha == 0:
        return g.mul(silu(g, gate), up)
    gate = g.minimum(gate, g.number(limit, gate))
    up = g.activation("CLIP", up, -limit, limit)
    return g.mul(g.mul(g.plus(up, 1.0), gate), g.activation("SIGMOID", g.times(gate, alpha)))


LOWERINGS: dict[str, Lower] = {
    "sink_router": lambda c: _sink_router(c, c.x("logits")),
    "router": _router,
    "topk_router": _topk_router,
    "moe": moe,
    "moe_add": lambda c: finish(c, moe(c)),
    "moe_conv_state": lambda c: finish(c, moe(c)),
}

"""Lowers routers and experts.

Experts run in one of two ways, which the number of rows of a call decides (`grouped_from`): each pair of row and expert
by itself, with a copy of the weights of each pair's expert; or expert by expert in a loop over those that the call
touches, with a copy of one expert at a time. Copies of large experts cost more than a loop ever does, so these always
take the loop.
"""

from __future__ import annotations

import math

from tmlc.emit.onnx.attention import convolved
from tmlc.emit.onnx.call import Call
from tmlc.emit.onnx.dense import capped, product
from tmlc.emit.onnx.fused_experts import fused_moe, suits
from tmlc.emit.onnx.graph import Dim, Graph, value_info
from tmlc.ir.ops.topk import RAW, SIGMOID, SOFTMAX
from tmlc.ir.quantize import SCHEMES
from tmlc.ir.types import QUANTISED

SMALL_EXPERT = 1 << 17  # weights; measured in perf/test_onnx.py


def _best(c: Call, values: str, count: int) -> str:
    """int64 [n, count]: the columns with the largest values, best first, the lower one where two are equal."""
    return c.g.ops("TopK", values, c.g.ints(count), outputs=2, axis=1, largest=1, sorted=1)[1]


def _sink_routes(c: Call, logits: str, total: int, rows: str) -> tuple[str, str]:
    g, top_k, shared = c.g, c.args["top_k"], c.args["n_shared"]
    routed = total - shared
    head = g.slice(logits, 0, routed, 1) if shared else logits
    choice = g.op("Add", g.sigmoid_exact(head), c.row("bias"))
    experts = _best(c, choice, top_k)
    if shared:
        last = g.constant([list(range(routed, total))], "i64")
        experts = g.concat([experts, g.op("Expand", last, g.concat([rows, g.ints(shared)], 0))], 1)
    chosen = g.op("GatherElements", logits, experts, axis=1)
    # log sigmoid(x) = min(x, 0) - log(1 + e^-|x|), which neither end of the range breaks
    tail = g.op("Log", g.op("Add", g.op("Exp", g.op("Neg", g.op("Abs", chosen))), g.f32(1.0)))
    shares = g.op("Softmax", g.op("Sub", g.op("Min", chosen, g.f32(0.0)), tail), axis=1)
    return g.op("Mul", g.op("Mul", shares, g.f32(c.args["route_scale"])), c.scalar("scale")), experts


def sink_router(c: Call) -> tuple[str, str]:
    return _sink_routes(c, c.x("logits"), c.cols("logits"), c.rows("logits"))


def router(c: Call) -> tuple[str, str]:
    return _sink_routes(c, product(c, c.x("x"), bias=None), int(c.type("weight").shape[0]), c.rows("x"))


def topk_router(c: Call) -> tuple[str, str]:
    g, kind, groups, experts = c.g, c.args["scores"], c.args["groups"], c.cols("logits")
    logits = c.x("logits")
    if kind == SOFTMAX:
        score = g.op("Softmax", logits, axis=1)
    else:
        score = g.sigmoid_exact(logits) if kind == SIGMOID else logits
    choice = g.op("Add", score, c.row("bias")) if c.has("bias") else score
    if groups > 1:
        each = experts // groups
        split = g.reshape(choice, 0, groups, each)
        two = g.ops("TopK", split, g.ints(min(2, each)), outputs=2, axis=2, largest=1, sorted=1)[0]
        best = _best(c, g.sum(two, 2), c.args["top_groups"])
        same = g.op("Equal", g.unsqueeze(best, 2), g.constant([[list(range(groups))]], "i64"))  # [n, top, groups]
        open_ = g.op("ReduceMax", g.cast(same, "i32"), g.ints(1), keepdims=0)
        seen = g.unsqueeze(g.cast(open_, "bool"), 2)
        choice = g.reshape(g.op("Where", seen, split, g.f32(-math.inf)), 0, experts)
    chosen = _best(c, choice, c.args["top_k"])
    weights = g.op("GatherElements", score, chosen, axis=1)
    if kind == RAW:
        weights = g.op("Softmax", weights, axis=1)
    if c.args["normalise"]:
        total = g.sum(weights, 1, keep=True)
        weights = g.op("Div", weights, g.op("Add", total, g.f32(1e-20)) if kind == SIGMOID else total)
    return g.op("Mul", weights, g.f32(c.args["scale"])), chosen


def moe(c: Call) -> str:
    if suits(c):
        return fused_moe(c)
    _, d, f = (int(size) for size in c.type("down").shape)
    at = c.args["grouped_from"] if 3 * f * d <= SMALL_EXPERT else 0
    most = c.context.max_n
    if at > most:
        return _pairs(c, c.g)
    if at <= 1:
        return _grouped(c, c.g)
    shape: list[Dim] = ["n", c.cols("x")]
    branches = []
    for name, write in (("pairs", _pairs), ("grouped", _grouped)):
        graph = Graph(c.g)
        value = write(c, graph)
        branches.append(graph.subgraph(name, [value_info(value, "f32", shape)]))
    few = c.g.op("Less", c.g.squeeze(c.rows("x"), 0), c.g.constant(at, "i64"))
    return c.g.op("If", few, then_branch=branches[0], else_branch=branches[1])


def moe_add(c: Call) -> str:
    return c.g.op("Add", c.x("addend"), moe(c))


def finished(c: Call, y: str, cols: int) -> str:
    """What moe_conv_state and linear_conv_state do with a product: columns through a convolution, then an addend."""
    g = c.g
    start, channels = c.args.get("start", 0), int(c.type("taps").shape[0])
    part = y if channels == cols else g.slice(y, start, start + channels, 1)
    mixed = convolved(c, part, channels, "taps", c.args["residual"])
    if c.args["level"] != 1:
        mixed = g.op("Mul", mixed, g.f32(c.args["level"]))
    parts = [g.slice(y, 0, start, 1)] if start else []
    parts.append(mixed)
    if start + channels < cols:
        parts.append(g.slice(y, start + channels, cols, 1))
    y = g.concat(parts, 1)
    return g.op("Add", c.x("addend"), y) if c.has("addend") else y


def moe_conv_state(c: Call) -> str:
    return finished(c, moe(c), c.cols("x"))


def linear_conv_state(c: Call) -> str:
    y = product(c, c.x("x"))
    if c.has("scale"):
        y = c.g.op("Mul", y, c.scalar("scale"))
    return finished(c, y, int(c.type("weight").shape[0]))


def _gathered(c: Call, g: Graph, name: str, index: str) -> str:
    """The weights of the experts of an index, as float32 [*index, rows, k]."""
    kind = c.type(name)
    if kind.dtype not in QUANTISED:
        rows = g.op("Gather", c.raw(name), index, axis=0)
        return rows if kind.dtype == "f32" else g.cast(rows, "f32")
    scheme, k = SCHEMES[kind.dtype], int(kind.shape[2])
    groups = scheme.groups(k)
    _, parts = c.stored(name, "i8" if scheme.bits == 8 else "u4.halves")
    codes, scales = (g.op("Gather", part, index, axis=0) for part in parts[:2])
    if scheme.bits == 4:
        low = g.op("BitwiseAnd", codes, g.constant(15, "u8"))
        high = g.op("BitShift", codes, g.constant(4, "u8"), direction="RIGHT")
        codes = g.concat([low, high], -1)
    wide = g.cast(codes, "f32")
    sizes = g.concat([g.op("Shape", index), g.ints(int(kind.shape[1]))], 0)
    wide = g.op("Reshape", wide, g.concat([sizes, g.ints(groups, scheme.group)], 0))
    if scheme.bits == 4:
        zeros = g.cast(g.op("Gather", parts[2], index, axis=0), "f32")
        wide = g.op("Sub", wide, g.unsqueeze(g.op("Mul", zeros, g.f32(1 / 16)), -1))
    wide = g.op("Mul", wide, g.unsqueeze(g.cast(scales, "f32"), -1))
    flat = g.op("Reshape", wide, g.concat([sizes, g.ints(groups * scheme.group)], 0))
    return flat if groups * scheme.group == k else g.slice(flat, 0, k, -1)


def _biased(c: Call, g: Graph, y: str, name: str, index: str) -> str:
    if not c.has(name):
        return y
    return g.op("Add", y, g.op("Gather", c.weight(name), index, axis=0))


def _activated(c: Call, g: Graph, both: str, axis: int) -> str:
    """The hidden columns of gate and up, which lie one behind the other."""
    f = int(c.type("down").shape[2])
    gate, up = g.slice(both, 0, f, axis), g.slice(both, f, 2 * f, axis)
    alpha, limit, caps = c.args["alpha"], c.args["limit"], (c.args["gate_cap"], c.args["up_cap"])
    if caps[0] > 0:
        on = g.op("Mul", capped(g, gate, caps[0]), g.op("Sigmoid", gate))
        return g.op("Mul", on, capped(g, up, caps[1]))
    if alpha == 0:
        return g.op("Mul", g.silu(gate), up)
    gate = g.op("Min", gate, g.f32(limit))
    up = g.op("Clip", up, g.f32(-limit), g.f32(limit))
    on = g.op("Mul", gate, g.op("Sigmoid", g.op("Mul", gate, g.f32(alpha))))
    return g.op("Mul", g.op("Add", up, g.f32(1.0)), on)


def _pairs(c: Call, g: Graph) -> str:
    """Each pair of row and expert by itself: the weights of n·K experts are copied."""
    experts, d = c.x("experts"), c.cols("x")
    x = g.reshape(c.x("x"), 0, 1, d, 1)
    both = g.squeeze(g.op("MatMul", _gathered(c, g, "gate_up", experts), x), 3)
    hidden = _activated(c, g, _biased(c, g, both, "gate_up_bias", experts), 2)
    parts = g.squeeze(g.op("MatMul", _gathered(c, g, "down", experts), g.unsqueeze(hidden, 3)), 3)
    parts = _biased(c, g, parts, "down_bias", experts)
    return g.squeeze(g.op("MatMul", g.unsqueeze(c.x("weights"), 1), parts), 1)


def _grouped(c: Call, g: Graph) -> str:
    """Expert by expert, in ascending order: the weights of one expert at a time are copied."""
    x, d, columns = c.x("x"), c.cols("x"), int(c.type("experts").shape[1])
    flat, shares = g.reshape(c.x("experts"), -1), g.reshape(c.x("weights"), -1, 1)
    touched = g.op("Unique", flat, sorted=1)
    start = g.op("Expand", g.f32(0.0), g.op("Shape", x))
    body = Graph(g)
    step, going, so_far = (body.name(f"moe.{what}") for what in ("step", "going", "so_far"))
    expert = body.op("Gather", touched, step, axis=0)
    pairs = body.reshape(body.op("NonZero", body.op("Equal", flat, expert)), -1)
    rows = body.op("Div", pairs, body.constant(columns, "i64")) if columns > 1 else pairs
    both = body.op("Gemm", body.op("Gather", x, rows, axis=0), _gathered(c, body, "gate_up", expert), transB=1)
    hidden = _activated(c, body, _biased(c, body, both, "gate_up_bias", expert), 1)
    y = body.op("Gemm", hidden, _gathered(c, body, "down", expert), transB=1)
    y = body.op("Mul", _biased(c, body, y, "down_bias", expert), body.op("Gather", shares, pairs, axis=0))
    total = body.op("ScatterND", so_far, body.unsqueeze(rows, 1), y, reduction="add")
    on = body.op("Identity", going)
    graph = body.subgraph("experts", [value_info(on, "bool", []), value_info(total, "f32", ["n", d])])
    for name, dtype, shape in ((step, "i64", []), (going, "bool", []), (so_far, "f32", ["n", d])):
        graph.input.append(value_info(name, dtype, shape))  # type: ignore[arg-type]
    count = g.op("Reshape", g.op("Shape", touched), g.constant([], "i64"))
    return g.op("Loop", count, None, start, body=graph)

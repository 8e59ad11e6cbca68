"""Lowers Philox normals and sampling: exact integer arithmetic on unsigned 64-bit words."""

from __future__ import annotations

import math

import numpy as np

from tmlc.emit.onnx.call import Call
from tmlc.emit.onnx.dense import capped, product
from tmlc.emit.onnx.graph import Graph, value_info
from tmlc.ir.ops.random import GUMBEL_STREAM, MASK

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
STEPS = 0x9E3779B9, 0xBB67AE85


def _low(g: Graph, x: str) -> str:
    return g.op("BitwiseAnd", x, g.constant(MASK, "u64"))


def _high(g: Graph, x: str) -> str:
    return g.op("BitShift", x, g.constant(32, "u64"), direction="RIGHT")


def _words(g: Graph, key: str, count: int, stream: int) -> str:
    """uint64 [n, count]: 32-bit words for key rows (seed, tick, position)."""
    whole = g.cast(key, "u64")
    seed, tick, position = (g.slice(whole, i, i + 1, 1) for i in range(3))
    blocks = np.arange((count + 3) // 4, dtype=np.uint64)[None]
    place = _low(g, position)
    c1 = g.op("BitwiseOr", place, g.constant(stream, "u64")) if stream else place
    c0, c2, c3 = g.constant(blocks, "u64"), _low(g, tick), _high(g, tick)
    k0, k1 = _low(g, seed), _high(g, seed)
    for turn in range(ROUNDS):
        first = g.op("Mul", c0, g.constant(MULTIPLIERS[0], "u64"))
        second = g.op("Mul", c2, g.constant(MULTIPLIERS[1], "u64"))
        c0 = g.op("BitwiseXor", g.op("BitwiseXor", _high(g, second), c1), k0)
        c2 = g.op("BitwiseXor", g.op("BitwiseXor", _high(g, first), c3), k1)
        c1, c3 = _low(g, second), _low(g, first)
        if turn + 1 < ROUNDS:
            k0 = _low(g, g.op("Add", k0, g.constant(STEPS[0], "u64")))
            k1 = _low(g, g.op("Add", k1, g.constant(STEPS[1], "u64")))
    shape = g.op("Shape", c0)
    words = g.concat([g.unsqueeze(g.op("Expand", word, shape), 2) for word in (c0, c1, c2, c3)], 2)
    flat = g.reshape(words, 0, 4 * blocks.shape[1])
    return flat if count == 4 * blocks.shape[1] else g.slice(flat, 0, count, 1)


def _uniform(g: Graph, words: str) -> str:
    """Words to float64 in the open interval (0, 1)."""
    return g.op("Mul", g.op("Add", g.cast(words, "f64"), g.constant(0.5, "f64")), g.constant(2.0**-32, "f64"))


def philox_normal(c: Call) -> str:
    g, size = c.g, c.args["size"]
    whole = (size + 3) // 4 * 4
    pairs = g.reshape(_uniform(g, _words(g, c.x("key"), whole, 0)), 0, whole // 2, 2)
    radius = g.op("Sqrt", g.op("Mul", g.op("Log", g.slice(pairs, 0, 1, 2)), g.constant(-2.0, "f64")))
    angle = g.op("Mul", g.slice(pairs, 1, 2, 2), g.constant(2 * math.pi, "f64"))
    both = g.concat([g.op("Mul", radius, g.op("Cos", angle)), g.op("Mul", radius, g.op("Sin", angle))], 2)
    flat = g.cast(g.reshape(both, 0, whole), "f32")
    return flat if size == whole else g.slice(flat, 0, size, 1)


def _draw(c: Call, logits: str, entries: int) -> str:
    """Arg-max of logits/T + Gumbel noise; without any temperature no noise is made."""
    g = c.g
    t = g.cast(c.x("temperature"), "f64")
    wide = g.cast(logits, "f64")
    hot = Graph(g)
    zero = hot.constant(0.0, "f64")
    uniform = _uniform(hot, _words(hot, c.x("key"), entries, GUMBEL_STREAM))
    noise = hot.op("Neg", hot.op("Log", hot.op("Neg", hot.op("Log", uniform))))
    some = hot.op("Greater", t, zero)
    safe = hot.op("Where", some, t, hot.constant(1.0, "f64"))
    noisy = hot.op("Add", hot.op("Div", wide, safe), noise)
    scores = hot.op("Where", some, noisy, wide)
    cold = Graph(g)
    same = cold.op("Identity", wide)
    shape = ["n", entries]
    branches = [
        graph.subgraph(name, [value_info(value, "f64", shape)])  # type: ignore[arg-type]
        for graph, name, value in ((hot, "noisy", scores), (cold, "plain", same))
    ]
    any_ = g.op("Greater", g.op("ReduceMax", t, keepdims=0), g.constant(0.0, "f64"))
    chosen = g.op("If", any_, then_branch=branches[0], else_branch=branches[1])
    return g.op("ArgMax", chosen, axis=1, keepdims=1, select_last_index=0)


def sample(c: Call) -> str:
    return _draw(c, c.x("logits"), c.cols("logits"))


def head_sample(c: Call) -> str:
    g, x, entries = c.g, c.x("x"), c.args["entries"]
    if c.args["alpha"] != 1:
        x = g.op("Mul", x, g.f32(c.args["alpha"]))
    logits = product(c, x)
    if c.args["cap"] > 0:
        logits = capped(g, logits, c.args["cap"])
    if entries < int(c.type("weight").shape[0]):
        logits = g.slice(logits, 0, entries, 1)
    return _draw(c, logits, entries)

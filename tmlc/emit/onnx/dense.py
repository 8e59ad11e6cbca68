"""Lowers lookups, norms, projections and elementwise arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tmlc.emit.onnx.call import Call
from tmlc.emit.onnx.graph import CONTRIB, Graph
from tmlc.ir.quantize import SCHEMES
from tmlc.ir.types import QUANTISED


def embedding(c: Call) -> str:
    g = c.g
    rows = g.op("Gather", c.raw("table"), g.squeeze(c.x("ids"), 1), axis=0)
    return rows if c.type("table").dtype == "f32" else g.cast(rows, "f32")


def bag_embedding(c: Call) -> str:
    g, bins = c.g, c.cols("levels")
    offsets = g.constant(np.arange(bins)[None] * c.args["per_bin"], "i64")
    rows = g.op("Gather", c.raw("table"), g.op("Add", c.x("levels"), offsets), axis=0)
    return g.sum(rows if c.type("table").dtype == "f32" else g.cast(rows, "f32"), 1)


def normed(c: Call, x: str, cols: int) -> str:
    """x / sqrt(mean(x²) + eps) · weight, each group of columns by itself."""
    g, d = c.g, c.cols("weight")
    groups = g.reshape(x, 0, cols // d, d) if cols != d else x
    squares = g.op("ReduceMean", g.op("Pow", groups, g.f32(2.0)), g.ints(-1), keepdims=1)
    root = g.op("Sqrt", g.op("Add", squares, g.f32(c.args["eps"])))
    scaled = g.op("Mul", g.op("Div", groups, root), c.row("weight"))
    return g.reshape(scaled, 0, cols) if cols != d else scaled


def rms_norm(c: Call) -> str:
    return normed(c, c.x("x"), c.cols("x"))


def add_rms_norm(c: Call) -> tuple[str, str]:
    total = c.g.op("Add", c.x("x"), c.x("residual"))
    return total, normed(c, total, c.cols("x"))


def product(c: Call, x: str, bias: str | None = "bias") -> str:
    """x · weightᵀ (+ bias), whatever the weight's form."""
    g = c.g
    named = bias is not None and c.has(bias)
    added = c.row(str(bias)) if named else None
    dtype = c.type("weight").dtype
    if dtype not in QUANTISED:
        return g.op("Gemm", x, c.weight("weight"), added, transB=1)
    if c.context.contrib:
        y = _product_nbits(c, x)
        return g.op("Add", y, added) if added is not None else y
    return g.op("Gemm", x, _dequantised(c), added, transB=1)


def _dequantised(c: Call) -> str:
    """A quantised matrix as float32 [m, k]: DequantizeLinear of its codes, less its zero points."""
    g, scheme = c.g, SCHEMES[c.type("weight").dtype]
    m, k = (int(size) for size in c.type("weight").shape)
    _, parts = c.stored("weight", "i8" if scheme.bits == 8 else "u4")
    scales = g.cast(parts[1], "f32")
    values = g.op("DequantizeLinear", parts[0], scales, axis=1, block_size=scheme.group)
    groups = scheme.groups(k)
    if scheme.bits == 4:  # scale·code - scale·zero/16: both products and the difference are exact
        below = g.op("Mul", g.op("Mul", g.cast(parts[2], "f32"), g.f32(1 / 16)), scales)
        wide = g.op("Sub", g.reshape(values, m, groups, scheme.group), g.unsqueeze(below, 2))
        values = g.reshape(wide, m, groups * scheme.group)
    return values if groups * scheme.group == k else g.slice(values, 0, k, 1)


def _product_nbits(c: Call, x: str) -> str:
    """MatMulNBits: int8 products of rounded activations. It knows whole zero points only (here 8 of int4), so what
    lies between them and the real ones goes through the sums of the activations of each group."""
    g, scheme = c.g, SCHEMES[c.type("weight").dtype]
    m, k = (int(size) for size in c.type("weight").shape)
    _, parts = c.stored("weight", "u8" if scheme.bits == 8 else "u4.blocks")
    scales, groups = g.cast(parts[1], "f32"), scheme.groups(k)
    blocks = g.reshape(parts[0], m, groups, scheme.group * scheme.bits // 8)
    y = g.op(
        "MatMulNBits", x, blocks, scales, domain=CONTRIB, K=k, N=m, bits=scheme.bits, block_size=scheme.group,
        accuracy_level=4,
    )  # fmt: skip
    if scheme.bits == 8:
        return y
    padded = x
    if groups * scheme.group != k:
        padded = g.op("Pad", x, g.ints(0, 0, 0, groups * scheme.group - k))
    sums = g.sum(g.reshape(padded, 0, groups, scheme.group), 2)
    above = g.op("Sub", g.f32(8.0), g.op("Mul", g.cast(parts[2], "f32"), g.f32(1 / 16)))
    return g.op("Add", y, g.op("Gemm", sums, g.op("Mul", above, scales), transB=1))


def linear(c: Call) -> str:
    return product(c, c.x("x"))


def linear_add(c: Call) -> str:
    g, y = c.g, product(c, c.x("x"))
    if c.has("scale"):
        y = g.op("Mul", y, c.scalar("scale"))
    return g.op("Add", c.x("addend"), y)


def binary(kind: str) -> Callable[[Call], str]:
    return lambda c: c.g.op(kind, c.x("a"), c.x("b"))


def unary(kind: str) -> Callable[[Call], str]:
    return lambda c: c.g.op(kind, c.x("x"))


def add_scaled(c: Call) -> str:
    return c.g.op("Add", c.x("a"), c.g.op("Mul", c.x("b"), c.g.f32(c.args["alpha"])))


def scale(c: Call) -> str:
    return c.g.op("Mul", c.x("x"), c.g.f32(c.args["alpha"]))


def clamp(c: Call) -> str:
    return c.g.op("Clip", c.x("x"), c.g.f32(c.args["lo"]), c.g.f32(c.args["hi"]))


def scale_by(c: Call) -> str:
    return c.g.op("Mul", c.x("x"), c.scalar("s"))


def add_row(c: Call) -> str:
    row = c.g.op("Gather", c.matrix("rows"), c.g.constant(c.args["index"], "i64"), axis=0)
    return c.g.op("Add", c.x("x"), row)


def silu(c: Call) -> str:
    return c.g.silu(c.x("x"))


def gelu(c: Call) -> str:
    return c.g.op("Gelu", c.x("x"), approximate="none")


def swiglu(c: Call) -> str:
    return c.g.op("Mul", c.g.silu(c.x("gate")), c.x("up"))


def modulate(c: Call) -> str:
    g = c.g
    return g.op("Add", g.op("Mul", c.x("x"), g.op("Add", c.x("scale"), g.f32(1.0))), c.x("shift"))


def columns(c: Call) -> str:
    start, stop = c.args["start"], c.args["stop"]
    return c.x("x") if (start, stop) == (0, c.cols("x")) else c.g.slice(c.x("x"), start, stop, 1)


def reshape(c: Call) -> str:
    return c.g.reshape(c.x("x"), -1, c.args["cols"])


def capped(g: Graph, x: str, cap: float) -> str:
    """cap·tanh(x/cap)."""
    return g.op("Mul", g.op("Tanh", g.op("Div", x, g.f32(cap))), g.f32(cap))


def softcap(c: Call) -> str:
    return capped(c.g, c.x("x"), c.args["cap"])


def l2_clip(c: Call) -> str:
    g, cols, heads = c.g, c.cols("x"), c.args["num_heads"]
    x = g.op("Mul", c.x("x"), g.reshape(c.weight("scale"), 1, cols)) if c.has("scale") else c.x("x")
    split = g.reshape(x, 0, heads, cols // heads)
    length = g.op("Sqrt", g.op("ReduceSumSquare", split, g.ints(2), keepdims=1))
    factor = g.op("Div", g.f32(c.args["threshold"]), g.op("Add", length, g.f32(1e-6)))
    return g.reshape(g.op("Mul", split, g.op("Min", factor, g.f32(1.0))), 0, cols)


def concat_columns(c: Call) -> str:
    return c.g.concat([c.x("a"), c.x("b")], 1)


def mix_blocks(c: Call) -> str:
    g, d = c.g, c.cols("queries")
    blocks, queries = c.cols("x") // d, c.type("queries").numel() // d
    split = g.reshape(c.x("x"), 0, blocks, d)
    mean = g.op("ReduceMean", g.op("Mul", split, split), g.ints(2), keepdims=1)
    even = g.op("Div", split, g.op("Sqrt", g.op("Add", mean, g.f32(c.args["eps"]))))
    scores = g.op("MatMul", even, g.transpose(c.matrix("queries"), 1, 0))  # [n, blocks, queries]
    shares = g.op("Softmax", g.op("Mul", scores, g.f32(1 / math.sqrt(d))), axis=1)
    return g.reshape(g.op("MatMul", g.transpose(shares, 0, 2, 1), even), 0, queries * d)

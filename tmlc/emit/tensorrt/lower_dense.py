"""Lookups, norms, products and what is done to one element after the other.

Activations are float32 throughout. A product's operands are cast to the type of its weight (float16, bfloat16,
float32), and its result back to float32, so that residual sums and norms lose nothing.
"""

from __future__ import annotations

import numpy as np

from tmlc.emit.tensorrt.graph import Graph, Tensor
from tmlc.emit.tensorrt.network import Call, Lower, Quantised


def rms(g: Graph, x: Tensor, axis: int, eps: float) -> Tensor:
    """x over its root mean square along an axis."""
    mean = g.reduce("AVG", g.mul(x, x), axis)
    return g.div(x, g.unary("SQRT", g.plus(mean, eps)))


def rms_norm(c: Call, x: Tensor) -> Tensor:
    width, weight = int(x.shape[1]), c.numpy("weight").reshape(-1)
    group = weight.size
    if group == width:
        return c.g.mul(rms(c.g, x, 1, c.args["eps"]), c.floats("weight", (1, group)))
    heads = c.g.reshape(x, (-1, width // group, group))
    normed = c.g.mul(rms(c.g, heads, 2, c.args["eps"]), c.floats("weight", (1, 1, group)))
    return c.g.reshape(normed, (-1, width))


def _add_rms_norm(c: Call) -> tuple[Tensor, Tensor]:
    total = c.g.add(c.x("x"), c.x("residual"))
    return total, rms_norm(c, total)


def linear(c: Call, x: Tensor, weight: str = "weight", bias: str | None = "bias") -> Tensor:
    """x · weightᵀ (+ bias)."""
    quantised = c.codes(weight)
    if quantised is not None:
        y = _coded_product(c, x, quantised, c.weight_name(weight))
    else:
        matrix, dtype = c.heavy(weight)
        y = c.g.cast(c.g.matmul(c.g.cast(x, dtype), matrix, transpose_b=True), "f32")
    return c.g.add(y, c.floats(bias, (1, -1))) if bias is not None and c.has(bias) else y


def code_parts(q: Quantised) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(codes, scales, zero terms) of a quantised weight [rows, K]: signed codes [rows, K'] with K' in whole groups,
    float16 scales [rows, G], and for codes with zero points what each group's sum of inputs is multiplied by."""
    scheme = q.codes.scheme
    codes = q.codes.codes.numpy().reshape(len(q.codes.codes), -1)
    scales = q.codes.scales.numpy()
    if q.codes.zeros is None:
        return (codes.astype(np.int16) - 128).astype(np.int8), scales, None
    middle = 1 << (scheme.bits - 1)
    signed = codes.astype(np.int16) - middle
    zeros = q.codes.zeros.numpy().astype(np.float32) / 16
    terms = scales.astype(np.float32) * (middle - zeros)
    return signed.astype(np.int8), scales, terms.astype(np.float16)


def code_constant(g: Graph, codes: np.ndarray, shape: tuple[int, ...], bits: int) -> Tensor:
    """Codes as a constant of TensorRT: int8, or int4 with two in a byte, the first in the low half."""
    if bits == 8:
        return g.constant(codes.reshape(shape), "i8")
    low, high = codes.reshape(-1, 2).view(np.uint8).T & 15
    return g.constant(low | high << 4, "i4", shape)


def group_sums(g: Graph, x: Tensor, group: int) -> Tensor:
    """float16 [.., G]: the sum of each group of inputs along the last axis of a two-dimensional x."""
    width = int(x.shape[1])
    sums = g.reduce("SUM", g.reshape(x, (-1, width // group, group)), 2)
    return g.cast(g.reshape(sums, (-1, width // group)), "f16")


def _coded_product(c: Call, x: Tensor, q: Quantised, name: str) -> Tensor:
    """x · Wᵀ of codes, in float16: TensorRT scales the codes, and what zero points add is a product of its own."""
    g, group = c.g, q.codes.scheme.group
    codes, scales, terms = code_parts(q)
    rows, wide = codes.shape
    if wide != int(x.shape[1]):
        x = g.columns(x, 1, 0, wide)  # zeros meet the codes behind the end
    matrix = g.once(("codes", name), lambda: g.dequantize(
        code_constant(g, codes, (rows, wide), q.codes.scheme.bits), g.constant(scales, "f16"), "f16"
    ))  # fmt: skip
    y = g.cast(g.matmul(g.cast(x, "f16"), matrix, transpose_b=True), "f32")
    if terms is None:
        return y
    shift = g.once(("zeros", name), lambda: g.constant(terms, "f16"))
    return g.add(y, g.cast(g.matmul(group_sums(g, x, group), shift, transpose_b=True), "f32"))


def _embedding(c: Call) -> Tensor:
    table, _ = c.heavy("table")
    return c.g.cast(c.g.gather(table, c.g.reshape(c.x("ids"), (-1,)), 0), "f32")


def _bag_embedding(c: Call) -> Tensor:
    g, levels = c.g, c.x("levels")
    bins, table = int(levels.shape[1]), c.heavy("table")[0]
    rows = g.add(levels, g.integers(np.arange(bins)[None] * int(c.args["per_bin"])))
    parts = g.cast(g.gather(table, rows, 0), "f32")
    return g.reshape(g.reduce("SUM", parts, 1), (-1, int(table.shape[1])))


def silu(g: Graph, x: Tensor) -> Tensor:
    return g.mul(x, g.activation("SIGMOID", x))


def softcap(g: Graph, x: Tensor, cap: float) -> Tensor:
    return g.times(g.activation("TANH", g.div(x, g.number(cap, x))), cap)


def scale_by(c: Call, x: Tensor, name: str) -> Tensor:
    return c.g.mul(x, c.floats(name, (1, 1)))


def _add_row(c: Call) -> Tensor:
    x = c.x("x")
    rows = c.numpy("rows").reshape(-1, int(x.shape[1]))
    return c.g.add(x, c.g.floats(rows[int(c.args["index"])][None]))


def _modulate(c: Call) -> Tensor:
    g = c.g
    return g.add(g.mul(c.x("x"), g.plus(c.x("scale"), 1.0)), c.x("shift"))


def short_conv(c: Call, x: Tensor, taps: str) -> Tensor:
    """The causal depthwise convolution of x behind the rows of its tail, which moves on."""
    g, weight = c.g, c.numpy(taps)
    channels, count = weight.shape[0], weight.shape[-1]
    weight = weight.reshape(channels, count)
    padded = g.concat([c.state("tail", "f32", (count - 1, channels)), x], 0)
    size = g.shape(x)
    out = None
    for j in range(count):
        part = g.mul(g.window(padded, (j, 0), size), g.floats(weight[None, :, j]))
        out = part if out is None else g.add(out, part)
    c.keep("tail", _last_rows(g, padded, size, count - 1, channels), "f32")
    return g.add(out, x) if c.args["residual"] else out


def _last_rows(g: Graph, padded: Tensor, size: Tensor, count: int, channels: int) -> Tensor:
    """The last `count` rows of [count + n, channels]; `size` is the shape [n, channels] of what came behind them."""
    return g.window(padded, g.mul(size, g.sizes([1, 0])), (count, channels))


def _dynamic_conv(c: Call) -> Tensor:
    g, x, weight = c.g, c.x("x"), c.numpy("weight")
    count, channels = weight.shape
    heads = int(c.x("taps").shape[1]) // count
    padded = g.concat([c.state("tail", "f32", (count - 1, channels)), x], 0)
    taps, size = g.reshape(c.x("taps"), (-1, heads, 1, count)), g.shape(x)
    out = None
    for j in range(count):
        tap = g.add(g.columns(taps, 3, j, 1), g.floats(weight[j].reshape(1, heads, channels // heads, 1)))
        rows = g.window(padded, (count - 1 - j, 0), size)
        part = g.mul(tap, g.reshape(rows, (-1, heads, channels // heads, 1)))
        out = part if out is None else g.add(out, part)
    out = g.reshape(out, (-1, channels))
    c.keep("tail", _last_rows(g, padded, size, count - 1, channels), "f32")
    return g.add(out, x) if c.args["residual"] else out


def finish(c: Call, y: Tensor) -> Tensor:
    """What an epilogue does to a product: a factor, a convolution of some columns, a sum, in this order."""
    if c.has("scale"):
        y = scale_by(c, y, "scale")
    if c.has("taps"):
        start, width = int(c.args.get("start", 0)), int(y.shape[1])
        channels = int(c.args["taps"].meta["type"].shape[0])
        mixed = short_conv(c, c.g.columns(y, 1, start, channels), "taps")
        mixed = mixed if c.args["level"] == 1 else c.g.times(mixed, c.args["level"])
        parts = [c.g.columns(y, 1, 0, start)] if start else []
        parts.append(mixed)
        if start + channels < width:
            parts.append(c.g.columns(y, 1, start + channels, width - start - channels))
        y = c.g.concat(parts, 1) if len(parts) > 1 else mixed
    return c.g.add(c.x("addend"), y) if c.has("addend") else y


LOWERINGS: dict[str, Lower] = {
    "embedding": _embedding,
    "bag_embedding": _bag_embedding,
    "rms_norm": lambda c: rms_norm(c, c.x("x")),
    "add_rms_norm": _add_rms_norm,
    "linear": lambda c: linear(c, c.x("x")),
    "linear_add": lambda c: finish(c, linear(c, c.x("x"))),
    "linear_conv_state": lambda c: finish(c, linear(c, c.x("x"))),
    "add": lambda c: c.g.add(c.x("a"), c.x("b")),
    "mul": lambda c: c.g.mul(c.x("a"), c.x("b")),
    "add_scaled": lambda c: c.g.add(c.x("a"), c.g.times(c.x("b"), c.args["alpha"])),
    "scale": lambda c: c.g.times(c.x("x"), c.args["alpha"]),
    "clamp": lambda c: c.g.activation("CLIP", c.x("x"), c.args["lo"], c.args["hi"]),
    "scale_by": lambda c: scale_by(c, c.x("x"), "s"),
    "add_row": _add_row,
    "silu": lambda c: silu(c.g, c.x("x")),
    "gelu": lambda c: c.g.activation("GELU_ERF", c.x("x")),
    "swiglu": lambda c: c.g.mul(silu(c.g, c.x("gate")), c.x("up")),
    "sigmoid": lambda c: c.g.activation("SIGMOID", c.x("x")),
    "softcap": lambda c: softcap(c.g, c.x("x"), c.args["cap"]),
    "modulate": _modulate,
    "columns": lambda c: c.g.columns(c.x("x"), 1, int(c.args["start"]), int(c.args["stop"]) - int(c.args["start"])),
    "reshape": lambda c: c.g.reshape(c.x("x"), (-1, int(c.args["cols"]))),
    "short_conv_state": lambda c: short_conv(c, c.x("x"), "weight"),
    "dynamic_conv_state": _dynamic_conv,
}

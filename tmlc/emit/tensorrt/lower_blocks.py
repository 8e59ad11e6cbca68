"""Work on the heads and blocks inside a row."""

from __future__ import annotations

from tmlc.emit.tensorrt.graph import Tensor
from tmlc.emit.tensorrt.lower_dense import rms
from tmlc.emit.tensorrt.network import Call, Lower
from tmlc.ir.program import role


def _heads(c: Call, x: Tensor, count: int) -> Tensor:
    return c.g.reshape(x, (-1, count, int(x.shape[1]) // count))


def _head_columns(c: Call) -> Tensor:
    heads, start, stop = (int(c.args[name]) for name in ("num_heads", "start", "stop"))
    return c.g.reshape(c.g.columns(_heads(c, c.x("x"), heads), 2, start, stop - start), (-1, heads * (stop - start)))


def _concat_heads(c: Call) -> Tensor:
    g, heads, shared = c.g, int(c.args["num_heads"]), int(c.args["shared"])
    parts = []
    for number, name in ((1, "a"), (2, "b")):
        part = _heads(c, c.x(name), 1 if shared == number else heads)
        if shared == number and heads > 1:
            part = g.concat([part] * heads, 1)
        parts.append(part)
    both = g.concat(parts, 2)
    return g.reshape(both, (-1, heads * int(both.shape[2])))


def _l2_clip(c: Call) -> Tensor:
    g, x, heads = c.g, c.x("x"), int(c.args["num_heads"])
    if c.has("scale"):
        x = g.mul(x, c.floats("scale", (1, -1)))
    parts = _heads(c, x, heads)
    length = g.unary("SQRT", g.reduce("SUM", g.mul(parts, parts), 2))
    factor = g.div(g.number(c.args["threshold"], length), g.plus(length, 1e-6))
    return g.reshape(g.mul(parts, g.minimum(factor, g.number(1.0, factor))), (-1, int(x.shape[1])))


def _mix_blocks(c: Call) -> Tensor:
    g, x, queries = c.g, c.x("x"), c.numpy("queries")
    d = queries.shape[-1]
    normed = rms(g, g.reshape(x, (-1, int(x.shape[1]) // d, d)), 2, c.args["eps"])
    keys = c.floats("queries", (1, -1, d))
    scores = g.times(g.matmul(keys, normed, transpose_b=True), d**-0.5)
    return g.reshape(g.matmul(g.softmax(scores, 2), normed), (-1, queries.size))


def _rope(c: Call) -> Tensor:
    g, x, heads, offset = c.g, c.x("x"), int(c.args["num_heads"]), int(c.args["offset"])
    half = c.numpy("inv_freq").size
    state = role(c.args["position"])[1]
    rows, _ = c.writer.positions(state)
    scaling = float(c.args["scaling"])

    def turn(kind: str) -> Tensor:
        def make() -> Tensor:
            angle = g.mul(g.cast(rows, "f32"), c.floats("inv_freq", (1, half)))
            turned = g.reshape(g.unary(kind, angle), (-1, 1, half, 1))
            return turned if scaling == 1 else g.times(turned, scaling)

        return g.once((kind, c.weight_name("inv_freq"), scaling), make)

    cos, sin = turn("COS"), turn("SIN")
    parts = _heads(c, x, heads)
    width = int(parts.shape[2])
    middle = g.columns(parts, 2, offset, 2 * half) if width != 2 * half else parts
    pairs = (-1, heads, half, 2) if c.args["interleaved"] else (-1, heads, 2, half)
    split = g.reshape(middle, pairs)
    if not c.args["interleaved"]:
        split = g.transpose(split, (0, 1, 3, 2))  # pairs last, in both forms
    a, b = g.columns(split, 3, 0, 1), g.columns(split, 3, 1, 1)
    both = g.concat([g.sub(g.mul(a, cos), g.mul(b, sin)), g.add(g.mul(b, cos), g.mul(a, sin))], 3)
    if not c.args["interleaved"]:
        both = g.transpose(both, (0, 1, 3, 2))
    both = g.reshape(both, (-1, heads, 2 * half))
    around = [g.columns(parts, 2, 0, offset)] if offset else []
    around.append(both)
    if offset + 2 * half < width:
        around.append(g.columns(parts, 2, offset + 2 * half, width - offset - 2 * half))
    whole = g.concat(around, 2) if len(around) > 1 else both
    return g.reshape(whole, (-1, heads * width))


LOWERINGS: dict[str, Lower] = {
    "head_columns": _head_columns,
    "concat_heads": _concat_heads,
    "concat_columns": lambda c: c.g.concat([c.x("a"), c.x("b")], 1),
    "l2_clip": _l2_clip,
    "mix_blocks": _mix_blocks,
    "rope_state": _rope,
}

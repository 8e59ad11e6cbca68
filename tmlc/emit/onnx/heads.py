"""Lowers work on the heads of a row, and the positions that rotary embeddings and attention share."""

from __future__ import annotations

from tmlc.emit.onnx.call import Call
from tmlc.emit.onnx.graph import INT_MAX


def first_position(c: Call) -> str:
    """The absolute position of the call's first row, int64 without dimensions."""
    position = c.states.read(c.args["position"])
    return c.g.op("Reshape", position, c.g.constant([], "i64"))


def positions(c: Call) -> str:
    """int64 [n]: the absolute positions of the call's rows."""
    return c.g.op("Add", c.upto(c.context.count), first_position(c))


def advance(c: Call) -> tuple[()]:
    state = c.args["position"]
    moved = c.g.op("Add", c.states.read(state), c.rows("x"), name=c.states.next_name(state))
    c.states.write(state, moved)
    return ()


def rope_state(c: Call) -> str:
    g, cols, heads = c.g, c.cols("x"), c.args["num_heads"]
    half, offset, width = c.cols("inv_freq"), c.args["offset"], cols // heads
    interleaved = c.args["interleaved"]
    angle = g.op("Mul", g.unsqueeze(g.cast(positions(c), "f32"), 1), g.unsqueeze(c.row("inv_freq"), 0))
    wide = g.cast(angle, "f64")  # large angles lose their digits in float32 sines
    scaling = g.f32(c.args["scaling"])
    cos, sin = (g.op("Mul", g.unsqueeze(g.cast(g.op(f, wide), "f32"), 1), scaling) for f in ("Cos", "Sin"))
    split = g.reshape(c.x("x"), 0, heads, width)
    turned = split if 2 * half == width else g.slice(split, offset, offset + 2 * half, 2)
    if interleaved:
        pairs = g.reshape(turned, 0, heads, half, 2)
        a, b = (g.squeeze(g.slice(pairs, i, i + 1, 3), 3) for i in (0, 1))
    else:
        a, b = g.slice(turned, 0, half, 2), g.slice(turned, half, 2 * half, 2)
    first = g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin))
    second = g.op("Add", g.op("Mul", b, cos), g.op("Mul", a, sin))
    if interleaved:
        both = g.reshape(g.concat([g.unsqueeze(first, 3), g.unsqueeze(second, 3)], 3), 0, heads, 2 * half)
        parts = [both]
    else:
        parts = [first, second]
    if offset:
        parts.insert(0, g.slice(split, 0, offset, 2))
    if offset + 2 * half < width:
        parts.append(g.slice(split, offset + 2 * half, INT_MAX, 2))
    return g.reshape(g.concat(parts, 2), 0, cols)


def head_columns(c: Call) -> str:
    g, heads, start, stop = c.g, c.args["num_heads"], c.args["start"], c.args["stop"]
    split = g.reshape(c.x("x"), 0, heads, c.cols("x") // heads)
    return g.reshape(g.slice(split, start, stop, 2), 0, heads * (stop - start))


def concat_heads(c: Call) -> str:
    g, heads, shared = c.g, c.args["num_heads"], c.args["shared"]
    parts, width = [], 0
    for name, alone in (("a", shared == 1), ("b", shared == 2)):
        cols = c.cols(name) if alone else c.cols(name) // heads
        split = g.reshape(c.x(name), 0, 1 if alone else heads, cols)
        parts.append(g.op("Expand", split, g.ints(1, heads, 1)) if alone and heads > 1 else split)
        width += cols
    return g.reshape(g.concat(parts, 2), 0, heads * width)

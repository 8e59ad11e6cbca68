"""Matchers of the dense ideas: embedding, linear, RMS norm, gated units, elementwise arithmetic, and views."""

from __future__ import annotations

from typing import Any

from torch import fx

from tmlc.frontend.foreign.graph import inputs_of, name_of, number, shape_of
from tmlc.frontend.foreign.lift import Lifter, Near, matcher
from tmlc.frontend.foreign.rows import ONE, N, Parts, Rows, Value
from tmlc.ir.dims import Dim
from tmlc.ir.ops import spec_of
from tmlc.ir.types import TensorType

_END = 1 << 62


@matcher("embedding")
def embedding(lift: Lifter, node: fx.Node) -> Value | None:
    table, ids = lift.param(node.args[0]), node.args[1]
    if table is None or not isinstance(ids, fx.Node) or ids.op != "placeholder":
        return None
    rows = lift.input("ids", TensorType("i64", (Dim(1), 1)))
    return Rows(lift.emit("embedding", lift.weight(table), rows), (ONE, N, 0), (table.shape[1],))


@matcher("linear")
def linear(lift: Lifter, node: fx.Node) -> Value | None:
    first, second, third = inputs_of(node, 3)
    x, weight, bias = lift.rows(first), lift.param(second), lift.param(third)
    if x is None or weight is None:
        return None
    if not x.matrix or not x.last:
        raise Near("its input is not one row a position")
    if third is not None and bias is None:
        raise Near("its bias is not a parameter")
    out = lift.emit("linear", x.node, lift.weight(weight), None if bias is None else lift.weight(bias))
    return x.with_columns(out, weight.shape[0])


@matcher("mul")
def rms_norm(lift: Lifter, node: fx.Node) -> Value | None:
    """weight · (x · rsqrt(mean(x², -1) + eps))"""
    for weight_node, normed in _both_ways(node):
        for x_node, root in _both_ways(normed) if name_of(normed) == "mul" else ():
            if name_of(root) != "rsqrt":
                continue
            x, weight = lift.rows(x_node), lift.param(weight_node)
            eps, squares = _mean_of_squares(root.args[0], x_node)
            if x is None:
                return None
            if not squares:
                raise Near("an rsqrt that is not of the mean of the squares of what it scales, over the last axis")
            if weight is None:
                raise Near("the weight of the norm is computed, not a parameter")
            if not x.last or not x.plain or weight.shape != x.dims[-1:]:
                raise Near(f"the norm's weight has shape {list(weight.shape)}, its groups are {x.dims[-1]} wide")
            return x.with_columns(lift.emit("rms_norm", x.node, lift.weight(weight), eps), x.dims[-1])
    return None


def _mean_of_squares(total: Any, x: fx.Node) -> tuple[float, bool]:
    """(eps, whether `total` is mean(x², -1, keepdim) + eps)."""
    if name_of(total) != "add" or number(total.args[1]) is None or name_of(total.args[0]) != "mean":
        return 0.0, False
    square, axes, kept = inputs_of(total.args[0], 3)
    squared = name_of(square) == "pow" and square.args[0] is x and square.args[1] == 2
    return float(total.args[1]), squared and list(axes) == [-1] and kept is True


@matcher("mul")
def swiglu(lift: Lifter, node: fx.Node) -> Value | None:
    """silu(gate) · up"""
    for activated, other in _both_ways(node):
        if name_of(activated) != "silu":
            continue
        gate, up = lift.rows(activated.args[0]), lift.rows(other)
        if gate is not None and up is not None and gate.matrix and up.matrix and gate.dims == up.dims:
            return gate.with_columns(lift.emit("swiglu", gate.node, up.node), gate.dims[-1])
    return None


@matcher("silu", "gelu")
def activation(lift: Lifter, node: fx.Node) -> Value | None:
    x = lift.rows(node.args[0])
    if x is None or not x.matrix:
        return None
    if name_of(node) == "gelu" and node.kwargs.get("approximate", "none") != "none":
        raise Near("the tanh form of gelu is not an op of the IR")
    return x.with_columns(lift.emit(name_of(node), x.node), x.dims[-1])


@matcher("clamp")
def clamp(lift: Lifter, node: fx.Node) -> Value | None:
    x, (_, low, high) = lift.rows(node.args[0]), inputs_of(node, 3)
    if x is None or not x.matrix:
        return None
    lo, hi = number(low), number(high)
    if lo is None or hi is None:
        raise Near(f"a clamp to {low}..{high}, where the IR has two numbers")
    return x.with_columns(lift.emit("clamp", x.node, lo, hi), x.dims[-1])


@matcher("add", "mul")
def arithmetic(lift: Lifter, node: fx.Node) -> Value | None:
    first, second = inputs_of(node, 2)
    a, b, factor = lift.rows(first), lift.rows(second), number(second)
    if a is not None and factor is not None and name_of(node) == "mul" and a.plain:
        return a.with_columns(lift.emit("scale", a.node, factor), a.dims[-1])
    if a is None or b is None:
        return None
    if node.kwargs.get("alpha", 1) != 1 or a.dims != b.dims or not (a.matrix and b.matrix):
        raise Near("its operands do not lie over each other row by row")
    if name_of(node) == "mul" and (_activated(a.node) or _activated(b.node)):
        raise Near("a product with a silu that is not silu(gate)·up: its parts would run one by one")
    longer = a if len(a.axes) >= len(b.axes) else b
    return longer.with_columns(lift.emit(name_of(node), a.node, b.node), a.dims[-1])


def _activated(node: fx.Node) -> bool:
    """Whether a value of the IR is a silu, scaled or clamped."""
    while (spec := spec_of(node.target)) is not None and spec.name in ("scale", "clamp"):
        node = node.all_input_nodes[0]
    return spec is not None and spec.name == "silu"


@matcher("reshape", "flatten")
def reshape(lift: Lifter, node: fx.Node) -> Value | None:
    x = lift.rows(node.args[0])
    return None if x is None else x.reshape(shape_of(node), lift.symbol)


@matcher("transpose", "permute")
def permute(lift: Lifter, node: fx.Node) -> Value | None:
    x = lift.rows(node.args[0])
    if x is None:
        return None
    rank = len(x.axes)
    order, (_, first, second) = list(range(rank)), inputs_of(node, 3)
    if name_of(node) == "permute":
        return x.permute([axis % rank for axis in first])
    order[first % rank], order[second % rank] = second % rank, first % rank
    return x.permute(order)


@matcher("unsqueeze", "squeeze")
def unit_axis(lift: Lifter, node: fx.Node) -> Value | None:
    x, at = lift.rows(node.args[0]), inputs_of(node, 2)[1]
    if x is None or not isinstance(at, int):
        return None
    axes = list(x.axes)
    if name_of(node) == "unsqueeze":
        axes.insert(at % (len(axes) + 1), ONE)
    elif axes[at] == ONE:
        del axes[at]
    else:
        return None
    return Rows(x.node, tuple(axes), x.dims, x.group, x.swizzle)


@matcher("expand")
def expand(lift: Lifter, node: fx.Node) -> Value | None:
    x, shape = lift.rows(node.args[0]), shape_of(node)
    return x.expand(shape) if x is not None and len(shape) == len(x.axes) else None


@matcher("slice")
def cut(lift: Lifter, node: fx.Node) -> Value | None:
    x, axis = lift.rows(node.args[0]), inputs_of(node, 2)[1]
    if x is None or axis not in (-1, len(x.axes) - 1) or not x.last:
        return None
    start, stop, step = bounds(node, x.dims[-1])
    return columns(lift, x, start, stop) if step == 1 and x.plain and start < stop else None


def bounds(node: fx.Node, size: int) -> tuple[int, int, int]:
    """(start, stop, step) of a slice of an axis of the given size."""
    start, stop, step = inputs_of(node, 5)[2:]
    return slice(start or 0, _END if stop is None else stop, step or 1).indices(size)


def columns(lift: Lifter, x: Rows, start: int, stop: int) -> Rows:
    """Columns start..stop of the last feature axis, in every head."""
    if (start, stop) == (0, x.dims[-1]):
        return x
    if len(x.dims) == 1:
        out = x.with_columns(lift.emit("columns", x.node, start, stop), stop - start)
    else:
        out = x.with_columns(lift.emit("head_columns", x.node, x.heads, start, stop), stop - start)
    lift.pieces[out.node] = (x, start, stop, None)
    return out


@matcher("split_with_sizes", "split", "chunk")
def split(lift: Lifter, node: fx.Node) -> Value | None:
    x, how, axis = lift.rows(node.args[0]), node.args[1], inputs_of(node, 3)[2] or 0
    if x is None or axis not in (-1, len(x.axes) - 1) or not x.last or not x.plain:
        return None
    results = node.meta["val"]
    parts, at = [], 0
    for result in results:
        parts.append(columns(lift, x, at, at + int(result.shape[-1])))
        at += int(result.shape[-1])
    return Parts(tuple(parts)) if how is not None and at == x.dims[-1] else None


@matcher("getitem")
def getitem(lift: Lifter, node: fx.Node) -> Value | None:
    return lift.part(*inputs_of(node, 2))


@matcher("cat")
def concat_heads(lift: Lifter, node: fx.Node) -> Value | None:
    """Columns of every head side by side: parts of one projection, or a part that all heads share."""
    nodes, axis = node.args[0], inputs_of(node, 2)[1] or 0
    found = [lift.rows(part) for part in nodes]  # type: ignore[union-attr]
    if len(found) != 2 or axis not in (-1, len(shape_of(node)) - 1):
        return None
    a, b = found
    if a is None or b is None or not a.last or not b.last:
        return None
    whole = _rejoined(lift, a, b)
    if whole is not None:
        return whole
    shared = [rows.group > 1 and len(rows.dims) == 1 for rows in (a, b)]
    if shared[0] and shared[1]:
        return None
    full = b if shared[0] else a
    heads = full.heads
    width = a.dims[-1] + b.dims[-1]
    for rows, one in zip((a, b), shared, strict=True):
        if (rows.group != heads) if one else (rows.group != 1 or rows.axes != full.axes or rows.heads != heads):
            raise Near(f"heads of different layout are joined: {rows.axes} beside {full.axes}")
    if a.swizzle and b.swizzle:
        raise Near("two rotated parts are joined")
    out = lift.emit("concat_heads", a.node, b.node, heads, 1 if shared[0] else 2 if shared[1] else 0)
    swizzle = a.swizzle or (b.swizzle and (b.swizzle[0] + a.dims[-1], b.swizzle[1])) or None
    return Rows(out, full.axes, (*full.dims[:-1], width), 1, swizzle)


def _rejoined(lift: Lifter, a: Rows, b: Rows) -> Rows | None:
    """[columns 0..s of x, columns s.. of x] with one of them rotated: the rotation alone, over a part of x's heads."""
    left, right = lift.pieces.get(a.node), lift.pieces.get(b.node)
    if left is None or right is None or left[0].node is not right[0].node or a.axes != b.axes or a.group != b.group:
        return None
    x = left[0]
    if left[1] != 0 or left[2] != right[1] or right[2] != x.dims[-1] or (left[3] is None) == (right[3] is None):
        return None
    (_, start, _, turned), part = (left, a) if left[3] is not None else (right, b)
    assert turned is not None
    inv_freq, interleaved, scaling = turned
    node = lift.emit("rope", x.node, inv_freq, x.heads, start, interleaved, scaling)
    swizzle = part.swizzle and (part.swizzle[0] + start, part.swizzle[1])
    return Rows(node, a.axes, x.dims, a.group, swizzle)


def _both_ways(node: Any) -> tuple[tuple[Any, Any], ...]:
    a, b = inputs_of(node, 2)
    return ((a, b), (b, a))

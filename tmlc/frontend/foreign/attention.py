"""Matchers of rotary positions and of attention: grouped heads, masks and windows, sink logits, soft caps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from tmlc.frontend.foreign.dense import bounds
from tmlc.frontend.foreign.graph import inputs_of, name_of, number, shape_of, under
from tmlc.frontend.foreign.lift import Lifter, Near, matcher
from tmlc.frontend.foreign.positions import Angles
from tmlc.frontend.foreign.rows import N, Param, Rows, Value


@matcher("add")
def rope_by_halves(lift: Lifter, node: fx.Node) -> Value | None:
    """x·cos + [-x₂, x₁]·sin"""
    for first, second in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        straight, turned = _times_angle(lift, first), _times_angle(lift, second)
        if straight is None or turned is None or name_of(turned[0]) != "cat":
            continue
        x, (negative, positive) = straight[0], turned[0].args[0]
        parts = [_part(under(negative, "neg")), _part(positive)]
        cos, sin = straight[1], turned[1]
        if (cos.function, sin.function, cos.layout, sin.layout) != ("cos", "sin", "halves", "halves"):
            raise Near(f"x times {cos.function} ({cos.layout}) plus its other half times {sin.function} ({sin.layout})")
        half = _width(x) // 2
        if parts != [(x, half, 2 * half, 1), (x, 0, half, 1)]:
            raise Near("what the sine multiplies is not [-second half, first half]")
        return _rope(lift, x, cos, sin, False)
    return None


@matcher("cat")
def rope_by_pairs(lift: Lifter, node: fx.Node) -> Value | None:
    """[a·cos - b·sin, b·cos + a·sin], a and b being halves of x or its even and odd columns"""
    parts = node.args[0]
    if len(parts) != 2 or name_of(parts[0]) != "sub" or name_of(parts[1]) != "add":  # type: ignore[arg-type, index]
        return None
    terms = [_times_angle(lift, term) for part in parts for term in part.args[:2]]  # type: ignore[union-attr]
    if any(term is None for term in terms):
        return None
    (a, cos), (b, sin), (b_too, cos_too), (a_too, sin_too) = (term for term in terms if term is not None)
    if cos.function == "sin" or (a, b, cos, sin) != (a_too, b_too, cos_too, sin_too) or cos.layout != "half":
        raise Near("the two rotated parts do not turn the same pair by the same angle")
    first, second = _part(a), _part(b)
    if first is None or second is None or first[0] is not second[0]:
        raise Near("the pair that is turned is not two parts of one value")
    x, width = first[0], _width(first[0])
    if (first[1:], second[1:]) == ((0, width // 2, 1), (width // 2, width, 1)):
        return _rope(lift, x, cos, sin, False)
    if (first[1:], second[1:]) == ((0, width, 2), (1, width, 2)):
        return _rope(lift, x, cos, sin, True)
    raise Near(f"the pair that is turned is {first[1:]} and {second[1:]} of {width} columns")


def _rope(lift: Lifter, node: fx.Node, cos: Angles, sin: Angles, interleaved: bool) -> Value | None:
    x = lift.rows(node)
    if x is None:
        return None
    if (cos.function, sin.function) != ("cos", "sin") or cos.inv_freq != sin.inv_freq:
        raise Near("cosine and sine are of different angles")
    if abs(cos.scaling - sin.scaling) > 1e-5 * abs(cos.scaling):
        raise Near(f"cosine and sine are scaled differently, {cos.scaling} and {sin.scaling}")
    if not x.last or not x.plain or x.axes[-2:] != (N, len(x.dims) - 1):
        raise Near("the axes of what is rotated are not [..., positions, columns of a head]")
    turn = (lift.constant(cos.inv_freq), interleaved, round(cos.scaling, 7))
    out = lift.emit("rope", x.node, turn[0], x.heads, 0, *turn[1:])
    if x.node in lift.pieces:
        source, start, stop, _ = lift.pieces[x.node]
        lift.pieces[out] = (source, start, stop, turn)
    return Rows(out, x.axes, x.dims, x.group, (0, x.dims[-1]) if interleaved else None)


def _times_angle(lift: Lifter, node: Any) -> tuple[Any, Angles] | None:
    """(x, cos or sin) of a product of the two."""
    if name_of(node) != "mul":
        return None
    for x, factor in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if isinstance(x, fx.Node) and x not in lift.positions and factor in lift.positions:
            try:
                return x, lift.positions.angles(factor)
            except ValueError as error:
                raise Near(f"what multiplies it is no rotary factor: {error}") from None
    return None


def _width(node: fx.Node) -> int:
    return int(shape_of(node)[-1])


def _part(node: Any) -> tuple[fx.Node, int, int, int] | None:
    """(whole, start, stop, step) of a value that is a part of another's last axis."""
    if name_of(node) == "slice" and node.args[1] in (-1, len(shape_of(node)) - 1):
        return (node.args[0], *bounds(node, _width(node.args[0])))
    if name_of(node) == "getitem" and name_of(node.args[0]) in ("chunk", "split_with_sizes", "split"):
        whole, index = node.args
        if inputs_of(whole, 3)[2] in (-1, len(shape_of(node)) - 1):
            sizes = [int(part.shape[-1]) for part in whole.meta["val"]]
            start = sum(sizes[:index])
            return whole.args[0], start, start + sizes[index], 1
    return None


@matcher("matmul")
def attention(lift: Lifter, node: fx.Node) -> Value | None:
    """softmax(q·kᵀ·scale + mask) · v, with or without one more score a head in the softmax"""
    probabilities, value = inputs_of(node, 2)
    cut = name_of(probabilities) == "slice" and _part_is_all_but_last(probabilities)
    softmax = probabilities.args[0] if cut else probabilities
    if name_of(softmax) != "softmax":
        return None
    if inputs_of(softmax, 2)[1] not in (-1, len(shape_of(softmax)) - 1):
        raise Near("the softmax is not over the keys")
    scores, sink = _without_sink(lift, softmax.args[0])
    if cut != (sink is not None):
        raise Near("the softmax has a column that is not one sink logit a head")
    found = _scores(lift, scores)
    q, k, v = lift.rows(found.q), lift.rows(found.k), lift.rows(value)
    if q is None or k is None or v is None:
        return None
    k = k.permute([*range(len(k.axes) - 2), len(k.axes) - 1, len(k.axes) - 2])
    heads = q.heads
    for rows, what in ((q, "queries"), (k, "keys"), (v, "values")):
        if not rows.last or rows.axes[-2] != N or rows.heads * rows.group != heads or len(rows.dims) > 2:
            raise Near(f"the axes of its {what} are {rows.axes}, not [1, heads, positions, columns]")
    if q.group != 1 or k.group != v.group or q.swizzle != k.swizzle or v.swizzle is not None:
        raise Near("queries, keys and values are not grouped or rotated alike")
    sinks = None if sink is None else lift.weight(sink)
    rest = (heads, k.heads, found.scale, found.window, 0, 0.0, 0.0, sinks, found.softcap)
    out = lift.emit("attention", q.node, k.node, v.node, None, None, *rest)
    return Rows(out, q.axes, (*q.dims[:-1], v.dims[-1]))


@dataclass
class _Scores:
    q: Any
    k: Any
    scale: float = 1.0
    window: int = 0
    softcap: float = 0.0


def _scores(lift: Lifter, node: Any) -> _Scores:
    """What is between the softmax and q·kᵀ: the mask outside, then a soft cap, then the scale."""
    window, softcap, scale = None, 0.0, 1.0
    if name_of(node) == "add" and node.args[1] in lift.positions:
        try:
            window = lift.positions.window(node.args[1])
        except ValueError as error:
            raise Near(f"its mask was not understood: {error}") from None
        node = node.args[0]
    if window is None:
        raise Near("no causal mask is added to its scores")
    while name_of(node) != "matmul":
        factor = number(inputs_of(node, 2)[1]) if name_of(node) in ("mul", "div") else None
        if factor is None or (softcap and name_of(node.args[0]) == "tanh"):
            raise Near(f"its scores go through {name_of(node) or node}, which is no scale and no soft cap")
        inner = node.args[0]
        if name_of(inner) == "tanh" and name_of(node) == "mul" and scale == 1.0:
            inner = inner.args[0]
            if name_of(inner) != "div" or number(inner.args[1]) != factor:
                raise Near("the soft cap divides by another number than it multiplies with")
            softcap, node = factor, inner.args[0]
            continue
        scale, node = scale * (factor if name_of(node) == "mul" else 1.0 / factor), inner
    return _Scores(node.args[0], node.args[1], scale, window, softcap)


def _without_sink(lift: Lifter, scores: Any) -> tuple[Any, Param | None]:
    """(scores, sink logits) of [scores, sink logit of the head], with or without the row's maximum subtracted."""
    if name_of(scores) == "sub" and name_of(scores.args[1]) == "getitem":
        most, last = scores.args[1].args[0], len(shape_of(scores)) - 1
        if under(most, "max") is scores.args[0] and most.args[1] in (-1, last):
            scores = scores.args[0]
    if name_of(scores) != "cat" or len(scores.args[0]) != 2:
        return scores, None
    plain, sink = scores.args[0]
    shape = shape_of(sink)
    if name_of(sink) == "expand":
        sink = sink.args[0]
    param = lift.param(under(sink, "reshape"))
    if param is None or len(shape) != 4 or shape[3] != 1 or shape[1] != param.shape[0] or len(param.shape) != 1:
        raise Near("what is put beside the scores is not one parameter a head")
    return plain, param


def _part_is_all_but_last(node: fx.Node) -> bool:
    _, axis, start, stop = inputs_of(node, 4)
    return axis in (-1, len(shape_of(node)) - 1) and start in (0, None) and stop == -1



"""Attention over caches that stay where they are: a key-value cache update, a mask from positions, and the product.

A ring is written by the same contiguous update as a linear cache. The runtime cuts a call where it would pass from the
last index to the first of the ring, so every update is one run of indices.

The cache update takes floats only. Caches of int8 codes are written by a scatter instead: they and their scales are
states like any other, an input and an output at two addresses.
"""

from __future__ import annotations

import numpy as np

from tmlc.emit.tensorrt.graph import Graph, Tensor
from tmlc.emit.tensorrt.lower_dense import softcap
from tmlc.emit.tensorrt.network import SCALE, Call, Lower
from tmlc.ir.program import role, type_of
from tmlc.ir.types import QUANTISED

HIDDEN = {"f16": -30000.0, "bf16": -1e30, "f32": -1e30}  # added to a score that nobody may see
FAR = 2**30  # the position of what was never written
FINITE = float(np.finfo(np.float32).max)
TINY = 1e-30  # a head of a cache of codes whose numbers are all smaller is zero (tmlc/ir/ops/kv.py)


def write_index(g: Graph, first: Tensor, capacity: int, sinks: int, ring: bool) -> Tensor:
    """int32 [1]: where the first new position [1, 1] goes."""
    if not ring:
        return g.reshape(first, (1,))
    size = capacity - sinks
    turned = g.sub(first, g.number(sinks, first))
    rest = g.sub(turned, g.times(g.floor_div(turned, g.number(size, turned)), size))
    at = g.select(g.less(first, g.number(capacity, first)), first, g.plus(rest, sinks))
    return g.reshape(at, (1,))


def key_positions(g: Graph, end: Tensor | None, capacity: int, sinks: int, ring: bool) -> Tensor:
    """int32 [1, C]: the position that each index holds once the call has written; FAR where that is none."""
    index = g.integers(np.arange(capacity)[None])
    if not ring:
        return index
    size = capacity - sinks
    # Whole turns are added so that no number is negative: rounding of quotients then means the same everywhere.
    behind = g.plus(g.sub(end, index), size * -(-capacity // size))
    behind = g.sub(behind, g.times(g.floor_div(behind, g.number(size, behind)), size))
    held = g.sub(end, behind)
    written = g.select(g.less(held, g.number(sinks, held)), g.number(FAR, held), held)
    if not sinks:
        return written
    return g.select(g.less(index, g.number(sinks, index)), index, written)


def _visible(
    c: Call, rows: Tensor, end: Tensor | None, capacity: int, window: int, sinks: int
) -> tuple[Tensor, Tensor]:
    """(distance int32 [n, C], visible bool [n, C]): the same for all layers of one shape."""
    g = c.g

    def make() -> tuple[Tensor, Tensor]:
        keys = key_positions(g, end, capacity, sinks, window > 0)
        distance = g.sub(rows, keys)
        seen = g.greater(distance, g.number(-1, distance))
        if window > 0:
            near = g.less(distance, g.number(window, distance))
            if sinks:
                near = g.either(near, g.less(keys, g.number(sinks, keys)))
            seen = g.both(seen, near)
        return distance, seen

    return g.once(("visible", capacity, window, sinks), make)


def _tau(c: Call, rows: Tensor) -> Tensor | None:
    """float32 [n, 1]: the factor of scores that grows with the position."""
    floor, alpha, g = float(c.args["log_floor"]), float(c.args["log_alpha"]), c.g
    if floor <= 0:
        return None

    def make() -> Tensor:
        ratio = g.times(g.plus(g.cast(rows, "f32"), 1.0), 1.0 / floor)
        grown = g.unary("LOG", g.maximum(ratio, g.number(1.0, ratio)))
        return g.plus(g.times(grown, alpha), 1.0)

    return g.once(("tau", floor, alpha), make)


def _bias(c: Call, distance: Tensor, tau: Tensor | None) -> Tensor:
    """float32 [H, n, C]: the learned bias of each distance, zero beyond the table."""
    g, heads = c.g, int(c.args["num_heads"])
    ranks, extent = (int(size) for size in c.args["rel_table"].meta["type"].shape)
    table = c.floats("rel_table", (ranks, extent))
    rel = g.reshape(c.x("rel"), (-1, ranks))
    if tau is not None:
        rel = g.reshape(g.mul(g.reshape(rel, (-1, heads, ranks)), g.reshape(tau, (-1, 1, 1))), (-1, ranks))
    by_distance = g.reshape(g.matmul(rel, table), (-1, heads, extent), after=(0, 2, 1))

    def make() -> tuple[Tensor, Tensor]:
        inside = g.minimum(g.maximum(distance, g.number(0, distance)), g.number(extent - 1, distance))
        return inside, g.reshape(g.less(distance, g.number(extent, distance)), (1, -1, int(distance.shape[1])))

    inside, reached = g.once(("inside", distance.name, extent), make)
    picked = g.transpose(g.gather(by_distance, inside, 1, batch=1), (2, 0, 1))
    return g.select(reached, picked, g.number(0.0, picked))


def _attention(c: Call) -> Tensor:
    g, heads, groups = c.g, int(c.args["num_heads"]), int(c.args["num_kv_heads"])
    window, sinks = int(c.args["window"]), int(c.args["sinks"]) if c.args["window"] else 0
    held = c.args["k_cache"].meta["type"]
    coded, capacity = held.dtype == "u8", int(held.shape[0])
    dtype = _product_type(c) if coded else held.dtype
    rows, end = c.writer.positions(role(c.args["position"])[1], end=window > 0)
    if window:
        c.writer.rings.add((capacity, sinks))
    first = g.once("first", lambda: g.window(rows, (0, 0), (1, 1)))
    at = g.once(("at", capacity, sinks, window > 0), lambda: write_index(g, first, capacity, sinks, window > 0))
    caches = []
    for name in "kv":
        width = int(c.args[name].meta["type"].cols) // groups
        if coded:
            index = g.once(("index", at.name), lambda: g.add(g.sub(rows, first), g.reshape(at, (1, 1))))
            caches.append(_coded_cache(c, name, groups, width, index, dtype))
            continue
        cache = c.state(f"{name}_cache", dtype, (1, groups, capacity, width), cache=True)
        new = g.reshape(g.cast(c.x(name), dtype), (1, -1, groups, width), after=(0, 2, 1, 3))
        caches.append(g.cache_update(cache, new, at, f"next.{role(c.args[f'{name}_cache'])[1]}"))
        c.keep(f"{name}_cache", caches[-1], dtype, cache=True)
    distance, seen = _visible(c, rows, end, capacity, window, sinks)
    tau = _tau(c, rows)
    q = g.times(c.x("q"), c.args["scale"])
    q = g.cast(q if tau is None else g.mul(q, tau), dtype)
    bias = _bias(c, distance, tau) if c.has("rel") else None
    width = int(q.shape[1]) // heads
    if c.has("sink_logits") or c.args["softcap"] > 0 or int(caches[1].shape[3]) != width:
        out = _by_hand(c, g.reshape(q, (-1, heads, width), after=(1, 0, 2)), caches, bias, seen, dtype)
    else:
        mask = _mask(c, bias, seen, dtype, capacity)
        turned = g.reshape(q, (1, -1, heads, width), after=(0, 2, 1, 3))
        wide = g.attention(turned, caches[0], caches[1], mask)
        out = g.reshape(wide, (-1, heads * width), before=(0, 2, 1, 3))
    return g.cast(out, "f32")


def _product_type(c: Call) -> str:
    """What products of this program are computed in: keys and values of codes come out in it."""
    dtypes = {type_of(node).dtype for node in c.writer.method.placeholders("weight")}
    return "bf16" if "bf16" in dtypes else "f16" if dtypes & {"f16", *QUANTISED} else "f32"


def _coded_cache(c: Call, name: str, groups: int, width: int, index: Tensor, dtype: str) -> Tensor:
    """The cache [1, G, C, D] after the new rows were written at `index` int32 [n, 1]: codes int8 [C, G·D] and a float32
    scale for each head of a row [C, G], rounded as tmlc/ir/ops/kv.py says (codes here without its 128)."""
    g, state = c.g, f"{name}_cache"
    capacity = int(c.args[state].meta["type"].shape[0])
    x = g.reshape(g.cast(c.x(name), "f32"), (-1, groups, width))
    peak = g.reduce("MAX", g.unary("ABS", x), 2)
    least, usable = g.less(peak, g.number(TINY, peak)), g.less(peak, g.number(FINITE, peak))
    flat = g.either(least, g.unary("NOT", usable))
    inverse = g.div(g.number(127.0, peak), g.select(flat, g.number(1.0, peak), peak))
    whole = g.unary("ROUND", g.mul(x, inverse))
    codes = g.cast(g.select(flat, g.number(0.0, whole), whole), "i8")
    scale = g.select(least, g.number(0.0, peak), g.times(peak, 1.0 / 127.0))
    scale = g.select(usable, scale, g.number(float("nan"), scale))
    held = []
    for part, rows, columns in (("", codes, groups * width), (SCALE, scale, groups)):
        kind = "f32" if part else "i8"
        old = c.state(state, kind, (capacity, columns), part=part)
        held.append(g.scatter_rows(old, index, g.reshape(rows, (-1, columns))))
        c.keep(state, held[-1], kind, part=part)
    wide = g.dequantize(held[0], held[1], "f32")
    return g.reshape(g.cast(wide, dtype), (1, capacity, groups, width), after=(0, 2, 1, 3))


def _mask(c: Call, bias: Tensor | None, seen: Tensor, dtype: str, capacity: int) -> Tensor:
    """What is added to scores: [1, 1 or H, n, C], the bias where a key is visible."""
    g = c.g

    three = g.once(("three", seen.name), lambda: g.reshape(seen, (1, -1, capacity)))
    if bias is not None:
        shut = g.select(three, bias, g.number(HIDDEN[dtype], bias))
        return g.reshape(g.cast(shut, dtype), (1, int(bias.shape[0]), -1, capacity))

    def plain() -> Tensor:
        zero = g.floats(np.zeros((1, 1, 1)))
        shut = g.select(three, zero, g.number(HIDDEN[dtype], zero))
        return g.reshape(g.cast(shut, dtype), (1, 1, -1, capacity))

    return g.once(("mask", seen.name, dtype), plain)


def _by_hand(c: Call, q: Tensor, caches: list[Tensor], bias: Tensor | None, seen: Tensor, dtype: str) -> Tensor:
    """Attention that TensorRT has no layer for: soft-capped scores, sinks in the denominator, narrower values.
    q [H, n, D] → [n, H·Dv]."""
    g, heads, groups = c.g, int(c.args["num_heads"]), int(c.args["num_kv_heads"])
    capacity, width, v_width = int(caches[0].shape[2]), int(caches[0].shape[3]), int(caches[1].shape[3])
    keys, values = (g.reshape(t, (groups, capacity, int(t.shape[3]))) for t in caches)
    scores = g.matmul(g.reshape(q, (groups, -1, width)), keys, transpose_b=True)
    scores = g.reshape(g.cast(scores, "f32"), (heads, -1, capacity))
    if bias is not None:
        scores = g.add(scores, bias)
    if c.args["softcap"] > 0:
        scores = softcap(g, scores, c.args["softcap"])
    three = g.once(("three", seen.name), lambda: g.reshape(seen, (1, -1, capacity)))
    scores = g.select(three, scores, g.number(HIDDEN["f32"], scores))
    most = g.reduce("MAX", scores, 2)
    sink = None
    if c.has("sink_logits"):
        if c.is_weight("sink_logits"):
            sink = c.floats("sink_logits", (heads, 1, 1))
        else:
            sink = g.reshape(c.x("sink_logits"), (-1, heads, 1), after=(1, 0, 2))
        most = g.maximum(most, sink)
    weights = g.unary("EXP", g.sub(scores, most))
    total = g.reduce("SUM", weights, 2)
    if sink is not None:
        total = g.add(total, g.unary("EXP", g.sub(sink, most)))
    shares = g.cast(g.div(weights, total), dtype)
    out = g.matmul(g.reshape(shares, (groups, -1, capacity)), values)
    out = g.reshape(out, (heads, -1, v_width), after=(1, 0, 2))
    return g.reshape(out, (-1, heads * v_width))


def _advance(c: Call) -> None:
    """Counting is the runtime's: it knows n before the call, and refuses what has no room."""
    c.writer.position = role(c.args["position"])[1]
    c.writer.context = int(c.args["limit"])


LOWERINGS: dict[str, Lower] = {"attention_state": _attention, "advance": _advance}

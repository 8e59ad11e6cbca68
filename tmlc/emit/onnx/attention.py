"""Lowers attention over a cache (linear, or sinks and a ring) and the convolutions that keep a tail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tmlc.emit.onnx.call import Call
from tmlc.emit.onnx.dense import capped
from tmlc.emit.onnx.graph import INT_MAX
from tmlc.emit.onnx.heads import first_position, positions

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Cache:
    """One cache of a call: what a row of it holds for each kv head."""

    kv_heads: int
    capacity: int
    width: int
    dtype: str


def attention_state(c: Call) -> str:
    g, heads, kv_heads = c.g, c.args["num_heads"], c.args["num_kv_heads"]
    group, width = heads // kv_heads, c.cols("q") // heads
    stored = c.type("k_cache")
    capacity = int(stored.shape[0])
    keys, values = (
        _held(c, name, Cache(kv_heads, capacity, c.cols(name) // kv_heads, stored.dtype)) for name in ("k", "v")
    )
    rounded = stored.dtype == "bf16"
    distance, visible = _visible(c, capacity)

    q = g.transpose(g.reshape(c.x("q"), 0, kv_heads, group, width), 1, 2, 0, 3)  # [G, H/G, n, D]
    tau = _tau(c)
    unit = 1.0 if c.args["softcap"] > 0 or not rounded else LOG2_E
    if rounded:
        factor = g.f32(c.args["scale"] * unit)
        q = _to_bf16(c, g.op("Mul", q, factor if tau is None else g.op("Mul", tau, factor)))
    else:
        q = q if tau is None else g.op("Mul", q, tau)
    merged = g.reshape(q, kv_heads, -1, width)
    scores = g.op("MatMul", merged, g.transpose(keys, 0, 2, 1))  # [G, H/G·n, held]
    if rounded:
        scores = scores if unit == 1.0 else g.op("Div", scores, g.f32(unit))
    else:
        scores = g.op("Mul", scores, g.f32(c.args["scale"]))
    rows = g.op("Reshape", scores, _by_head(c, heads))  # [H, n, held]
    if c.has("rel"):
        rows = g.op("Add", rows, _bias(c, distance, tau))
    if c.args["softcap"] > 0:
        rows = capped(g, rows, c.args["softcap"])
    rows = g.op("Add", rows, g.op("Where", visible, g.f32(0.0), g.f32(-math.inf)))
    shares = _shares(c, rows, rounded)
    mixed = g.op("MatMul", g.op("Reshape", shares, _by_kv_head(c, kv_heads)), values)  # [G, H/G·n, Dv]
    out = c.cols("v") // kv_heads
    apart = g.op("Reshape", mixed, g.concat([g.ints(kv_heads, group), c.context.count, g.ints(out)], 0))
    return g.reshape(g.transpose(apart, 2, 0, 1, 3), 0, heads * out)


def _by_head(c: Call, heads: int) -> str:
    return c.g.concat([c.g.ints(heads), c.context.count, c.g.ints(-1)], 0)


def _by_kv_head(c: Call, kv_heads: int) -> str:
    g = c.g
    rows = g.op("Mul", c.context.count, g.ints(c.args["num_heads"] // kv_heads))
    return g.concat([g.ints(kv_heads), rows, g.ints(-1)], 0)


def _tau(c: Call) -> str | None:
    """float32 [n, 1]: the factor by which scores grow with their position; None where there is none."""
    g = c.g
    if c.args["log_floor"] <= 0:
        return None
    place = g.cast(g.op("Add", positions(c), g.constant(1, "i64")), "f32")
    over = g.op("Max", g.op("Div", place, g.f32(c.args["log_floor"])), g.f32(1.0))
    grown = g.op("Add", g.op("Mul", g.op("Log", over), g.f32(c.args["log_alpha"])), g.f32(1.0))
    return g.unsqueeze(grown, 1)


def _last(c: Call) -> str:
    """The absolute position of the call's last row, int64 [1]."""
    end = c.g.op("Add", c.g.unsqueeze(first_position(c), 0), c.context.count)
    return c.g.op("Sub", end, c.g.ints(1))


def _held_rows(c: Call, capacity: int) -> str:
    """How many rows of the cache hold a position after the update, int64 [1]. Rows fill in order before any is
    used again."""
    return c.g.op("Min", c.g.op("Add", _last(c), c.g.ints(1)), c.g.ints(capacity))


def _ring(c: Call, capacity: int) -> tuple[int, int]:
    """(sinks, rows of the ring); no ring where the window is 0."""
    sinks = c.args["sinks"] if c.args["window"] else 0
    return sinks, capacity - sinks if c.args["window"] else 0


def _cache_rows(c: Call, capacity: int) -> str:
    """int64 [n]: the cache row of each new position."""
    g, new = c.g, positions(c)
    sinks, ring = _ring(c, capacity)
    if not ring:
        return new
    first = g.constant(sinks, "i64")
    turned = g.op("Add", g.op("Mod", g.op("Sub", new, first), g.constant(ring, "i64")), first)
    return g.op("Where", g.op("Less", new, first), new, turned) if sinks else turned


def _visible(c: Call, capacity: int) -> tuple[str, str]:
    """(distance int64 [n, held] from each query to each held key, which of them it sees)."""
    g, row = c.g, c.upto(_held_rows(c, capacity))
    sinks, ring = _ring(c, capacity)
    held = row
    if ring:  # the newest position that has this row
        back = g.op("Mod", g.op("Sub", _last(c), row), g.constant(ring, "i64"))
        held = g.op("Sub", _last(c), back)
        if sinks:
            held = g.op("Where", g.op("Less", row, g.constant(sinks, "i64")), row, held)
    held = g.unsqueeze(held, 0)
    distance = g.op("Sub", g.unsqueeze(positions(c), 1), held)
    seen = g.op("GreaterOrEqual", distance, g.constant(0, "i64"))
    if c.args["window"]:
        near = g.op("Less", distance, g.constant(c.args["window"], "i64"))
        if sinks:
            near = g.op("Or", near, g.op("Less", held, g.constant(sinks, "i64")))
        seen = g.op("And", seen, near)
    return distance, seen


def _bias(c: Call, distance: str, tau: str | None) -> str:
    """float32 [H, n, held]: rel · rel_table at each distance, 0 beyond the table."""
    g, heads = c.g, c.args["num_heads"]
    extent, ranks = c.cols("rel_table"), c.cols("rel") // heads
    rel = g.transpose(g.reshape(c.x("rel"), 0, heads, ranks), 1, 0, 2)
    table = g.op("MatMul", rel, c.matrix("rel_table"))  # [H, n, extent]
    inside = g.op("Clip", distance, g.constant(0, "i64"), g.constant(extent - 1, "i64"))
    index = g.op("Expand", inside, g.concat([g.ints(heads), g.op("Shape", distance)], 0))
    bias = g.op("GatherElements", table, index, axis=2)
    bias = g.op("Where", g.op("Less", distance, g.constant(extent, "i64")), bias, g.f32(0.0))
    return bias if tau is None else g.op("Mul", bias, tau)


def _shares(c: Call, rows: str, rounded: bool) -> str:
    """The softmax of scores [H, n, held]; a sink logit takes a share and gives no value."""
    g = c.g
    if c.has("sink_logits"):
        sink = g.transpose(g.reshape(c.x("sink_logits"), -1, c.args["num_heads"], 1), 1, 0, 2)  # [H, 1 or n, 1]
        one = g.concat([g.ints(c.args["num_heads"]), c.context.count, g.ints(1)], 0)
        rows = g.concat([rows, g.op("Expand", sink, one)], 2)
    if not rounded:
        shares = g.op("Softmax", rows, axis=2)
        return g.slice(shares, 0, -1, 2) if c.has("sink_logits") else shares
    powers = g.op("Mul", rows, g.f32(LOG2_E))
    top = g.op("Ceil", g.op("ReduceMax", powers, g.ints(2), keepdims=1))
    weights = g.op("Exp", g.op("Mul", g.op("Sub", powers, top), g.f32(math.log(2))))
    kept = g.slice(weights, 0, -1, 2) if c.has("sink_logits") else weights
    kept = _to_bf16(c, kept)
    total = g.sum(kept, 2, keep=True)
    if c.has("sink_logits"):
        total = g.op("Add", total, g.slice(weights, -1, INT_MAX, 2))
    return g.op("Div", kept, total)


def _to_bf16(c: Call, x: str) -> str:
    return c.g.cast(c.g.cast(x, "bf16"), "f32")


def _held(c: Call, name: str, cache: Cache) -> str:
    """Writes the new rows of k or v to its cache; the rows that it holds then, float32 [G, held, width]."""
    g, state = c.g, c.args[f"{name}_cache"]
    new = g.transpose(g.reshape(c.x(name), 0, cache.kv_heads, cache.width), 1, 0, 2)
    if cache.dtype == "u8":
        codes, scales = _codes(c, new)
        wide = g.cast(_updated(c, state, codes, cache, cache.width, "u8"), "f32")
        held = _updated(c, state, scales, cache, 1, "f32", "scale")
        return g.op("Mul", g.op("Sub", wide, g.f32(128.0)), held)
    if cache.dtype == "bf16":
        return g.cast(_updated(c, state, g.cast(new, "bf16"), cache, cache.width, "bf16"), "f32")
    return _updated(c, state, new, cache, cache.width, "f32")


def _updated(c: Call, state: object, rows: str, cache: Cache, width: int, dtype: str, part: str = "") -> str:
    """The held rows of a cache [G, C, width] after `rows` [G, n, width] were written to it. Nothing else reads the old
    cache, so that the new one may lie in its memory."""
    g = c.g
    old = c.states.read(state, dtype, (cache.kv_heads, cache.capacity, width), part, in_place=True)  # type: ignore[arg-type]
    shape = g.concat([g.ints(cache.kv_heads), c.context.count, g.ints(1)], 0)
    head = g.op("Expand", g.constant(np.arange(cache.kv_heads).reshape(-1, 1, 1), "i64"), shape)
    row = g.op("Expand", g.unsqueeze(_cache_rows(c, cache.capacity), 0, 2), shape)
    index = g.concat([head, row], 2)
    new = g.op("ScatterND", old, index, rows, name=c.states.next_name(state, part))  # type: ignore[arg-type]
    c.states.write(state, new, part)  # type: ignore[arg-type]
    return g.slice(new, g.ints(0), _held_rows(c, cache.capacity), 1)


def _codes(c: Call, x: str) -> tuple[str, str]:
    """(uint8 codes, float32 scales) of rows [G, n, width]: tmlc/ir/ops/kv.py."""
    g = c.g
    peak = g.op("ReduceMax", g.op("Abs", x), g.ints(2), keepdims=1)
    usable = g.op("Less", peak, g.f32(math.inf))  # neither infinite nor NaN
    none = g.op("Less", peak, g.f32(1e-30))
    flat = g.op("Or", none, g.op("Not", usable))
    inverse = g.op("Div", g.f32(127.0), g.op("Where", flat, g.f32(1.0), peak))
    whole = g.op("Round", g.op("Mul", x, inverse))
    codes = g.op("Where", flat, g.f32(128.0), g.op("Add", whole, g.f32(128.0)))
    scale = g.op("Where", none, g.f32(0.0), g.op("Div", peak, g.f32(127.0)))
    return g.cast(codes, "u8"), g.op("Where", usable, scale, g.f32(math.nan))


def _windows(c: Call, tail: str, x: str, rows: str, taps: int, newest_first: bool) -> tuple[str, str]:
    """([n, taps, cols] the rows that each tap meets, [k-1+n, cols] all rows)."""
    g = c.g
    padded = g.concat([tail, x], 0)
    lags = np.arange(taps)[::-1] if newest_first else np.arange(taps)
    index = g.op("Add", g.unsqueeze(c.upto(rows), 1), g.constant(lags[None].copy(), "i64"))
    return g.op("Gather", padded, index, axis=0), padded


def convolved(c: Call, x: str, cols: int, weight: str, residual: bool) -> str:
    """short_conv_state of `x`, with the taps and the tail of this call."""
    g, state = c.g, c.args["tail"]
    shape = c.type(weight).shape
    taps = int(shape[-1])
    kernel = g.transpose(g.reshape(c.weight(weight), cols, taps), 1, 0)
    windows, padded = _windows(c, c.states.read(state), x, c.rows("x"), taps, False)
    c.states.write(state, c.last_rows(padded, taps - 1, c.states.next_name(state)))
    out = g.sum(g.op("Mul", windows, kernel), 1)
    return g.op("Add", out, x) if residual else out


def short_conv_state(c: Call) -> str:
    return convolved(c, c.x("x"), c.cols("x"), "weight", c.args["residual"])


def dynamic_conv_state(c: Call) -> str:
    g, state, cols = c.g, c.args["tail"], c.cols("x")
    taps = int(c.type("weight").shape[0])
    heads = c.cols("taps") // taps
    windows, padded = _windows(c, c.states.read(state), c.x("x"), c.rows("x"), taps, True)
    c.states.write(state, c.last_rows(padded, taps - 1, c.states.next_name(state)))
    fixed = g.reshape(c.matrix("weight"), taps, heads, cols // heads)
    moving = g.unsqueeze(g.transpose(g.reshape(c.x("taps"), 0, heads, taps), 0, 2, 1), 3)  # [n, k, H, 1]
    split = g.reshape(windows, 0, taps, heads, cols // heads)
    out = g.reshape(g.sum(g.op("Mul", split, g.op("Add", moving, fixed)), 1), 0, cols)
    return g.op("Add", out, c.x("x")) if c.args["residual"] else out

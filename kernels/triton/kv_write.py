"""New keys and values are written into the caches of their sessions; heads that are normed or turned, the keys on their
way, and the queries by programs beside them. In calls of few rows a session attention does that itself (attention.py),
with the functions of this file."""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Launch, Pointer
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import norm_scale, power
from tmlc.kernels.triton.position import rotated, turning
from tmlc.kernels.triton.registry import Call, launch

#: Columns that a program writes at once; where it prepares them, of one warp, whose sums need no barrier.
WRITTEN_AT_ONCE, PREPARED_AT_ONCE = 2048, 256
#: Constexprs of a kernel that turns nothing.
NO_TURNS: dict[str, Any] = {"OFFSET": 0, "HALF": 0, "INTERLEAVED": False}


@device
def cache_row(position, ring, sinks, RING: tl.constexpr):
    """Row of a cache that holds an absolute position; `ring`: how many rows lie behind those of the sinks."""
    if RING:
        return tl.where(position < sinks, position, sinks + (position - sinks) % ring)
    return position


@device
def int8_codes(values, AXIS: tl.constexpr):
    """(codes uint8, float32 scales) of heads that lie along an axis of `values`."""
    peak = tl.max(tl.abs(values), AXIS)
    # Counted as floats: the compiler counts whole numbers as bits, through memory.
    usable = (peak < float("inf")) & (tl.sum(tl.where(values != values, 1.0, 0.0), AXIS) == 0.0)
    flat = (usable == 0) | (peak < 1e-30)
    step = tl.where(flat, 0.0, tl.div_rn(127.0, tl.where(flat, 1.0, peak)))
    rounded = (values * tl.expand_dims(step, AXIS) + 12582912.0) - 12582912.0
    codes = tl.where(tl.expand_dims(flat, AXIS), 128.0, rounded + 128.0).to(tl.int32).to(tl.uint8)
    return codes, tl.where(usable, tl.where(flat, 0.0, tl.div_rn(peak, 127.0)), float("nan"))


@device
def read_row(new, row, groups, d, new_stride, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """A run of heads of one new row: [heads, columns]."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inner = tl.arange(0, BLOCK)
    mask = (head < groups)[:, None] & (inner < d)[None, :]
    return tl.load(new + row * new_stride + head[:, None] * d + inner[None, :], mask=mask, other=0.0)


@device
def write_row(
    cache, values, slot, at, groups, d, row_stride,
    INT8: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, ITEM: tl.constexpr, PREPARED: tl.constexpr,
):  # fmt: skip
    """A run of heads of one new row into row `at` of a cache. PREPARED: four columns are a thread's, of caches in bf16
    too: so they are stored from where they were summed."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inner = tl.arange(0, BLOCK)
    mask = (head < groups)[:, None] & (inner < d)[None, :]
    base = tl.multiple_of(slot // ITEM, 16) + at * row_stride
    if INT8:
        wide = (d + 3) // 4 * 4
        codes, scale = int8_codes(values, 1)
        place = head * (wide + 4)
        inside = (head < groups)[:, None] & (inner < wide)[None, :]
        tl.store(cache + base + place[:, None] + inner[None, :], tl.where(mask, codes, 0), mask=inside)
        where = (cache + base + place + wide).to(tl.pointer_type(tl.float32))
        tl.store(where, scale, mask=head < groups)
    else:
        there = cache + base + head[:, None] * d + inner[None, :]
        if PREPARED:
            there = tl.max_contiguous(there, (1, 4))
        tl.store(there, values.to(cache.dtype.element_ty), mask=mask)


@device
def write_columns(cache, values, place, d, live, INT8: tl.constexpr):
    """values[columns, 16], a head of 16 new rows of which some are `live`, to where each lies in a cache."""
    inner = tl.arange(0, values.shape[0])
    there = cache + place[None, :] + inner[:, None]
    if INT8:
        wide = (d + 3) // 4 * 4
        codes, scale = int8_codes(values, 0)
        tl.store(there, tl.where((inner < d)[:, None], codes, 0), mask=live[None, :] & (inner < wide)[:, None])
        tl.store((cache + place + wide).to(tl.pointer_type(tl.float32)), scale, mask=live)
    else:
        tl.store(there, values.to(cache.dtype.element_ty), mask=live[None, :] & (inner < d)[:, None])


@device
def kv_write_kernel(
    k_cache, v_cache, k, v, position, slots, counts, n, groups, d, dv, capacity, sinks, k_stride, v_stride,
    k_new_stride, v_new_stride,
    RING: tl.constexpr, INT8: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ITEM: tl.constexpr,
):  # fmt: skip
    """Writes the new keys and values of all sessions into their caches; grid (rows, runs of heads, keys and values)."""
    row = tl.program_id(0).to(tl.int64)
    session, i = row // n, row % n
    slot = tl.load(slots + session)
    if (i >= tl.load(counts + session)) | (slot < 0):  # no slot is negative; said here, both are read together
        return
    at = cache_row(tl.load(position + slot // 8) + i, capacity - sinks, sinks, RING)
    if tl.program_id(2) == 0:
        keys = read_row(k, row, groups, d, k_new_stride, HEADS, BLOCK_K)
        write_row(k_cache, keys, slot, at, groups, d, k_stride, INT8, HEADS, BLOCK_K, ITEM, False)
    else:
        values = read_row(v, row, groups, dv, v_new_stride, HEADS, BLOCK_V)
        write_row(v_cache, values, slot, at, groups, dv, v_stride, INT8, HEADS, BLOCK_V, ITEM, False)


@device
def read_heads(
    x, norm, table, shared, row, heads, d, own, x_stride, table_stride, shared_stride, run,
    OFFSET: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is read to prepare a run of heads of one row: (columns, the other ones of their pairs, the norm's weight for
    both, cosines, sines). shared: heads have `own` columns in x, and these behind them."""
    head, inner = run * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    mask = (head < heads)[:, None] & (inner < d)[None, :]
    at = x + row * x_stride + head[:, None] * d
    if shared is not None:
        at = x + row * x_stride + head[:, None] * own
        mask = mask & (inner < own)[None, :]
        behind = (inner >= own) & (inner < d)
        common = tl.load(shared + row * shared_stride + inner - own, mask=behind, other=0.0)
    values = tl.load(at + inner[None, :], mask=mask, other=0.0)
    if shared is not None:
        values = tl.where(behind[None, :], common[None, :], values)
    learned, others, others_learned, cos, sin = 0.0, 0.0, 0.0, 0.0, 0.0
    if norm is not None:
        learned = tl.load(norm + inner, mask=inner < d, other=0.0)
    if table is not None:
        inside, pair, _first, partner = turning(inner, OFFSET, HALF, INTERLEAVED)
        if shared is not None:
            turned = tl.load(shared + row * shared_stride + partner - own, mask=inside, other=0.0)
            others = tl.zeros(values.shape, tl.float32) + turned[None, :]
        else:
            others = tl.load(at + partner[None, :], mask=mask & inside[None, :], other=0.0)
        if norm is not None:
            others_learned = tl.load(norm + partner, mask=inside, other=0.0)
        cos = tl.load(table + row * table_stride + pair, mask=inside, other=1.0)
        sin = tl.load(table + row * table_stride + HALF + pair, mask=inside, other=0.0)
    return values, others, learned, others_learned, cos, sin


@device
def prepared_heads(found, norm, table, d, eps, OFFSET: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """[heads, columns] of what `read_heads` read, normed and then turned."""
    values, others, learned, others_learned, cos, sin = found
    if norm is not None:
        scale = norm_scale(values, d, eps)
        values = values * scale[:, None] * learned[None, :]
        if table is not None:
            others = others * scale[:, None] * others_learned[None, :]
    if table is not None:
        inside, _pair, first, _partner = turning(tl.arange(0, values.shape[1]), OFFSET, HALF, INTERLEAVED)
        moved = rotated(values, others, cos[None, :], sin[None, :], first[None, :])
        values = tl.where(inside[None, :], moved, values)
    return values


@device
def prepare_kv_write_kernel(
    k_cache, v_cache, q_prepared, q, k, v, q_norm, k_norm, table, shared, position, slots, counts, n, heads, groups, d,
    dv, own, capacity, sinks, k_stride, v_stride, q_stride, k_new_stride, v_new_stride, table_stride, shared_stride,
    eps,
    RING: tl.constexpr, INT8: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ITEM: tl.constexpr, OFFSET: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """kv_write_kernel of v and of keys that are normed (with norms), then turned (with a table); q_prepared: queries to
    which the same is done, dense, of rows of no session too. shared: the columns behind the `own` ones of each head of
    keys. Grid (rows, runs of kv heads, keys, values and then, for each program of keys, those of as many queries).

    No program ends early: what it prepares is asked for together with its session, and computed while the position is
    under way."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    if part >= 2:
        run = (part - 2) * tl.num_programs(1) + tl.program_id(1)
        found = read_heads(
            q, q_norm, table, None, row, heads, d, d, q_stride, table_stride, 0, run,
            OFFSET, HALF, INTERLEAVED, HEADS, BLOCK_K,
        )  # fmt: skip
        queries = prepared_heads(found, q_norm, table, d, eps, OFFSET, HALF, INTERLEAVED)
        head, inner = run * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK_K)
        mask = (head < heads)[:, None] & (inner < d)[None, :]
        tl.store(q_prepared + row * heads * d + head[:, None] * d + inner[None, :], queries, mask=mask)
        return
    session, i = row // n, row % n
    slot, count = tl.load(slots + session), tl.load(counts + session)
    live = (i < count) & (slot >= 0)
    written = tl.where(live, groups, 0)
    if part == 0:
        run = tl.program_id(1)
        found = read_heads(
            k, k_norm, table, shared, row, groups, d, own, k_new_stride, table_stride, shared_stride, run,
            OFFSET, HALF, INTERLEAVED, HEADS, BLOCK_K,
        )  # fmt: skip
        begin = tl.load(position + slot // 8, mask=live, other=0)
        keys = prepared_heads(found, k_norm, table, d, eps, OFFSET, HALF, INTERLEAVED)
        at = cache_row(begin + i, capacity - sinks, sinks, RING)
        write_row(k_cache, keys, slot, at, written, d, k_stride, INT8, HEADS, BLOCK_K, ITEM, True)
    else:
        values = read_row(v, row, groups, dv, v_new_stride, HEADS, BLOCK_V)
        at = cache_row(tl.load(position + slot // 8, mask=live, other=0) + i, capacity - sinks, sinks, RING)
        write_row(v_cache, values, slot, at, written, dv, v_stride, INT8, HEADS, BLOCK_V, ITEM, True)


def new_rows(call: Call) -> dict[str, Any]:
    """The new keys and values of attention, as arguments."""
    k, v = call.operand("k"), call.operand("v")
    strides = {"k_new_stride": Aligned(k.stride), "v_new_stride": Aligned(v.stride)}
    return {"k": call.pointer(k), "v": call.pointer(v), **strides}


def norms(call: Call) -> dict[str, Any]:
    """What attention norms queries and keys with, as arguments; None in a call that norms nothing.

    Raises:
        EmitError: the weights of a norm are not as wide as a head.
    """
    if call.optional("q_norm") is None:
        return dict.fromkeys(("q_norm", "k_norm", "eps"))
    weights = {name: call.operand(name) for name in ("q_norm", "k_norm")}
    d = call.operand("k").cols // int(call.attrs["num_kv_heads"])
    for weight in weights.values():
        call.need(weight.cols == d, f"{weight.name} has {weight.cols} columns", f"heads have {d}")
    return {name: call.pointer(weight) for name, weight in weights.items()} | {"eps": float(call.attrs["eps"])}


def turns(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """What attention turns queries and keys by, and what all heads of keys share, as arguments and constexprs."""
    table, shared = call.optional("table"), call.optional("shared")
    if table is None:
        return dict.fromkeys(("table", "table_stride", "shared", "shared_stride", "own")), NO_TURNS
    fixed = {
        "OFFSET": int(call.attrs["offset"]), "HALF": table.cols // 2, "INTERLEAVED": bool(call.attrs["interleaved"])
    }  # fmt: skip
    values: dict[str, Any] = {"table": call.pointer(table), "table_stride": Aligned(table.stride)}
    if shared is None:
        return values | dict.fromkeys(("shared", "shared_stride", "own")), fixed
    own = call.operand("k").cols // int(call.attrs["num_kv_heads"])
    call.need(fixed["OFFSET"] == own, f"keys of {own} columns are turned from {fixed['OFFSET']} on")
    values |= {"shared": call.pointer(shared), "shared_stride": Aligned(shared.stride), "own": Aligned(own)}
    return values, fixed


def write_launch(call: Call, shared: dict[str, Any], cached: dict[str, Any], queries: Pointer | None) -> Launch:
    """The launch that writes the new keys and values of attention.

    Args:
        shared: caches, sessions, sizes, new rows, norms and the table, by parameter name.
        cached: RING, INT8 and ITEM.
        queries: where the prepared queries go, of a call that norms or turns; None: keys are written as they are.
    """
    k, v = call.operand("k"), call.operand("v")
    groups, rows = int(call.attrs["num_kv_heads"]), call.rows(k)
    d, dv = int(shared["d"]), v.cols // groups
    block_k, block_v = (power(-(-width // 4) * 4 if cached["INT8"] else width, 4) for width in (d, dv))
    held = max(block_k, block_v)
    run = min(power(groups), max(1, WRITTEN_AT_ONCE // held))
    if queries is not None:
        run = max(1, PREPARED_AT_ONCE // held)
    fixed = cached | {"HEADS": run, "BLOCK_K": block_k, "BLOCK_V": block_v}
    warps, runs = 1 if run * held <= 256 else 4, -(-groups // run)
    values = shared | {"groups": groups}
    if queries is None:
        values = {name: value for name, value in values.items() if value is not None}
        return launch("kv_write_kernel", (rows, runs, 2), values, fixed, warps)
    q = call.operand("q")
    values |= {"q_prepared": queries, "q": call.pointer(q), "q_stride": Aligned(q.stride), "heads": q.cols // d}
    grid = (rows, runs, 2 + -(-(q.cols // d) // (run * runs)))
    return launch("prepare_kv_write_kernel", grid, values, fixed | turns(call)[1], warps)

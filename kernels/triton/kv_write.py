"""New keys and values are written into the caches of their sessions; where heads are normed, the keys on their way, and
the queries by programs beside them. In calls of few rows a session attention does that itself (attention.py), with the
functions of this file."""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Launch, Pointer
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import norm_run, normed, power
from tmlc.kernels.triton.overlap import previous
from tmlc.kernels.triton.registry import Call, launch

#: Columns that a program writes at once; where it norms, of one warp, whose sums need no barrier.
WRITTEN_AT_ONCE, NORMED_AT_ONCE = 2048, 256


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
    INT8: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, ITEM: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """A run of heads of one new row into row `at` of a cache. NORMED: four columns are a thread's, of caches in bf16
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
        if NORMED:
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
def norm_kv_write_kernel(
    k_cache, v_cache, q_normed, q, k, v, q_norm, k_norm, position, slots, counts, n, heads, groups, d, dv, capacity,
    sinks, k_stride, v_stride, q_stride, k_new_stride, v_new_stride, eps,
    RING: tl.constexpr, INT8: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ITEM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """kv_write_kernel of rms_norm(k) and v, and q_normed = rms_norm(q), dense, of rows of no session too; grid (rows,
    runs of kv heads, keys, values and then, for each program of keys, those of as many queries).

    No program ends early: what it norms is asked for together with its session, and normed while the position is under
    way."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    if part >= 2:
        if OVERLAP:
            previous()
        run = (part - 2) * tl.num_programs(1) + tl.program_id(1)
        norm_run(q_normed, q, q_norm, heads, d, q_stride, heads * d, run, eps, HEADS, BLOCK_K)
        return
    session, i = row // n, row % n
    slot, count = tl.load(slots + session), tl.load(counts + session)
    if OVERLAP:  # the host wrote these before the first launch
        previous()
    live = (i < count) & (slot >= 0)
    written = tl.where(live, groups, 0)
    if part == 0:
        keys = read_row(k, row, groups, d, k_new_stride, HEADS, BLOCK_K)
        inner = tl.arange(0, BLOCK_K)
        learned = tl.load(k_norm + inner, mask=inner < d, other=0.0)
        begin = tl.load(position + slot // 8, mask=live, other=0)
        keys = normed(keys, learned, d, eps)
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
    if call.op != "norm_attention_state":
        return dict.fromkeys(("q_norm", "k_norm", "eps"))
    weights = {name: call.operand(name) for name in ("q_norm", "k_norm")}
    d = call.operand("k").cols // int(call.attrs["num_kv_heads"])
    for weight in weights.values():
        call.need(weight.cols == d, f"{weight.name} has {weight.cols} columns", f"heads have {d}")
    return {name: call.pointer(weight) for name, weight in weights.items()} | {"eps": float(call.attrs["eps"])}


def write_launch(call: Call, shared: dict[str, Any], cached: dict[str, Any], queries: Pointer | None) -> Launch:
    """The launch that writes the new keys and values of attention.

    Args:
        shared: caches, sessions, sizes, new rows and norms, by parameter name.
        cached: RING, INT8 and ITEM.
        queries: where the normed queries go, of a call that norms; None: keys are written as they are.
    """
    k, v = call.operand("k"), call.operand("v")
    groups, rows = int(call.attrs["num_kv_heads"]), call.rows(k)
    d, dv = k.cols // groups, v.cols // groups
    block_k, block_v = (power(-(-width // 4) * 4 if cached["INT8"] else width, 4) for width in (d, dv))
    held = max(block_k, block_v)
    run = min(power(groups), max(1, WRITTEN_AT_ONCE // held))
    if queries is not None:
        run = max(1, NORMED_AT_ONCE // held)
    fixed = cached | {"HEADS": run, "BLOCK_K": block_k, "BLOCK_V": block_v}
    warps, runs = 1 if run * held <= 256 else 4, -(-groups // run)
    values = shared | {"groups": groups}
    if queries is None:
        values = {name: value for name, value in values.items() if value is not None}
        return launch("kv_write_kernel", (rows, runs, 2), values, fixed, warps)
    q = call.operand("q")
    values |= {"q_normed": queries, "q": call.pointer(q), "q_stride": Aligned(q.stride), "heads": q.cols // d}
    grid = (rows, runs, 2 + -(-(q.cols // d) // (run * runs)))
    return launch("norm_kv_write_kernel", grid, values, fixed | {"OVERLAP": False}, warps)

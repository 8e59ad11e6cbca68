"""Experts, gathered by index inside the kernels: gate/up with the activation, then down with the weighted sum.

Few rows, two launches: a program has one (row, expert) pair of gate/up, then one row and all its experts in a tile of
down, which it adds up. It reads weights in place: nothing is gathered or materialised, nothing is added atomically.
Many rows: the pairs are sorted by expert first, 16 of one expert share a tile, and a last kernel adds a row's experts
up. Both sum in the same order, to the same bits.
"""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.conv import conv_launch
from tmlc.kernels.triton.elementwise import sigmoid
from tmlc.kernels.triton.launch import ITEM_BYTES, Aligned, Launch, Lowered, Operand, Pointer
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.overlap import prefetch_rows, previous
from tmlc.kernels.triton.products import (
    FEW_ROWS,
    ROWS,
    exact_product,
    group_numbers,
    inputs,
    lines,
    product_values,
    slice_values,
    tile_rows,
    weight_product,
    weight_products,
)
from tmlc.kernels.triton.registry import Call, launch, lowering
from tmlc.kernels.triton.row_conv import NO_CONV, RowConv, convolve, keep_rows, rows_before
from tmlc.kernels.triton.steps import tanh
from tmlc.kernels.triton.tuning import turns_at_once

#: Rows from which on pairs are grouped where the program does not say (grouped_from 0).
GROUPED_FROM = 16


@device
def gated(gate, up, alpha, limit, gate_cap, up_cap, ACT: tl.constexpr):
    if ACT == 2:
        return gate_cap * tanh(gate / gate_cap) * sigmoid(gate) * (up_cap * tanh(up / up_cap))
    if ACT == 1:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return (up + 1.0) * gate * sigmoid(alpha * gate)
    return gate * sigmoid(gate) * up


@device
def tile_pairs(order, tile_first, tile_count, tile_expert, index, ROWS: tl.constexpr):
    """(pairs [ROWS], which of them are there, their expert) of tile `index`; a pair is row·top_k + choice."""
    lane = tl.arange(0, ROWS)
    held = lane < tl.load(tile_count + index)
    pair = tl.load(order + tl.load(tile_first + index) + lane, mask=held, other=0)
    return pair, held, tl.load(tile_expert + index)


@device
def chosen(experts, at, count_e):
    """The expert of a pair; of a pair of nobody, any."""
    return tl.minimum(tl.maximum(tl.load(experts + at).to(tl.int32), 0), count_e - 1)


@device
def moe_gate_up_kernel(
    hidden, x, w, scales, zeros, bias, experts, order, tile_first, tile_count, tile_expert, counts, n, per, top_k,
    count_e, f, k, w_stride, s_stride, x_stride, alpha, limit, gate_cap, up_cap,
    GROUPED: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """hidden[pair, f] = act(gate_e x, up_e x); grid (tiles of pairs, blocks of f)."""
    col = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = col < f
    if GROUPED:
        pair, held, expert = tile_pairs(order, tile_first, tile_count, tile_expert, tl.program_id(0), ROWS)
        if tl.max(held.to(tl.int32), 0) == 0:
            return
    else:
        # A pair of nobody goes all the way and reads and writes nothing: a branch, or a mask of what is loaded here,
        # would part these loads into rounds.
        pair, row = tl.program_id(0) + tl.zeros((ROWS,), tl.int32), tl.program_id(0) // top_k
        expert = chosen(experts, tl.program_id(0), count_e)
        live = row % n < tl.load(counts + row // n) * per
        held = (tl.arange(0, ROWS) == 0) & live
        inside = inside & live
    x_off = (pair // top_k).to(tl.int64) * x_stride
    gate_row = (expert.to(tl.int64) * 2) * f + col
    up_row = gate_row + f
    if FORM == "f32":
        gate = exact_product(w, gate_row * w_stride, inside, x, x_off, held, k, None, BLOCK_M, BLOCK_K, ROWS)
        up = exact_product(w, up_row * w_stride, inside, x, x_off, held, k, None, BLOCK_M, BLOCK_K, ROWS)
    else:
        gate, up = weight_products(
            w, scales, zeros, gate_row * w_stride, gate_row * s_stride, up_row * w_stride, up_row * s_stride, inside,
            x, x_off, held, k, None, True, FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, ROWS,
        )  # fmt: skip
    if bias is not None:
        gate += tl.load(bias + gate_row, mask=inside, other=0.0)[:, None]
        up += tl.load(bias + up_row, mask=inside, other=0.0)[:, None]
    result = gated(gate, up, alpha, limit, gate_cap, up_cap, ACT).to(hidden.dtype.element_ty)
    tl.store(hidden + pair.to(tl.int64)[None, :] * f + col[:, None], result, mask=inside[:, None] & held[None, :])


@device
def moe_sort_kernel(
    order, tile_first, tile_count, tile_expert, experts, counts, n, per, top_k, pairs, count_e,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sorts the live pairs by expert, in their order, and cuts each expert's into tiles of 16; grid (experts).

    Expert e's tiles begin at (pairs before it) // 16 + e, which leaves room for its last, shorter one; tiles that are
    left over get the count 0.
    """
    e = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before, mine = 0, 0
    for start in range(0, pairs, BLOCK):
        pair = start + lane
        row = pair // top_k
        live = (pair < pairs) & (row % n < tl.load(counts + row // n, mask=pair < pairs, other=0) * per)
        expert = tl.load(experts + pair, mask=live, other=-1).to(tl.int32)
        expert = tl.where(live, tl.minimum(tl.maximum(expert, 0), count_e - 1), -1)
        before += tl.sum((live & (expert < e)).to(tl.int32), 0)
        mine += tl.sum((live & (expert == e)).to(tl.int32), 0)
    seen = 0
    for start in range(0, pairs, BLOCK):
        pair = start + lane
        row = pair // top_k
        live = (pair < pairs) & (row % n < tl.load(counts + row // n, mask=pair < pairs, other=0) * per)
        expert = tl.load(experts + pair, mask=live, other=-1).to(tl.int32)
        expert = tl.where(live, tl.minimum(tl.maximum(expert, 0), count_e - 1), -1)
        chosen = (live & (expert == e)).to(tl.int32)
        place = before + seen + tl.cumsum(chosen, 0) - chosen
        tl.store(order + place, pair, mask=chosen > 0)
        seen += tl.sum(chosen, 0)
    first = before // 16 + e
    last = (before + mine) // 16 + e + 1
    for t in range(first, last):
        done = (t - first) * 16
        tl.store(tile_first + t, before + done)
        tl.store(tile_count + t, tl.minimum(tl.maximum(mine - done, 0), 16))
        tl.store(tile_expert + t, e)
    if e == count_e - 1:
        for t in range(last, pairs // 16 + count_e):
            tl.store(tile_count + t, 0)


@device
def moe_down_kernel(
    parts, hidden, w, scales, zeros, bias, order, tile_first, tile_count, tile_expert, d, k, w_stride, s_stride,
    FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """parts[pair, d] = down_e hidden[pair] + bias of sorted pairs; grid (tiles of pairs, blocks of d)."""
    pair, held, expert = tile_pairs(order, tile_first, tile_count, tile_expert, tl.program_id(0), ROWS)
    some = tl.max(held.to(tl.int32), 0) > 0
    col = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = col < d
    down_row = expert.to(tl.int64) * d + col
    if OVERLAP:  # what sorted the pairs had ended when the gate's kernel let this one begin
        prefetch_rows(w, down_row * w_stride, inside & some, k, FORM, LINES)
        previous()  # before any program may end: the next kernel relies on it
    if not some:
        return
    y = weight_product(
        w, scales, zeros, down_row * w_stride, down_row * s_stride, inside, hidden, pair.to(tl.int64) * k, held, k,
        None, FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, ROWS,
    )  # fmt: skip
    if bias is not None:
        y += tl.load(bias + down_row, mask=inside, other=0.0)[:, None]
    tl.store(parts + pair.to(tl.int64)[None, :] * d + col[:, None], y, mask=inside[:, None] & held[None, :])


@device
def one_of(j, values, COUNT: tl.constexpr):
    """values[j] of COUNT numbers; j is none that the compiler knows."""
    found = values[0]
    for i in tl.static_range(1, COUNT):
        found = tl.where(j == i, values[i], found)
    return found


@device
def choices_products(
    w, scales, zeros, w_row, inside, experts, x, x_off, d, k, w_stride, s_stride,
    TOP_K: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, COLS]: column j is the product of the rows of choice j's expert with x[x_off[j]], with the
    operations of `weight_products` in their order. Not for f32.

    A turn multiplies one expert's weights with a tile in which column j alone is not zero, so all choices share one
    sum, which is added up over the slices once. Turns of all choices follow one another in a loop without anything
    else, so that as many as fit shared memory are on their way at once.
    """
    choice = tl.arange(0, COLS)
    acc = tl.zeros((SLICES, BLOCK_M, COLS), tl.float32)
    for start in range(0, k, SLICES * BLOCK_K):
        first = start + tl.arange(0, SLICES) * BLOCK_K
        codes, scale, zero = acc, (), ()
        if FORM != "bf16":
            codes = tl.zeros((SLICES, BLOCK_M, COLS), tl.float32)
            for j in tl.static_range(TOP_K):
                s_off = (experts[j] * d + w_row).to(tl.int64) * s_stride
                found, nothing = group_numbers(scales, zeros, s_off, inside, first, k, FORM, GROUP)
                scale += (found,)  # type: ignore[assignment]
                zero += (nothing,)  # type: ignore[assignment]
        for j in range(TOP_K):
            off = (one_of(j, experts, TOP_K) * d + w_row).to(tl.int64) * w_stride
            at_zero = first
            if FORM == "i4":
                at_zero = one_of(j, zero, TOP_K)
            low, high, _ = slice_values(w, off, inside, first, at_zero, k, FORM, BLOCK_K)
            if FORM == "i4":
                kk = first[:, None] + tl.arange(0, BLOCK_K // 2)[None, :]
                low_x, _, _ = inputs(x, x_off, choice == j, kk, k, None, None, None, x_off, None, x_off)
                kk += BLOCK_K // 2
                high_x, _, _ = inputs(x, x_off, choice == j, kk, k, None, None, None, x_off, None, x_off)
                codes = tl.dot(high, high_x, tl.dot(low, low_x, codes))
            else:
                kk = first[:, None] + tl.arange(0, BLOCK_K)[None, :]
                low_x, _, _ = inputs(x, x_off, choice == j, kk, k, None, None, None, x_off, None, x_off)
                codes = tl.dot(low, low_x, codes)
        if FORM == "bf16":
            acc = codes
        else:
            times = tl.zeros((SLICES, BLOCK_M, COLS), tl.float32)
            for j in tl.static_range(TOP_K):
                times = tl.where((choice == j)[None, None, :], scale[j][:, :, None], times)
            if FORM == "i4":
                times = times * 0.0625
            acc += codes * times
    return tl.sum(acc, 0)


@device
def choices_exact(
    w, w_row, inside, experts, x, x_off, d, k, w_stride,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The same with f32 weights."""
    choice = tl.arange(0, COLS)
    y = tl.zeros((BLOCK_M, COLS), tl.float32)
    for j in range(TOP_K):
        off = (one_of(j, experts, TOP_K) * d + w_row).to(tl.int64) * w_stride
        y += exact_product(w, off, inside, x, x_off, choice == j, k, None, BLOCK_M, BLOCK_K, COLS)
    return y


@device
def moe_down_sum_kernel(
    out, hidden, w, scales, zeros, bias, experts, weights, addend, counts, n, per, count_e, d, k, w_stride, s_stride,
    out_stride, addend_stride, taps, tail, slots, start, channels, level,
    TOP_K: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, COLS: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr, TAPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out[row] = addend + Σ_j weights_j·(down_e hidden[row, j] + bias), j ascending; grid (rows, blocks of d). With
    `taps` each row is a session's only one, and before the addend comes the convolution of `channels` columns from
    `start` on (row_conv.py)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    choice = tl.arange(0, COLS)
    # A row of nobody goes all the way and reads and writes nothing: a branch would part these loads into rounds.
    live = row % n < tl.load(counts + row // n) * per
    inside = (col < d) & live
    # What chose the experts had ended when the gate's kernel let this one begin.
    ids, shares = (), ()
    for j in tl.static_range(TOP_K):
        ids += (chosen(experts, row * TOP_K + j, count_e),)  # type: ignore[assignment]
        shares += (tl.load(weights + row * TOP_K + j),)  # type: ignore[assignment]
    if TAPS > 0:
        slot = tl.load(slots + row)
    if OVERLAP:
        line = tl.arange(0, COLS * BLOCK_M)
        at, place = tl.program_id(1) * BLOCK_M + line % BLOCK_M, line // BLOCK_M
        there = live & (at < d) & (place < TOP_K)
        prefetch_rows(w, (one_of(place, ids, TOP_K) * d + at).to(tl.int64) * w_stride, there, k, FORM, LINES)
        previous()
    tl.assume(k > 0)
    if bias is not None:
        biased = one_of(choice, ids, TOP_K)[None, :] * d + col[:, None]
        biases = tl.load(bias + biased, mask=inside[:, None] & (choice < TOP_K)[None, :], other=0.0)
    if addend is not None:
        added = tl.load(addend + row * addend_stride + col, mask=inside, other=0.0)[:, None]
    if TAPS > 0:
        channel = col - start
        convolved = inside & (channel >= 0) & (channel < channels)
        tail_at = (tail + slot // 4 + channel)[:, None]
        before, rows = rows_before(taps, tail_at, channel, convolved, convolved[:, None], channels, TAPS)
    x_off = (row * TOP_K + choice) * k
    if FORM == "f32":
        y = choices_exact(w, col, inside, ids, hidden, x_off, d, k, w_stride, TOP_K, BLOCK_M, BLOCK_K, COLS)
    else:
        y = choices_products(
            w, scales, zeros, col, inside, ids, hidden, x_off, d, k, w_stride, s_stride,
            TOP_K, FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, COLS,
        )  # fmt: skip
    if bias is not None:
        y += biases
    total = tl.zeros((BLOCK_M, 1), tl.float32)
    for j in tl.static_range(TOP_K):
        total += shares[j] * tl.sum(tl.where((choice == j)[None, :], y, 0.0), 1)[:, None]
    if TAPS > 0:
        tl.debug_barrier()  # every thread has read the tail
        keep_rows(total, rows, tail_at, convolved[:, None], channels, TAPS)
        total = convolve(total, before, rows, convolved, level, RESIDUAL, TAPS)
    if addend is not None:
        total = added + total
    tl.store(out + row * out_stride + col[:, None], total, mask=inside[:, None])


@device
def moe_combine_kernel(
    out, parts, weights, addend, counts, n, per, top_k, d, out_stride, addend_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = addend + Σ_j weights_j·parts[row, j], j ascending; grid (rows, blocks of d)."""
    row = tl.program_id(0).to(tl.int64)
    if row % n >= tl.load(counts + row // n) * per:
        return
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < d
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(top_k):
        y = tl.load(parts + (row * top_k + j) * d + col, mask=inside, other=0.0)
        total += tl.load(weights + row * top_k + j) * y
    if addend is not None:
        total = tl.load(addend + row * addend_stride + col, mask=inside, other=0.0) + total
    tl.store(out + row * out_stride + col, total, mask=inside)


class _Scratch:
    """Pieces of scratch, each at a multiple of 256 bytes."""

    def __init__(self) -> None:
        self.used = 0

    def piece(self, dtype: str, count: int) -> Pointer:
        nbytes = ITEM_BYTES[dtype] * count
        pointer = Pointer("scratch", "", self.used, dtype, nbytes)
        self.used += -(-nbytes // 256) * 256
        return pointer


def grouped(call: Call) -> bool:
    """Whether a call's pairs are sorted by expert. Counted by positions of a session, and so the same for a session
    alone and in company; bits agree anyhow."""
    routes, rows = call.operand("weights"), call.rows(call.operand("x"))
    return routes.cols > ROWS or rows >= (int(call.attrs["grouped_from"]) or GROUPED_FROM)


def gate_up_launches(call: Call, scratch: _Scratch) -> tuple[list[Launch], Pointer, dict[str, Any]]:
    """The hidden columns of every pair, where they are, and the lists of sorted pairs, if the call groups them."""
    x, routes, experts, weight = (call.operand(name) for name in ("x", "weights", "experts", "gate_up"))
    count_e, wide, _ = weight.shape
    f, top_k, rows, n = wide // 2, routes.cols, call.rows(x), call.bucket.session_rows(x.rows)
    call.need(x.rows[0] > 0 == x.rows[1], f"rows {x.rows[0]}n+{x.rows[1]} belong to no positions")
    call.need(routes.stride == top_k == experts.stride, "routes are not dense")
    pairs, sort = rows * top_k, grouped(call)
    # Rounded before the second product, unless its weights are float32.
    hidden = scratch.piece("f32" if call.operand("down").dtype == "f32" else "bf16", pairs * f)
    bias = call.optional("gate_up_bias")
    alpha, limit = float(call.attrs["alpha"]), float(call.attrs["limit"])
    caps = float(call.attrs["gate_cap"]), float(call.attrs["up_cap"])
    act = 2 if caps[0] > 0 else 1 if alpha > 0 else 0
    launches: list[Launch] = []
    chosen: dict[str, Any] = {
        "experts": call.pointer(experts, ("i32", "i64")), "counts": call.counts, "n": n, "per": x.rows[0],
        "count_e": count_e,
    }  # fmt: skip
    tiles = pairs
    lists: dict[str, Any] = dict.fromkeys(("order", "tile_first", "tile_count", "tile_expert"))
    if sort:
        tiles = pairs // 16 + count_e
        lists = {name: scratch.piece("i32", pairs if name == "order" else tiles) for name in lists}
        values = chosen | lists | {"top_k": top_k, "pairs": pairs}
        launches.append(launch("moe_sort_kernel", (count_e,), values, {"BLOCK": 1024}, 4))
        chosen = dict.fromkeys(chosen)
    product, fixed, blocks = product_values(call, weight, "moe_gate_up", f)
    fixed |= {"GROUPED": sort, "ROWS": ROWS if sort else FEW_ROWS, "ACT": act}
    values = product | chosen | lists | {
        "hidden": hidden, "x": call.pointer(x), "x_stride": Aligned(x.stride), "f": Aligned(f), "top_k": top_k,
        "bias": None if bias is None else call.pointer(bias),
        "alpha": alpha if act == 1 else None, "limit": limit if act == 1 else None,
        "gate_cap": caps[0] if act == 2 else None, "up_cap": caps[1] if act == 2 else None,
    }  # fmt: skip
    grid = (tiles, -(-f // blocks.block_m))
    launches.append(launch("moe_gate_up_kernel", grid, values, fixed, blocks.warps, blocks.stages))
    return launches, hidden, lists


def down_launch(call: Call, scratch: _Scratch, hidden: Pointer, lists: dict[str, Any]) -> tuple[Launch, Pointer]:
    """The second product of sorted pairs, and where its results are, one behind the other: [rows·top_k, d]."""
    down, bias = call.operand("down"), call.optional("down_bias")
    d, pairs = down.shape[1], call.rows(call.operand("x")) * call.operand("weights").cols
    product, fixed, blocks = product_values(call, down, "moe_down", d)
    fixed |= {"ROWS": ROWS, "LINES": lines(down, fixed), "OVERLAP": False}
    parts = scratch.piece("f32", pairs * d)
    values = product | lists | {
        "parts": parts, "hidden": hidden, "d": Aligned(d), "bias": None if bias is None else call.pointer(bias),
    }  # fmt: skip
    grid = (pairs // 16 + down.shape[0], -(-d // blocks.block_m))
    return launch("moe_down_kernel", grid, values, fixed, blocks.warps, blocks.stages), parts


def _sum_values(call: Call, out: Operand | Pointer, addend: Operand | None, out_stride: int) -> dict[str, Any]:
    """What both kernels that add up the experts of a row take; `out` may be scratch with its stride."""
    x = call.operand("x")
    return {
        "counts": call.counts, "n": call.bucket.session_rows(x.rows), "per": x.rows[0],
        "weights": call.pointer(call.operand("weights")), "d": Aligned(call.operand("down").shape[1]),
        "out": call.pointer(out) if isinstance(out, Operand) else out,
        "out_stride": Aligned(out.stride if isinstance(out, Operand) else out_stride),
        "addend": None if addend is None else call.pointer(addend),
        "addend_stride": None if addend is None else Aligned(addend.stride),
    }  # fmt: skip


def combine_launch(
    call: Call, parts: Pointer, out: Operand | Pointer, addend: Operand | None, out_stride: int
) -> Launch:
    """The weighted sum of the parts of each row's experts, and `addend` before it."""
    d = call.operand("down").shape[1]
    block = min(1024, power(d, 32))
    values = _sum_values(call, out, addend, out_stride) | {"parts": parts, "top_k": call.operand("weights").cols}
    return launch("moe_combine_kernel", (call.rows(call.operand("x")), -(-d // block)), values, {"BLOCK": block}, 4)


def down_sum_launch(
    call: Call, hidden: Pointer, out: Operand | Pointer, addend: Operand | None, out_stride: int, conv: RowConv | None
) -> Launch:
    """The second product and the weighted sum of few rows, and `addend` before it. `conv`: with one row a session."""
    down, bias, experts = call.operand("down"), call.optional("down_bias"), call.operand("experts")
    d, rows, top_k = down.shape[1], call.rows(call.operand("x")), call.operand("weights").cols
    product, fixed, blocks = product_values(call, down, "moe_down", d)
    convolution = NO_CONV if conv is None else conv.values(call, d)
    values = product | convolution[0] | _sum_values(call, out, addend, out_stride) | {
        "hidden": hidden, "bias": None if bias is None else call.pointer(bias), "count_e": down.shape[0],
        "experts": call.pointer(experts, ("i32", "i64")),
    }  # fmt: skip
    fixed |= convolution[1] | {
        "TOP_K": top_k, "COLS": tile_rows(top_k), "LINES": lines(down, fixed), "OVERLAP": False,
    }  # fmt: skip
    grid = (rows, -(-d // blocks.block_m))
    stages = turns_at_once(down.dtype, blocks, fixed["SLICES"], top_k, grid[0] * grid[1], call.sm)
    return launch("moe_down_sum_kernel", grid, values, fixed, blocks.warps, stages)


def summed(
    call: Call, out: Operand | None, addend: Operand | None = None, conv: RowConv | None = None
) -> tuple[list[Launch], Pointer | None, _Scratch]:
    """The experts of every row, added up: into `out`, or, where that is None, dense into scratch, and where there."""
    scratch = _Scratch()
    launches, hidden, lists = gate_up_launches(call, scratch)
    cols = call.operand("down").shape[1]
    source = scratch.piece("f32", call.rows(call.operand("x")) * cols) if out is None else None
    to: Any = out if source is None else source
    if grouped(call):
        product, parts = down_launch(call, scratch, hidden, lists)
        launches += [product, combine_launch(call, parts, to, addend, cols)]
    else:
        launches.append(down_sum_launch(call, hidden, to, addend, cols, conv))
    return launches, source, scratch


@lowering("moe", "moe_add")
def lower_moe(call: Call) -> Lowered:
    launches, _, scratch = summed(call, call.outputs[0], call.optional("addend"))
    return Lowered(tuple(launches), scratch.used)


@lowering("moe_conv_state")
def lower_moe_conv(call: Call) -> Lowered:
    """With one row a session whoever adds the experts up convolves; more rows are a kernel of their own."""
    out, addend = call.outputs[0], call.optional("addend")
    conv = RowConv(
        call.operand("taps"), call.operand("tail"), 0, bool(call.attrs["residual"]), float(call.attrs["level"])
    )
    if call.bucket.session_rows(out.rows) == 1 and conv.fits and not grouped(call):
        launches, _, scratch = summed(call, out, addend, conv)
        return Lowered(tuple(launches), scratch.used)
    launches, source, scratch = summed(call, None)
    assert source is not None
    launches.append(
        conv_launch(call, out, (source, out.cols), conv.taps, conv.tail, conv.residual, level=conv.level, addend=addend)
    )
    return Lowered(tuple(launches), scratch.used)

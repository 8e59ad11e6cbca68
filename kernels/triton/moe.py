"""Experts, gathered by index inside the kernels: gate/up with the activation, then down with the weighted sum.

Few rows, two launches: a program has one (row, expert) pair of gate/up, then one row and all its experts in a tile of
down, which it adds up. It reads weights in place: nothing is gathered or materialised, nothing is added atomically.
Many rows: the pairs are sorted by expert first, 16 of one expert share a tile, and a last kernel adds a row's experts
up. Both sum in the same order, to the same bits.
"""

import triton.language as tl

from tmlc.kernels.triton.activations import inputs
from tmlc.kernels.triton.choice import ranked, sink_choice, store_sink_routes, store_topk_routes, topk_scores
from tmlc.kernels.triton.elementwise import sigmoid
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.products import (
    exact_product,
    group_numbers,
    slice_values,
    two_products,
    weight_product,
)
from tmlc.kernels.triton.router import SINKS
from tmlc.kernels.triton.row_conv import convolve, keep_rows, rows_before
from tmlc.kernels.triton.steps import tanh

#: Experts that a warp ranks together, one a thread.
WARP = tl.constexpr(32)


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
    first = tl.load(tile_first + index)
    pair = tl.load(order + first + lane, mask=held, other=0)
    return pair, held, tl.load(tile_expert + index)


@device
def of_somebody(counts, row, n, per):
    """Whether a row is of a session's new positions; without n each row is a session's only one (a division would keep
    this load waiting)."""
    if n is None:
        live = tl.load(counts + row) > 0
    else:
        live = row % n < tl.load(counts + row // n) * per
    return live


@device
def chosen(experts, at, count_e):
    """The expert of a pair; of a pair of nobody, any."""
    return tl.minimum(tl.maximum(tl.load(experts + at).to(tl.int32), 0), count_e - 1)


@device
def moe_gate_up_kernel(
    hidden, x, w, scales, zeros, bias, experts, order, tile_first, tile_count, tile_expert, counts, n, per, top_k,
    count_e, f, k, w_stride, s_stride, x_stride, alpha, limit, gate_cap, up_cap,
    weights, logits, inverses, logit_bias, learned, scale, routed, route_scale,
    GROUPED: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, MASKED_K: tl.constexpr, ONCE: tl.constexpr,
    SCORES: tl.constexpr, NORMALISE: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """hidden[pair, f] = act(gate_e x, up_e x); grid (tiles of pairs, blocks of f).

    With `logits` each program finds the expert of its choice itself, as `sink_router_kernel` does from [rows, routed +
    SHARED] (SCORES is SINKS) or `topk_router_kernel` from [rows, routed]; there is one block more, which stores
    experts and weights for the second product.
    """
    col = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = col < f
    if GROUPED:
        pair, held, expert = tile_pairs(order, tile_first, tile_count, tile_expert, tl.program_id(0), ROWS)
        if tl.max(held.to(tl.int32), 0) == 0:
            return
        x_row = pair // top_k
    else:
        pair = tl.program_id(0) + tl.zeros((ROWS,), tl.int32)
        row, choice = tl.program_id(0) // top_k, tl.program_id(0) % top_k
        if TOP_K > 0:  # known, it is divided by faster
            row, choice = tl.program_id(0) // (TOP_K + SHARED), tl.program_id(0) % (TOP_K + SHARED)
        live = of_somebody(counts, row, n, per)
        if TOP_K > 0:
            wide = row.to(tl.int64)
            # Of a row of nobody no expert is eligible, so its count is read along with the logits.
            eligible = tl.where(live, routed, 0)
            if SCORES == SINKS:
                found, places, shared = sink_choice(
                    logits, inverses, learned, wide, routed, eligible, routed + SHARED, TOP_K, SHARED, PARTS, WARP
                )
                factor = route_scale * tl.load(scale)
            else:
                found, keys = topk_scores(
                    logits, inverses, logit_bias, learned, wide, routed, eligible, routed, SCORES, PARTS, WARP
                )
                places = ranked(keys, TOP_K, PARTS, WARP)
            stores = tl.program_id(1) == tl.num_programs(1) - 1
            if stores | (live == 0):
                if stores & live & (choice == 0):
                    if SCORES == SINKS:
                        store_sink_routes(
                            weights, experts, found, places, shared, factor, wide, routed, TOP_K, SHARED, PARTS, WARP
                        )
                    else:
                        store_topk_routes(
                            weights, experts, found, places, route_scale, wide, routed, SCORES, NORMALISE, TOP_K,
                            SHARED, PARTS, WARP,
                        )  # fmt: skip
                return
            mine = tl.zeros((WARP,), tl.int32)
            for p in tl.static_range(PARTS):
                mine += tl.where(places[p] == choice, p * WARP + tl.arange(0, WARP), 0)
            expert = tl.where(choice < TOP_K, tl.sum(mine, 0), routed + choice - TOP_K)
        else:
            # A pair of nobody goes all the way and reads and writes nothing: a branch, or a mask of what is loaded
            # here, would part these loads into rounds.
            expert = chosen(experts, tl.program_id(0), count_e)
            inside = inside & live
        held = (tl.arange(0, ROWS) == 0) & live
        x_row = row + tl.zeros((ROWS,), tl.int32)
    ALONE: tl.constexpr = not GROUPED and FORM != "f32"
    x_off, x_mask = x_row.to(tl.int64) * x_stride, held
    if ALONE:
        x_off, x_mask = row.to(tl.int64) * x_stride, live
    gate_row = (expert.to(tl.int64) * 2) * f + col
    up_row = gate_row + f
    gate, up = two_products(
        w, scales, zeros, gate_row * w_stride, gate_row * s_stride, up_row * w_stride, up_row * s_stride, inside,
        x, x_off, x_mask, k, FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, ROWS, MASKED_K, ONCE, ALONE,
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
    ROWS: tl.constexpr, MASKED_K: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """parts[pair, d] = down_e hidden[pair] + bias of sorted pairs; grid (tiles of pairs, blocks of d)."""
    pair, held, expert = tile_pairs(order, tile_first, tile_count, tile_expert, tl.program_id(0), ROWS)
    if tl.max(held.to(tl.int32), 0) == 0:
        return
    col = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = col < d
    down_row = expert.to(tl.int64) * d + col
    y = weight_product(
        w, scales, zeros, down_row * w_stride, down_row * s_stride, inside, hidden, pair.to(tl.int64) * k, held, k,
        None, FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, ROWS, MASKED_K, ONCE, False,
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
    BLOCK_K: tl.constexpr, COLS: tl.constexpr, MASKED_K: tl.constexpr,
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
            low, high, _ = slice_values(w, off, inside, first, at_zero, FORM, BLOCK_K, MASKED_K)
            half: tl.constexpr = BLOCK_K // 2 if FORM == "i4" else BLOCK_K
            low_x, _, _, _ = inputs(
                x, x_off, choice == j, first, None, None, None, x_off, None, x_off, half, MASKED_K
            )
            codes = tl.dot(low, low_x, codes)
            if FORM == "i4":
                high_x, _, _, _ = inputs(
                    x, x_off, choice == j, first + half, None, None, None, x_off, None, x_off, half, MASKED_K
                )
                codes = tl.dot(high, high_x, codes)
        if FORM == "bf16":
            acc = codes
        else:
            times = tl.zeros((SLICES, BLOCK_M, COLS), tl.float32)
            for j in tl.static_range(TOP_K):
                times = tl.where((choice == j)[None, None, :], scale[j][:, :, None], times)
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
    BLOCK_K: tl.constexpr, COLS: tl.constexpr, MASKED_K: tl.constexpr, TAPS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """out[row] = addend + Σ_j weights_j·(down_e hidden[row, j] + bias), j ascending; grid (rows, blocks of d). With
    `taps` each row is a session's only one, and before the addend comes the convolution of `channels` columns from
    `start` on (row_conv.py)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    choice = tl.arange(0, COLS)
    # A row of nobody goes all the way and reads and writes nothing: a branch would part these loads into rounds.
    live = of_somebody(counts, row, n, per)
    inside = (col < d) & live
    ids, shares = (), ()
    for j in tl.static_range(TOP_K):
        ids += (chosen(experts, row * TOP_K + j, count_e),)  # type: ignore[assignment]
        shares += (tl.load(weights + row * TOP_K + j),)  # type: ignore[assignment]
    if TAPS > 0:
        slot = tl.load(slots + row)
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
            TOP_K, FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, COLS, MASKED_K,
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

"""Routers: which experts a row uses and with what weights, ties to the lowest index; a NaN is the worst score.

Logits are sums of float32 products, one for each row and expert, in an order that the width of a row decides; many
programs have a few experts each. The choice is a small program for each row: experts lie across its threads.
"""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.elementwise import sigmoid
from tmlc.kernels.triton.launch import Aligned, Launch, Lowered, Pointer, Scratch
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.overlap import prefetch_rows, previous
from tmlc.kernels.triton.registry import Call, launch, lowering

MOST_EXPERTS = 1024
#: Routed experts among which the product of few rows chooses by itself: four for each thread of a warp, as every warp
#: does it alone.
MOST_RANKED = 128
#: What chooses the experts of a row: 0, 1 or 2 are topk_router's scores, this is sink_router.
SINKS = tl.constexpr(3)
#: Inputs that a program reads at once, and of them those of one warp: 32 a thread of a row, and as many of an expert.
MOST_INPUTS, WARP_INPUTS = 8192, 1024
#: Programs from which one takes more experts, which share what it reads of a row, and then more rows.
ENOUGH_PROGRAMS, PLENTY_OF_PROGRAMS = 132, 1056


@device
def sortable(score):
    """int32 numbers in the order of the scores; NaN as the worst, both zeros alike, none the smallest int32."""
    score = tl.where(score != score, float("-inf"), score)
    word = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return word ^ ((word >> 31) & 0x7FFFFFFF)


@device
def score_of(key):
    """The score that `sortable` made a number of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@device
def lowest_best(key, index):
    """Index of the largest number, the lowest of equals. Whole numbers are reduced in one instruction of a warp."""
    return tl.min(tl.where(key == tl.max(key, 0), index, 1 << 30), 0)


@device
def ranked(keys, TOP_K: tl.constexpr, PARTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """For each expert the turn in which it is chosen, -1 for never, in PARTS blocks as its number in `keys`, where the
    smallest int32 closes one. The best of blocks of one warp are found without any wait for another warp."""
    places = ()
    for _p in tl.static_range(PARTS):
        places += (tl.full((BLOCK_E,), -1, tl.int32),)  # type: ignore[assignment]
    for turn in tl.static_range(TOP_K):
        top = keys[0]
        for p in tl.static_range(1, PARTS):
            top = tl.maximum(top, keys[p])
        best = tl.max(top, 0)
        first = tl.full((BLOCK_E,), 1 << 30, tl.int32)
        for p in tl.static_range(PARTS):
            e = p * BLOCK_E + tl.arange(0, BLOCK_E)
            first = tl.minimum(first, tl.where(keys[p] == best, e, 1 << 30))
        winner = tl.min(first, 0)
        left, taken = (), ()
        for p in tl.static_range(PARTS):
            won = p * BLOCK_E + tl.arange(0, BLOCK_E) == winner
            left += (tl.where(won, -2147483648, keys[p]),)  # type: ignore[assignment]
            taken += (tl.where(won, turn, places[p]),)  # type: ignore[assignment]
        keys, places = left, taken
    return places


@device
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@device
def sum_of(blocks, PARTS: tl.constexpr):
    """Of all numbers of PARTS blocks. With the same blocks, of 32 one a thread of a warp, it has the same bits in every
    kernel."""
    total = blocks[0]
    for p in tl.static_range(1, PARTS):
        total += blocks[p]
    return tl.sum(total, 0)


@device
def softmax_of(scores, among, PARTS: tl.constexpr):
    """Softmax over those that are `among`, 0 elsewhere; PARTS blocks of each."""
    top = tl.where(among[0], scores[0], float("-inf"))
    for p in tl.static_range(1, PARTS):
        top = tl.maximum(top, tl.where(among[p], scores[p], float("-inf")))
    best = score_of(tl.max(sortable(top), 0))  # one instruction of a warp
    powers, shares = (), ()
    for p in tl.static_range(PARTS):
        powers += (tl.where(among[p], tl.exp(scores[p] - best), 0.0),)  # type: ignore[assignment]
    total = sum_of(powers, PARTS)
    for p in tl.static_range(PARTS):
        shares += (powers[p] / total,)  # type: ignore[assignment]
    return shares


@device
def store_routes(weights, experts, share, index, place, row, K: tl.constexpr):
    at = row * K + place
    tl.store(weights + at, share, mask=place >= 0)
    tl.store(experts + at, index.to(experts.dtype.element_ty), mask=place >= 0)


@device
def sink_choice(
    logits, inverses, bias, row, routed, eligible, logits_stride,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """(logits and places of the routed experts, PARTS blocks of each, and the logits of the shared ones as numbers) of
    a row: places of the first `eligible` are chosen by sigmoid + bias, -1 is none."""
    inverse = 1.0
    if inverses is not None:
        inverse = tl.load(inverses + row)
    at = logits + row * logits_stride
    found, keys, shared = (), (), ()
    for p in tl.static_range(PARTS):
        e = p * BLOCK_E + tl.arange(0, BLOCK_E)
        logit = tl.load(at + e, mask=e < routed, other=0.0)
        learned = tl.load(bias + e, mask=e < routed, other=0.0)
        if inverses is not None:
            logit = logit * inverse
        found += (logit,)  # type: ignore[assignment]
        keys += (tl.where(e < eligible, sortable(sigmoid(logit) + learned), -2147483648),)  # type: ignore[assignment]
    for s in tl.static_range(SHARED):
        one = tl.load(at + routed + s)
        if inverses is not None:
            one = one * inverse
        shared += (one,)  # type: ignore[assignment]
    return found, ranked(keys, TOP_K, PARTS, BLOCK_E), shared


@device
def store_sink_routes(
    weights, experts, found, places, shared, factor, row, routed,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The chosen and the shared experts of a row, and the softmax of their log-sigmoids times the factor. It is summed
    place by place, so that its bits do not depend on which thread has what."""
    top = tl.full((BLOCK_E,), float("-inf"), tl.float32)
    for p in tl.static_range(PARTS):
        top = tl.maximum(top, tl.where(places[p] >= 0, log_sigmoid(found[p]), float("-inf")))
    best = tl.max(top, 0)
    for s in tl.static_range(SHARED):
        best = tl.maximum(best, log_sigmoid(shared[s]))
    total = 0.0
    for j in tl.static_range(TOP_K):
        one = tl.zeros((BLOCK_E,), tl.float32)
        for p in tl.static_range(PARTS):
            one += tl.where(places[p] == j, tl.exp(log_sigmoid(found[p]) - best), 0.0)
        total += tl.sum(one, 0)
    for s in tl.static_range(SHARED):
        total += tl.exp(log_sigmoid(shared[s]) - best)
    for p in tl.static_range(PARTS):
        share = tl.exp(log_sigmoid(found[p]) - best) / total * factor
        e = p * BLOCK_E + tl.arange(0, BLOCK_E)
        store_routes(weights, experts, share, e, places[p], row, TOP_K + SHARED)
    at = row * (TOP_K + SHARED) + TOP_K
    for s in tl.static_range(SHARED):
        tl.store(weights + at + s, tl.exp(log_sigmoid(shared[s]) - best) / total * factor)
        tl.store(experts + at + s, (routed + s).to(experts.dtype.element_ty))


@device
def topk_scores(
    logits, inverses, logit_bias, bias, row, routed, eligible, logits_stride,
    SCORES: tl.constexpr, PARTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """(scores of the experts of a row, and the numbers that `ranked` takes; PARTS blocks of each): softmax of all (0),
    sigmoid (1) or raw scores (2) of the first `eligible`, which are all or none. With `inverses` the logits of a row
    are scaled by its own, `logit_bias` is added to them, and `bias` to the scores for the choice alone."""
    inverse = 1.0
    if inverses is not None:
        inverse = tl.load(inverses + row)
    read, added, learned = (), (), ()
    # All that is read is asked for before the first of it is used.
    for p in tl.static_range(PARTS):
        e = p * BLOCK_E + tl.arange(0, BLOCK_E)
        known = e < routed
        read += (tl.load(logits + row * logits_stride + e, mask=known, other=float("-inf")),)  # type: ignore[assignment]
        if logit_bias is not None:
            added += (tl.load(logit_bias + e, mask=known, other=0.0),)  # type: ignore[assignment]
        if bias is not None:
            learned += (tl.load(bias + e, mask=known, other=0.0),)  # type: ignore[assignment]
    scores, among, keys = (), (), ()
    for p in tl.static_range(PARTS):
        e = p * BLOCK_E + tl.arange(0, BLOCK_E)
        score = read[p]  # type: ignore[var-annotated]
        if inverses is not None:
            score = score * inverse  # type: ignore[assignment]
        if logit_bias is not None:
            score += added[p]
        if SCORES == 1:
            score = sigmoid(score)
        scores += (score,)  # type: ignore[assignment]
        among += (e < eligible,)  # type: ignore[assignment]
    if SCORES == 0:
        scores = softmax_of(scores, among, PARTS)
    for p in tl.static_range(PARTS):
        choice = scores[p]  # type: ignore[var-annotated]
        if bias is not None:
            choice += learned[p]
        keys += (tl.where(among[p], sortable(choice), -2147483648),)  # type: ignore[assignment]
    return scores, keys


@device
def of_best_groups(key, routed, each, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The numbers of the experts of the TOP_GROUPS groups whose two best have the largest sum; those of others are
    closed."""
    e = tl.arange(0, BLOCK_E)
    group = e // each
    sums = tl.full((BLOCK_E,), -2147483648, tl.int32)  # place g stands for group g
    for g in range(GROUPS):
        mine = tl.where(group == g, key, -2147483648)
        best = score_of(tl.max(mine, 0))
        if each > 1:
            best += score_of(tl.max(tl.where(e == lowest_best(mine, e), -2147483648, mine), 0))
        sums = tl.where(e == g, sortable(best), sums)
    closed = e < routed
    for _turn in range(TOP_GROUPS):
        winner = lowest_best(sums, e)
        sums = tl.where(e == winner, -2147483648, sums)
        closed = closed & (group != winner)
    return tl.where(closed, -2147483648, key)


@device
def store_topk_routes(
    weights, experts, scores, places, factor, row, routed,
    SCORES: tl.constexpr, NORMALISE: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The chosen experts of a row and their weights: scores (raw ones: softmax over the chosen), divided by their sum
    where NORMALISE says so, times the factor. Behind them the SHARED experts behind the last one, with weight 1."""
    chosen, shares = (), ()
    for p in tl.static_range(PARTS):
        chosen += (places[p] >= 0,)  # type: ignore[assignment]
        shares += (tl.where(places[p] >= 0, scores[p], 0.0),)  # type: ignore[assignment]
    if SCORES == 2:
        shares = softmax_of(scores, chosen, PARTS)
    total = 1.0
    if NORMALISE:
        total = sum_of(shares, PARTS)
        if SCORES == 1:
            total += 1e-20
    for p in tl.static_range(PARTS):
        share = shares[p]  # type: ignore[var-annotated]
        if NORMALISE:
            share = share / total  # type: ignore[assignment]
        e = p * BLOCK_E + tl.arange(0, BLOCK_E)
        store_routes(weights, experts, share * factor, e, places[p], row, TOP_K + SHARED)
    at = row * (TOP_K + SHARED) + TOP_K
    for s in tl.static_range(SHARED):
        tl.store(weights + at + s, 1.0)
        tl.store(experts + at + s, (routed + s).to(experts.dtype.element_ty))


@device
def norm_row(
    normed, inverses, x, norm, row, k, x_stride, normed_stride, eps, PIECES: tl.constexpr, BLOCK_K: tl.constexpr
):
    """normed[row] = rms_norm(x[row]), and inverses[row] what it was scaled by."""
    inner = tl.arange(0, BLOCK_K)
    squares, scaled = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for piece in tl.static_range(PIECES):
        at = piece * BLOCK_K + inner
        values = tl.load(x + row * x_stride + at, mask=at < k, other=0.0)
        if PIECES == 1:
            scaled = values * tl.load(norm + at, mask=at < k, other=0.0)
        # The zeros keep the assembler from asking for the norm's weight only when the sum is known.
        squares += values * values + 0.0 * scaled
    inverse = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / k + eps)
    tl.store(inverses + row, inverse)
    for piece in tl.static_range(PIECES):
        at = piece * BLOCK_K + inner
        if PIECES > 1:  # more than the threads hold
            scaled = tl.load(x + row * x_stride + at, mask=at < k, other=0.0)
            scaled = scaled * tl.load(norm + at, mask=at < k, other=0.0)
        tl.store(normed + row * normed_stride + at, scaled * inverse, mask=at < k)


@device
def router_logits_kernel(
    logits, x, w, norm, normed, inverses, rows, total, k, w_stride, x_stride, normed_stride, per, each, eps,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_K: tl.constexpr, LINES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Logits [rows, total] = x · Wᵀ in float32; grid (runs of EXPERTS experts, runs of `per` rows).

    A sum is of one row and one expert: BLOCK_K products, across threads, whatever EXPERTS and ROWS are. (`each` is
    EXPERTS again, as a number: known, it would tell the compiler that rows of weights begin at multiples of it, and how
    wide loads are would decide the order of the sum.) With `norm` x∘norm is multiplied, and `per` programs more of each
    run norm a row each: they write normed[row], and in inverses[row] what the logits of the row have to be scaled by.
    """
    slot, inner = tl.arange(0, EXPERTS * ROWS), tl.arange(0, BLOCK_K)
    first = tl.program_id(0) * each
    begin = tl.program_id(1) * per
    w_wide, x_wide = w_stride.to(tl.int64), x_stride.to(tl.int64)
    if OVERLAP:
        own = first + tl.arange(0, EXPERTS)
        prefetch_rows(w, own.to(tl.int64) * w_wide, own < total, k, "f32", LINES)
        previous()
    if norm is not None:
        extra = tl.program_id(0) - tl.cdiv(total, EXPERTS)
        if extra >= 0:
            row = begin + extra
            if row < rows:
                wide = normed_stride.to(tl.int64)
                norm_row(normed, inverses, x, norm, row, k, x_wide, wide, eps, PIECES, BLOCK_K)
            return
    for turn in range(begin, tl.minimum(begin + per, rows), ROWS):
        found = tl.zeros((EXPERTS * ROWS,), tl.float32)
        for r in tl.static_range(ROWS):
            for e in tl.static_range(EXPERTS):
                acc = tl.zeros((BLOCK_K,), tl.float32)
                for piece in tl.static_range(PIECES):
                    at = piece * BLOCK_K + inner
                    read = (at < k) & (first + e < total) & (turn + r < rows)
                    wt = tl.load(w + (first + e) * w_wide + at, mask=read, other=0.0)
                    xt = tl.load(x + (turn + r) * x_wide + at, mask=read, other=0.0)
                    if norm is not None:
                        xt = xt * tl.load(norm + at, mask=at < k, other=0.0)
                    if PIECES == 1:
                        acc = wt * xt
                    else:
                        acc += wt * xt
                found = tl.where(slot == r * EXPERTS + e, tl.sum(acc, 0), found)
        row, expert = turn + slot // EXPERTS, first + slot % EXPERTS
        tl.store(logits + row.to(tl.int64) * total + expert, found, mask=(row < rows) & (expert < total))


@device
def sink_router_kernel(
    weights, experts, logits, inverses, bias, scale, routed, logits_stride, route_scale,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The choice by sigmoid + bias from logits [rows, experts + shared], and the softmax of the log-sigmoids of the
    chosen and the shared; with `inverses` the logits of a row are scaled by its own; grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    found, places, shared = sink_choice(
        logits, inverses, bias, row, routed, routed, logits_stride, TOP_K, SHARED, 1, BLOCK_E
    )
    factor = route_scale * tl.load(scale)
    store_sink_routes(weights, experts, found, places, shared, factor, row, routed, TOP_K, SHARED, 1, BLOCK_E)


@device
def topk_router_kernel(
    weights, experts, logits, inverses, logit_bias, bias, routed, each, logits_stride, route_scale,
    SCORES: tl.constexpr, NORMALISE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Top-k of the scores of `topk_scores`, of the best groups where there are groups, which lie in one block; grid
    (rows)."""
    row = tl.program_id(0).to(tl.int64)
    scores, keys = topk_scores(
        logits, inverses, logit_bias, bias, row, routed, routed, logits_stride, SCORES, PARTS, BLOCK_E
    )
    if GROUPS > 1:
        keys = (of_best_groups(keys[0], routed, each, GROUPS, TOP_GROUPS, BLOCK_E),)
    places = ranked(keys, TOP_K, PARTS, BLOCK_E)
    store_topk_routes(
        weights, experts, scores, places, route_scale, row, routed, SCORES, NORMALISE, TOP_K, SHARED, PARTS, BLOCK_E
    )


@device
def append_experts_kernel(weights_out, experts_out, weights, experts, top_k, first, each, BLOCK: tl.constexpr):
    """The choices of a row, and behind them the experts from `first` on, with weight 1; grid (rows)."""
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    given = place < top_k
    at = row * top_k + place
    weight = tl.load(weights + at, mask=given, other=1.0)
    expert = tl.load(experts + at, mask=given, other=0)
    expert = tl.where(given, expert, (first + place - top_k).to(experts.dtype.element_ty))
    tl.store(weights_out + row * each + place, weight, mask=place < each)
    tl.store(experts_out + row * each + place, expert, mask=place < each)


def _results(call: Call, k: int) -> dict[str, Any]:
    weights, experts = call.outputs[:2]
    call.need(weights.stride == k == experts.stride, "the router's results are not dense")
    return {"weights": call.pointer(weights), "experts": call.pointer(experts, ("i32", "i64"))}


def ranks_itself(routed: int, groups: int = 1) -> bool:
    """Whether one warp can choose among so many experts by itself, as each of a product's does."""
    return routed <= MOST_RANKED and groups == 1


def _warps(experts: int) -> int:
    """One, whose threads need no shared memory to find the best, up to four experts a thread."""
    return max(1, power(experts) // 128)


def logits_launch(call: Call, logits: Pointer, inverses: Pointer | None) -> Launch:
    """The logits of all rows, dense. With `inverses` the call has a norm, and these are where the scale of each row
    goes; the normed rows are its third result."""
    weight, x = call.operand("weight"), call.operand("x")
    call.need(weight.dtype == "f32", f"a router with weights of {weight.dtype}", "keep routers in f32")
    (total, k), rows = weight.shape, call.rows(x)
    call.need(x.cols == k, f"{weight.name} {weight.shape} does not take {x.cols} columns")
    block = min(MOST_INPUTS, power(k, 32))
    each, at_once, per = 1, min(4, power(rows)), min(4, rows)
    while each < 4 and -(-total // (2 * each)) * -(-rows // per) >= ENOUGH_PROGRAMS:
        each *= 2
    if each == 4:  # a thread holds its part of four experts and of two rows
        at_once = min(2, at_once)
        if -(-total // each) * -(-rows // per) >= PLENTY_OF_PROGRAMS:
            per = 16
    values: dict[str, Any] = {
        "logits": logits, "x": call.pointer(x), "w": call.pointer(weight), "rows": rows, "total": total,
        "k": Aligned(k), "w_stride": Aligned(k), "x_stride": Aligned(x.stride), "per": per,
        "each": each, "inverses": inverses, **dict.fromkeys(("norm", "normed", "normed_stride", "eps")),
    }  # fmt: skip
    if inverses is not None:
        norm, normed = call.operand("norm"), call.outputs[2]
        call.need(norm.cols == k, f"the norm of {norm.cols} columns is not of whole rows")
        values |= {
            "norm": call.pointer(norm), "normed": call.pointer(normed), "normed_stride": Aligned(normed.stride),
            "eps": float(call.attrs["eps"]),
        }  # fmt: skip
    fixed = {
        "EXPERTS": each, "ROWS": at_once, "PIECES": -(-k // block), "BLOCK_K": block,
        "LINES": power(-(-min(k, MOST_INPUTS) // 32)), "OVERLAP": False,
    }  # fmt: skip
    grid = (-(-total // each) + (0 if inverses is None else per), -(-rows // per))
    return launch("router_logits_kernel", grid, values, fixed, max(1, block // WARP_INPUTS))


def sink_values(
    call: Call, logits: Pointer, stride: int, inverses: Pointer | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constexprs of the choice from logits with so many columns a row."""
    top_k, shared = int(call.attrs["top_k"]), int(call.attrs["n_shared"])
    bias, scale = call.operand("bias"), call.operand("scale")
    routed = bias.cols * bias.rows[1]
    total = routed + shared
    call.need(total <= MOST_EXPERTS, f"{total} experts", f"up to {MOST_EXPERTS} are supported")
    values = _results(call, top_k + shared) | {
        "bias": call.pointer(bias), "scale": call.pointer(scale), "routed": routed, "logits": logits,
        "logits_stride": stride, "route_scale": float(call.attrs["route_scale"]), "inverses": inverses,
    }  # fmt: skip
    return values, {"TOP_K": top_k, "SHARED": shared, "BLOCK_E": power(routed, 32)}


def sink_launch(call: Call, logits: Pointer, stride: int, inverses: Pointer | None) -> Launch:
    """The choice of each row."""
    values, fixed = sink_values(call, logits, stride, inverses)
    rows = call.rows(call.outputs[0])
    return launch("sink_router_kernel", (rows,), values, fixed, _warps(values["routed"]))


@lowering("router", "norm_router", "sink_router")
def lower_sink_router(call: Call) -> Lowered:
    if call.op == "sink_router":
        given = call.operand("logits")
        return Lowered((sink_launch(call, call.pointer(given), given.stride, None),))
    total, rows = call.operand("weight").shape[0], call.rows(call.operand("x"))
    scratch = Scratch()
    logits = scratch.piece("f32", rows * total)
    inverses = scratch.piece("f32", rows) if call.op == "norm_router" else None
    return scratch.lowered(logits_launch(call, logits, inverses), sink_launch(call, logits, total, inverses))


def topk_values(
    call: Call, logits: Pointer, stride: int, inverses: Pointer | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constexprs of the choice from logits with so many columns a row. Experts that could choose
    themselves lie in the same blocks here: so sums have the same bits."""
    routed = call.operand("logits").cols if call.op == "topk_router" else call.operand("weight").shape[0]
    call.need(routed <= MOST_EXPERTS, f"{routed} experts", f"up to {MOST_EXPERTS} are supported")
    top_k, groups, shared = (int(call.attrs.get(name, 0)) for name in ("top_k", "groups", "n_shared"))
    biases = {name: call.optional(name) for name in ("logit_bias", "bias")}
    values = _results(call, top_k + shared) | {
        "logits": logits, "inverses": inverses, "routed": routed, "each": routed // groups, "logits_stride": stride,
        "route_scale": float(call.attrs["scale"]),
        **{name: None if bias is None else call.pointer(bias) for name, bias in biases.items()},
    }  # fmt: skip
    block = 32 if ranks_itself(routed, groups) else power(routed, 32)
    fixed = {
        "SCORES": int(call.attrs["scores"]), "NORMALISE": bool(call.attrs["normalise"]), "GROUPS": groups,
        "TOP_GROUPS": int(call.attrs["top_groups"]), "TOP_K": top_k, "SHARED": shared, "PARTS": -(-routed // block),
        "BLOCK_E": block,
    }  # fmt: skip
    return values, fixed


def topk_launch(call: Call, logits: Pointer, stride: int, inverses: Pointer | None) -> Launch:
    """The choice of each row."""
    values, fixed = topk_values(call, logits, stride, inverses)
    rows = call.rows(call.outputs[0])
    return launch("topk_router_kernel", (rows,), values, fixed, _warps(values["routed"]))


@lowering("topk_router", "norm_topk_router")
def lower_topk_router(call: Call) -> Lowered:
    if call.op == "topk_router":
        given = call.operand("logits")
        return Lowered((topk_launch(call, call.pointer(given), given.stride, None),))
    count, rows = call.operand("weight").shape[0], call.rows(call.operand("x"))
    scratch = Scratch()
    logits, inverses = scratch.piece("f32", rows * count), scratch.piece("f32", rows)
    return scratch.lowered(logits_launch(call, logits, inverses), topk_launch(call, logits, count, inverses))


@lowering("append_experts")
def lower_append_experts(call: Call) -> Lowered:
    weights, experts = call.operand("weights"), call.operand("experts")
    top_k, each = weights.cols, weights.cols + int(call.attrs["count"])
    call.need(weights.stride == top_k == experts.stride, "routes are not dense")
    given = _results(call, each)
    values = {
        "weights_out": given["weights"], "experts_out": given["experts"], "weights": call.pointer(weights),
        "experts": call.pointer(experts, ("i32", "i64")), "top_k": top_k, "first": int(call.attrs["first"]),
        "each": each,
    }  # fmt: skip
    return Lowered((launch("append_experts_kernel", (call.rows(weights),), values, {"BLOCK": power(each, 32)}, 1),))

"""Routers: which experts a row uses and with what weights.

Logits are sums of float32 products, one for each row and expert, in an order that the width of a row decides; many
programs have a few experts each. The choice is a small program for each row: experts lie across its threads
(choice.py).
"""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.choice import (
    of_best_groups,
    ranked,
    sink_choice,
    store_sink_routes,
    store_topk_routes,
    topk_scores,
)
from tmlc.kernels.triton.launch import Aligned, Launch, Lowered, Pointer, Scratch
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.registry import Call, launch, lowering

MOST_EXPERTS = 1024
#: Routed experts among which the product of few rows chooses by itself: four for each thread of a warp, as every warp
#: does it alone.
MOST_RANKED = 128
#: What chooses the experts of a row: 0, 1 or 2 are topk_router's scores, this is sink_router.
SINKS = tl.constexpr(3)
#: Inputs that a program reads at once, and of them those of one warp (8 a thread of a row, and as many of an expert),
#: as long as it has no more warps than that.
MOST_INPUTS, WARP_INPUTS, MOST_WARPS = 8192, 256, 8
#: Programs from which one takes more experts, which share what it reads of a row, and then more rows.
ENOUGH_PROGRAMS, PLENTY_OF_PROGRAMS = 132, 1056


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
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_K: tl.constexpr,
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
    if norm is not None:
        extra = tl.program_id(0) - tl.cdiv(total, EXPERTS)
        if extra >= 0:
            row = begin + extra
            if row < rows:
                wide = normed_stride.to(tl.int64)
                norm_row(normed, inverses, x, norm, row, k, x_wide, wide, eps, PIECES, BLOCK_K)
            return
    ONE: tl.constexpr = EXPERTS * PIECES == 1
    if ONE:  # what it reads of weights, once for all rows
        own = tl.load(w + first * w_wide + inner, mask=(inner < k) & (first < total), other=0.0)
        if norm is not None:
            learned = tl.load(norm + inner, mask=inner < k, other=0.0)
    for turn in range(begin, tl.minimum(begin + per, rows), ROWS):
        found = tl.zeros((EXPERTS * ROWS,), tl.float32)
        for r in tl.static_range(ROWS):
            for e in tl.static_range(EXPERTS):
                acc = tl.zeros((BLOCK_K,), tl.float32)
                for piece in tl.static_range(PIECES):
                    at = piece * BLOCK_K + inner
                    read = (at < k) & (first + e < total) & (turn + r < rows)
                    if ONE:
                        wt = own
                    else:
                        wt = tl.load(w + (first + e) * w_wide + at, mask=read, other=0.0)
                    xt = tl.load(x + (turn + r) * x_wide + at, mask=read, other=0.0)
                    if norm is not None:
                        if ONE:
                            xt = xt * learned
                        else:
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
    fixed = {"EXPERTS": each, "ROWS": at_once, "PIECES": -(-k // block), "BLOCK_K": block}
    grid = (-(-total // each) + (0 if inverses is None else per), -(-rows // per))
    return launch("router_logits_kernel", grid, values, fixed, max(1, min(MOST_WARPS, block // WARP_INPUTS)))


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

"""Routers: which experts a row uses and with what weights, in one kernel where the logits fit a tile, ties to the
lowest index. A tile is [experts, 16 rows]; a NaN is the worst score."""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.elementwise import sigmoid
from tmlc.kernels.triton.launch import Lowered, Operand, Pointer
from tmlc.kernels.triton.linear import ROWS, exact_product, linear_launch, product_values
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.registry import Call, launch, lowering

#: Experts, shared ones too, up to which the logits are computed in the router's own kernel.
FUSED_EXPERTS, MOST_EXPERTS = 64, 1024


@device
def best_of(choice, taken, index):
    """Lowest index [1, cols] of the largest choice that is not taken, and that choice [cols]."""
    open_choice = tl.where(taken, float("-inf"), choice)
    best = tl.max(open_choice, 0)
    winner = tl.min(tl.where((open_choice == best[None, :]) & (taken == 0), index, 1 << 30), 0)
    return best, winner


@device
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@device
def sink_route(
    logits, weights, experts, bias, scale, row, live, routed, route_scale,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The choice by sigmoid + bias, and the softmax of the log-sigmoids of the chosen and the shared."""
    e = tl.arange(0, BLOCK_E)[:, None]
    index = e + tl.zeros((1, 16), tl.int32)
    choice = sigmoid(logits) + tl.load(bias + e, mask=e < routed, other=0.0)
    choice = tl.where(choice != choice, float("-inf"), choice)
    taken = index >= routed
    k = tl.arange(0, BLOCK_K)[:, None]
    chosen = tl.full((BLOCK_K, 16), float("-inf"), tl.float32)
    numbers = tl.zeros((BLOCK_K, 16), tl.int32)
    for i in range(TOP_K + SHARED):
        if i < TOP_K:
            _best, winner = best_of(choice, taken, index)
            taken = taken | (index == winner[None, :])
        else:
            winner = tl.zeros((16,), tl.int32) + (routed + i - TOP_K)
        logit = tl.sum(tl.where(index == winner[None, :], logits, 0.0), 0)
        chosen = tl.where(k == i, log_sigmoid(logit)[None, :], chosen)
        numbers = tl.where(k == i, winner[None, :], numbers)
    share = tl.exp(chosen - tl.max(chosen, 0)[None, :])
    share = share / tl.sum(share, 0)[None, :] * route_scale * tl.load(scale)
    store_routes(weights, experts, share, numbers, row, live, TOP_K + SHARED, BLOCK_K)


@device
def store_routes(weights, experts, share, numbers, row, live, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = tl.arange(0, BLOCK_K)[:, None]
    at = row.to(tl.int64)[None, :] * K + k
    mask = (k < K) & live[None, :]
    tl.store(weights + at, share, mask=mask)
    tl.store(experts + at, numbers.to(experts.dtype.element_ty), mask=mask)


@device
def router_kernel(
    weights, experts, x, w, bias, scale, rows, routed, k, w_stride, x_stride, route_scale,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_TOP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits x · Wᵀ in float32 and the choice from them; grid (tiles of 16 rows)."""
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    live = row < rows
    e = tl.arange(0, BLOCK_E)
    logits = exact_product(
        w, e.to(tl.int64) * w_stride, e < routed + SHARED, x, row.to(tl.int64) * x_stride, live, k, None,
        BLOCK_E, BLOCK_K, 16,
    )  # fmt: skip
    sink_route(logits, weights, experts, bias, scale, row, live, routed, route_scale, TOP_K, SHARED, BLOCK_E, BLOCK_TOP)


@device
def sink_router_kernel(
    weights, experts, logits, bias, scale, rows, routed, logits_stride, route_scale,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_TOP: tl.constexpr,
):  # fmt: skip
    """The choice from logits [rows, experts + shared]; grid (tiles of 16 rows)."""
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    live = row < rows
    e = tl.arange(0, BLOCK_E)
    values = tl.load(
        logits + row.to(tl.int64)[None, :] * logits_stride + e[:, None],
        mask=live[None, :] & (e < routed + SHARED)[:, None], other=0.0,
    )  # fmt: skip
    sink_route(values, weights, experts, bias, scale, row, live, routed, route_scale, TOP_K, SHARED, BLOCK_E, BLOCK_TOP)


@device
def topk_router_kernel(
    weights, experts, logits, bias, rows, count, each, logits_stride, scale,
    SCORES: tl.constexpr, NORMALISE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_TOP: tl.constexpr,
):  # fmt: skip
    """Top-k of softmax (0), sigmoid (1) or raw scores (2), of the best groups where there are groups."""
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    live = row < rows
    e = tl.arange(0, BLOCK_E)[:, None]
    index = e + tl.zeros((1, 16), tl.int32)
    known = e < count
    score = tl.load(
        logits + row.to(tl.int64)[None, :] * logits_stride + e, mask=live[None, :] & known, other=float("-inf")
    )
    if SCORES == 0:
        score = tl.exp(score - tl.max(score, 0)[None, :])
        score = score / tl.sum(score, 0)[None, :]
    elif SCORES == 1:
        score = sigmoid(score)
    choice = score
    if bias is not None:
        choice += tl.load(bias + e, mask=known, other=0.0)
    choice = tl.where(choice != choice, float("-inf"), choice)
    taken = (index >= count) | (index < 0)
    if GROUPS > 1:
        group = index // each
        closed = taken
        groups_taken = index >= GROUPS  # one row of the tile stands for a group
        sums = tl.full((BLOCK_E, 16), float("-inf"), tl.float32)
        for g in range(GROUPS):
            other = taken | (group != g)
            best, winner = best_of(choice, other, index)
            if each > 1:
                second, _index = best_of(choice, other | (index == winner[None, :]), index)
                best += second
            sums = tl.where(index == g, best[None, :], sums)
        closed = index >= 0
        for _turn in range(TOP_GROUPS):
            _best, winner = best_of(sums, groups_taken, index)
            groups_taken = groups_taken | (index == winner[None, :])
            closed = closed & (group != winner[None, :])
        taken = taken | closed
    k = tl.arange(0, BLOCK_TOP)[:, None]
    chosen = tl.full((BLOCK_TOP, 16), float("-inf") if SCORES == 2 else 0.0, tl.float32)
    numbers = tl.zeros((BLOCK_TOP, 16), tl.int32)
    for i in range(TOP_K):
        _best, winner = best_of(choice, taken, index)
        taken = taken | (index == winner[None, :])
        value = tl.sum(tl.where(index == winner[None, :], score, 0.0), 0)
        chosen = tl.where(k == i, value[None, :], chosen)
        numbers = tl.where(k == i, winner[None, :], numbers)
    if SCORES == 2:
        chosen = tl.exp(chosen - tl.max(chosen, 0)[None, :])
        chosen = chosen / tl.sum(chosen, 0)[None, :]
    if NORMALISE:
        total = tl.sum(chosen, 0)
        if SCORES == 1:
            total += 1e-20
        chosen = chosen / total[None, :]
    store_routes(weights, experts, chosen * scale, numbers, row, live, TOP_K, BLOCK_TOP)


def _results(call: Call, k: int) -> dict[str, Any]:
    weights, experts = call.outputs
    call.need(weights.stride == k == experts.stride, "the router's results are not dense")
    return {"weights": call.pointer(weights), "experts": call.pointer(experts, ("i32", "i64"))}


def _grid(call: Call) -> tuple[int]:
    return (-(-call.rows(call.outputs[0]) // ROWS),)


@lowering("router", "sink_router")
def lower_sink_router(call: Call) -> Lowered:
    top_k, shared = int(call.attrs["top_k"]), int(call.attrs["n_shared"])
    bias, scale = call.operand("bias"), call.operand("scale")
    routed = bias.cols * bias.rows[1]
    total, rows = routed + shared, call.rows(call.outputs[0])
    call.need(total <= MOST_EXPERTS, f"{total} experts", f"up to {MOST_EXPERTS} are supported")
    block = power(total, 16)
    values = _results(call, top_k + shared) | {
        "bias": call.pointer(bias), "scale": call.pointer(scale), "rows": rows, "routed": routed,
        "route_scale": float(call.attrs["route_scale"]),
    }  # fmt: skip
    fixed = {"TOP_K": top_k, "SHARED": shared, "BLOCK_E": block, "BLOCK_TOP": power(top_k + shared)}
    warps = 4 if block <= 128 else 8
    if call.op == "sink_router":
        logits: Operand | Pointer = call.operand("logits")
        values |= {"logits": call.pointer(call.operand("logits")), "logits_stride": call.operand("logits").stride}
        return Lowered((launch("sink_router_kernel", _grid(call), values, fixed, warps),))
    weight, x = call.operand("weight"), call.operand("x")
    call.need(weight.dtype == "f32", f"a router with weights of {weight.dtype}", "keep routers in f32")
    if total <= FUSED_EXPERTS:
        product, _, blocks = product_values(call, weight, "router", total)
        values |= {name: product[name] for name in ("w", "k", "w_stride")}
        values |= {"x": call.pointer(x), "x_stride": x.stride}
        fixed["BLOCK_K"] = blocks.block_k
        return Lowered((launch("router_kernel", _grid(call), values, fixed, warps, blocks.stages),))
    logits = Pointer("scratch", "", 0, "f32", rows * total * 4)
    values |= {"logits": logits, "logits_stride": total}
    first = linear_launch(call, logits, x, weight, out_stride=total)
    return Lowered((first, launch("sink_router_kernel", _grid(call), values, fixed, warps)), logits.nbytes)


@lowering("topk_router")
def lower_topk_router(call: Call) -> Lowered:
    logits, bias = call.operand("logits"), call.optional("bias")
    top_k, groups = int(call.attrs["top_k"]), int(call.attrs["groups"])
    call.need(logits.cols <= MOST_EXPERTS, f"{logits.cols} experts", f"up to {MOST_EXPERTS} are supported")
    values = _results(call, top_k) | {
        "logits": call.pointer(logits), "bias": None if bias is None else call.pointer(bias),
        "rows": call.rows(call.outputs[0]), "count": logits.cols, "each": logits.cols // groups,
        "logits_stride": logits.stride, "scale": float(call.attrs["scale"]),
    }  # fmt: skip
    block = power(logits.cols, 16)
    fixed = {
        "SCORES": int(call.attrs["scores"]), "NORMALISE": bool(call.attrs["normalise"]), "GROUPS": groups,
        "TOP_GROUPS": int(call.attrs["top_groups"]), "TOP_K": top_k, "BLOCK_E": block, "BLOCK_TOP": power(top_k),
    }  # fmt: skip
    return Lowered((launch("topk_router_kernel", _grid(call), values, fixed, 4 if block <= 128 else 8),))

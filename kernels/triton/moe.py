"""Experts, gathered by index inside the kernels: gate/up with the activation, then down with the weighted sum.

Few rows: a program has one (row, expert) pair and reads its expert's weights in place: nothing is gathered or
materialised, nothing is added atomically. Many rows: the pairs are sorted by expert first, and 16 of one expert share a
tile. A last kernel adds a row's experts up. Both sum in the same order, to the same bits.
"""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.conv import conv_launch
from tmlc.kernels.triton.elementwise import sigmoid
from tmlc.kernels.triton.launch import Aligned, Launch, Lowered, Operand, Pointer
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.overlap import prefetch_rows, previous
from tmlc.kernels.triton.products import (
    FEW_ROWS,
    ROWS,
    exact_product,
    lines,
    product_values,
    weight_product,
    weight_products,
)
from tmlc.kernels.triton.registry import Call, launch, lowering
from tmlc.kernels.triton.steps import tanh

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
def tile_pairs(
    experts, order, tile_first, tile_count, tile_expert, counts, n, per, top_k, count_e, index,
    GROUPED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(pairs [ROWS], which of them are there, their expert) of tile `index`; a pair is row·top_k + choice."""
    lane = tl.arange(0, ROWS)
    if GROUPED:
        held = lane < tl.load(tile_count + index)
        pair = tl.load(order + tl.load(tile_first + index) + lane, mask=held, other=0)
        expert = tl.load(tile_expert + index)
    else:
        row = index // top_k
        live = row % n < tl.load(counts + row // n) * per
        held = (lane == 0) & live
        pair = lane * 0 + index
        expert = tl.load(experts + index, mask=live, other=0).to(tl.int32)
        expert = tl.minimum(tl.maximum(expert, 0), count_e - 1)
    return pair, held, expert


@device
def moe_gate_up_kernel(
    hidden, x, w, scales, zeros, bias, experts, order, tile_first, tile_count, tile_expert, counts, n, per, top_k,
    count_e, f, k, w_stride, s_stride, x_stride, alpha, limit, gate_cap, up_cap,
    GROUPED: tl.constexpr, ACT: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """hidden[pair, f] = act(gate_e x, up_e x); grid (tiles of pairs, blocks of f)."""
    pair, held, expert = tile_pairs(
        experts, order, tile_first, tile_count, tile_expert, counts, n, per, top_k, count_e, tl.program_id(0),
        GROUPED, ROWS,
    )  # fmt: skip
    if tl.max(held.to(tl.int32), 0) == 0:
        return
    col = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = col < f
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
    result = gated(gate, up, alpha, limit, gate_cap, up_cap, ACT)
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
    parts, hidden, w, scales, zeros, bias, experts, order, tile_first, tile_count, tile_expert, counts, n, per, top_k,
    count_e, d, k, w_stride, s_stride,
    GROUPED: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """parts[pair, d] = down_e hidden[pair] + bias; grid (tiles of pairs, blocks of d)."""
    pair, held, expert = tile_pairs(
        experts, order, tile_first, tile_count, tile_expert, counts, n, per, top_k, count_e, tl.program_id(0),
        GROUPED, ROWS,
    )  # fmt: skip
    some = tl.max(held.to(tl.int32), 0) > 0
    col = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = col < d
    down_row = expert.to(tl.int64) * d + col
    if OVERLAP:  # what chose and sorted the experts had ended when the gate's kernel let this one begin
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
        pointer = Pointer("scratch", "", self.used, dtype, 4 * count)
        self.used += -(-4 * count // 256) * 256
        return pointer


def moe_launches(call: Call, scratch: _Scratch) -> tuple[list[Launch], Pointer]:
    """The experts of every row, and where their parts are, one behind the other: [rows·top_k, d]."""
    x, routes, experts = call.operand("x"), call.operand("weights"), call.operand("experts")
    gate_up, down = call.operand("gate_up"), call.operand("down")
    count_e, wide, d = gate_up.shape
    f, top_k, rows, n = wide // 2, routes.cols, call.rows(x), call.bucket.session_rows(x.rows)
    call.need(x.rows[0] > 0 == x.rows[1], f"rows {x.rows[0]}n+{x.rows[1]} belong to no positions")
    call.need(routes.stride == top_k == experts.stride, "routes are not dense")
    pairs = rows * top_k
    # Counted by positions of a session, and so the same for a session alone and in company; bits agree anyhow.
    grouped = rows >= (int(call.attrs["grouped_from"]) or GROUPED_FROM)
    hidden = scratch.piece("f32", pairs * f)
    biases = call.optional("gate_up_bias"), call.optional("down_bias")
    alpha, limit = float(call.attrs["alpha"]), float(call.attrs["limit"])
    caps = float(call.attrs["gate_cap"]), float(call.attrs["up_cap"])
    act = 2 if caps[0] > 0 else 1 if alpha > 0 else 0
    launches: list[Launch] = []
    common: dict[str, Any] = {"counts": call.counts, "n": n, "per": x.rows[0], "top_k": top_k}
    chosen = call.pointer(experts, ("i32", "i64"))
    tiles, lists = pairs, _no_lists()
    if grouped:
        tiles = pairs // 16 + count_e
        lists = {name: scratch.piece("i32", pairs if name == "order" else tiles) for name in lists}
        values = common | lists | {"experts": chosen, "pairs": pairs, "count_e": count_e}
        launches.append(launch("moe_sort_kernel", (count_e,), values, {"BLOCK": 1024}, 4))
    product, fixed, blocks = product_values(call, gate_up, "moe_gate_up", f)
    tile = {"GROUPED": grouped, "ROWS": ROWS if grouped else FEW_ROWS}
    chosen_by = common | lists | {"experts": chosen, "count_e": count_e}
    if grouped:
        chosen_by |= dict.fromkeys(("experts", "counts", "n", "per", "count_e"))
    values = product | chosen_by | {
        "hidden": hidden, "x": call.pointer(x), "x_stride": Aligned(x.stride), "f": Aligned(f), "top_k": top_k,
        "bias": None if biases[0] is None else call.pointer(biases[0]),
        "alpha": alpha if act == 1 else None, "limit": limit if act == 1 else None,
        "gate_cap": caps[0] if act == 2 else None, "up_cap": caps[1] if act == 2 else None,
    }  # fmt: skip
    grid = (tiles, -(-f // blocks.block_m))
    launches.append(
        launch("moe_gate_up_kernel", grid, values, fixed | tile | {"ACT": act}, blocks.warps, blocks.stages)
    )
    product, fixed, blocks = product_values(call, down, "moe_down", d)
    parts = scratch.piece("f32", pairs * d)
    values = product | chosen_by | {
        "parts": parts, "hidden": hidden, "d": Aligned(d), "top_k": None if grouped else top_k,
        "bias": None if biases[1] is None else call.pointer(biases[1]),
    }  # fmt: skip
    grid = (tiles, -(-d // blocks.block_m))
    tile |= {"LINES": lines(down, fixed), "OVERLAP": False}
    launches.append(launch("moe_down_kernel", grid, values, fixed | tile, blocks.warps, blocks.stages))
    return launches, parts


def combine_launch(
    call: Call, parts: Pointer, out: Operand | Pointer, addend: Operand | None, out_stride: int = 0
) -> Launch:
    """The weighted sum of the parts of each row's experts, and `addend` before it; `out` may be scratch with its
    stride."""
    x, routes, d = call.operand("x"), call.operand("weights"), call.operand("down").shape[1]
    block = min(1024, power(d, 32))
    values: dict[str, Any] = {
        "counts": call.counts, "n": call.bucket.session_rows(x.rows), "per": x.rows[0], "top_k": routes.cols,
        "parts": parts, "d": Aligned(d), "out": call.pointer(out) if isinstance(out, Operand) else out,
        "out_stride": Aligned(out.stride if isinstance(out, Operand) else out_stride),
        "addend": None if addend is None else call.pointer(addend),
        "addend_stride": None if addend is None else Aligned(addend.stride), "weights": call.pointer(routes),
    }  # fmt: skip
    return launch("moe_combine_kernel", (call.rows(x), -(-d // block)), values, {"BLOCK": block}, 4)


def _no_lists() -> dict[str, Pointer | None]:
    return dict.fromkeys(("order", "tile_first", "tile_count", "tile_expert"))


@lowering("moe", "moe_add")
def lower_moe(call: Call) -> Lowered:
    scratch = _Scratch()
    launches, parts = moe_launches(call, scratch)
    launches.append(combine_launch(call, parts, call.outputs[0], call.optional("addend")))
    return Lowered(tuple(launches), scratch.used)


@lowering("moe_conv_state")
def lower_moe_conv(call: Call) -> Lowered:
    """With one row a session the convolution adds the experts up itself; it would do so once a tap, so with more rows a
    kernel of its own does."""
    scratch, out = _Scratch(), call.outputs[0]
    launches, parts = moe_launches(call, scratch)
    source, shares = parts, call.operand("weights") if call.bucket.session_rows(out.rows) == 1 else None
    if shares is None:
        source = scratch.piece("f32", call.rows(out) * out.cols)
        launches.append(combine_launch(call, parts, source, None, out.cols))
    launches.append(
        conv_launch(
            call, out, (source, out.cols), call.operand("taps"), call.operand("tail"), call.attrs["residual"],
            level=call.attrs["level"], addend=call.optional("addend"), shares=shares,
        )
    )  # fmt: skip
    return Lowered(tuple(launches), scratch.used)

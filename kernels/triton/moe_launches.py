"""Which launches run experts (kernels in moe.py): two of few rows, with the router's logits one more, four of many."""

from dataclasses import replace
from typing import Any

from tmlc.kernels.triton.conv import conv_launch
from tmlc.kernels.triton.launch import Aligned, Launch, Lowered, Operand, Pointer, Scratch
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.products import FEW_ROWS, ROWS, product_values, tile_rows
from tmlc.kernels.triton.registry import Call, launch, lowering
from tmlc.kernels.triton.router import (
    SINKS,
    logits_launch,
    ranks_itself,
    sink_launch,
    sink_values,
    topk_launch,
    topk_values,
)
from tmlc.kernels.triton.row_conv import NO_CONV, RowConv
from tmlc.kernels.triton.tuning import turns_at_once

#: Rows from which on pairs are grouped where the program does not say (grouped_from 0).
GROUPED_FROM = 16
#: What `moe_gate_up_kernel` needs to choose the experts of a row: arguments and constexprs.
Choice = tuple[dict[str, Any], dict[str, Any]]
#: Experts that are given.
GIVEN: Choice = (
    dict.fromkeys(("weights", "logits", "inverses", "logit_bias", "learned", "scale", "routed", "route_scale")),
    {"SCORES": 0, "NORMALISE": False, "TOP_K": 0, "SHARED": 0, "PARTS": 0},
)


def grouped(call: Call) -> bool:
    """Whether a call's pairs are sorted by expert. Counted by positions of a session, and so the same for a session
    alone and in company; bits agree anyhow."""
    routes, rows = call.operand("weights"), call.rows(call.operand("x"))
    return routes.cols > ROWS or rows >= (int(call.attrs["grouped_from"]) or GROUPED_FROM)


def gate_up_launches(call: Call, scratch: Scratch, choice: Choice) -> tuple[list[Launch], Pointer, dict[str, Any]]:
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
    else:
        chosen |= _whose(call)
    product, fixed, blocks = product_values(call, weight, "moe_gate_up", f)
    fixed |= choice[1] | {"GROUPED": sort, "ROWS": ROWS if sort else FEW_ROWS, "ACT": act}
    values = product | chosen | lists | choice[0] | {
        "hidden": hidden, "x": call.pointer(x), "x_stride": Aligned(x.stride), "f": Aligned(f), "top_k": top_k,
        "bias": None if bias is None else call.pointer(bias),
        "alpha": alpha if act == 1 else None, "limit": limit if act == 1 else None,
        "gate_cap": caps[0] if act == 2 else None, "up_cap": caps[1] if act == 2 else None,
    }  # fmt: skip
    grid = (tiles, -(-f // blocks.block_m) + (choice is not GIVEN))
    launches.append(launch("moe_gate_up_kernel", grid, values, fixed, blocks.warps, blocks.stages))
    return launches, hidden, lists


def down_launch(call: Call, scratch: Scratch, hidden: Pointer, lists: dict[str, Any]) -> tuple[Launch, Pointer]:
    """The second product of sorted pairs, and where its results are, one behind the other: [rows·top_k, d]."""
    down, bias = call.operand("down"), call.optional("down_bias")
    d, pairs = down.shape[1], call.rows(call.operand("x")) * call.operand("weights").cols
    product, fixed, blocks = product_values(call, down, "moe_down", d)
    fixed |= {"ROWS": ROWS}
    parts = scratch.piece("f32", pairs * d)
    values = product | lists | {
        "parts": parts, "hidden": hidden, "d": Aligned(d), "bias": None if bias is None else call.pointer(bias),
    }  # fmt: skip
    grid = (pairs // 16 + down.shape[0], -(-d // blocks.block_m))
    return launch("moe_down_kernel", grid, values, fixed, blocks.warps, blocks.stages), parts


def _whose(call: Call) -> dict[str, Any]:
    """What tells kernels of few rows whose a row is: with one row a session its number does."""
    x = call.operand("x")
    n = call.bucket.session_rows(x.rows)
    return {"n": None, "per": None} if n == 1 else {"n": n, "per": x.rows[0]}


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
) -> Launch:  # fmt: skip
    """The second product and the weighted sum of few rows, and `addend` before it. `conv`: with one row a session."""
    down, bias, experts = call.operand("down"), call.optional("down_bias"), call.operand("experts")
    d, rows, top_k = down.shape[1], call.rows(call.operand("x")), call.operand("weights").cols
    product, fixed, blocks = product_values(call, down, "moe_down", d)
    convolution = NO_CONV if conv is None else conv.values(call, call.outputs[0], d, None)
    taps = {name: convolution[0][name] for name in ("taps", "tail", "slots", "start", "channels", "level")}
    values = product | taps | _sum_values(call, out, addend, out_stride) | _whose(call) | {
        "hidden": hidden, "bias": None if bias is None else call.pointer(bias), "count_e": down.shape[0],
        "experts": call.pointer(experts, ("i32", "i64")),
    }  # fmt: skip
    del fixed["ONCE"]  # the turns of all choices follow one another
    fixed |= {
        "TAPS": convolution[1]["TAPS"], "RESIDUAL": convolution[1]["RESIDUAL"], "TOP_K": top_k,
        "COLS": tile_rows(top_k),
    }  # fmt: skip
    grid = (rows, -(-d // blocks.block_m))
    stages = turns_at_once(down.dtype, blocks, fixed["SLICES"], top_k, grid[0] * grid[1], call.sm)
    return launch("moe_down_sum_kernel", grid, values, fixed, blocks.warps, stages)


def summed(
    call: Call, scratch: Scratch, out: Operand | None, addend: Operand | None = None, conv: RowConv | None = None,
    choice: Choice = GIVEN,
) -> tuple[list[Launch], Pointer | None]:  # fmt: skip
    """The experts of every row, added up: into `out`, or, where that is None, dense into scratch, and where there."""
    launches, hidden, lists = gate_up_launches(call, scratch, choice)
    cols = call.operand("down").shape[1]
    source = scratch.piece("f32", call.rows(call.operand("x")) * cols) if out is None else None
    to: Any = out if source is None else source
    if grouped(call):
        product, parts = down_launch(call, scratch, hidden, lists)
        launches += [product, combine_launch(call, parts, to, addend, cols)]
    else:
        launches.append(down_sum_launch(call, hidden, to, addend, cols, conv))
    return launches, source


@lowering("moe", "moe_add")
def lower_moe(call: Call) -> Lowered:
    scratch = Scratch()
    launches, _ = summed(call, scratch, call.outputs[0], call.optional("addend"))
    return scratch.lowered(*launches)


@lowering("moe_conv_state")
def lower_moe_conv(call: Call) -> Lowered:
    scratch = Scratch()
    return scratch.lowered(*convolved_launches(call, scratch, GIVEN))


def convolved_launches(call: Call, scratch: Scratch, choice: Choice) -> list[Launch]:
    """With one row a session whoever adds the experts up convolves; more rows are a kernel of their own."""
    out, addend = call.outputs[0], call.optional("addend")
    conv = RowConv(
        call.operand("taps"), call.operand("tail"), 0, bool(call.attrs["residual"]), float(call.attrs["level"])
    )
    if call.bucket.session_rows(out.rows) == 1 and conv.fits(call, out, 1) and not grouped(call):
        return summed(call, scratch, out, addend, conv, choice)[0]
    launches, source = summed(call, scratch, None, choice=choice)
    assert source is not None
    x = (source, out.cols)
    return [*launches, conv_launch(call, out, x, conv.taps, conv.tail, conv.residual, level=conv.level, addend=addend)]


@lowering("norm_moe_conv_state", "norm_topk_moe")
def lower_norm_moe(call: Call) -> Lowered:
    """Few rows and up to MOST_RANKED routed experts: the first product chooses them itself from the router's logits."""
    sinks = call.op == "norm_moe_conv_state"
    x, columns, shared = call.operand("x"), call.operand("weight").shape[0], int(call.attrs["n_shared"])
    routed = columns - shared if sinks else columns  # a top-k router has no logits of the shared ones
    held, count = call.operand("gate_up").shape[0], call.attrs["top_k"] + shared
    call.need(held >= routed + shared, f"a router chooses among {routed + shared} experts, and there are {held}")
    scratch = Scratch()
    made = (("f32", count), ("i32", count), ("f32", x.cols))
    *routes, normed = (scratch.operand(dtype, x.rows, cols, call.rows(x)) for dtype, cols in made)
    router = replace(call, op="norm_router" if sinks else "norm_topk_router", outputs=(*routes, normed))
    args = {"x": normed, "weights": routes[0], "experts": routes[1]}
    experts = replace(call, op="moe_conv_state" if sinks else "moe_add", args={**call.args, **args})
    logits, inverses = scratch.piece("f32", call.rows(x) * columns), scratch.piece("f32", call.rows(x))
    launches, choice = [logits_launch(router, logits, inverses)], GIVEN
    given = (router, logits, columns, inverses)
    if grouped(experts) or not ranks_itself(routed, int(call.attrs.get("groups", 1))):
        launches.append(sink_launch(*given) if sinks else topk_launch(*given))
    else:
        choice = _own(*(sink_values(*given) if sinks else topk_values(*given)))
    if sinks:
        return scratch.lowered(*launches, *convolved_launches(experts, scratch, choice))
    more, _ = summed(experts, scratch, call.outputs[0], call.optional("addend"), choice=choice)
    return scratch.lowered(*launches, *more)


def _own(values: dict[str, Any], fixed: dict[str, Any]) -> Choice:
    """What a router's kernel would take, as `moe_gate_up_kernel` takes it."""
    names, constants = GIVEN
    parts = {"SCORES": SINKS.value, "PARTS": -(-values["routed"] // 32)}
    return (
        {name: values.get("bias" if name == "learned" else name) for name in names},
        constants | parts | {name: value for name, value in fixed.items() if name in constants},
    )

"""Normalisation of rows: rms_norm over groups of columns, add_rms_norm, norms with steps behind them, norms of two
tensors at once, l2_clip. One program for each row and run of groups; a group is summed in one order that its width
decides."""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Lowered, Operand
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.registry import Call, launch, lowering
from tmlc.kernels.triton.steps import NO_STEPS, run_steps, steps_of

MOST_COLUMNS = 16384


@device
def head_sums(x):
    """Sums of x[groups, columns] over 4 to 256 columns, a power of two, as [groups], in an order that is written here:
    each sum is of two numbers, so no bit depends on which thread has which column, nor on columns of zeros behind. As
    the columns of a warp lie, four a thread, each step stays in a thread or is one exchange between two."""
    x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2)
    x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2)
    if x.shape[1] > 16:  # the halves of 256 columns are added up last
        x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 32, 2, 16)), 2)
    else:
        x = tl.reshape(x, (x.shape[0], 1, x.shape[1]))
    if x.shape[2] == 16:
        x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1], 2, 8)), 2)
    if x.shape[2] == 8:
        x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1], 2, 4)), 2)
    if x.shape[2] == 4:
        x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2)), 2)
    return tl.sum(tl.sum(x, 2), 1)


@device
def norm_scale(values, d, eps):
    """rsqrt(mean of squares + eps) of values[groups, columns], as [groups]. Of up to 256 columns the bits are the same
    in every kernel; where there are more a kernel has its own order."""
    squares = values * values
    if (squares.shape[1] < 4) | (squares.shape[1] > 256):
        sums = tl.sum(squares, 1)
    else:
        sums = head_sums(squares)
    return 1.0 / tl.sqrt_rn(sums / d + eps)


@device
def normed(values, learned, d, eps):
    """values[groups, columns]·norm_scale·learned."""
    return values * norm_scale(values, d, eps)[:, None] * learned[None, :]


@device
def rms_norm_kernel(
    out, total, x, residual, weight, groups, d, x_stride, residual_stride, out_stride, total_stride, eps,
    a, b, c, a_stride, b_stride, c_stride, number0, number1, number2,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """out = the steps on rms_norm(x (+ residual)), total = x + residual; grid (rows, runs of groups). Everything is
    asked for before anything is waited for."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inner = tl.arange(0, BLOCK)
    mask = (group < groups)[:, None] & (inner < d)[None, :]
    col = group[:, None] * d + inner[None, :]
    values = tl.load(x + row * x_stride + col, mask=mask, other=0.0)
    learned = tl.load(weight + inner, mask=inner < d, other=0.0)
    av, bv, cv = 0.0, 0.0, 0.0
    if a is not None:
        av = tl.load(a + row * a_stride + col, mask=mask, other=0.0)
    if b is not None:
        bv = tl.load(b + row * b_stride + col, mask=mask, other=0.0)
    if c is not None:
        cv = tl.load(c + row * c_stride + col, mask=mask, other=0.0)
    if residual is not None:
        values += tl.load(residual + row * residual_stride + col, mask=mask, other=0.0)
        tl.store(total + row * total_stride + col, values, mask=mask)
    result = run_steps(normed(values, learned, d, eps), av, bv, cv, number0, number1, number2, STEPS, COUNT)
    tl.store(out + row * out_stride + col, result, mask=mask)


@device
def rms_norm_pair_kernel(
    a_out, b_out, a, b, a_weight, b_weight, a_groups, b_groups, d, a_stride, b_stride, a_out_stride, b_out_stride,
    a_runs, eps,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a_out = rms_norm(a), b_out = rms_norm(b); grid (rows, runs of groups of a and then those of b)."""
    run = tl.program_id(1)
    if run < a_runs:
        norm_run(a_out, a, a_weight, a_groups, d, a_stride, a_out_stride, run, eps, GROUPS, BLOCK)
    else:
        norm_run(b_out, b, b_weight, b_groups, d, b_stride, b_out_stride, run - a_runs, eps, GROUPS, BLOCK)


@device
def norm_run(out, x, weight, groups, d, x_stride, out_stride, run, eps, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = run * GROUPS + tl.arange(0, GROUPS)
    inner = tl.arange(0, BLOCK)
    mask = (group < groups)[:, None] & (inner < d)[None, :]
    col = group[:, None] * d + inner[None, :]
    values = tl.load(x + row * x_stride + col, mask=mask, other=0.0)
    learned = tl.load(weight + inner, mask=inner < d, other=0.0)
    tl.store(out + row * out_stride + col, normed(values, learned, d, eps), mask=mask)


def power(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size`."""
    return max(least, 1 << (size - 1).bit_length())


@lowering("rms_norm", "add_rms_norm", "rms_norm_steps")
def lower_rms_norm(call: Call) -> Lowered:
    x, weight, residual = call.operand("x"), call.operand("weight"), call.optional("residual")
    total: Operand | None = call.outputs[0] if residual is not None else None
    out = call.outputs[-1]
    d = weight.cols
    call.need(x.cols % d == 0, f"{x.cols} columns are not groups of {d}")
    call.need(d <= MOST_COLUMNS, f"groups of {d} columns", f"up to {MOST_COLUMNS} fit into the registers of a program")
    groups, block = x.cols // d, power(d)
    steps, coded = steps_of(call) if "steps" in call.attrs else (NO_STEPS, {"STEPS": (), "COUNT": 0})
    run = min(power(groups), max(1, 1024 // block))
    values: dict[str, Any] = {
        "out": call.pointer(out), "x": call.pointer(x), "weight": call.pointer(weight), "groups": groups,
        "d": Aligned(d), "x_stride": Aligned(x.stride), "out_stride": Aligned(out.stride),
        "eps": float(call.attrs["eps"]),
        "total": None if total is None else call.pointer(total),
        "total_stride": None if total is None else Aligned(total.stride),
        "residual": None if residual is None else call.pointer(residual),
        "residual_stride": None if residual is None else Aligned(residual.stride),
        **steps,
    }  # fmt: skip
    warps = 1 if run * block <= 256 else 4 if run * block <= 4096 else 8
    grid = (call.rows(x), -(-groups // run))
    return Lowered((launch("rms_norm_kernel", grid, values, {"GROUPS": run, "BLOCK": block, **coded}, warps),))


@lowering("rms_norm_pair")
def lower_rms_norm_pair(call: Call) -> Lowered:
    """Few groups a program and one warp for them: a sum inside a warp needs no barrier."""
    a, b = call.operand("a"), call.operand("b")
    weights = call.operand("a_weight"), call.operand("b_weight")
    d = weights[0].cols
    call.need(d <= MOST_COLUMNS, f"groups of {d} columns", f"up to {MOST_COLUMNS} fit into the registers of a program")
    block = power(d)
    run = max(1, 256 // block)
    a_runs, b_runs = (-(-(x.cols // d) // run) for x in (a, b))
    values: dict[str, Any] = {"d": Aligned(d), "a_runs": a_runs, "eps": float(call.attrs["eps"])}
    for name, x, weight, out in zip("ab", (a, b), weights, call.outputs, strict=True):
        values |= {
            name: call.pointer(x), f"{name}_out": call.pointer(out), f"{name}_weight": call.pointer(weight),
            f"{name}_groups": x.cols // d, f"{name}_stride": Aligned(x.stride),
            f"{name}_out_stride": Aligned(out.stride),
        }  # fmt: skip
    warps = 1 if run * block <= 256 else 4 if block <= 4096 else 8
    grid = (call.rows(a), a_runs + b_runs)
    return Lowered((launch("rms_norm_pair_kernel", grid, values, {"GROUPS": run, "BLOCK": block}, warps),))

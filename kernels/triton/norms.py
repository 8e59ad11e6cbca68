"""Normalisation of rows: rms_norm over groups of columns, add_rms_norm, l2_clip. One program for each row and run of
groups; a group is summed in one order that its width decides."""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Lowered, Operand
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.registry import Call, launch, lowering

MOST_COLUMNS = 16384


@device
def rms_norm_kernel(
    out, total, x, residual, weight, groups, d, x_stride, residual_stride, out_stride, total_stride, eps,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = rms_norm(x (+ residual)), total = x + residual; grid (rows, runs of groups)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inner = tl.arange(0, BLOCK)
    mask = (group < groups)[:, None] & (inner < d)[None, :]
    col = group[:, None] * d + inner[None, :]
    values = tl.load(x + row * x_stride + col, mask=mask, other=0.0)
    if residual is not None:
        values += tl.load(residual + row * residual_stride + col, mask=mask, other=0.0)
        tl.store(total + row * total_stride + col, values, mask=mask)
    mean = tl.sum(values * values, 1) / d
    inverse = 1.0 / tl.sqrt_rn(mean + eps)
    learned = tl.load(weight + inner, mask=inner < d, other=0.0)
    tl.store(out + row * out_stride + col, values * inverse[:, None] * learned[None, :], mask=mask)


def power(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size`."""
    return max(least, 1 << (size - 1).bit_length())


@lowering("rms_norm", "add_rms_norm")
def lower_rms_norm(call: Call) -> Lowered:
    x, weight, residual = call.operand("x"), call.operand("weight"), call.optional("residual")
    total: Operand | None = call.outputs[0] if residual is not None else None
    out = call.outputs[-1]
    d = weight.cols
    call.need(x.cols % d == 0, f"{x.cols} columns are not groups of {d}")
    call.need(d <= MOST_COLUMNS, f"groups of {d} columns", f"up to {MOST_COLUMNS} fit into the registers of a program")
    groups, block = x.cols // d, power(d)
    run = min(power(groups), max(1, 1024 // block))
    values: dict[str, Any] = {
        "out": call.pointer(out), "x": call.pointer(x), "weight": call.pointer(weight), "groups": groups,
        "d": Aligned(d), "x_stride": Aligned(x.stride), "out_stride": Aligned(out.stride),
        "eps": float(call.attrs["eps"]),
        "total": None if total is None else call.pointer(total),
        "total_stride": None if total is None else Aligned(total.stride),
        "residual": None if residual is None else call.pointer(residual),
        "residual_stride": None if residual is None else Aligned(residual.stride),
    }  # fmt: skip
    warps = 1 if run * block <= 256 else 4 if run * block <= 4096 else 8
    grid = (call.rows(x), -(-groups // run))
    return Lowered((launch("rms_norm_kernel", grid, values, {"GROUPS": run, "BLOCK": block}, warps),))

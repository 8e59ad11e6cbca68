"""linear, and what fusing passes put before it (a norm, a modulation) and behind it (bias, scale, soft cap, a short
convolution, residual, elementwise steps)."""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Launch, Lowered, Operand, Pointer
from tmlc.kernels.triton.layouts import FORMS
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.parts import NO_COLUMNS, NO_PARTS, Parts
from tmlc.kernels.triton.products import (
    FEW_ROWS,
    normed_products,
    product_values,
    tile_rows,
    two_products,
    weight_product,
)
from tmlc.kernels.triton.registry import Call, launch, lowering
from tmlc.kernels.triton.row_conv import NO_CONV, RowConv, convolve_rows, rows_before, sessions_from, tails_before
from tmlc.kernels.triton.steps import NO_STEPS, arithmetic, run_steps, steps_of, tanh
from tmlc.kernels.triton.tuning import stages_that_fit


@device
def linear_kernel(
    out, x, norm, w, scales, zeros, bias, factor, addend, rows, m, k, w_stride, s_stride, x_stride, out_stride,
    addend_stride, alpha, cap, eps, a, b, c, a_stride, b_stride, c_stride, number0, number1, number2,
    gain, shift, gain_stride, shift_stride, taps, tail, slots, counts, start, channels, level,
    per, mixed, mixed_stride, part_m, part_l, part_acc, splits,
    FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, MASKED_K: tl.constexpr, ONCE: tl.constexpr, ALONE: tl.constexpr, STEPS: tl.constexpr,
    COUNT: tl.constexpr, TAPS: tl.constexpr, RESIDUAL: tl.constexpr, EACH: tl.constexpr, DV: tl.constexpr,
    PARTS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """out[rows, m] = addend + factor·(cap·tanh((alpha·x) · Wᵀ + bias)/cap)), and then the steps; with `norm` of
    rms_norm(x) in the place of alpha·x, or with `gain` and `shift` of rms_norm(x)∘(1 + gain) + shift; grid (tiles of
    rows, tiles of m). What the epilogue reads is asked for before the product, which hides the wait.

    With `taps` a tile has the EACH rows of its sessions, and before the addend comes their convolution of `channels`
    columns from `start` on (row_conv.py); with `mixed` it is one of the result, and goes there. With PARTS there is one
    row, and x is the sum of the parts of attention (parts.py). With GATED W has 2·m rows: silu of a product with one of
    the first m is multiplied by that with the row m behind it.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live, inside = row < rows, col < m
    wide_row, wide_col = row.to(tl.int64), col.to(tl.int64)
    if TAPS > 0:
        if EACH == 1:
            slot = tl.load(slots + row, mask=live, other=-1)
            some = tl.load(counts + row, mask=live, other=0) > 0
        else:
            sessions = sessions_from(tl.program_id(0) * (ROWS // EACH), slots, counts, rows // EACH, ROWS // EACH)
    mask = inside[:, None] & live[None, :]
    if bias is not None:
        biases = tl.load(bias + col, mask=inside, other=0.0)
        if GATED:
            biases_2 = tl.load(bias + m + col, mask=inside, other=0.0)
    if factor is not None:
        times = tl.load(factor)
    if addend is not None:
        added = tl.load(addend + wide_row[None, :] * addend_stride + col[:, None], mask=mask, other=0.0)
    av, bv, cv = 0.0, 0.0, 0.0
    if a is not None:
        av = tl.load(a + wide_row[None, :] * a_stride + col[:, None], mask=mask, other=0.0)
    if b is not None:
        bv = tl.load(b + wide_row[None, :] * b_stride + col[:, None], mask=mask, other=0.0)
    if c is not None:
        cv = tl.load(c + wide_row[None, :] * c_stride + col[:, None], mask=mask, other=0.0)
    if TAPS > 0:
        channel = col - start
        convolved = inside & (channel >= 0) & (channel < channels)
        if EACH == 1:
            held = convolved[:, None] & ((slot >= 0) & some)[None, :]
            tails = (tail + (slot // 4)[None, :] + channel[:, None], held)
            weights, before = rows_before(taps, tails[0], channel, convolved, held, channels, TAPS)
        else:
            weights, tails, before = tails_before(
                taps, tail, sessions, channel, convolved, channels, TAPS, ROWS // EACH
            )
    from_row, x_mask = wide_row, live
    if ALONE:
        from_row, x_mask = tl.program_id(0).to(tl.int64), tl.program_id(0) < rows
    if norm is not None:
        gain_off, shift_off = from_row, from_row
        if gain is not None:
            gain_off, shift_off = from_row * gain_stride, from_row * shift_stride
        y, y_2 = normed_products(
            w, scales, zeros, wide_col * w_stride, wide_col * s_stride, (wide_col + m) * w_stride,
            (wide_col + m) * s_stride, inside, x, norm, from_row * x_stride, x_mask, k, eps, gain, gain_off, shift,
            shift_off, GATED, FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, ROWS, MASKED_K, ONCE, ALONE,
        )  # fmt: skip
    elif GATED:
        y, y_2 = two_products(
            w, scales, zeros, wide_col * w_stride, wide_col * s_stride, (wide_col + m) * w_stride,
            (wide_col + m) * s_stride, inside, x, from_row * x_stride, x_mask, k, FORM, GROUP, SLICES, BLOCK_M,
            BLOCK_K, ROWS, MASKED_K, ONCE, ALONE,
        )  # fmt: skip
    else:
        x_off = from_row
        if PARTS == 0:
            x_off = from_row * x_stride
        y = weight_product(
            w, scales, zeros, wide_col * w_stride, wide_col * s_stride, inside, x, x_off, x_mask, k, alpha,
            FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, ROWS, MASKED_K, ONCE, ALONE, (part_m, part_l, part_acc, splits), DV,
            PARTS,
        )  # fmt: skip
    if bias is not None:
        y += biases[:, None]
        if GATED:
            y_2 += biases_2[:, None]
    if GATED:
        y = arithmetic(y, y_2, 0.0, 0.0, 0.0, "swiglu")
    if factor is not None:
        y *= times
    if cap is not None:
        y = cap * tanh(y / cap)
    if TAPS > 0 and mixed is None:
        y = convolve_rows(
            y, weights, tails, before, convolved, level, per, channels, RESIDUAL, TAPS, EACH, ROWS // EACH, BLOCK_M
        )
    if addend is not None:
        y = added + y
    y = run_steps(y, av, bv, cv, number0, number1, number2, STEPS, COUNT)
    if mixed is not None:
        z = convolve_rows(
            y, weights, tails, before, convolved, level, per, channels, RESIDUAL, TAPS, EACH, ROWS // EACH, BLOCK_M
        )
        tl.store(mixed + wide_row[None, :] * mixed_stride + col[:, None], z, mask=mask)
    tl.store(out + wide_row[None, :] * out_stride + col[:, None], y, mask=mask)


def linear_launch(
    call: Call,
    out: Operand | Pointer,
    x: Operand | Parts,
    weight: Operand,
    bias: Operand | None = None,
    factor: Operand | None = None,
    addend: Operand | None = None,
    alpha: float = 1.0,
    cap: float = 0.0,
    out_stride: int = 0,
    steps: tuple[dict[str, Any], dict[str, Any]] = (NO_STEPS, {"STEPS": (), "COUNT": 0}),
    conv: RowConv | None = None,
    mixed: Operand | None = None,
    gated: bool = False,
) -> Launch:
    """One product of all rows of x (of parts of attention, one); `out` may be a pointer to scratch, with its stride.
    `steps`: of `steps_of`. `conv`: one that fits; with `mixed` it goes there. `gated`: the weight has gates, and then
    as many ups. An op that norms its rows first names the weight of the norm `norm`, and `gain` and `shift` where it
    modulates them then."""
    m, k = weight.shape[-2:]
    if gated:
        call.need(m % 2 == 0, f"{m} rows of gates and ups")
        m //= 2
    call.need(len(weight.shape) == 2 and x.cols == k, f"{weight.name} {weight.shape} does not take {x.cols} columns")
    norm, rows = call.optional("norm"), 1 if isinstance(x, Parts) else call.rows(x)
    call.need(norm is None or norm.cols == k, f"the norm of {x.cols} columns is not of whole rows")
    gain, shift = call.optional("gain"), call.optional("shift")
    values, fixed, blocks = product_values(call, weight, "linear", m)
    # Gains and shifts of 16 rows do not fit into shared memory, nor their tails into the registers of few warps, nor
    # two products of codes beside the squares.
    two = gated and norm is not None and FORMS[weight.dtype].group > 0
    tile = FEW_ROWS if gain is not None or conv is not None or two else tile_rows(rows)
    alone = rows == 1 and fixed["FORM"] != "f32"
    fixed |= {"ROWS": tile, "ALONE": alone}
    values |= {
        "out": call.pointer(out) if isinstance(out, Operand) else out,
        "out_stride": out.stride if isinstance(out, Operand) else out_stride,
        "x": None if isinstance(x, Parts) else call.pointer(x),
        "x_stride": None if isinstance(x, Parts) else Aligned(x.stride), "rows": rows, "m": m,
        "bias": None if bias is None else call.pointer(bias),
        "factor": None if factor is None else call.pointer(factor),
        "addend": None if addend is None else call.pointer(addend),
        "addend_stride": None if addend is None else addend.stride,
        "alpha": None if alpha == 1.0 else float(alpha),
        "cap": None if cap == 0.0 else float(cap),
        "norm": None if norm is None else call.pointer(norm),
        "eps": None if norm is None else float(call.attrs["eps"]),
        "gain": None if gain is None else call.pointer(gain),
        "gain_stride": None if gain is None else Aligned(gain.stride),
        "shift": None if shift is None else call.pointer(shift),
        "shift_stride": None if shift is None else Aligned(shift.stride),
        **steps[0],
    }  # fmt: skip
    convolution = NO_CONV if conv is None else conv.values(call, call.outputs[0], m, mixed)
    values |= convolution[0] | (x.values if isinstance(x, Parts) else NO_PARTS)
    fixed |= steps[1] | convolution[1] | (x.fixed if isinstance(x, Parts) else NO_COLUMNS) | {"GATED": gated}
    form, stages = FORMS[weight.dtype], blocks.stages
    if norm is not None:
        held = weight.dtype != "i4g32"
        call.need(held, "weights of i4g32 leave no registers for a norm", "leave out fuse.norm_linear")
    if gated or (norm is not None and form.group):
        # Two products, or codes, their values, x and its squares of more rows of weights do not fit into the registers.
        fixed["BLOCK_M"] = min(16, blocks.block_m)
    if gated or norm is not None or isinstance(x, Parts):
        # What lies beside the weights and the rows: the norm's weight, gains, shifts; or parts in the place of rows.
        each = (2 if gated else 1) * fixed["BLOCK_M"] * form.bits // 8
        each += 4 * fixed["PARTS"] if isinstance(x, Parts) else (4 if gain is None else 12) * fixed["ROWS"]
        stages = stages_that_fit(stages, fixed["SLICES"] * blocks.block_k * (each + 4 * (norm is not None)), call.sm)
    grid = (-(-rows // fixed["ROWS"]), -(-m // fixed["BLOCK_M"]))
    return launch("linear_kernel", grid, values, fixed, blocks.warps, stages)


@lowering("linear", "linear_add")
def lower_linear(call: Call) -> Lowered:
    return Lowered(linear_launches(call))


def linear_launches(call: Call, parts: Parts | None = None) -> tuple[Launch]:
    """With `parts` these are x."""
    product = linear_launch(
        call, call.outputs[0], parts or call.operand("x"), call.operand("weight"), bias=call.optional("bias"),
        factor=call.optional("scale"), addend=call.optional("addend"),
    )  # fmt: skip
    return (product,)


@lowering("linear_swiglu")
def lower_linear_swiglu(call: Call) -> Lowered:
    product = linear_launch(
        call, call.outputs[0], call.operand("x"), call.operand("weight"), bias=call.optional("bias"), gated=True
    )
    return Lowered((product,))


@lowering("linear_steps")
def lower_linear_steps(call: Call) -> Lowered:
    product = linear_launch(
        call, call.outputs[0], call.operand("x"), call.operand("weight"), bias=call.optional("bias"),
        steps=steps_of(call),
    )  # fmt: skip
    return Lowered((product,))

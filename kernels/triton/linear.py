"""Products with weights of every form: linear, and what fusing passes put behind it.

One scheme for any number of rows: a tile of weight rows is the left operand of a dot whose right operand is always 16
rows of activations, summed over K in ascending blocks in float32. A row of the result is a column of that dot, so its
bits depend neither on the other rows nor on how many there are.
"""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Launch, Lowered, Operand, Pointer
from tmlc.kernels.triton.layouts import FORMS, weight_pointers
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.registry import Call, launch, lowering
from tmlc.kernels.triton.steps import NO_STEPS, run_steps, steps_of, tanh

ROWS = 16


@device
def fp8_value(byte):
    """bf16 value of e4m3 codes: exponent and mantissa moved into a float32, which is 2^120 too small. Needs no fp8
    instructions, so it runs on every architecture. Subnormal codes become subnormal float32 numbers, which the
    multiplication brings back exactly."""
    wide = byte.to(tl.int32)
    magnitude = ((wide & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(wide >= 128, -magnitude, magnitude).to(tl.bfloat16)


@device
def weight_product(
    w, scales, zeros, w_off, s_off, w_mask, x, x_off, x_mask, k, alpha,
    FORM: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, 16] = W[rows of w_off] · (alpha·x)[rows of x_off]ᵀ.

    w_off, s_off: int64 [BLOCK_M], where a row of codes and of scales begins; x_off: int64 [16].
    """
    acc = tl.zeros((BLOCK_M, 16), tl.float32)
    if FORM == "f32" or FORM == "bf16":
        for start in range(0, k, BLOCK_K):
            kk = start + tl.arange(0, BLOCK_K)
            inside = kk < k
            wt = tl.load(w + w_off[:, None] + kk[None, :], mask=w_mask[:, None] & inside[None, :], other=0.0)
            xt = tl.load(x + x_off[None, :] + kk[:, None], mask=x_mask[None, :] & inside[:, None], other=0.0)
            if alpha is not None:
                xt = xt * alpha
            if FORM == "f32":
                acc = tl.dot(wt, xt, acc, input_precision="ieee")
            else:
                acc = tl.dot(wt, xt.to(tl.bfloat16), acc)
    else:
        for start in range(0, k, BLOCK_K):
            for part in tl.static_range(BLOCK_K // GROUP):
                first = start + part * GROUP
                group = first // GROUP
                live = w_mask & (first < k)
                scale = tl.load(scales + s_off + group, mask=live, other=0.0).to(tl.float32)
                if FORM == "i4":
                    zero = tl.load(zeros + s_off + group, mask=live, other=0).to(tl.int32)
                    half = tl.arange(0, GROUP // 2)
                    byte = tl.load(w + w_off[:, None] + (first // 2 + half)[None, :], mask=live[:, None], other=0).to(
                        tl.int32
                    )
                    low = ((byte & 15) * 16 - zero[:, None]).to(tl.float32).to(tl.bfloat16)
                    high = ((byte >> 4) * 16 - zero[:, None]).to(tl.float32).to(tl.bfloat16)
                    below, above = first + half, first + GROUP // 2 + half
                    x_low = tl.load(x + x_off[None, :] + below[:, None], mask=x_mask[None, :] & (below < k)[:, None],
                                    other=0.0)  # fmt: skip
                    x_high = tl.load(x + x_off[None, :] + above[:, None], mask=x_mask[None, :] & (above < k)[:, None],
                                     other=0.0)  # fmt: skip
                    if alpha is not None:
                        x_low = x_low * alpha
                        x_high = x_high * alpha
                    part_sum = tl.dot(low, x_low.to(tl.bfloat16))
                    part_sum = tl.dot(high, x_high.to(tl.bfloat16), part_sum)
                    acc += part_sum * (scale * 0.0625)[:, None]
                else:
                    kk = first + tl.arange(0, GROUP)
                    byte = tl.load(w + w_off[:, None] + kk[None, :], mask=live[:, None], other=0)
                    xt = tl.load(x + x_off[None, :] + kk[:, None], mask=x_mask[None, :] & (kk < k)[:, None], other=0.0)
                    if alpha is not None:
                        xt = xt * alpha
                    if FORM == "i8":
                        value = (byte.to(tl.int32) - 128).to(tl.float32).to(tl.bfloat16)
                    else:
                        value = fp8_value(byte)
                    acc += tl.dot(value, xt.to(tl.bfloat16)) * scale[:, None]
    return acc


@device
def linear_kernel(
    out, x, w, scales, zeros, bias, factor, addend, rows, m, k, w_stride, s_stride, x_stride, out_stride,
    addend_stride, alpha, cap, a, b, c, a_stride, b_stride, c_stride, number0, number1, number2,
    FORM: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """out[rows, m] = addend + factor·(cap·tanh((alpha·x) · Wᵀ + bias)/cap)), and then the steps; grid (tiles of rows,
    tiles of m). What the epilogue reads is asked for before the product, which hides the wait."""
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    col = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live, inside = row < rows, col < m
    wide_row, wide_col = row.to(tl.int64), col.to(tl.int64)
    mask = inside[:, None] & live[None, :]
    if bias is not None:
        biases = tl.load(bias + col, mask=inside, other=0.0)
    if factor is not None:
        level = tl.load(factor)
    if addend is not None:
        added = tl.load(addend + wide_row[None, :] * addend_stride + col[:, None], mask=mask, other=0.0)
    av, bv, cv = 0.0, 0.0, 0.0
    if a is not None:
        av = tl.load(a + wide_row[None, :] * a_stride + col[:, None], mask=mask, other=0.0)
    if b is not None:
        bv = tl.load(b + wide_row[None, :] * b_stride + col[:, None], mask=mask, other=0.0)
    if c is not None:
        cv = tl.load(c + wide_row[None, :] * c_stride + col[:, None], mask=mask, other=0.0)
    y = weight_product(
        w, scales, zeros, wide_col * w_stride, wide_col * s_stride, inside, x, wide_row * x_stride, live, k, alpha,
        FORM, GROUP, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        y += biases[:, None]
    if factor is not None:
        y *= level
    if cap is not None:
        y = cap * tanh(y / cap)
    if addend is not None:
        y = added + y
    y = run_steps(y, av, bv, cv, number0, number1, number2, STEPS, COUNT)
    tl.store(out + wide_row[None, :] * out_stride + col[:, None], y, mask=mask)


def product_values(call: Call, weight: Operand) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constexprs of `weight_product` that depend on the weight; the caller adds the tile."""
    form = FORMS.get(weight.dtype)
    if form is None:
        raise call.fail(f"{weight.name}: no kernel reads weights of dtype {weight.dtype}", f"use {', '.join(FORMS)}")
    w, scales, zeros, w_stride, s_stride = weight_pointers(weight)
    values: dict[str, Any] = {
        "w": w, "scales": scales, "zeros": zeros, "w_stride": Aligned(w_stride),
        "s_stride": None if scales is None else Aligned(s_stride), "k": Aligned(weight.shape[-1]),
    }  # fmt: skip
    if scales is None:
        values["s_stride"] = Aligned(0)
    return values, {"FORM": form.family, "GROUP": form.group}


def linear_launch(
    call: Call,
    out: Operand | Pointer,
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    factor: Operand | None = None,
    addend: Operand | None = None,
    alpha: float = 1.0,
    cap: float = 0.0,
    out_stride: int = 0,
    steps: tuple[dict[str, Any], dict[str, Any]] = (NO_STEPS, {"STEPS": (), "COUNT": 0}),
) -> Launch:
    """One product of all rows of x; `out` may be a pointer to scratch, with its stride. `steps`: of `steps_of`."""
    m, k = weight.shape[-2:]
    call.need(len(weight.shape) == 2 and x.cols == k, f"{weight.name} {weight.shape} does not take {x.cols} columns")
    rows = call.rows(x)
    values, fixed = product_values(call, weight)
    blocks = call.blocks("linear", weight.dtype, m, k)
    values |= {
        "out": call.pointer(out) if isinstance(out, Operand) else out,
        "out_stride": out.stride if isinstance(out, Operand) else out_stride,
        "x": call.pointer(x), "x_stride": x.stride, "rows": rows, "m": m,
        "bias": None if bias is None else call.pointer(bias),
        "factor": None if factor is None else call.pointer(factor),
        "addend": None if addend is None else call.pointer(addend),
        "addend_stride": None if addend is None else addend.stride,
        "alpha": None if alpha == 1.0 else float(alpha),
        "cap": None if cap == 0.0 else float(cap),
        **steps[0],
    }  # fmt: skip
    grid = (-(-rows // ROWS), -(-m // blocks.block_m))
    fixed |= {"BLOCK_M": blocks.block_m, "BLOCK_K": blocks.block_k, **steps[1]}
    return launch("linear_kernel", grid, values, fixed, blocks.warps, blocks.stages)


@lowering("linear", "linear_add")
def lower_linear(call: Call) -> Lowered:
    product = linear_launch(
        call, call.outputs[0], call.operand("x"), call.operand("weight"), bias=call.optional("bias"),
        factor=call.optional("scale"), addend=call.optional("addend"),
    )  # fmt: skip
    return Lowered((product,))


@lowering("linear_steps")
def lower_linear_steps(call: Call) -> Lowered:
    product = linear_launch(
        call, call.outputs[0], call.operand("x"), call.operand("weight"), bias=call.optional("bias"),
        steps=steps_of(call),
    )  # fmt: skip
    return Lowered((product,))

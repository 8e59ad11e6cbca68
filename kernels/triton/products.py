"""Products of weights of every form with a few rows of activations: what the kernels of linears and of experts call.

One scheme for any number of rows: a tile of weight rows is the left operand of a dot whose right operand is a few rows
of activations. K is cut into slices; a warp sums its own, and they are added up at the end, so that a program has all
it reads on the way at once. A row of the result is a column of that dot, so its bits depend neither on the other rows
nor on how many there are.
"""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.activations import read_turn, there, turn_inputs
from tmlc.kernels.triton.codes import STEP, fp8_values, half_values, whole_values
from tmlc.kernels.triton.launch import Aligned, Operand
from tmlc.kernels.triton.layouts import FORMS, weight_pointers
from tmlc.kernels.triton.mode import COMPILED, device
from tmlc.kernels.triton.parts import add_parts, read_parts
from tmlc.kernels.triton.registry import Call
from tmlc.kernels.triton.tuning import Blocks, turn_constants

#: Rows of activations in a tile: where there are no more, and else. A row is a column of the same instructions in both.
FEW_ROWS, ROWS = 8, 16


@device
def add_squares(acc, high, low, ones):
    """acc [slices, BLOCK_M, rows] + Σ x² over the inputs of squares [slices, inputs, rows], the same number in all
    BLOCK_M: a product with ones, so a row's sum is in one order whatever the number of rows is, and lies where the
    row's products lie."""
    return tl.dot(ones, low, tl.dot(ones, high, acc))


@device
def group_numbers(scales, zeros, s_off, w_mask, first, k, FORM: tl.constexpr, GROUP: tl.constexpr):
    """Of the group that begins at input `first` of each slice what products with `slice_values` are multiplied by, and
    the zero point of 4-bit codes: [slices, BLOCK_M]."""
    mask = w_mask[None, :] & (first < k)[:, None]
    at = s_off[None, :] + (first // GROUP)[:, None]
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    if FORM != "f8":
        scale *= STEP
    if FORM == "i4":
        zero = tl.load(zeros + at, mask=mask, other=0)
    else:
        zero = scale
    return scale, zero


@device
def slice_values(w, w_off, w_mask, first, zero, FORM: tl.constexpr, BLOCK_K: tl.constexpr, MASKED_K: tl.constexpr):
    """(bf16 [slices, BLOCK_M, inputs] of each slice's inputs: of 4-bit codes those of the first half of a group; of
    4-bit codes those of the second half, else the first again; what was loaded). Codes have no scale yet."""
    if FORM == "bf16":
        kk = (first[:, None] + tl.arange(0, BLOCK_K)[None, :])[:, None, :]
        mask = there(w_mask[None, :, None], kk, MASKED_K)
        loaded = tl.load(w + w_off[None, :, None] + kk, mask=mask, other=0.0)
        low = loaded
        high = low
    else:
        mask = there(w_mask[None, :, None], first[:, None, None], MASKED_K)  # groups are whole
        if FORM == "i4":
            at = (first // 2)[:, None] + tl.arange(0, BLOCK_K // 2)[None, :]
            loaded = tl.load(w + w_off[None, :, None] + at[:, None, :], mask=mask, other=0)
            low, high = half_values(loaded, zero)
        else:
            kk = first[:, None] + tl.arange(0, BLOCK_K)[None, :]
            loaded = tl.load(w + w_off[None, :, None] + kk[:, None, :], mask=mask, other=0)
            if FORM == "i8":
                low = whole_values(loaded)
            else:
                low = fp8_values(loaded)
            high = low
    return low, high, loaded


@device
def slice_products(
    acc, squares, moved, w, w_off, w_mask, first, scale, zero, low, high,
    SQUARES: tl.constexpr, SHIFT: tl.constexpr, FORM: tl.constexpr, BLOCK_K: tl.constexpr, MASKED_K: tl.constexpr,
):  # fmt: skip
    """acc [slices, BLOCK_M, rows] + W·x of each slice's inputs, with SQUARES squares + Σ x², with SHIFT moved +
    W·shift. low: of `inputs`; of 4-bit codes low and high are the halves of a group. Codes are
    multiplied as they are, and the product by their scale."""
    low_x, low_square, low_rest, low_shift = low
    high_x, high_square, high_rest, high_shift = high
    low_value, high_value, loaded = slice_values(w, w_off, w_mask, first, zero, FORM, BLOCK_K, MASKED_K)
    if FORM == "bf16":
        acc = tl.dot(low_value, low_x, acc)
        if SHIFT:
            moved = tl.dot(low_value, low_shift, moved)
        if SQUARES:
            squares = add_squares(
                squares, low_square, low_rest, tl.full(low_value.shape, 1.0, tl.float32).to(tl.bfloat16)
            )
    else:
        if FORM == "i4":
            part = tl.dot(high_value, high_x, tl.dot(low_value, low_x))
            acc += part * scale[:, :, None]
            if SHIFT:
                part = tl.dot(high_value, high_shift, tl.dot(low_value, low_shift))
                moved += part * scale[:, :, None]
        else:
            acc += tl.dot(low_value, low_x) * scale[:, :, None]
            if SHIFT:
                moved += tl.dot(low_value, low_shift) * scale[:, :, None]
        if SQUARES:
            # Triton lays the operands of a dot out by the width of what was loaded for them. Ones that seem to come
            # from the codes let x lie alike for both dots; else it is not copied asynchronously.
            ones = ((loaded | 1) & 1).to(tl.bfloat16)
            squares = add_squares(squares, low_square, low_rest, ones)
            if FORM == "i4":
                squares = add_squares(squares, high_square, high_rest, ones)
    return acc, squares, moved


@device
def add_two(a, b, x, y):
    return a + x, b + y


@device
def add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@device
def sums_of_two(a, b):
    """The sums of both over their slices, made together: each by itself would exchange and wait as often as both."""
    if COMPILED:
        sums = tl.reduce((a, b), 0, add_two)
    else:
        sums = tl.sum(a, 0), tl.sum(b, 0)
    return sums


@device
def sums_of_three(a, b, c):
    if COMPILED:
        sums = tl.reduce((a, b, c), 0, add_three)
    else:
        sums = tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0)
    return sums


@device
def sliced_products(
    w, scales, zeros, w_off, s_off, w_off_2, s_off_2, w_mask, x, x_off, x_mask, k, alpha, norm,
    gain, gain_off, shift, shift_off, parts,
    TWO: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, MASKED_K: tl.constexpr, ONCE: tl.constexpr, ALONE: tl.constexpr,
    DV: tl.constexpr = 0, PARTS: tl.constexpr = 0,
):  # fmt: skip
    """float32 [BLOCK_M, ROWS] = W[rows of w_off] · (alpha·norm∘x∘(1 + gain))[rows of x_off]ᵀ, with TWO the same of
    w_off_2, with `norm` the sums of squares of x, and with `shift` W·shiftᵀ. A number of the last three that is not
    asked for is the first again. With PARTS x is one row, the sum of `parts` (parts.py).

    w_off, s_off: int64 [BLOCK_M], where a row of codes and of scales begins; x_off, x_mask, gain_off and shift_off are
    [ROWS], with ALONE of the only row. SLICES·BLOCK_K inputs are read at a time, with ONCE all of them; MASKED_K is k
    where the last turn is not whole, else 0. Not for f32.
    """
    acc = tl.zeros((SLICES, BLOCK_M, ROWS), tl.float32)
    acc_2 = tl.zeros((SLICES, BLOCK_M, ROWS), tl.float32)
    squares = tl.zeros((SLICES, BLOCK_M, ROWS), tl.float32)
    moved = tl.zeros((SLICES, BLOCK_M, ROWS), tl.float32)
    first = tl.arange(0, SLICES) * BLOCK_K
    scale, zero = first, first
    scale_2, zero_2 = first, first
    if FORM != "bf16":
        scale, zero = group_numbers(scales, zeros, s_off, w_mask, first, k, FORM, GROUP)
        if TWO:
            scale_2, zero_2 = group_numbers(scales, zeros, s_off_2, w_mask, first, k, FORM, GROUP)
    HALF: tl.constexpr = BLOCK_K // 2 if FORM == "i4" else BLOCK_K
    low_row, high_row = first, first
    if ALONE:  # asked for before the turn's weights, and used behind them: that takes no shared memory
        low_row, high_row = read_turn(
            x, x_off, x_mask, first, k, norm, gain, gain_off, shift, shift_off, parts, FORM == "i4", DV, PARTS, HALF,
            MASKED_K,
        )  # fmt: skip
    for start in range(0, k, SLICES * BLOCK_K):
        first = start + tl.arange(0, SLICES) * BLOCK_K
        # Scales and the only row come one turn ahead: asked for behind the codes, they would be waited for.
        now, now_2 = scale, scale_2
        at, at_2 = zero, zero_2
        low_now, high_now = low_row, high_row
        following = first + SLICES * BLOCK_K
        if ALONE and not ONCE:
            more = x_mask & (following < k)[:, None]
            low_row, high_row = read_turn(
                x, x_off, more, following, k, norm, gain, gain_off, shift, shift_off, parts, FORM == "i4", DV, PARTS,
                HALF, MASKED_K,
            )  # fmt: skip
        if FORM != "bf16" and not ONCE:
            scale, zero = group_numbers(scales, zeros, s_off, w_mask, following, k, FORM, GROUP)
            if TWO:
                scale_2, zero_2 = group_numbers(scales, zeros, s_off_2, w_mask, following, k, FORM, GROUP)
        low = turn_inputs(
            low_now, x, x_off, x_mask, first, alpha, norm, gain, gain_off, shift, shift_off, PARTS, HALF, MASKED_K,
            ALONE, ROWS,
        )  # fmt: skip
        high = low
        if FORM == "i4":
            high = turn_inputs(
                high_now, x, x_off, x_mask, first + HALF, alpha, norm, gain, gain_off, shift, shift_off, PARTS, HALF,
                MASKED_K, ALONE, ROWS,
            )  # fmt: skip
        acc, squares, moved = slice_products(
            acc, squares, moved, w, w_off, w_mask, first, now, at, low, high,
            norm is not None, shift is not None, FORM, BLOCK_K, MASKED_K,
        )  # fmt: skip
        if TWO:
            acc_2, squares, moved = slice_products(
                acc_2, squares, moved, w, w_off_2, w_mask, first, now_2, at_2, low, high,
                False, False, FORM, BLOCK_K, MASKED_K,
            )  # fmt: skip
    tl.static_assert(not TWO or shift is None)
    total = acc
    total_2, square, added = total, total, total
    if TWO and norm is not None:
        total, total_2, square = sums_of_three(acc, acc_2, squares)
    elif TWO:
        total, total_2 = sums_of_two(acc, acc_2)
    elif shift is not None:
        total, square, added = sums_of_three(acc, squares, moved)
    elif norm is not None:
        total, square = sums_of_two(acc, squares)
    else:
        total = tl.sum(acc, 0)
    return total, total_2, square, added


@device
def weight_products(
    w, scales, zeros, w_off, s_off, w_off_2, s_off_2, w_mask, x, x_off, x_mask, k, alpha,
    TWO: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, MASKED_K: tl.constexpr, ONCE: tl.constexpr, ALONE: tl.constexpr,
    parts=None, DV: tl.constexpr = 0, PARTS: tl.constexpr = 0,
):  # fmt: skip
    """`sliced_products` of rows that are not normed."""
    total, total_2, _, _ = sliced_products(
        w, scales, zeros, w_off, s_off, w_off_2, s_off_2, w_mask, x, x_off, x_mask, k, alpha, None,
        None, x_off, None, x_off, parts, TWO, FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, ROWS, MASKED_K, ONCE, ALONE,
        DV, PARTS,
    )  # fmt: skip
    return total, total_2


@device
def exact_product(
    w, w_off, w_mask, x, x_off, x_mask, k, alpha,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    parts=None, DV: tl.constexpr = 0, PARTS: tl.constexpr = 0,
):  # fmt: skip
    """The product with f32 weights, of float32 numbers: K in ascending blocks."""
    acc = tl.zeros((BLOCK_M, ROWS), tl.float32)
    for start in range(0, k, BLOCK_K):
        kk = start + tl.arange(0, BLOCK_K)
        inside = kk < k
        values = tl.load(w + w_off[:, None] + kk[None, :], mask=w_mask[:, None] & inside[None, :], other=0.0)
        if PARTS > 0:
            row = add_parts(
                read_parts(parts, start + tl.arange(0, 1), k, DV, PARTS, BLOCK_K), PARTS, BLOCK_K
            )
            rows = tl.where(x_mask[None, :] & inside[:, None], tl.trans(row, 1, 0), 0.0)
        else:
            rows = tl.load(x + x_off[None, :] + kk[:, None], mask=x_mask[None, :] & inside[:, None], other=0.0)
        if alpha is not None:
            rows = rows * alpha
        acc = tl.dot(values, rows, acc, input_precision="ieee")
    return acc


@device
def weight_product(
    w, scales, zeros, w_off, s_off, w_mask, x, x_off, x_mask, k, alpha,
    FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, MASKED_K: tl.constexpr, ONCE: tl.constexpr, ALONE: tl.constexpr, parts=None,
    DV: tl.constexpr = 0, PARTS: tl.constexpr = 0,
):  # fmt: skip
    """float32 [BLOCK_M, ROWS] = W[rows of w_off] · (alpha·x)[rows of x_off]ᵀ, weights of any form; with PARTS the one
    row of x is the sum of `parts` (parts.py)."""
    if FORM == "f32":
        y = exact_product(
            w, w_off, w_mask, x, x_off, x_mask, k, alpha, BLOCK_M, BLOCK_K, ROWS, parts, DV, PARTS
        )
    else:
        y, _ = weight_products(
            w, scales, zeros, w_off, s_off, w_off, s_off, w_mask, x, x_off, x_mask, k, alpha,
            False, FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, ROWS, MASKED_K, ONCE, ALONE, parts, DV, PARTS,
        )  # fmt: skip
    return y


@device
def two_products(
    w, scales, zeros, w_off, s_off, w_off_2, s_off_2, w_mask, x, x_off, x_mask, k,
    FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, MASKED_K: tl.constexpr, ONCE: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """`weight_product` of the rows of w_off, and of those of w_off_2."""
    if FORM == "f32":
        y = exact_product(w, w_off, w_mask, x, x_off, x_mask, k, None, BLOCK_M, BLOCK_K, ROWS)
        y_2 = exact_product(w, w_off_2, w_mask, x, x_off, x_mask, k, None, BLOCK_M, BLOCK_K, ROWS)
    else:
        y, y_2 = weight_products(
            w, scales, zeros, w_off, s_off, w_off_2, s_off_2, w_mask, x, x_off, x_mask, k, None,
            True, FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, ROWS, MASKED_K, ONCE, ALONE,
        )  # fmt: skip
    return y, y_2


@device
def exact_normed_product(
    w, w_off, w_mask, x, norm, x_off, x_mask, k, gain, gain_off, shift, shift_off,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`exact_product` of norm∘x∘(1 + gain), the sums of squares of x, and the product of the shift (0 without one)."""
    acc, squares = tl.zeros((BLOCK_M, ROWS), tl.float32), tl.zeros((BLOCK_M, ROWS), tl.float32)
    moved = tl.zeros((BLOCK_M, ROWS), tl.float32)
    ones = tl.full((BLOCK_M, BLOCK_K), 1.0, tl.float32)
    for start in range(0, k, BLOCK_K):
        kk = start + tl.arange(0, BLOCK_K)
        inside = kk < k
        values = tl.load(w + w_off[:, None] + kk[None, :], mask=w_mask[:, None] & inside[None, :], other=0.0)
        rows = tl.load(x + x_off[None, :] + kk[:, None], mask=x_mask[None, :] & inside[:, None], other=0.0)
        taken = rows * tl.load(norm + kk, mask=inside, other=0.0)[:, None]
        mask = x_mask[None, :] & inside[:, None]
        if gain is not None:
            taken = taken * (1.0 + tl.load(gain + gain_off[None, :] + kk[:, None], mask=mask, other=0.0))
        acc = tl.dot(values, taken, acc, input_precision="ieee")
        squares = tl.dot(ones, rows * rows, squares, input_precision="ieee")
        if shift is not None:
            added = tl.load(shift + shift_off[None, :] + kk[:, None], mask=mask, other=0.0)
            moved = tl.dot(values, added, moved, input_precision="ieee")
    return acc, squares, moved


@device
def normed_products(
    w, scales, zeros, w_off, s_off, w_off_2, s_off_2, w_mask, x, norm, x_off, x_mask, k, eps,
    gain, gain_off, shift, shift_off,
    TWO: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, MASKED_K: tl.constexpr, ONCE: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, ROWS] = W[rows of w_off] · (rms_norm(x; norm, eps)∘(1 + gain) + shift)[rows of x_off]ᵀ, weights
    of any form: the product of norm∘x∘(1 + gain), at the end times one number for each row, and that of the shift. With
    TWO also the product of the rows of w_off_2, without gain and shift; else that is the first again."""
    if FORM == "f32":
        y, square, moved = exact_normed_product(
            w, w_off, w_mask, x, norm, x_off, x_mask, k, gain, gain_off, shift, shift_off, BLOCK_M, BLOCK_K, ROWS
        )
        y_2 = y
        if TWO:
            y_2, _, _ = exact_normed_product(
                w, w_off_2, w_mask, x, norm, x_off, x_mask, k, None, gain_off, None, shift_off, BLOCK_M, BLOCK_K, ROWS
            )
    else:
        y, y_2, square, moved = sliced_products(
            w, scales, zeros, w_off, s_off, w_off_2, s_off_2, w_mask, x, x_off, x_mask, k, None, norm,
            gain, gain_off, shift, shift_off, None, TWO, FORM, GROUP, SLICES, BLOCK_M, BLOCK_K, ROWS, MASKED_K,
            ONCE, ALONE,
        )  # fmt: skip
    inverse = tl.rsqrt(square * (1.0 / k) + eps)
    y, y_2 = y * inverse, y_2 * inverse
    if shift is not None:
        y += moved
    return y, y_2


def product_values(
    call: Call, weight: Operand, op: str, m: int
) -> tuple[dict[str, Any], dict[str, Any], Blocks]:
    """Arguments and constexprs of `weight_product` that depend on the weight, and its block sizes, for an op of the
    table with m rows of weights; the caller adds ROWS."""
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
    k = weight.shape[-1]
    blocks = call.blocks(op, weight.dtype, m, k)
    return values, {
        "FORM": form.family, "GROUP": form.group, "BLOCK_M": blocks.block_m, "BLOCK_K": blocks.block_k,
        **turn_constants(weight.dtype, k, blocks.block_k, call.sm),
    }, blocks  # fmt: skip


def tile_rows(rows: int) -> int:
    """Rows of activations in a tile, for a call with so many."""
    return FEW_ROWS if rows <= FEW_ROWS else ROWS

"""Activations of a turn of a product, as its dots take them: scaled, normed or modulated in float32, and then bf16."""

import triton.language as tl

from tmlc.kernels.triton.mode import device, held
from tmlc.kernels.triton.parts import add_parts, read_parts


@device
def there(mask, kk, MASKED_K: tl.constexpr):
    """`mask`, and where turns are not whole that of the first MASKED_K inputs; kk: the inputs, of axes that mask has
    too. Masks of single copies take five instructions beside each, but for those that the compiler can tell."""
    if MASKED_K > 0:
        mask = mask & (kk < MASKED_K)
    return mask


@device
def taken_values(values, weights, gains, alpha, norm, gain):
    """float32 of the shape of values: alpha·weights∘values∘(1 + gains), of what is there of alpha, norm and gain."""
    taken = values
    if norm is not None:
        taken = values * weights
    if gain is not None:
        taken = taken * (1.0 + gains)
    if alpha is not None:
        taken = taken * alpha
    return taken


@device
def square_halves(values):
    """Squares in two parts that hold 16 of their bits when they are rounded to bf16: their upper halves, which stay as
    they are (rounded here, they would take a slow conversion of single numbers to be subtracted), and the rest."""
    squares = values * values
    high = (squares.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high, squares - high


@device
def read_alone(
    x, x_off, x_mask, first, k, norm, gain, gain_off, shift, shift_off, parts,
    DV: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr, MASKED_K: tl.constexpr,
):  # fmt: skip
    """What `alone_inputs` takes: the only row, float32 [slices, BLOCK_K] from first [slices] on, or its parts; the
    norm's weight, gain and shift, and of those that are not there the first again. x_mask: of the row, or of each slice
    [slices, 1]."""
    kk = first[:, None] + tl.arange(0, BLOCK_K)[None, :]
    mask = there(tl.full(kk.shape, 1, tl.int1) & x_mask, kk, MASKED_K)
    if PARTS > 0:
        values = read_parts(parts, first, k, DV, PARTS, BLOCK_K)
    else:
        values = tl.load(x + x_off + kk, mask=mask, other=0.0)
    weights, gains, shifts = values, values, values
    if norm is not None:
        weights = tl.load(norm + kk, mask=mask, other=0.0)
    if gain is not None:
        gains = tl.load(gain + gain_off + kk, mask=mask, other=0.0)
    if shift is not None:
        shifts = tl.load(shift + shift_off + kk, mask=mask, other=0.0)
    return values, weights, gains, shifts


@device
def read_turn(
    x, x_off, x_mask, first, k, norm, gain, gain_off, shift, shift_off, parts,
    HALVES: tl.constexpr, DV: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr, MASKED_K: tl.constexpr,
):  # fmt: skip
    """`read_alone`, and with HALVES also of the BLOCK_K inputs behind those; else the first again."""
    low = read_alone(
        x, x_off, x_mask, first, k, norm, gain, gain_off, shift, shift_off, parts, DV, PARTS, BLOCK_K, MASKED_K
    )
    high = low
    if HALVES:
        high = read_alone(
            x, x_off, x_mask, first + BLOCK_K, k, norm, gain, gain_off, shift, shift_off, parts, DV, PARTS, BLOCK_K,
            MASKED_K,
        )  # fmt: skip
    return low, high


@device
def columns(row, ROWS: tl.constexpr):
    """bf16 [slices, inputs, ROWS], each column the only row [slices, inputs]."""
    return tl.broadcast_to(row.to(tl.bfloat16)[:, :, None], (row.shape[0], row.shape[1], ROWS))


@device
def alone_inputs(
    read, first, alpha, norm, gain, shift,
    PARTS: tl.constexpr, BLOCK_K: tl.constexpr, MASKED_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`inputs` of the only row, each column the same. It is made by threads that have inputs of their own: a dot's
    operand has a thread for each input and column, which would make all of them."""
    values, weights, gains, shifts = read
    if PARTS > 0:
        values = add_parts(values, PARTS, BLOCK_K)
        if MASKED_K > 0:
            kk = first[:, None] + tl.arange(0, BLOCK_K)[None, :]
            values = tl.where(kk < MASKED_K, values, 0.0)
    else:
        values = held(values)
    if norm is not None:
        weights = held(weights)
    if gain is not None:
        gains = held(gains)
    rounded = columns(taken_values(values, weights, gains, alpha, norm, gain), ROWS)
    high, low, added = rounded, rounded, rounded
    if norm is not None:
        high, low = square_halves(values)
        high, low = columns(high, ROWS), columns(low, ROWS)
    if shift is not None:
        added = columns(held(shifts), ROWS)
    return rounded, high, low, added


@device
def inputs(
    x, x_off, x_mask, first, alpha, norm, gain, gain_off, shift, shift_off,
    BLOCK_K: tl.constexpr, MASKED_K: tl.constexpr,
):  # fmt: skip
    """bf16 [slices, inputs, rows] of the BLOCK_K inputs from first [slices] on: alpha·norm∘x∘(1 + gain), the two halves
    of x² where there is a norm, and the shift. What is not asked for is the first again."""
    kk = (first[:, None] + tl.arange(0, BLOCK_K)[None, :])[:, None, :]
    mask = there(x_mask[None, :, None], kk, MASKED_K)
    values = tl.load(x + x_off[None, :, None] + kk, mask=mask, other=0.0)
    weights, gains = values, values
    if norm is not None:
        weights = tl.load(norm + kk, mask=there(tl.full((1, 1, 1), 1, tl.int1), kk, MASKED_K), other=0.0)
    if gain is not None:
        gains = tl.load(gain + gain_off[None, :, None] + kk, mask=mask, other=0.0)
    rounded = tl.trans(taken_values(values, weights, gains, alpha, norm, gain).to(tl.bfloat16), 0, 2, 1)
    high, low, added = rounded, rounded, rounded
    if norm is not None:
        high, low = square_halves(tl.trans(values, 0, 2, 1))
        high, low = high.to(tl.bfloat16), low.to(tl.bfloat16)
    if shift is not None:
        moved = tl.load(shift + shift_off[None, :, None] + kk, mask=mask, other=0.0)
        added = tl.trans(moved.to(tl.bfloat16), 0, 2, 1)
    return rounded, high, low, added


@device
def turn_inputs(
    row, x, x_off, x_mask, first, alpha, norm, gain, gain_off, shift, shift_off,
    PARTS: tl.constexpr, BLOCK_K: tl.constexpr, MASKED_K: tl.constexpr, ALONE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`inputs` of all rows, or with ALONE those of the only one, which has been read (`row`)."""
    if ALONE:
        made = alone_inputs(row, first, alpha, norm, gain, shift, PARTS, BLOCK_K, MASKED_K, ROWS)
    else:
        made = inputs(x, x_off, x_mask, first, alpha, norm, gain, gain_off, shift, shift_off, BLOCK_K, MASKED_K)
    return made

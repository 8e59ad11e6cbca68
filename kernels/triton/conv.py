"""Causal short convolutions with their tails: plain, with computed taps, and behind products (fuse.conv), whose
epilogue does them for a row a session (row_conv.py).

One program has a session's rows of a block of columns. It reads the tail before it writes it.
"""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Launch, Lowered, Operand, Pointer, Scratch
from tmlc.kernels.triton.linear import linear_launch
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.parts import Parts
from tmlc.kernels.triton.products import FEW_ROWS
from tmlc.kernels.triton.registry import Call, launch, lowering
from tmlc.kernels.triton.row_conv import RowConv

MOST_TAPS = 64
AT_ONCE = 8  # taps whose loads are on their way together


@device
def conv_kernel(
    out, x, w, taps, tail, addend, slots, counts, n, per, start, c, width, per_head, x_stride, out_stride,
    addend_stride, taps_stride, w_tap, w_channel, level,
    RESIDUAL: tl.constexpr, TAPS: tl.constexpr, PIECE: tl.constexpr, HELD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = addend + level·(Σ_j w_j·x[t - (TAPS-1) + j] (+ x[t])) in c columns from `start` on, addend + x in the
    others of `width`; grid (sessions, blocks of columns).

    With `taps` the lags count backwards: Σ_j (w_j + taps[t, head·TAPS + j])·x[t - j]. The tail holds the rows before
    the first; it becomes the last rows of x.
    """
    session = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + session)
    count = tl.load(counts + session) * per
    if (count == 0) | (slot < 0):  # no slot is negative; said here, it is read along with the count
        return
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = col - start
    inside = (channel >= 0) & (channel < c)
    held = tail + slot // 4
    row = session * n  # of the session's first
    r = tl.arange(0, HELD)
    source = count - (TAPS - 1) + r
    keep = (r < TAPS - 1)[:, None] & inside[None, :]
    fresh = tl.load(
        x + (row + source)[:, None] * x_stride + col[None, :], mask=keep & (source >= 0)[:, None], other=0.0
    )
    old = tl.load(
        held + (source + TAPS - 1)[:, None] * c + channel[None, :], mask=keep & (source < 0)[:, None], other=0.0
    )
    for first in range(0, count, BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)
        live = (t < count)[:, None]
        whole, live = live & (col < width)[None, :], live & inside[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for begin in range(0, TAPS, PIECE):
            for j_ in tl.static_range(PIECE):
                j = begin + j_
                weight = tl.load(w + j * w_tap + channel * w_channel, mask=inside & (j < TAPS), other=0.0)[None, :]
                at = t - (TAPS - 1) + j
                if taps is not None:
                    at = t - j
                    weight += tl.load(
                        taps + (row + t)[:, None] * taps_stride + (channel // per_head * TAPS)[None, :] + j,
                        mask=live & (j < TAPS), other=0.0,
                    )  # fmt: skip
                there = live & (at >= 0)[:, None] & (j < TAPS)
                value = tl.load(x + (row + at)[:, None] * x_stride + col[None, :], mask=there, other=0.0)
                before = tl.load(
                    held + (at + TAPS - 1)[:, None] * c + channel[None, :],
                    mask=live & (at < 0)[:, None] & (j < TAPS), other=0.0,
                )  # fmt: skip
                total += weight * tl.where((at >= 0)[:, None], value, before)
        now = tl.load(x + (row + t)[:, None] * x_stride + col[None, :], mask=whole, other=0.0)
        if RESIDUAL:
            total += now
        if level is not None:
            total = total * level
        total = tl.where(inside[None, :], total, now)
        if addend is not None:
            total = tl.load(addend + (row + t)[:, None] * addend_stride + col[None, :], mask=whole, other=0.0) + total
        tl.store(out + (row + t)[:, None] * out_stride + col[None, :], total, mask=whole)
    tl.debug_barrier()  # every thread has read the tail
    tl.store(held + r[:, None] * c + channel[None, :], tl.where((source >= 0)[:, None], fresh, old), mask=keep)


def conv_launch(
    call: Call,
    out: Operand,
    x: Operand | tuple[Pointer, int],
    weight: Operand,
    tail: Operand,
    residual: bool,
    taps: Operand | None = None,
    level: float = 1.0,
    addend: Operand | None = None,
    start: int = 0,
) -> Launch:
    """A short convolution of all sessions; x may be a pointer with its stride. It is of the columns of the tail, which
    begin at `start` in x, out and addend; the others pass as they are."""
    count, c = tail.rows[1] + 1, tail.cols
    call.need(start + c <= out.cols, f"columns {start} to {start + c} of {out.cols} are convolved")
    call.need(2 <= count <= MOST_TAPS, f"{count} taps", f"2 to {MOST_TAPS} are supported")
    call.need(out.rows[0] > 0 == out.rows[1], f"rows {out.rows[0]}n+{out.rows[1]} belong to no positions")
    call.need(tail.space == "state", f"{tail} is not a state of the session")
    source, stride = (call.pointer(x), x.stride) if isinstance(x, Operand) else x
    lags_first = taps is not None  # weight [k, c]; else [c, k]
    # None of the sizes is said to be a multiple of 16: a thread then has single columns in every load, and nothing is
    # moved between threads, which would part the loads into rounds.
    values: dict[str, Any] = {
        "out": call.pointer(out), "x": source,
        "w": call.pointer(weight), "tail": call.pointer(tail),
        "taps": None if taps is None else call.pointer(taps), "slots": call.slots, "counts": call.counts,
        "addend": None if addend is None else call.pointer(addend), "n": call.bucket.session_rows(out.rows),
        "per": out.rows[0], "start": start, "c": c, "width": out.cols,
        "per_head": None if taps is None else c // (taps.cols // count), "x_stride": stride,
        "out_stride": out.stride, "addend_stride": None if addend is None else addend.stride,
        "taps_stride": None if taps is None else taps.stride, "w_tap": c if lags_first else 1,
        "w_channel": 1 if lags_first else count, "level": None if level == 1.0 else float(level),
    }  # fmt: skip
    block = min(128, power(out.cols, 16))
    fixed = {
        "RESIDUAL": bool(residual), "TAPS": count,
        "PIECE": min(count, AT_ONCE), "HELD": power(count - 1),
        "BLOCK_N": min(8, power(call.bucket.session_rows(out.rows))), "BLOCK_C": block,
    }  # fmt: skip
    return launch("conv_kernel", (call.bucket.batch, -(-out.cols // block)), values, fixed, 4)


@lowering("short_conv_state", "dynamic_conv_state")
def lower_conv(call: Call) -> Lowered:
    return Lowered(
        (
            conv_launch(
                call, call.outputs[0], call.operand("x"), call.operand("weight"), call.operand("tail"),
                call.attrs["residual"], taps=call.optional("taps"),
            ),
        )
    )  # fmt: skip


@lowering("linear_and_conv_state")
def lower_linear_and_conv(call: Call) -> Lowered:
    out, mixed = call.outputs
    conv = RowConv(call.operand("taps"), call.operand("tail"), 0, bool(call.attrs["residual"]), 1.0)
    fits = conv.fits(call, out, FEW_ROWS)
    product = linear_launch(
        call, out, call.operand("x"), call.operand("weight"), call.optional("bias"), call.optional("scale"),
        call.optional("addend"), conv=conv if fits else None, mixed=mixed if fits else None,
    )  # fmt: skip
    if fits:
        return Lowered((product,))
    return Lowered((product, conv_launch(call, mixed, out, conv.taps, conv.tail, conv.residual)))


@lowering("linear_conv_state")
def lower_linear_conv(call: Call) -> Lowered:
    scratch = Scratch()
    return scratch.lowered(*linear_conv_launches(call, scratch))


def linear_conv_launches(call: Call, scratch: Scratch, parts: Parts | None = None) -> tuple[Launch, ...]:
    """With `parts` these are x, and the convolution is one that a product can do."""
    out, weight = call.outputs[0], call.operand("weight")
    conv = RowConv(
        call.operand("taps"), call.operand("tail"), int(call.attrs["start"]), bool(call.attrs["residual"]),
        float(call.attrs["level"]),
    )  # fmt: skip
    x = parts or call.operand("x")
    bias, factor, addend = (call.optional(name) for name in ("bias", "scale", "addend"))
    if conv.fits(call, out, FEW_ROWS):
        return (linear_launch(call, out, x, weight, bias, factor, addend, conv=conv),)
    m = weight.shape[0]
    product = scratch.piece("f32", call.rows(out) * m)
    first = linear_launch(call, product, x, weight, bias, factor, out_stride=m)
    second = conv_launch(
        call, out, (product, m), conv.taps, conv.tail, conv.residual, level=conv.level, addend=addend,
        start=conv.start,
    )  # fmt: skip
    return first, second

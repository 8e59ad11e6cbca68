"""Causal short convolutions with their tails: plain, with computed taps, and behind products (fuse.conv).

One program has a session's rows of a block of channels. It reads the tail before it writes it.
"""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.elementwise import copy_launch, elementwise_launch
from tmlc.kernels.triton.launch import Aligned, Launch, Lowered, Operand, Pointer
from tmlc.kernels.triton.linear import linear_launch
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.registry import Call, launch, lowering

MOST_TAPS = 64


@device
def conv_kernel(
    out, x, w, taps, tail, addend, slots, counts, n, per, c, per_head, x_stride, out_stride, addend_stride, taps_stride,
    w_tap, w_channel, level,
    RESIDUAL: tl.constexpr, TAPS: tl.constexpr, HELD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = addend + level·(Σ_j w_j·x[t - (TAPS-1) + j] (+ x[t])); grid (sessions, blocks of channels).

    With `taps` the lags count backwards: Σ_j (w_j + taps[t, head·TAPS + j])·x[t - j]. The tail holds the rows before
    the first; it becomes the last rows of x.
    """
    session = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = col < c
    count = tl.load(counts + session) * per
    if count == 0:
        return
    held = tail + tl.load(slots + session) // 4
    x += session * n * x_stride
    r = tl.arange(0, HELD)
    source = count - (TAPS - 1) + r
    keep = (r < TAPS - 1)[:, None] & inside[None, :]
    fresh = tl.load(x + source[:, None] * x_stride + col[None, :], mask=keep & (source >= 0)[:, None], other=0.0)
    old = tl.load(held + (source + TAPS - 1)[:, None] * c + col[None, :], mask=keep & (source < 0)[:, None], other=0.0)
    for first in range(0, count, BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)
        live = (t < count)[:, None] & inside[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for j in range(TAPS):
            weight = tl.load(w + j * w_tap + col * w_channel, mask=inside, other=0.0)[None, :]
            at = t - (TAPS - 1) + j
            if taps is not None:
                at = t - j
                row = session * n + t
                weight += tl.load(
                    taps + row[:, None] * taps_stride + (col // per_head * TAPS)[None, :] + j, mask=live, other=0.0
                )
            value = tl.load(x + at[:, None] * x_stride + col[None, :], mask=live & (at >= 0)[:, None], other=0.0)
            before = tl.load(
                held + (at + TAPS - 1)[:, None] * c + col[None, :], mask=live & (at < 0)[:, None], other=0.0
            )
            total += weight * tl.where((at >= 0)[:, None], value, before)
        if RESIDUAL:
            total += tl.load(x + t[:, None] * x_stride + col[None, :], mask=live, other=0.0)
        if level is not None:
            total = total * level
        where = (session * n + t)[:, None]
        if addend is not None:
            total = tl.load(addend + where * addend_stride + col[None, :], mask=live, other=0.0) + total
        tl.store(out + where * out_stride + col[None, :], total, mask=live)
    tl.debug_barrier()  # every thread has read the tail
    tl.store(held + r[:, None] * c + col[None, :], tl.where((source >= 0)[:, None], fresh, old), mask=keep)


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
) -> Launch:
    """A short convolution of all sessions; x may be a pointer with its stride."""
    count, c = tail.rows[1] + 1, tail.cols
    call.need(2 <= count <= MOST_TAPS, f"{count} taps", f"2 to {MOST_TAPS} are supported")
    call.need(out.rows[0] > 0 == out.rows[1], f"rows {out.rows[0]}n+{out.rows[1]} belong to no positions")
    call.need(tail.space == "state", f"{tail} is not a state of the session")
    source, stride = (call.pointer(x), x.stride) if isinstance(x, Operand) else x
    lags_first = taps is not None  # weight [k, c]; else [c, k]
    values: dict[str, Any] = {
        "out": call.pointer(out), "x": source, "w": call.pointer(weight), "tail": call.pointer(tail),
        "taps": None if taps is None else call.pointer(taps), "slots": call.slots, "counts": call.counts,
        "addend": None if addend is None else call.pointer(addend), "n": call.bucket.session_rows(out.rows),
        "per": out.rows[0], "c": Aligned(c),
        "per_head": None if taps is None else c // (taps.cols // count), "x_stride": Aligned(stride),
        "out_stride": Aligned(out.stride), "addend_stride": None if addend is None else Aligned(addend.stride),
        "taps_stride": None if taps is None else taps.stride, "w_tap": c if lags_first else 1,
        "w_channel": 1 if lags_first else count, "level": None if level == 1.0 else float(level),
    }  # fmt: skip
    block = min(128, power(c, 16))
    fixed = {
        "RESIDUAL": bool(residual), "TAPS": count, "HELD": power(count - 1),
        "BLOCK_N": min(8, power(call.bucket.session_rows(out.rows))), "BLOCK_C": block,
    }  # fmt: skip
    return launch("conv_kernel", (call.bucket.batch, -(-c // block)), values, fixed, 4)


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


@lowering("linear_conv_state")
def lower_linear_conv(call: Call) -> Lowered:
    out, weight, tail = call.outputs[0], call.operand("weight"), call.operand("tail")
    start, c, m = int(call.attrs["start"]), tail.cols, weight.shape[0]
    rows, addend = call.rows(out), call.optional("addend")
    product = Pointer("scratch", "", 0, "f32", rows * m * 4)
    launches = [
        linear_launch(
            call, product, call.operand("x"), weight, call.optional("bias"), call.optional("scale"), out_stride=m
        )
    ]
    part = Pointer("scratch", "", 4 * start, "f32", product.nbytes - 4 * start)
    launches.append(
        conv_launch(
            call, _columns(out, start, c), (part, m), call.operand("taps"), tail, call.attrs["residual"],
            level=call.attrs["level"], addend=None if addend is None else _columns(addend, start, c),
        )
    )  # fmt: skip
    for first, width in ((0, start), (start + c, m - start - c)):
        if width and addend is None:
            launches.append(copy_launch(call, out, (product, m), width, out_at=first, x_at=first))
        elif width and addend is not None:
            piece = Pointer("scratch", "", 4 * first, "f32", product.nbytes - 4 * first)
            target, more = _columns(out, first, width), _columns(addend, first, width)
            launches.append(elementwise_launch(call, "add", target, (more, (piece, m))))
    return Lowered(tuple(launches), product.nbytes)


def _columns(x: Operand, start: int, width: int) -> Operand:
    """Columns of an operand: another reading of the same bytes."""
    return Operand(x.space, x.dtype, x.rows, width, x.stride, x.offset + 4 * start, x.name, x.shape)

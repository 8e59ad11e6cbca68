"""What depends on a session's position: rotary embedding, the cosines and sines that attention turns by (kv_write.py),
and moving the position on."""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Lowered
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.registry import Call, launch, lowering


@device
def cos_sin(theta):
    """(cos, sin) of a float64 tensor, |theta| up to about 10^6, to float64's last digits but a few.

    Written out: the library's functions keep a table on the stack for huge angles.
    """
    turns = tl.floor(theta * 0.6366197723675814 + 0.5)
    r = theta - turns * 1.5707963267341256
    r = r - turns * 6.077100506303966e-11
    r = r - turns * 2.0222662487959506e-21
    return turned_cos_sin(r, turns.to(tl.int64) & 3)


@device
def turned_cos_sin(r, quarter):
    """(cos, sin) of r + quarter·π/2; r float64 of at most π/4 in size, quarter a whole number from 0 to 3."""
    z = r * r
    sin = tl.full(z.shape, 1.58962301576546568e-10, tl.float64)
    sin = sin * z - 2.50507477628578073e-8
    sin = sin * z + 2.75573136213857245e-6
    sin = sin * z - 1.98412698295895386e-4
    sin = sin * z + 8.33333333332211858e-3
    sin = sin * z - 1.66666666666666307e-1
    sin = r + r * z * sin
    cos = tl.full(z.shape, -1.13585365213876817e-11, tl.float64)
    cos = cos * z + 2.08757008419747316e-9
    cos = cos * z - 2.75573141792967388e-7
    cos = cos * z + 2.48015872888517045e-5
    cos = cos * z - 1.38888888888730564e-3
    cos = cos * z + 4.16666666666665930e-2
    cos = 1.0 - 0.5 * z + z * z * cos
    swap = (quarter & 1) == 1
    c, s = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -c, c), tl.where(quarter >= 2, -s, s)


@device
def turning(column, offset, half, INTERLEAVED: tl.constexpr):
    """Of the columns of a head: (is it turned, which pair it is of, is it the first of it, the other one of it)."""
    place = column - offset
    if INTERLEAVED:
        pair, first = place // 2, place % 2 == 0
        partner = tl.where(first, column + 1, column - 1)
    else:
        first = place < half
        pair = tl.where(first, place, place - half)
        partner = tl.where(first, column + half, column - half)
    return (place >= 0) & (place < 2 * half), pair, first, partner


@device
def rotated(value, partner, cos, sin, first):
    """The first of a pair (a, b) becomes a·cos - b·sin, the other b·cos + a·sin."""
    return value * cos + tl.where(first, -partner, partner) * sin


@device
def rope_kernel(
    out, x, position, inv_freq, slots, counts, n, heads, width, offset, half, x_stride, out_stride, scaling,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotates columns offset..offset + 2·half of every head by position·inv_freq; grid (rows, runs of heads)."""
    row = tl.program_id(0).to(tl.int64)
    session, i = row // n, row % n
    if i >= tl.load(counts + session):
        return
    p = tl.load(position + tl.load(slots + session) // 8) + i
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, BLOCK)
    inside, pair, first, partner = turning(col, offset, half, INTERLEAVED)
    angle = p.to(tl.float32) * tl.load(inv_freq + pair, mask=inside, other=0.0)
    cos, sin = cos_sin(angle.to(tl.float64))
    c, s = cos.to(tl.float32) * scaling, sin.to(tl.float32) * scaling
    mask = (head < heads)[:, None] & (col < width)[None, :]
    at = x + row * x_stride + head[:, None] * width
    a = tl.load(at + col[None, :], mask=mask, other=0.0)
    b = tl.load(at + partner[None, :], mask=mask & inside[None, :], other=0.0)
    moved = rotated(a, b, c[None, :], s[None, :], first[None, :])
    tl.store(
        out + row * out_stride + head[:, None] * width + col[None, :], tl.where(inside[None, :], moved, a), mask=mask
    )


@device
def rope_table_kernel(out, position, inv_freq, slots, counts, n, half, out_stride, scaling, BLOCK: tl.constexpr):
    """Cosines of position·inv_freq, and behind them the sines; grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    session, i = row // n, row % n
    pair = tl.arange(0, BLOCK)
    freq = tl.load(inv_freq + pair, mask=pair < half, other=0.0)
    if i >= tl.load(counts + session):
        return
    p = tl.load(position + tl.load(slots + session) // 8) + i
    cos, sin = cos_sin((p.to(tl.float32) * freq).to(tl.float64))
    at = out + row * out_stride + pair
    tl.store(at, cos.to(tl.float32) * scaling, mask=pair < half)
    tl.store(at + half, sin.to(tl.float32) * scaling, mask=pair < half)


@device
def advance_kernel(position, slots, counts):
    """position += new positions; grid (sessions). The host has refused what a context does not hold."""
    session = tl.program_id(0)
    count = tl.load(counts + session)
    if count > 0:
        at = position + tl.load(slots + session) // 8
        moved = tl.load(at) + count
        tl.debug_barrier()  # every thread has read the old position
        tl.store(at, moved)


@lowering("rope_state")
def lower_rope(call: Call) -> Lowered:
    x, out, inv_freq, position = call.operand("x"), call.outputs[0], call.operand("inv_freq"), call.operand("position")
    heads = int(call.attrs["num_heads"])
    width = x.cols // heads
    block = power(width, 16)
    run = min(power(heads), max(1, 1024 // block))
    values: dict[str, Any] = {
        "out": call.pointer(out), "x": call.pointer(x), "position": call.pointer(position, ("i64",)),
        "inv_freq": call.pointer(inv_freq), "slots": call.slots, "counts": call.counts,
        "n": call.bucket.session_rows(x.rows), "heads": heads, "width": Aligned(width),
        "offset": Aligned(int(call.attrs["offset"])), "half": Aligned(inv_freq.cols * inv_freq.rows[1]),
        "x_stride": Aligned(x.stride), "out_stride": Aligned(out.stride), "scaling": float(call.attrs["scaling"]),
    }  # fmt: skip
    call.need(x.rows == (1, 0), f"rows {x.rows[0]}n+{x.rows[1]} are not positions")
    fixed = {"INTERLEAVED": bool(call.attrs["interleaved"]), "HEADS": run, "BLOCK": block}
    return Lowered((launch("rope_kernel", (call.rows(x), -(-heads // run)), values, fixed, 4),))


@lowering("rope_table_state")
def lower_rope_table(call: Call) -> Lowered:
    x, out, inv_freq = call.operand("x"), call.outputs[0], call.operand("inv_freq")
    call.need(x.rows == (1, 0), f"rows {x.rows[0]}n+{x.rows[1]} are not positions")
    half = inv_freq.cols * inv_freq.rows[1]
    values: dict[str, Any] = {
        "out": call.pointer(out), "position": call.pointer(call.operand("position"), ("i64",)),
        "inv_freq": call.pointer(inv_freq), "slots": call.slots, "counts": call.counts,
        "n": call.bucket.session_rows(x.rows), "half": Aligned(half), "out_stride": Aligned(out.stride),
        "scaling": float(call.attrs["scaling"]),
    }  # fmt: skip
    fixed = {"BLOCK": power(half, 32)}
    return Lowered((launch("rope_table_kernel", (call.rows(x),), values, fixed, 1),))


@lowering("advance")
def lower_advance(call: Call) -> Lowered:
    values: dict[str, Any] = {
        "position": call.pointer(call.operand("position"), ("i64",)), "slots": call.slots, "counts": call.counts,
    }  # fmt: skip
    return Lowered((launch("advance_kernel", (call.bucket.batch,), values, {}, 1),))

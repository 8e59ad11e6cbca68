"""A short convolution in the epilogue of the product that feeds it, where a tile has all rows of its sessions: whoever
has made a column has all that its convolution needs, but for the rows before, which lie in the session's tail.

More rows have a launch of their own (conv.py), with the same operations in the same order.
"""

from dataclasses import dataclass
from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Operand
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.registry import Call

#: Taps whose rows a product can hold in registers until it is done.
MOST_TAPS = 8
#: A product without a convolution.
NO_CONV: tuple[dict[str, Any], dict[str, Any]] = (
    dict.fromkeys(("taps", "tail", "slots", "counts", "start", "channels", "level", "per", "mixed", "mixed_stride")),
    {"TAPS": 0, "RESIDUAL": False, "EACH": 1},
)


@device
def rows_before(taps, tail, channel, inside, held, c, TAPS: tl.constexpr):
    """(weights of the taps [BLOCK_M], the TAPS - 1 rows before [BLOCK_M, rows]), each a tuple in ascending order. They
    are asked for here and first used in `convolve`."""
    weights, rows = (), ()
    for j in tl.static_range(TAPS):
        weights += (tl.load(taps + channel * TAPS + j, mask=inside, other=0.0),)  # type: ignore[assignment]
        if j < TAPS - 1:
            rows += (tl.load(tail + j * c, mask=held, other=0.0),)  # type: ignore[assignment]
    return weights, rows


@device
def convolve(y, weights, rows, inside, level, RESIDUAL: tl.constexpr, TAPS: tl.constexpr):
    """level·(Σ_j weights_j·rows_j (+ y)) in the columns `inside`, y being the last row; the others as they are."""
    total = tl.zeros(y.shape, tl.float32)
    for j in tl.static_range(TAPS - 1):
        total += weights[j][:, None] * rows[j]
    total += weights[TAPS - 1][:, None] * y
    if RESIDUAL:
        total += y
    if level is not None:
        total = total * level
    return tl.where(inside[:, None], total, y)


@device
def keep_rows(y, rows, tail, held, c, TAPS: tl.constexpr):
    """The tail without its first row, and y behind it. Every thread has read the tail."""
    for j in tl.static_range(TAPS - 2):
        tl.store(tail + j * c, rows[j + 1], mask=held)
    tl.store(tail + (TAPS - 2) * c, y, mask=held)


@device
def sessions_from(first, slots, counts, sessions, HELD: tl.constexpr):
    """(slot, count) of HELD sessions from `first` on, of `sessions`; no slot is negative."""
    found = ()
    for s in tl.static_range(HELD):
        there = first + s < sessions
        slot = tl.load(slots + first + s, mask=there, other=-1)
        found += ((slot, tl.load(counts + first + s, mask=there, other=0)),)  # type: ignore[assignment]
    return found


@device
def tails_before(taps, tail, sessions, channel, inside, c, TAPS: tl.constexpr, HELD: tl.constexpr):
    """`rows_before` of HELD sessions: (weights, tails: for each session its pointer, its count and whether it is there,
    rows: of all sessions one behind the other, [BLOCK_M] each)."""
    weights, tails, rows = (), (), ()
    for j in tl.static_range(TAPS):
        weights += (tl.load(taps + channel * TAPS + j, mask=inside, other=0.0),)  # type: ignore[assignment]
    for s in tl.static_range(HELD):
        slot, count = sessions[s]
        at = tail + slot // 4 + channel
        there = (slot >= 0) & (count > 0)
        tails += ((at, count, there),)  # type: ignore[assignment]
        for j in tl.static_range(TAPS - 1):
            rows += (tl.load(at + j * c, mask=inside & there, other=0.0),)  # type: ignore[assignment]
    return weights, tails, rows


@device
def columns_of(y, BLOCK_M: tl.constexpr):
    """The columns [BLOCK_M] of y [BLOCK_M, 8] as a tuple: threads exchange y once, and a thread then has its row."""
    even, odd = tl.split(tl.reshape(y, (BLOCK_M, 4, 2)))
    c04, c26 = tl.split(tl.reshape(even, (BLOCK_M, 2, 2)))
    c15, c37 = tl.split(tl.reshape(odd, (BLOCK_M, 2, 2)))
    c0, c4 = tl.split(c04)
    c1, c5 = tl.split(c15)
    c2, c6 = tl.split(c26)
    c3, c7 = tl.split(c37)
    return c0, c1, c2, c3, c4, c5, c6, c7


@device
def from_columns(c, BLOCK_M: tl.constexpr):
    """[BLOCK_M, 8] of eight columns: what `columns_of` takes apart."""
    even = tl.reshape(tl.join(tl.join(c[0], c[4]), tl.join(c[2], c[6])), (BLOCK_M, 4))
    odd = tl.reshape(tl.join(tl.join(c[1], c[5]), tl.join(c[3], c[7])), (BLOCK_M, 4))
    return tl.reshape(tl.join(even, odd), (BLOCK_M, 8))


@device
def convolve_sessions(
    y, weights, tails, rows, inside, level, per, c,
    RESIDUAL: tl.constexpr, TAPS: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`convolve` and `keep_rows` of y [BLOCK_M, 8], EACH columns a session, count·per of them real. Every thread has
    read the tails."""
    columns = columns_of(y, BLOCK_M)
    mixed = ()
    for s in tl.static_range(HELD):
        whole = ()  # the session's rows: those of its tail, then its own
        for j in tl.static_range(TAPS - 1):
            whole += (rows[s * (TAPS - 1) + j],)  # type: ignore[assignment]
        for t in tl.static_range(EACH):
            whole += (columns[s * EACH + t],)  # type: ignore[assignment]
        for t in tl.static_range(EACH):
            now = columns[s * EACH + t]
            total = tl.zeros(now.shape, tl.float32)
            for j in tl.static_range(TAPS):
                total += weights[j] * whole[t + j]
            if RESIDUAL:
                total += now
            if level is not None:
                total = total * level
            mixed += (tl.where(inside, total, now),)  # type: ignore[assignment]
        at, count, there = tails[s]
        for j in tl.static_range(TAPS - 1):
            kept = whole[1 + j]  # type: ignore[var-annotated]
            for n in tl.static_range(2, EACH + 1):
                kept = tl.where(count * per == n, whole[n + j], kept)
            tl.store(at + j * c, kept, mask=inside & there)
    return from_columns(mixed, BLOCK_M)


@device
def convolve_rows(
    y, weights, tails, rows, inside, level, per, c,
    RESIDUAL: tl.constexpr, TAPS: tl.constexpr, EACH: tl.constexpr, HELD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The convolution of a tile's rows, and their sessions' tails moved on. tails and rows: of `tails_before`, or with
    one row a session its pointers and which are there, and of `rows_before`."""
    tl.debug_barrier()  # every thread has read the tails
    if EACH == 1:
        keep_rows(y, rows, tails[0], tails[1], c, TAPS)
        mixed = convolve(y, weights, rows, inside, level, RESIDUAL, TAPS)
    else:
        mixed = convolve_sessions(
            y, weights, tails, rows, inside, level, per, c, RESIDUAL, TAPS, EACH, HELD, BLOCK_M
        )
    return mixed


@dataclass(frozen=True)
class RowConv:
    """What a product convolves: columns `start`.. of its result, as many as `taps` [c, taps] has channels."""

    taps: Operand
    tail: Operand
    start: int
    residual: bool
    level: float

    def fits(self, call: Call, out: Operand, most: int) -> bool:
        """Whether a product can do it: a session has one row, or all rows of the call lie in a tile of `most`, those of
        each session behind each other."""
        each = call.bucket.session_rows(out.rows)
        whole = call.rows(out) <= most and each & (each - 1) == 0
        return 2 <= self.taps.shape[-1] <= MOST_TAPS and (each == 1 or whole)

    def values(
        self, call: Call, out: Operand, cols: int, mixed: Operand | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments and constexprs of a product with `cols` columns. `mixed`: where the convolution goes, if not in the
        place of the columns.

        Raises:
            EmitError: the columns are not there, or the tail is not the session's.
        """
        count, c = self.tail.rows[1] + 1, self.tail.cols
        call.need(self.start + c <= cols, f"columns {self.start} to {self.start + c} of {cols} are convolved")
        call.need(self.tail.space == "state", f"{self.tail} is not a state of the session")
        each = call.bucket.session_rows(out.rows)
        values = {
            "taps": call.pointer(self.taps), "tail": call.pointer(self.tail), "slots": call.slots,
            "counts": call.counts, "start": self.start, "channels": c,
            "level": None if self.level == 1.0 else float(self.level), "per": None if each == 1 else out.rows[0],
            "mixed": None if mixed is None else call.pointer(mixed),
            "mixed_stride": None if mixed is None else mixed.stride,
        }  # fmt: skip
        return values, {"TAPS": count, "RESIDUAL": self.residual, "EACH": each}

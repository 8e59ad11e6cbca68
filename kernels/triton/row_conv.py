"""A short convolution in the epilogue of the product that feeds it, where a tile has all rows of its sessions: whoever has
made a column has all that its convolution needs, but for the rows before, which lie in the session's tail.

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
def rows_before(taps, tail, channel, inside, held, c, TAPS: tl.constexpr, EACH: tl.constexpr = 1, turn=0):
    """(weights of the taps [BLOCK_M], rows before [BLOCK_M, rows]), each a tuple in ascending order. They are asked for
    here and first used in `convolve`.

    EACH rows of a session follow each other, row r of them in turn[r]: its j-th row before is row turn + j of the tail,
    or, where that ends, one of the EACH.
    """
    weights, rows = (), ()
    for j in tl.static_range(TAPS):
        weights += (tl.load(taps + channel * TAPS + j, mask=inside, other=0.0),)  # type: ignore[assignment]
        if j < TAPS - 1:
            if EACH == 1:
                rows += (tl.load(tail + j * c, mask=held, other=0.0),)  # type: ignore[assignment]
            else:
                there = held & (turn + j < TAPS - 1)[None, :]
                rows += (tl.load(tail + (turn + j)[None, :] * c, mask=there, other=0.0),)  # type: ignore[assignment]
    return weights, rows


@device
def rows_apart(y, lane, ROWS: tl.constexpr, EACH: tl.constexpr):
    """The columns [BLOCK_M] of y [BLOCK_M, ROWS], in order, without the last of each session. Each is a sum of one
    number, so it has its bits whatever the order is."""
    found = ()
    for s in tl.static_range(ROWS // EACH):
        for t in tl.static_range(EACH - 1):
            found += (tl.sum(tl.where((lane == s * EACH + t)[None, :], y, 0.0), 1),)  # type: ignore[assignment]
    return found


@device
def convolve(
    y, weights, rows, inside, level,
    RESIDUAL: tl.constexpr, TAPS: tl.constexpr, EACH: tl.constexpr = 1, ROWS: tl.constexpr = 1,
):  # fmt: skip
    """level·(Σ_j weights_j·x[t - (TAPS-1) + j] (+ x[t])) of the rows x of each session, those before it and then its EACH
    columns of y [BLOCK_M, ROWS], in the rows `inside`; the others as they are."""
    if EACH > 1:
        lane = tl.arange(0, ROWS)
        apart = rows_apart(y, lane, ROWS, EACH)
    total = tl.zeros(y.shape, tl.float32)
    for j in tl.static_range(TAPS - 1):
        before = rows[j]
        for s in tl.static_range(ROWS // EACH):
            for t in tl.static_range(EACH - 1):
                if t + TAPS - 1 - j < EACH:
                    to = s * EACH + t + TAPS - 1 - j
                    before = tl.where((lane == to)[None, :], apart[s * (EACH - 1) + t][:, None], before)
        total += weights[j][:, None] * before
    total += weights[TAPS - 1][:, None] * y
    if RESIDUAL:
        total += y
    if level is not None:
        total = total * level
    return tl.where(inside[:, None], total, y)


@device
def keep_rows(y, rows, tail, held, c, TAPS: tl.constexpr, EACH: tl.constexpr = 1, turn=0, count=1):
    """The last TAPS - 1 of the tail's rows and the first `count` of a session's. Every thread has read the tail."""
    if EACH == 1:
        for j in tl.static_range(TAPS - 2):
            tl.store(tail + j * c, rows[j + 1], mask=held)
        tl.store(tail + (TAPS - 2) * c, y, mask=held)
    else:
        for j in tl.static_range(TAPS - 1):  # of the first column, whose rows are the whole tail
            stays = (turn == 0) & (j >= count)
            tl.store(tail + (j - count)[None, :] * c, rows[j], mask=held & stays[None, :])
        place = turn - count + (TAPS - 1)
        comes = (turn < count) & (place >= 0)
        tl.store(tail + place[None, :] * c, y, mask=held & comes[None, :])


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

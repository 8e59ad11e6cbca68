"""A short convolution in the epilogue of the product that feeds it, for calls of one row a session: whoever has made a
column has all that its convolution needs, but for the rows before, which lie in the session's tail.

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
    dict.fromkeys(("taps", "tail", "slots", "counts", "start", "channels", "level")),
    {"TAPS": 0, "RESIDUAL": False},
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


@dataclass(frozen=True)
class RowConv:
    """What a product convolves: columns `start`.. of its result, as many as `taps` [c, taps] has channels."""

    taps: Operand
    tail: Operand
    start: int
    residual: bool
    level: float

    @property
    def fits(self) -> bool:
        """Whether a product can do it, in a call of one row a session."""
        return 2 <= self.taps.shape[-1] <= MOST_TAPS

    def values(self, call: Call, cols: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments and constexprs of a product with `cols` columns.

        Raises:
            EmitError: the columns are not there, or the tail is not the session's.
        """
        count, c = self.tail.rows[1] + 1, self.tail.cols
        call.need(self.start + c <= cols, f"columns {self.start} to {self.start + c} of {cols} are convolved")
        call.need(self.tail.space == "state", f"{self.tail} is not a state of the session")
        values = {
            "taps": call.pointer(self.taps), "tail": call.pointer(self.tail), "slots": call.slots,
            "counts": call.counts, "start": self.start, "channels": c,
            "level": None if self.level == 1.0 else float(self.level),
        }  # fmt: skip
        return values, {"TAPS": count, "RESIDUAL": self.residual}

"""Parts of attention, one for each split of a cache, and their sum in ascending order: in a program's registers, in a
launch of its own, or by the product that reads what attention gives."""

from dataclasses import dataclass
from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Pointer
from tmlc.kernels.triton.mode import device, held

#: The largest score of no keys. No score is less, so differences of largest scores are never of infinities.
LEAST = tl.constexpr(-3.4028234663852886e38)
#: Parts that every program of a product adds up by itself: more of them would take longer than a launch.
MOST_PARTS = 16
#: Parameters of a kernel that writes parts.
WRITTEN = ("part_m", "part_l", "part_acc")
#: Arguments and constexprs of a product of rows that are there.
NO_PARTS: dict[str, Any] = dict.fromkeys((*WRITTEN, "splits"))
NO_COLUMNS = {"DV": 0, "PARTS": 0}


@device
def whole_power(x):
    """2^x of a whole number up to 0, and 0 below -126: whole numbers are put into a float's exponent, which takes no
    slow instruction."""
    return ((tl.maximum(x, -127.0) + 12583039.0).to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@device
def join(total_m, total_l, m, l):  # noqa: E741
    """(largest score, sum of weights) of what was added up and of one more part, and what the weighted sums of values
    of both have to be multiplied by."""
    most = tl.maximum(total_m, m)
    old, new = whole_power(total_m - most), whole_power(m - most)
    return most, total_l * old + l * new, old, new


@device
def read_parts(parts, first, k, DV: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The parts of the columns first[slice].. of attention's only row, as `add_parts` takes them: for each split its
    largest scores, its sums, and its weighted sums of values. parts: (part_m, part_l, part_acc, splits) of
    `attention_kernel`.

    GROUP columns that lie in one head read its largest scores and sums once.
    """
    part_m, part_l, part_acc, splits = parts
    GROUP: tl.constexpr = min(BLOCK_K, DV & -DV)
    COUNT: tl.constexpr = BLOCK_K // GROUP
    begin = first[:, None] + (tl.arange(0, COUNT) * GROUP)[None, :]
    inner = tl.arange(0, GROUP)
    head = begin // DV
    read = ()
    for i in tl.static_range(PARTS):  # one behind the last adds nothing
        there = (begin < k) & (i < splits)
        part = head * splits + i
        m = tl.load(part_m + part, mask=there, other=LEAST)
        l = tl.load(part_l + part, mask=there, other=0.0)  # noqa: E741
        at = part * DV + begin % DV
        acc = tl.load(part_acc + at[:, :, None] + inner[None, None, :], mask=there[:, :, None], other=0.0)
        read += ((m, l, acc),)  # type: ignore[assignment]
    return read


@device
def add_parts(read, PARTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """What attention gives in the columns of `read_parts`: [slices, BLOCK_K]."""
    total_m = tl.full(read[0][0].shape, LEAST, tl.float32)
    total_l = tl.zeros(read[0][1].shape, tl.float32)
    total = tl.zeros(read[0][2].shape, tl.float32)
    for i in tl.static_range(PARTS):
        m, l, acc = read[i]  # noqa: E741
        total_m, total_l, old, new = join(total_m, total_l, held(m), held(l))
        total = total * old[:, :, None] + held(acc) * new[:, :, None]
    return tl.reshape(total / total_l[:, :, None], (total.shape[0], BLOCK_K))


@dataclass(frozen=True)
class Parts:
    """Where the parts of a call's attention lie in scratch: m, l f32 [rows, heads, splits], acc [rows, heads, splits,
    columns of a head]."""

    m: Pointer
    l: Pointer  # noqa: E741
    acc: Pointer
    splits: int
    heads: int
    columns: int

    @property
    def written(self) -> dict[str, Any]:
        """Arguments of a kernel that writes them."""
        return dict(zip(WRITTEN, (self.m, self.l, self.acc), strict=True))

    @property
    def cols(self) -> int:
        """Columns of the row that they make."""
        return self.heads * self.columns

    @property
    def values(self) -> dict[str, Any]:
        """Arguments of a kernel that adds them up."""
        return self.written | {"splits": self.splits}

    @property
    def fixed(self) -> dict[str, int]:
        """Constexprs of a product that adds them up, in a call of one row."""
        return {"DV": self.columns, "PARTS": -(-self.splits // 2) * 2}

"""Rows of tables: embedding and bag_embedding, and rows of activations. An index outside its table gives NaN: hosts
check what they send."""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Lowered
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.registry import Call, launch, lowering

_IDS = ("i32", "i64")


#: Bins of a bag at most, and columns of it that a program sums: one warp, which waits for no other.
MOST_BINS, BAG_COLUMNS = 512, 8


@device
def embedding_kernel(
    out, table, ids, entries, per_bin, bins, d, ids_stride, out_stride, BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[row] = Σ over bins of table[bin·per_bin + ids[row, bin]]; grid (rows, blocks of columns).

    All rows are asked for at once. The order of the sum follows from BINS and BLOCK, which the table decides.
    """
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.arange(0, BINS)
    index = tl.load(ids + row * ids_stride + b, mask=b < bins, other=0).to(tl.int64)
    known = (index >= 0) & (index < entries)
    wrong = tl.max((~known).to(tl.int32), 0)
    at = (b * per_bin + index)[:, None] * d + col[None, :]
    values = tl.load(table + at, mask=(known & (b < bins))[:, None] & (col < d)[None, :], other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + col, tl.where(wrong != 0, float("nan"), tl.sum(values, 0)), mask=col < d)


@lowering("embedding", "bag_embedding")
def lower_embedding(call: Call) -> Lowered:
    table, out = call.operand("table"), call.outputs[0]
    ids = call.operand("ids" if call.op == "embedding" else "levels")
    per_bin = int(call.attrs["per_bin"]) if call.op == "bag_embedding" else 0
    bins = power(ids.cols)
    call.need(bins <= MOST_BINS, f"{ids.cols} bins", f"up to {MOST_BINS} are supported")
    block = min(1024 if bins == 1 else BAG_COLUMNS, power(table.cols, 16))
    values: dict[str, Any] = {
        "out": call.pointer(out), "table": call.pointer(table, ("f32", "bf16")), "ids": call.pointer(ids, _IDS),
        "entries": per_bin or table.rows[1], "per_bin": per_bin, "bins": ids.cols, "d": Aligned(table.cols),
        "ids_stride": ids.stride, "out_stride": Aligned(out.stride),
    }  # fmt: skip
    grid = (call.rows(out), -(-table.cols // block))
    warps = 4 if block > 256 else 1
    return Lowered((launch("embedding_kernel", grid, values, {"BINS": bins, "BLOCK": block}, warps),))


@device
def take_rows_kernel(out, source, index, entries, cols, BLOCK: tl.constexpr):
    """out[row] = source[index[row]], bit for bit; rows whose index is outside stay. Grid (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + row).to(tl.int64)
    inside = (col < cols) & (at >= 0) & (at < entries)
    values = tl.load(source + at * cols + col, mask=inside, other=0.0)
    tl.store(out + row * cols + col, values, mask=inside)


@lowering("take_rows")
def lower_take_rows(call: Call) -> Lowered:
    """Not an op of the IR: what passes rows from one method of a chain to the next. All operands are dense."""
    source, index, out = call.operand("source"), call.operand("index"), call.outputs[0]
    call.need(source.cols == source.stride == out.cols == out.stride, "rows that differ, or are not dense")
    block = min(1024, power(out.cols, 32))
    values: dict[str, Any] = {
        "out": call.pointer(out), "source": call.pointer(source), "index": call.pointer(index, ("i32",)),
        "entries": call.rows(source), "cols": Aligned(out.cols),
    }  # fmt: skip
    grid = (call.rows(out), -(-out.cols // block))
    return Lowered((launch("take_rows_kernel", grid, values, {"BLOCK": block}, 4 if block > 256 else 1),))

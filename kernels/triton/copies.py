"""Dense copies: what the emitter puts where a view of columns must become rows of its own."""

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Lowered
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.registry import Call, launch, lowering

BLOCK = 1024


@device
def copy_kernel(out, x, cols, x_stride, out_stride, BLOCK: tl.constexpr):
    """out[row, col] = x[row, col]; grid (rows, runs of columns)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + col, mask=col < cols)
    tl.store(out + row * out_stride + col, values, mask=col < cols)


@lowering("copy")
def lower_copy(call: Call) -> Lowered:
    x, out = call.operand("x"), call.outputs[0]
    call.need((x.dtype, x.cols, x.rows) == (out.dtype, out.cols, out.rows), "a copy changes neither dtype nor shape")
    block = min(BLOCK, max(16, 1 << (x.cols - 1).bit_length()))
    values = {
        "out": call.pointer(out, (x.dtype,)), "x": call.pointer(x, (x.dtype,)), "cols": x.cols,
        "x_stride": Aligned(x.stride), "out_stride": Aligned(out.stride),
    }  # fmt: skip
    grid = (call.rows(x), -(-x.cols // block))
    return Lowered((launch("copy_kernel", grid, values, {"BLOCK": block}, 1 if block <= 256 else 4),))

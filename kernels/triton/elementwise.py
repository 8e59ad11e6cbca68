"""Arithmetic on elements, and copies of columns: one kernel for all that computes, one for all that only moves."""

from typing import Any

import triton.language as tl

from tmlc.kernels.triton.launch import Aligned, Launch, Lowered, Operand, Pointer
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.norms import power
from tmlc.kernels.triton.registry import Call, launch, lowering
from tmlc.kernels.triton.steps import arithmetic, sigmoid, table_row  # noqa: F401 (routers take sigmoid from here)


@device
def elementwise_kernel(
    out, a, b, c, cols, out_stride, a_stride, b_stride, c_stride, a_rows, b_rows, c_rows, alpha, beta,
    OP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = OP(a, b, c; alpha, beta); grid (rows, blocks of columns). An operand with fewer rows is read again for
    every session (its rows are a session's)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    at = row
    if a_rows is not None:
        at = row % a_rows
    x = tl.load(a + at * a_stride + col, mask=inside, other=0.0)
    y, z = x, x
    if b is not None and OP != "scale_by":
        at = row
        if b_rows is not None:
            at = row % b_rows
        y = tl.load(b + at * b_stride + col, mask=inside, other=0.0)
    if c is not None:
        at = row
        if c_rows is not None:
            at = row % c_rows
        z = tl.load(c + at * c_stride + col, mask=inside, other=0.0)
    if OP == "scale_by":
        result = x * tl.load(b)
    else:
        result = arithmetic(x, y, z, alpha, beta, OP)
    tl.store(out + row * out_stride + col, result, mask=inside)


@device
def copy_kernel(
    out, x, width, heads, out_stride, x_stride, out_head, x_head,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`heads` runs of `width` columns of each row, out_head and x_head columns apart; grid (rows, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, col = index // width, index % width
    inside = head < heads
    values = tl.load(x + row * x_stride + head * x_head + col, mask=inside, other=0)
    tl.store(out + row * out_stride + head * out_head + col, values, mask=inside)


_OPERANDS = {
    "add": ("a", "b"), "mul": ("a", "b"), "add_scaled": ("a", "b"), "scale": ("x",), "clamp": ("x",), "silu": ("x",),
    "gelu": ("x",), "swiglu": ("gate", "up"), "modulate": ("x", "scale", "shift"), "sigmoid": ("x",),
    "softcap": ("x",),
}  # fmt: skip
_NUMBERS = {"add_scaled": ("alpha",), "scale": ("alpha",), "clamp": ("lo", "hi"), "softcap": ("cap",)}


def elementwise_launch(
    call: Call,
    op: str,
    out: Operand,
    operands: tuple[Operand | tuple[Pointer, int] | None, ...],
    numbers: tuple[float, ...] = (),
) -> Launch:
    """`op` over all rows of out; an operand may be a pointer to scratch with its stride."""
    block = min(1024, power(out.cols, 32))
    each = call.bucket.session_rows(out.rows)
    values: dict[str, Any] = {
        "out": call.pointer(out), "out_stride": Aligned(out.stride), "cols": out.cols,
        "alpha": float(numbers[0]) if numbers else None, "beta": float(numbers[1]) if len(numbers) > 1 else None,
    }  # fmt: skip
    for letter, operand in zip("abc", (*operands, None, None), strict=False):
        rows = None
        if isinstance(operand, tuple):
            pointer, stride = operand
        elif operand is None:
            pointer, stride = None, None
        else:
            pointer, stride = call.pointer(operand), Aligned(operand.stride)
            if operand.space == "weight" and op not in ("scale_by", "add_row"):
                rows = operand.rows[1]
                call.need(rows == each, f"{operand.name} has {rows} rows and a session {each}")
        values |= {letter: pointer, f"{letter}_stride": stride, f"{letter}_rows": rows}
    grid = (call.rows(out), -(-out.cols // block))
    return launch("elementwise_kernel", grid, values, {"OP": op, "BLOCK": block}, 4 if block > 256 else 1)


@lowering(*_OPERANDS)
def lower_elementwise(call: Call) -> Lowered:
    operands = tuple(call.operand(name) for name in _OPERANDS[call.op])
    numbers = tuple(call.attrs[name] for name in _NUMBERS.get(call.op, ()))
    return Lowered((elementwise_launch(call, call.op, call.outputs[0], operands, numbers),))


@lowering("scale_by")
def lower_scale_by(call: Call) -> Lowered:
    return Lowered((elementwise_launch(call, "scale_by", call.outputs[0], (call.operand("x"), call.operand("s"))),))


@lowering("add_row")
def lower_add_row(call: Call) -> Lowered:
    rows, x = call.operand("rows"), call.operand("x")
    row = table_row(call, rows, int(call.attrs["index"]))
    return Lowered((elementwise_launch(call, "add", call.outputs[0], (x, (row, 0))),))


def copy_launch(
    call: Call,
    out: Operand,
    x: Operand | tuple[Pointer, int],
    width: int,
    heads: int = 1,
    out_at: int = 0,
    x_at: int = 0,
    out_head: int = 0,
    x_head: int = 0,
) -> Launch:
    """Copies runs of columns of every row: from column x_at (and every x_head behind it) to out_at (every out_head)."""
    target, (source, stride) = call.pointer(out, (out.dtype,)), x if isinstance(x, tuple) else _whole(call, x)
    call.need(source.dtype == out.dtype, f"{source.dtype} is copied to {out.dtype}")
    item = {"f32": 4, "i32": 4, "i64": 8, "bf16": 2, "u8": 1}[out.dtype]
    block = min(1024, power(width * heads, 32))
    values: dict[str, Any] = {
        "out": _shift(target, out_at * item), "x": _shift(source, x_at * item), "width": Aligned(width),
        "heads": heads, "out_stride": Aligned(out.stride), "x_stride": Aligned(stride),
        "out_head": Aligned(out_head), "x_head": Aligned(x_head),
    }  # fmt: skip
    grid = (call.rows(out), -(-width * heads // block))
    return launch("copy_kernel", grid, values, {"BLOCK": block}, 4 if block > 256 else 1)


def _whole(call: Call, x: Operand) -> tuple[Pointer, int]:
    return call.pointer(x, (x.dtype,)), x.stride


def _shift(pointer: Pointer, nbytes: int) -> Pointer:
    return Pointer(pointer.space, pointer.name, pointer.offset + nbytes, pointer.dtype, pointer.nbytes - nbytes)


@lowering("copy")
def lower_copy(call: Call) -> Lowered:
    """Not an op of the IR: what an emitter asks for where a view cannot be one."""
    x = call.operand("x")
    return Lowered((copy_launch(call, call.outputs[0], x, x.cols),))


@lowering("concat_columns")
def lower_concat_columns(call: Call) -> Lowered:
    a, b, out = call.operand("a"), call.operand("b"), call.outputs[0]
    return Lowered((copy_launch(call, out, a, a.cols), copy_launch(call, out, b, b.cols, out_at=a.cols)))


@lowering("head_columns")
def lower_head_columns(call: Call) -> Lowered:
    x, heads = call.operand("x"), int(call.attrs["num_heads"])
    start, width = int(call.attrs["start"]), int(call.attrs["stop"]) - int(call.attrs["start"])
    return Lowered(
        (copy_launch(call, call.outputs[0], x, width, heads, x_at=start, out_head=width, x_head=x.cols // heads),)
    )


@lowering("concat_heads")
def lower_concat_heads(call: Call) -> Lowered:
    a, b, out = call.operand("a"), call.operand("b"), call.outputs[0]
    heads, shared = int(call.attrs["num_heads"]), int(call.attrs["shared"])
    left = a.cols if shared == 1 else a.cols // heads
    right = b.cols if shared == 2 else b.cols // heads
    first = copy_launch(call, out, a, left, heads, out_head=left + right, x_head=0 if shared == 1 else left)
    second = copy_launch(
        call, out, b, right, heads, out_at=left, out_head=left + right, x_head=0 if shared == 2 else right
    )
    return Lowered((first, second))

"""Arithmetic on elements: what one op does to values in registers, and several of them one after the other, which
products, norms and a kernel of their own run before they store (docs/triton-kernels.md, "Steps")."""

from typing import Any

import triton.language as tl

from tmlc.ir.steps import OPERANDS, read_steps
from tmlc.kernels.triton.launch import Aligned, Lowered, Operand, Pointer
from tmlc.kernels.triton.mode import device
from tmlc.kernels.triton.registry import Call, launch, lowering

#: What a kernel with steps takes beside its own arguments when there are none.
NO_STEPS: dict[str, Any] = dict.fromkeys(
    ("a", "b", "c", "a_stride", "b_stride", "c_stride", "number0", "number1", "number2")
)


@device
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@device
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@device
def tanh(x):
    """tanh in float32, without cancellation near 0."""
    size = tl.abs(x)
    square = x * x
    small = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * -0.053968254)))
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.2, small, tl.where(x < 0.0, -large, large))


@device
def arithmetic(x, y, z, alpha, beta, OP: tl.constexpr):
    """OP(x, y, z; alpha, beta), element by element; the operands that OP does not take are not looked at."""
    if OP == "add":
        result = x + y
    elif OP == "mul":
        result = x * y
    elif OP == "add_scaled":
        result = x + alpha * y
    elif OP == "scale":
        result = x * alpha
    elif OP == "clamp":  # a NaN stays one
        result = tl.where(x < alpha, alpha, x)
        result = tl.where(result > beta, beta, result)
    elif OP == "silu":
        result = x * sigmoid(x)
    elif OP == "gelu":
        result = gelu(x)
    elif OP == "swiglu":
        result = x * sigmoid(x) * y
    elif OP == "modulate":
        result = x * (1.0 + y) + z
    elif OP == "sigmoid":
        result = sigmoid(x)
    elif OP == "softcap":
        result = alpha * tanh(x / alpha)
    else:
        tl.static_assert(False, "an operation without arithmetic")
    return result


@device
def operand(v, a, b, c, WHICH: tl.constexpr):
    chosen = v
    if WHICH == "a":
        chosen = a
    if WHICH == "b":
        chosen = b
    if WHICH == "c":
        chosen = c
    return chosen


@device
def number(number0, number1, number2, WHICH: tl.constexpr):
    chosen = 0.0
    if WHICH == 0:
        chosen = number0
    if WHICH == 1:
        chosen = number1
    if WHICH == 2:
        chosen = number2
    return chosen


@device
def run_steps(v, a, b, c, number0, number1, number2, STEPS: tl.constexpr, COUNT: tl.constexpr):
    """v after each of COUNT steps, in order. STEPS has six entries for each, in one row (Triton 3.6 takes no tuples of
    tuples, and a text out of a tuple only if it is told again that it is a constant): the op, what its three operands
    are, which its two numbers are."""
    for i in tl.static_range(COUNT):
        x = operand(v, a, b, c, tl.constexpr(STEPS[6 * i + 1]))
        y = operand(v, a, b, c, tl.constexpr(STEPS[6 * i + 2]))
        z = operand(v, a, b, c, tl.constexpr(STEPS[6 * i + 3]))
        first = number(number0, number1, number2, STEPS[6 * i + 4])
        second = number(number0, number1, number2, STEPS[6 * i + 5])
        v = arithmetic(x, y, z, first, second, tl.constexpr(STEPS[6 * i]))
    return v


@device
def element_steps_kernel(
    out, x, a, b, c, cols, out_stride, x_stride, a_stride, b_stride, c_stride, number0, number1, number2,
    STEPS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the steps on x; grid (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    values = tl.load(x + row * x_stride + col, mask=inside, other=0.0)
    av, bv, cv = values, values, values
    if a is not None:
        av = tl.load(a + row * a_stride + col, mask=inside, other=0.0)
    if b is not None:
        bv = tl.load(b + row * b_stride + col, mask=inside, other=0.0)
    if c is not None:
        cv = tl.load(c + row * c_stride + col, mask=inside, other=0.0)
    values = run_steps(values, av, bv, cv, number0, number1, number2, STEPS, COUNT)
    tl.store(out + row * out_stride + col, values, mask=inside)


@device
def silu_add_rows_kernel(
    out, x, table, cols, out_stride, x_stride, table_stride,
    INDEX: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row, i·cols + col] = silu(x[row, col] + table[INDEX[i], col]); grid (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    values = tl.load(x + row * x_stride + col, mask=inside, other=0.0)
    for i in tl.static_range(COUNT):
        total = values + tl.load(table + INDEX[i] * table_stride + col, mask=inside, other=0.0)
        tl.store(out + row * out_stride + i * cols + col, total * sigmoid(total), mask=inside)


def steps_of(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constexprs of the steps of a call, whose value has the type of its result.

    Raises:
        EmitError: an operand is a weight (only `add_row` reads one), or has other rows than the result.
    """
    steps = read_steps(str(call.attrs["steps"]), tuple(call.attrs["numbers"]))
    values, out = dict(NO_STEPS), call.outputs[0]
    rows = {step.operands[1]: int(step.numbers[0]) for step in steps if step.op == "add_row"}
    for letter in OPERANDS:
        given = call.optional(letter)
        if given is None:
            continue
        if letter in rows:
            users = [step.op for step in steps if letter in step.operands]
            call.need(users == ["add_row"], f"operand {letter} is read as a table and as {users}")
            pointer, stride = table_row(call, given, rows[letter]), 0
        else:
            call.need(given.space != "weight", f"operand {letter} is the weight {given.name}")
            call.need(given.rows == out.rows and given.cols == out.cols, f"operand {letter} has another shape")
            pointer, stride = call.pointer(given), given.stride
        values |= {letter: pointer, f"{letter}_stride": Aligned(stride)}
    coded: list[str | int] = []
    count = 0
    for step in steps:
        taken = () if step.op == "add_row" else step.numbers
        which = [count + index if index < len(taken) else -1 for index in range(2)]
        values |= {f"number{count + index}": float(value) for index, value in enumerate(taken)}
        operands = (*step.operands, "", "")[:3]
        coded += ["add" if step.op == "add_row" else step.op, *operands, *which]
        count += len(taken)
    return values, {"STEPS": tuple(coded), "COUNT": len(steps)}


def table_row(call: Call, table: Operand, index: int) -> Pointer:
    """Row `index` of a table of float32 rows."""
    whole = call.pointer(table)
    return Pointer(whole.space, whole.name, whole.offset + 4 * index * table.stride, "f32", 4 * table.cols)


def column_block(cols: int) -> int:
    """Columns of one program of a kernel that does little to each."""
    return min(1024, max(32, 1 << (cols - 1).bit_length()))


@lowering("element_steps")
def lower_element_steps(call: Call) -> Lowered:
    x, out = call.operand("x"), call.outputs[0]
    values, fixed = steps_of(call)
    block = column_block(out.cols)
    values |= {
        "out": call.pointer(out), "x": call.pointer(x), "cols": out.cols, "out_stride": Aligned(out.stride),
        "x_stride": Aligned(x.stride),
    }  # fmt: skip
    grid = (call.rows(out), -(-out.cols // block))
    return Lowered((launch("element_steps_kernel", grid, values, fixed | {"BLOCK": block}, 4 if block > 256 else 1),))


@lowering("silu_add_rows")
def lower_silu_add_rows(call: Call) -> Lowered:
    x, rows, out = call.operand("x"), call.operand("rows"), call.outputs[0]
    index = tuple(int(one) for one in call.attrs["index"])
    block = column_block(x.cols)
    values: dict[str, Any] = {
        "out": call.pointer(out), "x": call.pointer(x), "table": call.pointer(rows), "cols": Aligned(x.cols),
        "out_stride": Aligned(out.stride), "x_stride": Aligned(x.stride), "table_stride": Aligned(rows.stride),
    }  # fmt: skip
    fixed = {"INDEX": index, "COUNT": len(index), "BLOCK": block}
    grid = (call.rows(x), -(-x.cols // block))
    return Lowered((launch("silu_add_rows_kernel", grid, values, fixed, 4 if block > 256 else 1),))

"""Small ops that stand for several: elementwise ops one after the other, alone, behind a product or behind a norm
(fuse.steps), the conditions of all flow times (fuse.flow_times), the norms of queries and keys (fuse.norm_pair).
How steps are written: `tmlc/ir/steps.py`. The meaning is that of the ops, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tmlc.errors import IRError
from tmlc.ir.ops import blocks  # noqa: F401 (it registers some of the steps)
from tmlc.ir.ops.dense import add_row, linear, linear_type, rms_norm, silu
from tmlc.ir.ops.registry import OPS, need, op
from tmlc.ir.steps import read_steps
from tmlc.ir.types import TensorType


def _stepped(
    v: TensorType, a: TensorType | None, b: TensorType | None, c: TensorType | None, steps: str, numbers: list[float]
) -> TensorType:
    given = {"v": v, "a": a, "b": b, "c": c}
    used = {"v"}
    for step in read_steps(steps, numbers):
        used |= set(step.operands)
        for name in step.operands:
            need(given[name] is not None, f"step {step.op} reads the operand {name}, which is absent")
        try:
            made = OPS[step.op].shapes(*(given[name] for name in step.operands), *step.numbers)
        except IRError as error:
            raise IRError(f"step {step.op}: {error.what}", fix=error.fix) from None
        need(made == v, f"step {step.op} makes {made} of {v}")
    unread = {name for name, operand in given.items() if operand is not None} - used
    need(not unread, f"no step reads the operand {', '.join(sorted(unread))}")
    return v


def _run(v: Tensor, a: Tensor | None, b: Tensor | None, c: Tensor | None, steps: str, numbers: list[float]) -> Tensor:
    given: dict[str, Any] = {"a": a, "b": b, "c": c}
    for step in read_steps(steps, numbers):
        v = OPS[step.op].reference(*((given | {"v": v})[name] for name in step.operands), *step.numbers)
    return v


_STEPS = "Tensor? a, Tensor? b, Tensor? c, str steps, float[] numbers"


def _element_steps(x: TensorType, *steps: Any) -> TensorType:
    need(x.dtype == "f32", f"x must be f32, not {x.dtype}")
    return _stepped(x, *steps)


@op(f"element_steps(Tensor x, {_STEPS}) -> Tensor", _element_steps, from_pass=True)
def element_steps(
    x: Tensor, a: Tensor | None, b: Tensor | None, c: Tensor | None, steps: str, numbers: list[float]
) -> Tensor:
    """The steps on x, one after the other."""
    return _run(x, a, b, c, steps, numbers)


def _linear_steps(x: TensorType, weight: TensorType, bias: TensorType | None, *steps: Any) -> TensorType:
    return _stepped(linear_type(x, weight, bias), *steps)


@op(f"linear_steps(Tensor x, Tensor weight, Tensor? bias, {_STEPS}) -> Tensor", _linear_steps, from_pass=True)
def linear_steps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    steps: str,
    numbers: list[float],
) -> Tensor:
    """The steps on linear(x): an activation, a gate, a residual, an Euler step behind a product."""
    return _run(linear(x, weight, bias), a, b, c, steps, numbers)


def _rms_norm_steps(x: TensorType, weight: TensorType, eps: float, *steps: Any) -> TensorType:
    return _stepped(_norm_type(x, weight, eps), *steps)


def _norm_type(x: TensorType, weight: TensorType, eps: float) -> TensorType:
    made = OPS["rms_norm"].shapes(x, weight, eps)
    assert isinstance(made, TensorType)
    return made


@op(f"rms_norm_steps(Tensor x, Tensor weight, float eps, {_STEPS}) -> Tensor", _rms_norm_steps, from_pass=True)
def rms_norm_steps(
    x: Tensor,
    weight: Tensor,
    eps: float,
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    steps: str,
    numbers: list[float],
) -> Tensor:
    """The steps on rms_norm(x): an adaptive norm, an activation behind a norm."""
    return _run(rms_norm(x, weight, eps), a, b, c, steps, numbers)


def _silu_add_rows(x: TensorType, rows: TensorType, index: list[int]) -> TensorType:
    need(len(index) > 0, "index names no row")
    for one in index:
        OPS["add_row"].shapes(x, rows, one)
    return TensorType("f32", (x.shape[0], len(index) * x.shape[1]))


@op("silu_add_rows(Tensor x, Tensor rows, int[] index) -> Tensor", _silu_add_rows, from_pass=True)
def silu_add_rows(x: Tensor, rows: Tensor, index: list[int]) -> Tensor:
    """silu(x + rows[i]) for each i of index, side by side: [n, c] → [n, len(index)·c]."""
    return torch.cat([silu(add_row(x, rows, one)) for one in index], 1)


def _rms_norm_pair(
    a: TensorType, a_weight: TensorType, b: TensorType, b_weight: TensorType, eps: float
) -> tuple[TensorType, ...]:
    _norm_type(a, a_weight, eps)
    _norm_type(b, b_weight, eps)
    need(a.shape[0] == b.shape[0], f"{a} and {b} differ in rows")
    need(a_weight.cols == b_weight.cols, f"the weights {a_weight} and {b_weight} differ in columns")
    return a, b


@op(
    "rms_norm_pair(Tensor a, Tensor a_weight, Tensor b, Tensor b_weight, float eps) -> (Tensor, Tensor)",
    _rms_norm_pair,
    from_pass=True,
)
def rms_norm_pair(a: Tensor, a_weight: Tensor, b: Tensor, b_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(a), rms_norm(b)) over groups of one width: queries and keys."""
    return rms_norm(a, a_weight, eps), rms_norm(b, b_weight, eps)

"""Rows of elementwise steps as text: what the fused ops of `tmlc/ir/ops/steps.py` carry and kernels read.

`mul:av add:bv`: each step names an elementwise op and what its tensor arguments are, in their order: `v`, the value so
far, or one of the operands `a`, `b`, `c`. The numbers of all steps stand in one list, in the order in which the ops
take them. Without torch: the processes that compile kernels read steps too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tmlc.errors import IRError

OPERANDS = ("a", "b", "c")
#: What a kernel keeps beside the value.
MOST_STEPS, MOST_NUMBERS = 4, 3
#: What a step may be: how many tensors the op takes, and the kinds of the numbers behind them.
STEP_OPS: dict[str, tuple[int, tuple[type, ...]]] = {
    "add": (2, ()), "mul": (2, ()), "add_scaled": (2, (float,)), "scale": (1, (float,)), "add_row": (2, (int,)),
    "silu": (1, ()), "gelu": (1, ()), "swiglu": (2, ()), "clamp": (1, (float, float)), "modulate": (3, ()),
    "sigmoid": (1, ()), "softcap": (1, (float,)),
}  # fmt: skip


@dataclass(frozen=True)
class ElementStep:
    """One step: its op, what each of its tensor arguments is ("v", "a", "b", "c"), and its numbers."""

    op: str
    operands: str
    numbers: tuple[float | int, ...] = ()


def write_steps(steps: Sequence[ElementStep]) -> tuple[str, list[float]]:
    """Steps as the arguments `steps` and `numbers` of a fused op."""
    text = " ".join(f"{step.op}:{step.operands}" for step in steps)
    return text, [float(number) for step in steps for number in step.numbers]


def read_steps(text: str, numbers: Sequence[float]) -> tuple[ElementStep, ...]:
    """What `write_steps` wrote. IRError for ops that are no steps, and for operands and numbers that do not fit."""
    found, rest = [], list(numbers)
    for part in text.split():
        name, _, operands = part.partition(":")
        if name not in STEP_OPS:
            raise IRError(f"{name!r} is not a step", fix=f"use {', '.join(STEP_OPS)}")
        tensors, kinds = STEP_OPS[name]
        if len(operands) != tensors or not set(operands) <= {"v", *OPERANDS} or "v" not in operands:
            what = f"step {part!r} does not name {tensors} of v, {', '.join(OPERANDS)}, v among them"
            raise IRError(what, fix=f"write it as `{name}:{''.join(('v', *OPERANDS)[:tensors])}`")
        if len(rest) < len(kinds):
            fix = f"give {len(kinds)} for {name}, behind those of the steps before it"
            raise IRError(f"step {part!r} lacks a number", fix=fix)
        own, rest = rest[: len(kinds)], rest[len(kinds) :]
        found.append(ElementStep(name, operands, tuple(kind(n) for kind, n in zip(kinds, own, strict=True))))
    if rest or not 0 < len(found) <= MOST_STEPS or len(numbers) > MOST_NUMBERS:
        raise IRError(
            f"{len(found)} steps and {len(numbers)} numbers, of which {len(rest)} are not read",
            fix=f"give 1 to {MOST_STEPS} steps and the numbers that they take, at most {MOST_NUMBERS}",
        )
    return tuple(found)

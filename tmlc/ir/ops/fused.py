"""Ops that fusing passes make: the meaning of each is the ops that it stands for, one after the other."""

from __future__ import annotations

from torch import Tensor

from tmlc.ir.ops.blocks import softcap
from tmlc.ir.ops.dense import _linear as linear_type
from tmlc.ir.ops.dense import linear
from tmlc.ir.ops.random import _sample as sample_type
from tmlc.ir.ops.random import sample
from tmlc.ir.ops.registry import need, op
from tmlc.ir.types import TensorType


def _head_sample(
    x: TensorType,
    weight: TensorType,
    bias: TensorType | None,
    key: TensorType,
    temperature: TensorType,
    alpha: float,
    cap: float,
    entries: int,
) -> TensorType:
    logits = linear_type(x, weight, bias)
    need(0 < entries <= logits.shape[1], f"{entries} entries of {logits.shape[1]} rows of the weight")
    need(cap >= 0, f"cap {cap} must not be negative")
    return sample_type(logits, key, temperature)


@op(
    "head_sample(Tensor x, Tensor weight, Tensor? bias, Tensor key, Tensor temperature, float alpha, float cap,"
    " int entries) -> Tensor",
    _head_sample,
    from_pass=True,
)
def head_sample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key: Tensor,
    temperature: Tensor,
    alpha: float,
    cap: float,
    entries: int,
) -> Tensor:
    """sample of the first `entries` logits softcap(linear(alpha·x)); alpha 1: x itself, cap 0: no soft cap."""
    logits = linear(x * alpha if alpha != 1 else x, weight, bias)
    if cap > 0:
        logits = softcap(logits, cap)
    return sample(logits[:, :entries], key, temperature)

"""The routers of the open decoders: top-k of softmax, sigmoid or raw scores, with or without groups of experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tmlc.ir.ops.registry import exact, matrix, need, op, vector, wide
from tmlc.ir.types import TensorType

SOFTMAX, SIGMOID, RAW = range(3)


def _topk_router(
    logits: TensorType,
    bias: TensorType | None,
    scores: int,
    top_k: int,
    normalise: bool,
    groups: int,
    top_groups: int,
    scale: float,
) -> tuple[TensorType, ...]:
    n, experts = matrix(logits, "logits")
    need(bias is None or vector(bias, "bias") == experts, f"bias must have {experts} columns, not {bias}")
    need(scores in (SOFTMAX, SIGMOID, RAW), f"scores is {scores}: 0 softmax, 1 sigmoid, 2 raw logits")
    each = exact(experts, groups, "experts per group")
    need(1 <= top_groups <= groups, f"top_groups is {top_groups} of {groups} groups")
    need(0 < top_k <= each * top_groups, f"top_k is {top_k}, {top_groups} groups hold {each * top_groups} experts")
    return TensorType("f32", (n, top_k)), TensorType("i64", (n, top_k))


@op(
    "topk_router(Tensor logits, Tensor? bias, int scores, int top_k, bool normalise, int groups, int top_groups, "
    "float scale) -> (Tensor, Tensor)",
    _topk_router,
)
def topk_router(
    logits: Tensor,
    bias: Tensor | None,
    scores: int,
    top_k: int,
    normalise: bool,
    groups: int,
    top_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(weights, experts): the top_k experts by score (+ bias, for the choice only), best first, ties: lowest index.

    scores: 0 softmax over all logits, 1 sigmoid, 2 the logits themselves, of which the chosen go through a softmax.
    groups > 1: a group's score is the sum of its two best (its only one where it has one); experts outside the
    top_groups best groups cannot be chosen. normalise divides by the sum of the chosen scores (+ 1e-20 for sigmoid);
    then the weights are multiplied by `scale`.
    """
    if scores == SOFTMAX:
        score = torch.softmax(logits, dim=1)
    else:
        score = torch.sigmoid(logits) if scores == SIGMOID else logits
    choice = score if bias is None else score + wide(bias.reshape(1, -1), score)
    if groups > 1:
        n, experts = logits.shape
        each = experts // groups
        best = choice.reshape(n, groups, each).topk(min(2, each), dim=2).values.sum(2)
        out = torch.ones(n, groups, dtype=torch.bool, device=logits.device)
        out.scatter_(1, _best(best, top_groups), False)
        choice = choice.masked_fill(out.repeat_interleave(each, 1), -math.inf)
    chosen = _best(choice, top_k)
    weights = score.gather(1, chosen)
    if scores == RAW:
        weights = torch.softmax(weights, dim=1)
    if normalise:
        weights = weights / (weights.sum(1, keepdim=True) + (1e-20 if scores == SIGMOID else 0.0))
    return weights * scale, chosen


def _append_experts(weights: TensorType, experts: TensorType, first: int, count: int) -> tuple[TensorType, ...]:
    n, chosen = matrix(weights, "weights")
    need(experts == TensorType("i64", (n, chosen)), f"experts must be i64[{n}, {chosen}], not {experts}")
    need(first > 0 and count > 0, f"{count} experts from {first} on: both are positive")
    return TensorType("f32", (n, chosen + count)), TensorType("i64", (n, chosen + count))


@op(
    "append_experts(Tensor weights, Tensor experts, int first, int count) -> (Tensor, Tensor)",
    _append_experts,
    from_pass=True,
)
def append_experts(weights: Tensor, experts: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Each row's weights and experts, and behind them the experts first.. first + count - 1 with weight 1."""
    shared = torch.arange(first, first + count, device=experts.device).expand(len(experts), count)
    return torch.cat([weights, torch.ones_like(shared, dtype=weights.dtype)], 1), torch.cat([experts, shared], 1)


def _best(values: Tensor, count: int) -> Tensor:
    return torch.sort(values, dim=1, descending=True, stable=True).indices[:, :count]

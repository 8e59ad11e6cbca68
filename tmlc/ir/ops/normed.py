"""Ops that norm the rows that they read (fuse.norm_router, fuse.norm_linear): the meaning of each is rms_norm of whole
rows, `modulate` where it takes a gain and a shift, and then the op behind it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tmlc.ir.ops.dense import linear, modulate, rms_norm
from tmlc.ir.ops.fused import linear_conv_state
from tmlc.ir.ops.moe import router
from tmlc.ir.ops.registry import OPS, need, op, vector
from tmlc.ir.ops.steps import linear_steps
from tmlc.ir.types import TensorType


def _behind(name: str, x: TensorType, norm: TensorType, *args: Any) -> Any:
    """What the op `name` makes of the normed rows."""
    need(vector(norm, "norm") == x.shape[1], f"norm must have {x.shape[1]} columns, not {norm}")
    return OPS[name].shapes(x, *args)


def _norm_router(x: TensorType, norm: TensorType, eps: float, *args: Any) -> tuple[TensorType, ...]:
    return (*_behind("router", x, norm, *args), x)


@op(
    "norm_router(Tensor x, Tensor norm, float eps, Tensor weight, Tensor bias, Tensor scale, int top_k, int n_shared,"
    " float route_scale) -> (Tensor, Tensor, Tensor)",
    _norm_router,
    from_pass=True,
)
def norm_router(x: Tensor, norm: Tensor, eps: float, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """router of rms_norm(x), and the normed rows themselves, for the experts: (weights, experts, normed)."""
    normed = rms_norm(x, norm, eps)
    return (*router(normed, *args), normed)


def _norm_linear(x: TensorType, norm: TensorType, eps: float, *args: Any) -> TensorType:
    made: TensorType = _behind("linear", x, norm, *args)
    return made


@op(
    "norm_linear(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias) -> Tensor", _norm_linear, from_pass=True
)
def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear of rms_norm(x)."""
    return linear(rms_norm(x, norm, eps), weight, bias)


def _norm_linear_steps(x: TensorType, norm: TensorType, eps: float, *args: Any) -> TensorType:
    made: TensorType = _behind("linear_steps", x, norm, *args)
    return made


@op(
    "norm_linear_steps(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, Tensor? c,"
    " str steps, float[] numbers) -> Tensor",
    _norm_linear_steps,
    from_pass=True,
)
def norm_linear_steps(x: Tensor, norm: Tensor, eps: float, *args: Any) -> Tensor:
    """linear_steps of rms_norm(x)."""
    return linear_steps(rms_norm(x, norm, eps), *args)


def _norm_linear_conv_state(x: TensorType, norm: TensorType, eps: float, *args: Any) -> TensorType:
    made: TensorType = _behind("linear_conv_state", x, norm, *args)
    return made


@op(
    "norm_linear_conv_state(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias, Tensor? scale, Tensor taps,"
    " Tensor(a!) tail, int start, bool residual, float level, Tensor? addend) -> Tensor",
    _norm_linear_conv_state,
    from_pass=True,
)
def norm_linear_conv_state(x: Tensor, norm: Tensor, eps: float, *args: Any) -> Tensor:
    """linear_conv_state of rms_norm(x)."""
    return linear_conv_state(rms_norm(x, norm, eps), *args)


def _modulated(
    name: str, x: TensorType, norm: TensorType, eps: float, gain: TensorType, shift: TensorType, *args: Any
) -> TensorType:
    OPS["modulate"].shapes(x, gain, shift)
    made: TensorType = _behind(name, x, norm, *args)
    return made


def _modulated_linear(x: TensorType, *args: Any) -> TensorType:
    return _modulated("linear", x, *args)


@op(
    "modulated_linear(Tensor x, Tensor norm, float eps, Tensor gain, Tensor shift, Tensor weight, Tensor? bias)"
    " -> Tensor",
    _modulated_linear,
    from_pass=True,
)
def modulated_linear(x: Tensor, norm: Tensor, eps: float, gain: Tensor, shift: Tensor, *args: Any) -> Tensor:
    """linear of modulate(rms_norm(x), gain, shift)."""
    return linear(modulate(rms_norm(x, norm, eps), gain, shift), *args)


def _modulated_linear_steps(x: TensorType, *args: Any) -> TensorType:
    return _modulated("linear_steps", x, *args)


@op(
    "modulated_linear_steps(Tensor x, Tensor norm, float eps, Tensor gain, Tensor shift, Tensor weight, Tensor? bias,"
    " Tensor? a, Tensor? b, Tensor? c, str steps, float[] numbers) -> Tensor",
    _modulated_linear_steps,
    from_pass=True,
)
def modulated_linear_steps(x: Tensor, norm: Tensor, eps: float, gain: Tensor, shift: Tensor, *args: Any) -> Tensor:
    """linear_steps of modulate(rms_norm(x), gain, shift)."""
    return linear_steps(modulate(rms_norm(x, norm, eps), gain, shift), *args)

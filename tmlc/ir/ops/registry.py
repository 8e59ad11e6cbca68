"""The table of canonical ops, and the decorator that registers one there and as `torch.ops.tmlc.<name>`.

An op is registered once: its schema, its shape function, and a plain PyTorch body which *is* its meaning, its
fallback and the oracle of every kernel test. A call in a program always carries every argument, in the order of
docs/ir.md: arguments that came later than their op have defaults in the schema, which `program.positional` fills in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tmlc.errors import IRError
from tmlc.ir.types import TensorType, ValueType

__all__ = ["OPS", "OpSpec", "conv_taps", "need", "one_element", "op", "spec_of", "vector"]

_LIBRARY = torch.library.Library("tmlc", "FRAGMENT")


@dataclass(frozen=True)
class OpSpec:
    """One canonical op.

    Attributes:
        name: as in docs/ir.md.
        schema: torch schema without the namespace.
        reference: plain PyTorch, differentiable where the op is; computes in the dtype of its activations.
        shapes: types of the arguments (TensorType for tensors, None for absent ones, plain values for the
            rest) → type of the result; works on ints, Dim and SymInt; raises IRError for arguments that do
            not fit.
        mutates: names of the state arguments that the op changes in place.
        doc: one line of what it computes.
        from_pass: True for ops that only passes may introduce.
        view: True for ops that are another reading of the same bytes in every engine.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    shapes: Callable[..., ValueType]
    mutates: tuple[str, ...]
    doc: str
    from_pass: bool
    view: bool

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.tmlc, self.name).default

    @property
    def args(self) -> tuple[str, ...]:
        """Names of the arguments, in order."""
        return tuple(a.name for a in self.overload._schema.arguments)

    @property
    def optional(self) -> frozenset[str]:
        """Names of the arguments that may be absent (None)."""
        return frozenset(a.name for a in self.overload._schema.arguments if isinstance(a.type, torch.OptionalType))

    @property
    def outputs(self) -> int:
        """Number of tensors returned: 0 to 3."""
        return len(self.overload._schema.returns)


OPS: dict[str, OpSpec] = {}


def op(
    schema: str, shapes: Callable[..., ValueType], *, from_pass: bool = False, view: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated reference under `schema` (its name is the schema's) with its shape function."""

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        # A view may be its input's memory, which a torch op must not return without a schema that says so.
        body = (lambda *args: reference(*args).clone()) if view else reference
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")

        def fake(*args: Any) -> Any:
            args = (*args, *(a.default_value for a in schema_args[len(args) :]))
            like = next(a for a in args if isinstance(a, torch.Tensor))
            result = shapes(*[TensorType.of(a) if isinstance(a, torch.Tensor) else a for a in args])
            empty = [like.new_empty(t.shape, dtype=t.torch_dtype) for t in _types(result)]
            return empty[0] if isinstance(result, TensorType) else tuple(empty) if empty else None

        schema_args = getattr(torch.ops.tmlc, name).default._schema.arguments
        torch.library.register_fake(f"tmlc::{name}", fake, lib=_LIBRARY)
        mutates = tuple(a.name for a in schema_args if a.alias_info is not None and a.alias_info.is_write)
        doc = (reference.__doc__ or "").strip().partition("\n")[0]
        OPS[name] = OpSpec(name, schema, reference, shapes, mutates, doc, from_pass, view)
        return reference

    return register


def _types(result: ValueType) -> tuple[TensorType, ...]:
    return (result,) if isinstance(result, TensorType) else result


def spec_of(target: object) -> OpSpec | None:
    """The op that a graph node's target calls, or None if it is not a canonical op."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "tmlc":
        return OPS.get(target._schema.name.partition("::")[2])
    return None


# What shape functions are written with.


def need(condition: Any, message: str) -> None:
    """Raises IRError(message) unless the condition holds."""
    if not condition:
        raise IRError(message, fix="see docs/ir.md for the op")


def matrix(t: TensorType, what: str, dtypes: tuple[str, ...] = ("f32",)) -> tuple[Any, Any]:
    """(rows, cols) of a two-dimensional argument of one of `dtypes`."""
    need(len(t.shape) == 2, f"{what} must be two-dimensional, not {t}")
    need(t.dtype in dtypes, f"{what} must be {' or '.join(dtypes)}, not {t.dtype}")
    return t.shape[0], t.shape[1]


def vector(t: TensorType, what: str) -> Any:
    """The length of a float32 `[d]` or `[1, d]`."""
    need(t.dtype == "f32", f"{what} must be f32, not {t.dtype}")
    need(len(t.shape) == 1 or (len(t.shape) == 2 and t.shape[0] == 1), f"{what} must be one row, not {t}")
    return t.shape[-1]


def one_element(t: TensorType, what: str) -> None:
    """Checks a float32 scalar in any of the forms `[]`, `[1]`, `[1, 1]`."""
    need(t.dtype == "f32" and all(size == 1 for size in t.shape), f"{what} must be one f32 number, not {t}")


def conv_taps(t: TensorType, what: str) -> tuple[Any, Any]:
    """(channels, taps) of a depthwise filter `[c, k]` or `[c, 1, k]`."""
    need(t.dtype == "f32", f"{what} must be f32, not {t.dtype}")
    need(
        len(t.shape) == 2 or (len(t.shape) == 3 and t.shape[1] == 1),
        f"{what} must be [c, k] or [c, 1, k], not {t}",
    )
    return t.shape[0], t.shape[-1]


def exact(size: Any, divisor: int, what: str) -> Any:
    """size / divisor; IRError unless it leaves no rest."""
    need(divisor > 0 and size % divisor == 0, f"{what}: {size} is not a multiple of {divisor}")
    return size // divisor


def wide(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A weight in the dtype that the activations are computed in."""
    return weight.to(like.dtype)

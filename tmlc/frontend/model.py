"""What an architecture's frontend hands to the tracer: the model on the meta device, its methods, its tick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tmlc.ir.dims import Dim
from tmlc.ir.types import TensorType, dtype_name

if TYPE_CHECKING:
    from tmlc.model_zoo.interaction.modeling import MethodDef


@dataclass(frozen=True)
class Traceable:
    """One method before it is traced: the module, its inputs with their types, the names of its outputs."""

    module: nn.Module
    inputs: tuple[tuple[str, TensorType], ...]
    outputs: tuple[str, ...]

    @staticmethod
    def of(method: MethodDef) -> Traceable:
        """From the model zoo's description of a method."""
        inputs = []
        for item in method.inputs:
            a, b = item.rows
            inputs.append((item.name, TensorType(dtype_name(item.dtype), (Dim(a, b) if a else b, item.cols))))
        return Traceable(method.module, tuple(inputs), tuple(method.outputs))


@dataclass(frozen=True)
class Stored:
    """How a parameter is made of checkpoint tensors that have other names or layouts.

    Attributes:
        tensor: the name of one in the checkpoint.
        shape: its shape there.
        steps: weight ops (`tmlc.ir.weights`) with their args, applied in order; they must end in the parameter's shape,
            or in that of its first rows.
        more: where the rows behind those come from.
    """

    tensor: str
    shape: tuple[int, ...]
    steps: tuple[tuple[str, dict[str, Any]], ...] = ()
    more: tuple[Stored, ...] = ()

    @property
    def parts(self) -> tuple[Stored, ...]:
        """What the rows of the parameter are made of, in order."""
        return (self, *self.more)


@dataclass(frozen=True)
class Frontend:
    """A model that can be compiled.

    Attributes:
        kind: "interaction" or "tokens".
        model: on the meta device; its parameters and buffers have the names of the checkpoint's tensors, but for those
            that `stored` and `constants` name.
        context: runtime defaults {limit, policy, sinks, max_append}.
        tick: what a tick driver needs to know, plain data.
        ignore: tells of a surplus checkpoint tensor that it is known and not needed.
        stored: parameter → where its values are, for those that the checkpoint keeps under another name or layout.
        constants: parameter or buffer → its values, for those that no checkpoint holds.
        notes: what a person should know of how the checkpoint was read; they end up in the compile report.
    """

    kind: str
    name: str
    model: nn.Module
    methods: dict[str, Traceable]
    context: dict[str, Any]
    tick: dict[str, Any]
    ignore: Callable[[str], bool]
    stored: Mapping[str, Stored] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

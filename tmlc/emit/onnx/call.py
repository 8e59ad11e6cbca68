"""One call of a canonical op that is being lowered: its arguments as values of the graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from tmlc.emit.onnx.graph import INT_MAX, External, Graph
from tmlc.emit.onnx.weights import OnnxWeight, Section, Weights
from tmlc.errors import EmitError
from tmlc.ir.dims import Dim
from tmlc.ir.types import QUANTISED, TensorType

if TYPE_CHECKING:
    from tmlc.emit.onnx.states import MethodStates


@dataclass
class MethodContext:
    """What the calls of one method share.

    Attributes:
        graph: where nodes go.
        values: names of the values of nodes, by (node, number of the result).
        count: the name of the int64 tensor [1] that holds n.
        contrib: may operators of ONNX Runtime's own domain be used?
        max_n: the most positions of a call.
    """

    method: str
    graph: Graph
    weights: Weights
    states: MethodStates
    contrib: bool
    max_n: int
    values: dict[tuple[fx.Node, int], str] = field(default_factory=dict)
    count: str = ""


@dataclass
class Call:
    """One node that is being lowered: its op and its arguments by name."""

    context: MethodContext
    node: fx.Node
    op: str
    args: dict[str, Any]

    @property
    def g(self) -> Graph:
        return self.context.graph

    @property
    def states(self) -> MethodStates:
        return self.context.states

    def fail(self, reason: str, fix: str = "") -> EmitError:
        """The refusal of this call, which names op, method, source line, reason and what to do."""
        return refusal(self.context.method, self.node, self.op, reason, fix)

    def type(self, name: str) -> TensorType:
        found: TensorType = self.args[name].meta["type"]
        return found

    def cols(self, name: str) -> int:
        return int(self.type(name).cols)

    def x(self, name: str) -> str:
        """An activation; or a weight as float32, where the model adds one to activations."""
        node = self.args[name]
        if node.meta.get("role", ("",))[0] == "weight":
            return self.matrix(name)
        return self.context.values[node, 0]

    def has(self, name: str) -> bool:
        return self.args.get(name) is not None

    def weight_name(self, name: str) -> str:
        kind, weight = self.args[name].meta.get("role", ("", ""))
        if kind != "weight":
            raise self.fail(f"its {name} has to be a weight")
        return str(weight)

    def stored(self, name: str, form: str = "plain") -> tuple[OnnxWeight, list[str]]:
        """A weight in a stored form, and its sections as values of the graph."""
        found = self.context.weights.use(self.weight_name(name), form)
        return found, [self._section(found, i, section) for i, section in enumerate(found.sections())]

    def _section(self, found: OnnxWeight, number: int, section: Section) -> str:
        name = found.name if not found.scheme else f"{found.name}.{('codes', 'scales', 'zeros')[number]}"
        return self.g.weight(name, External(section.dtype, section.shape, found.name, section.offset, section.nbytes))

    def raw(self, name: str) -> str:
        """A float weight in its own dtype and shape."""
        if self.type(name).dtype in QUANTISED:
            raise self.fail(f"its {name} is quantised, and it needs numbers", "Exclude the weight in quantize.*")
        return self.stored(name)[1][0]

    def weight(self, name: str) -> str:
        """A float weight as float32, in its own shape."""
        value = self.raw(name)
        return value if self.type(name).dtype == "f32" else self.g.cast(value, "f32")

    def row(self, name: str) -> str:
        """A weight `[d]` or `[1, d]` as `[d]`."""
        value = self.weight(name)
        return value if len(self.type(name).shape) == 1 else self.g.reshape(value, -1)

    def matrix(self, name: str) -> str:
        """A weight as `[rows, cols]`."""
        shape = self.type(name).shape
        return self.weight(name) if len(shape) == 2 else self.g.reshape(self.weight(name), -1, int(shape[-1]))

    def scalar(self, name: str) -> str:
        """A weight of one number, without dimensions."""
        value = self.weight(name)
        return value if not self.type(name).shape else self.g.op("Reshape", value, self.g.constant([], "i64"))

    def rows(self, name: str) -> str:
        """How many rows an activation has, int64 [1]."""
        rows = self.type(name).rows
        if not isinstance(rows, Dim):
            return self.g.ints(int(rows))
        value = self.context.count
        if rows.a != 1:
            value = self.g.op("Mul", value, self.g.ints(rows.a))
        return self.g.op("Add", value, self.g.ints(rows.b)) if rows.b else value

    def upto(self, rows: str) -> str:
        """int64 [rows]: 0, 1, … of an int64 [1]."""
        zero, one = self.g.constant(0, "i64"), self.g.constant(1, "i64")
        return self.g.op("Range", zero, self.g.squeeze(rows, 0), one)

    def last_rows(self, x: str, count: int, name: str) -> str:
        """The last `count` rows of a matrix that has at least as many."""
        return self.g.slice(x, -count, INT_MAX, 0, name)


def refusal(method: str, node: fx.Node, op: str, reason: str, fix: str = "") -> EmitError:
    """An op that cannot be lowered: op, method, source, reason, what to do."""
    source = node.meta.get("source", "")
    where = f"method {method}, {node.name}" + (f", {source}" if source else "")
    return EmitError(f"op {op} cannot be lowered to ONNX: {reason}", where=where, fix=fix or FIX)


FIX = "See docs/onnx.md for what the target lowers, and `tmlc compile --print-pipeline` for the passes that run."

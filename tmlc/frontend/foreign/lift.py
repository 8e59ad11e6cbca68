"""Lifting: the aten graph of a foreign model becomes canonical ops, one matcher an idea.

Nodes are visited in order. A matcher looks backwards from the last operation of its idea (the multiplication with a
norm's weight, the product with the values, the sum over experts) at the foreign graph, and puts canonical ops into the
IR graph for the values it reads. Operations inside an idea stay unlifted, which is no loss: only what the results need
has to be lifted. A matcher that recognises its idea and then meets something it does not know raises `Near`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from tmlc.errors import FrontendError, IRError
from tmlc.frontend.foreign.graph import module_of, name_of, shape_of, source_of
from tmlc.frontend.foreign.positions import Positions
from tmlc.frontend.foreign.rows import Param, Parts, Rows, Value
from tmlc.frontend.foreign.weights import ForeignWeights
from tmlc.frontend.trace import placeholder
from tmlc.ir.program import call
from tmlc.ir.types import TensorType

__all__ = ["Lifter", "Near", "NearMiss", "matcher"]

Matcher = Callable[["Lifter", fx.Node], "Value | None"]
MATCHERS: dict[str, list[Matcher]] = {}
SHOWN = 6  # near misses that an error spells out
#: Operations inside ideas; where nothing comes near an idea, others are named first.
INNER = {"pow", "mean", "rsqrt", "neg", "sub", "div", "softmax", "sigmoid", "tanh", "max", "topk", "gather", "scatter",
         "masked_fill", "bitwise_not", "logical_not", "zeros_like", "index", "bmm", "repeat_interleave",
         "clamp"}  # fmt: skip


class Near(Exception):
    """An idea was recognised, but not all of it: the reason."""


@dataclass(frozen=True)
class NearMiss:
    """Where a model was nearly understood."""

    module: str
    op: str
    reason: str
    source: str

    def __str__(self) -> str:
        return f"{self.module or 'the model'}: {self.op}: {self.reason} ({self.source or 'unknown source'})"


def matcher(*ops: str) -> Callable[[Matcher], Matcher]:
    """Registers a matcher for nodes that call one of `ops` (short names); earlier registrations are tried first."""

    def register(function: Matcher) -> Matcher:
        for op in ops:
            MATCHERS.setdefault(op, []).append(function)
        return function

    return register


@dataclass
class Lifter:
    """One foreign graph on its way into the IR.

    Attributes:
        foreign: the simplified aten graph.
        symbol: how it writes the number of positions.
        out: the IR graph.
        positions: what depends on positions only.
    """

    foreign: fx.Graph
    symbol: str
    weights: ForeignWeights
    constants: Mapping[fx.Node, tuple[str, Tensor]]
    out: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    near: dict[fx.Node, NearMiss] = field(default_factory=dict)
    #: IR node → (source, heads, start, stop, rope arguments or None): columns of every head of another value.
    pieces: dict[fx.Node, tuple[Rows, int, int, tuple[Any, ...] | None]] = field(default_factory=dict)
    _inputs: dict[str, fx.Node] = field(default_factory=dict)
    _at: fx.Node | None = None

    def __post_init__(self) -> None:
        self.positions = Positions(self.foreign, self.constants)

    def run(self) -> None:
        """Visits all nodes; what could not be lifted is found out when its value is asked for."""
        for node in self.foreign.nodes:
            if node in self.positions or node.op != "call_function":
                continue
            self._at = node
            for match in MATCHERS.get(name_of(node), []):
                try:
                    value = match(self, node)
                except (Near, IRError) as error:
                    reason = error.what if isinstance(error, IRError) else str(error)
                    self.near[node] = NearMiss(module_of(node), str(node.target), reason, source_of(node))
                    break
                if value is not None:
                    self.values[node] = value
                    break

    def rows(self, node: object) -> Rows | None:
        """The lifted value of a node, if it is one of rows."""
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Rows) else None

    def param(self, node: object) -> Param | None:
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Param) else None

    def part(self, node: object, index: int) -> Rows | None:
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return value.items[index] if isinstance(value, Parts) else None

    def emit(self, op: str, *args: Any) -> fx.Node:
        """A call of a canonical op at the end of the IR graph; its place is that of the node that is being lifted."""
        made = call(self.out, op, args)
        if self._at is not None:
            made.meta["source"] = " at ".join(part for part in (module_of(self._at), source_of(self._at)) if part)
        return made

    def input(self, name: str, kind: TensorType) -> fx.Node:
        if name not in self._inputs:
            self._inputs[name] = placeholder(self.out, name, ("input", name), kind)
        return self._inputs[name]

    def weight(self, param: Param, *steps: tuple[str, Any]) -> fx.Node:
        """The IR's placeholder of a parameter, after `reshape`s and `transpose`s of it."""
        name = self.weights.get(param.name, steps)
        key = f"weight {name}"
        if key not in self._inputs:
            kind = self.weights.map[name].type
            self._inputs[key] = placeholder(self.out, name, ("weight", name), kind)
        return self._inputs[key]

    def constant(self, name: str) -> fx.Node:
        """The IR's placeholder of a buffer that the frontend computes."""
        value = next(tensor for known, tensor in self.constants.values() if known == name)
        return self.weight(Param(self.weights.constant(name, value), (1, value.numel())))

    def result(self, node: fx.Node) -> fx.Node:
        """The IR value of a result of the model, a matrix [n, c].

        Raises:
            FrontendError: what it needs was not understood; lists the near misses.
        """
        rows = self.rows(node)
        if rows is not None and rows.matrix:
            return rows.node
        misses = self._why(node)
        listed = "".join(f"\n  {miss}" for miss in misses[:SHOWN])
        more = f"\n  and {len(misses) - SHOWN} more" if len(misses) > SHOWN else ""
        error = FrontendError(
            f"{len(misses)} operations of the model are not understood:{listed}{more}",
            fix="tmlc knows the forms that docs/checkpoints.md lists; report the model with this message",
        )
        error.near_misses = misses
        raise error

    def _why(self, node: fx.Node) -> list[NearMiss]:
        """The near misses that a value needs; without any, the first operations that no matcher knows."""
        seen, todo = set(), [node]
        while todo:
            current = todo.pop()
            if current in seen or current in self.values or current in self.positions:
                continue
            seen.add(current)
            todo += current.all_input_nodes
        ordered = [current for current in self.foreign.nodes if current in seen and current.op == "call_function"]
        near = [self.near[current] for current in ordered if current in self.near]
        if near:
            return near
        unknown = [n for n in ordered if name_of(n) not in MATCHERS and name_of(n) not in INNER]
        if unknown:
            reason = "no matcher knows this operation"
            return [NearMiss(module_of(n), str(n.target), reason, source_of(n)) for n in unknown]
        known = "its operands are understood, this combination is not"
        first = [
            NearMiss(module_of(n), str(n.target), known, source_of(n))
            for n in ordered
            if all(source in self.values or source in self.positions for source in n.all_input_nodes)
        ]
        shape = f"a result of shape {shape_of(node)} is not one row a position"
        return first[:SHOWN] or [NearMiss(module_of(node), str(node.target), shape, source_of(node))]

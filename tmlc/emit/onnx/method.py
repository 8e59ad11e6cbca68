"""Program → ONNX graphs: one for each method, with states as explicit inputs and outputs."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import helper
from torch import fx

from tmlc.emit.onnx.call import Call, MethodContext, refusal
from tmlc.emit.onnx.graph import CONTRIB, DTYPES, IR_VERSION, OPSET, Dim, Graph, Shared, value_info
from tmlc.emit.onnx.states import NEXT, MethodStates, StateTensor
from tmlc.emit.onnx.table import LOWERINGS, REFUSED
from tmlc.emit.onnx.weights import Weights
from tmlc.errors import EmitError
from tmlc.ir import dims
from tmlc.ir.ops import spec_of
from tmlc.ir.program import Method, Program, role
from tmlc.ir.types import TensorType
from tmlc.package.manifest import MethodInfo, Signature
from tmlc.package.safetensors_io import TensorEntry

WEIGHTS = "weights.safetensors"


@dataclass
class MethodGraph:
    """A method as a graph.

    Attributes:
        info: the method as it stands in the manifest; inputs and outputs of the graph have these names.
        states: what it reads and writes beside them.
        below: for inputs of ids, the first number that is no id.
        position: the state that counts positions, and the most it may reach (0: no limit); None where there is none.
    """

    info: MethodInfo
    graph: Graph
    states: list[StateTensor]
    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]
    below: dict[str, int]
    position: tuple[str, int] | None

    def model(self, entries: dict[str, TensorEntry], start: int, producer: str) -> bytes:
        """The file: `entries` and `start` say where weights lie in the weights file beside it."""
        shared = self.graph.shared
        tensors = list(shared.tensors)
        for name, external in shared.weights.items():
            made = onnx.TensorProto(name=name, data_type=DTYPES[external.dtype], dims=external.shape)
            made.data_location = onnx.TensorProto.EXTERNAL
            place = start + entries[external.stored].offset + external.offset
            for key, value in (("location", WEIGHTS), ("offset", place), ("length", external.nbytes)):
                made.external_data.add(key=key, value=str(value))
            tensors.append(made)
        graph = helper.make_graph(self.graph.nodes, self.info.name, self.inputs, self.outputs, tensors)
        opsets = [helper.make_opsetid("", OPSET)] + [helper.make_opsetid(CONTRIB, 1)] * shared.contrib
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tmlc", producer_version=producer
        )
        return model.SerializeToString(deterministic=True)


def emit_method(program: Program, method: Method, weights: Weights, contrib: bool) -> MethodGraph:
    """Lowers one method.

    Raises:
        EmitError: an op or operand that has no lowering.
    """
    return _Emitter(program, method, weights, contrib).emit()


@dataclass
class _Emitter:
    program: Program
    method: Method
    weights: Weights
    contrib: bool
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def emit(self) -> MethodGraph:
        graph, nodes = Graph(), self.method.graph.nodes
        graph.shared.reserved |= {role(node)[1] for node in nodes if node.op == "placeholder"}
        states = MethodStates(self.program, self.method, graph)
        self.context = MethodContext(self.method.name, graph, self.weights, states, self.contrib, self.method.max_n)
        signatures = [self._input(node) for node in self.method.inputs]
        self._count(signatures)
        for node in nodes:
            if node.op == "call_function":
                self._call(node)
        tensors = states.finish()
        infos = [value_info(t.name, t.dtype, t.shape) for t in tensors]
        given = self._outputs(graph.shared)
        after = [value_info(t.name + NEXT, t.dtype, t.shape) for t in tensors if t.written]
        return MethodGraph(
            MethodInfo(self.method.name, tuple(signatures), tuple(s for s, _ in given), self.method.max_n),
            graph,
            tensors,
            [*self.inputs, *infos],
            [*(v for _, v in given), *after],
            {role(node)[1]: limit for node in self.method.inputs if (limit := _id_limit(node))},
            self._position(),
        )

    def _narrow(self, node: fx.Node, kind: TensorType) -> str:
        """Ids and levels are i32 outside of graphs, keys of the random stream i64."""
        return "i32" if kind.dtype == "i64" and not _is_key(node) else kind.dtype

    def _input(self, node: fx.Node) -> Signature:
        kind, name = node.meta["type"], role(node)[1]
        dtype = self._narrow(node, kind)
        self.inputs.append(value_info(name, dtype, _shape(kind)))
        graph = self.context.graph
        self.context.values[node, 0] = graph.cast(name, kind.dtype) if dtype != kind.dtype else name
        return _signature(name, dtype, kind)

    def _count(self, signatures: list[Signature]) -> None:
        """n, from the shape of an input."""
        graph = self.context.graph
        for s in sorted(signatures, key=lambda s: s.rows != (1, 0)):
            if s.rows[0]:
                rows = graph.op("Shape", s.name, start=0, end=1)
                rows = graph.op("Sub", rows, graph.ints(s.rows[1])) if s.rows[1] else rows
                self.context.count = graph.op("Div", rows, graph.ints(s.rows[0])) if s.rows[0] > 1 else rows
                return
        what = f"method {self.method.name} has no input whose rows are the new positions"
        raise EmitError(what, where="onnx", fix="Give the method an input with a row for each position.")

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, number = node.args
            self.context.values[node, 0] = self.context.values[source, int(number)]  # type: ignore[index, arg-type]
            return
        spec = spec_of(node.target)
        if spec is None:
            raise refusal(self.method.name, node, str(node.target), "it is not a canonical op")
        if spec.name not in LOWERINGS:
            raise refusal(self.method.name, node, spec.name, *REFUSED.get(spec.name, ("nothing lowers it",)))
        args: dict[str, Any] = dict(zip(spec.args, node.args, strict=False)) | dict(node.kwargs)
        made = LOWERINGS[spec.name].lower(Call(self.context, node, spec.name, args))
        for number, value in enumerate((made,) if isinstance(made, str) else made):
            self.context.values[node, number] = value

    def _outputs(self, shared: Shared) -> list[tuple[Signature, onnx.ValueInfoProto]]:
        graph, found = self.context.graph, []
        names = list(self.program.meta.get("outputs", {}).get(self.method.name, []))
        names += [f"out{i}" for i in range(len(names), len(self.method.outputs))]
        for wanted, node in zip(names, self.method.outputs, strict=False):
            kind = node.meta["type"]
            dtype = self._narrow(node, kind)
            name = graph.name(wanted if wanted not in shared.reserved else f"{wanted}.out")
            value = self.context.values[node, 0]
            if dtype != kind.dtype:
                graph.nodes.append(helper.make_node("Cast", [value], [name], name=name, to=DTYPES[dtype]))
            else:
                graph.nodes.append(helper.make_node("Identity", [value], [name], name=name))
            found.append((_signature(name, dtype, kind), value_info(name, dtype, _shape(kind))))
        return found

    def _position(self) -> tuple[str, int] | None:
        for node in self.method.calls("advance"):
            return role(node.args[0])[1], int(node.args[2])  # type: ignore[arg-type]
        return None


def _shape(kind: TensorType) -> list[Dim]:
    return [int(size) if not isinstance(size, dims.Dim) else str(size).replace("n", "*n") if size.a > 1 else str(size)
            for size in kind.shape]  # fmt: skip


def _signature(name: str, dtype: str, kind: TensorType) -> Signature:
    rows = kind.shape[0]
    pair = (rows.a, rows.b) if isinstance(rows, dims.Dim) else (0, int(rows))
    return Signature(name, dtype, pair, int(kind.shape[1]))


def _readers(node: fx.Node, argument: str) -> list[tuple[str, fx.Node]]:
    """The calls that take `node` as this argument, with the names of their ops."""
    specs = ((spec_of(user.target), user) for user in node.users if user.op == "call_function")
    return [
        (spec.name, user) for spec, user in specs
        if spec is not None and argument in spec.args and user.args[spec.args.index(argument)] is node
    ]  # fmt: skip


def _is_key(node: fx.Node) -> bool:
    return bool(_readers(node, "key"))


def _id_limit(node: fx.Node) -> int:
    """The rows of the smallest table that is looked up with an input; 0 where it looks up none."""
    tables = [user.args[0] for name, user in _readers(node, "ids") if name == "embedding"]
    return min((int(table.meta["type"].shape[0]) for table in tables), default=0)  # type: ignore[union-attr]

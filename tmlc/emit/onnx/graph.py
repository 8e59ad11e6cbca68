"""Writes an ONNX graph node by node: names, constants, weights in a file beside the graph, subgraphs.

Nodes without random or stateful meaning that are asked for twice are written once, so what every layer needs (masks,
positions, angles) is computed once a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tmlc.errors import EmitError

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"
INT_MAX = 2**63 - 1

DTYPES = {
    "f32": TensorProto.FLOAT,
    "f64": TensorProto.DOUBLE,
    "bf16": TensorProto.BFLOAT16,
    "f16": TensorProto.FLOAT16,
    "i32": TensorProto.INT32,
    "i64": TensorProto.INT64,
    "u64": TensorProto.UINT64,
    "u8": TensorProto.UINT8,
    "i8": TensorProto.INT8,
    "u4": TensorProto.UINT4,
    "bool": TensorProto.BOOL,
}
"""ONNX types by the names that are used here."""

Dim = int | str


@dataclass
class External:
    """A weight that lies in the package's weights file: its type and shape in the graph, and where in which stored
    tensor its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    stored: str
    offset: int
    nbytes: int


@dataclass
class Shared:
    """What a graph and its subgraphs have in common: names, constants, weights, operator domains."""

    names: set[str] = field(default_factory=set)
    reserved: set[str] = field(default_factory=set)
    constants: dict[tuple[Any, ...], str] = field(default_factory=dict)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    weights: dict[str, External] = field(default_factory=dict)
    contrib: bool = False


class Graph:
    """A graph that is being written; `Graph(parent=...)` is a subgraph that sees its parent's values."""

    def __init__(self, parent: Graph | None = None) -> None:
        self.parent = parent
        self.shared: Shared = parent.shared if parent is not None else Shared()
        self.nodes: list[onnx.NodeProto] = []
        self._known: dict[tuple[Any, ...], tuple[str, ...]] = {}

    def name(self, wanted: str) -> str:
        """A name that nothing has yet."""
        made, number = wanted, 2
        while made in self.shared.names or made in self.shared.reserved:
            made, number = f"{wanted}_{number}", number + 1
        self.shared.names.add(made)
        return made

    def op(
        self, kind: str, *inputs: str | None, name: str = "", outputs: int = 1, domain: str = "", **attributes: Any
    ) -> str:
        """Adds a node, unless the same one is there, and returns its first result."""
        return self.ops(kind, *inputs, name=name, outputs=outputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str | None, name: str = "", outputs: int = 1, domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Adds a node, unless the same one is there, and returns its results."""
        given = tuple(value or "" for value in inputs)
        subgraphs = any(isinstance(value, onnx.GraphProto) for value in attributes.values())
        key = (kind, domain, given, outputs, *((k, repr(v)) for k, v in sorted(attributes.items())))
        if not subgraphs:
            for graph in self._visible():
                if key in graph._known:
                    return graph._known[key]
        stem = name or kind.lower()
        results = tuple(self.name(stem if i == 0 else f"{stem}.{i}") for i in range(outputs))
        self.nodes.append(helper.make_node(kind, given, results, name=results[0], domain=domain, **attributes))
        self.shared.contrib |= domain == CONTRIB
        if not subgraphs:
            self._known[key] = results
        return results

    def _visible(self) -> list[Graph]:
        graphs, graph = [], self
        while graph is not None:
            graphs.append(graph)
            graph = graph.parent  # type: ignore[assignment]
        return graphs

    def constant(self, values: Any, dtype: str) -> str:
        """A small constant."""
        array = np.asarray(values, helper.tensor_dtype_to_np_dtype(DTYPES[dtype]))
        key = (dtype, array.shape, array.tobytes())
        if key not in self.shared.constants:
            name = self.name(f"c{len(self.shared.constants)}")
            self.shared.constants[key] = name
            self.shared.tensors.append(numpy_helper.from_array(array, name))
        return self.shared.constants[key]

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant(list(values), "i64")

    def f32(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(value, "f32")

    def weight(self, name: str, external: External) -> str:
        """A weight that lies in the package, under a name that nothing else has."""
        if name not in self.shared.weights:
            if name in self.shared.names:
                raise EmitError(f"two values are called {name}", where="onnx", fix="Rename the weight.")
            self.shared.names.add(name)
            self.shared.weights[name] = external
        return name

    # What is written most often.

    def cast(self, x: str, dtype: str) -> str:
        return self.op("Cast", x, to=DTYPES[dtype])

    def reshape(self, x: str, *shape: int, name: str = "") -> str:
        """0 keeps a size, one -1 is what is left."""
        return self.op("Reshape", x, self.ints(*shape), name=name)

    def slice(self, x: str, start: int | str, stop: int | str, axis: int, name: str = "") -> str:
        """start..stop along one axis; a name is a one-element int64 tensor."""
        first, last = (self.ints(v) if isinstance(v, int) else v for v in (start, stop))
        return self.op("Slice", x, first, last, self.ints(axis), name=name)

    def transpose(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=list(perm))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.op("Unsqueeze", x, self.ints(*axes))

    def squeeze(self, x: str, *axes: int) -> str:
        return self.op("Squeeze", x, self.ints(*axes))

    def concat(self, parts: Sequence[str], axis: int, name: str = "") -> str:
        return self.op("Concat", *parts, axis=axis, name=name) if len(parts) > 1 else parts[0]

    def sum(self, x: str, *axes: int, keep: bool = False) -> str:
        return self.op("ReduceSum", x, self.ints(*axes), keepdims=int(keep))

    def sigmoid_exact(self, x: str) -> str:
        """1/(1 + e^-x), which keeps its order where runtimes let `Sigmoid` saturate early."""
        one = self.f32(1.0)
        return self.op("Div", one, self.op("Add", one, self.op("Exp", self.op("Neg", x))))

    def silu(self, x: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def subgraph(self, name: str, outputs: Sequence[onnx.ValueInfoProto]) -> onnx.GraphProto:
        """This graph, written on a parent, as the value of an attribute."""
        return helper.make_graph(self.nodes, name, [], list(outputs))


def value_info(name: str, dtype: str, shape: Sequence[Dim] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, DTYPES[dtype], None if shape is None else list(shape))

"""`engines/onnx/signature.json`: what a driver must know of the graphs that they do not say themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import onnx

from tmlc.emit.onnx.method import WEIGHTS, MethodGraph
from tmlc.emit.onnx.states import NEXT

VERSION = 1
ONNXRUNTIME = "1.24"  # the oldest that the graphs are known to run in


def signature_json(graphs: list[MethodGraph], opset: int, contrib: bool) -> dict[str, Any]:
    """The signature as plain data; docs/onnx.md describes it."""
    return {
        "version": VERSION,
        "opset": opset,
        "contrib": contrib,
        "onnxruntime": ONNXRUNTIME,
        "weights": WEIGHTS,
        "methods": {graph.info.name: _method(graph) for graph in graphs},
    }


def _method(graph: MethodGraph) -> dict[str, Any]:
    arguments = {
        kind: [
            {"name": s.name, "dtype": s.dtype, "rows": list(s.rows), "cols": s.cols,
             **({"below": graph.below[s.name]} if kind == "inputs" and s.name in graph.below else {})}
            for s in signatures
        ]
        for kind, signatures in (("inputs", graph.info.inputs), ("outputs", graph.info.outputs))
    }  # fmt: skip
    states = [
        {
            "name": t.name,
            "next": t.name + NEXT if t.written else None,
            "dtype": t.dtype,
            "shape": list(t.shape),
            "initial": "zeros",
            "in_place": t.in_place,
        }
        for t in graph.states
    ]
    position = None if graph.position is None else {"state": graph.position[0], "limit": graph.position[1]}
    operators = dict(_operators(graph.graph.nodes).most_common())
    return {"file": f"{graph.info.name}.onnx", "max_n": graph.info.max_n, **arguments, "states": states,
            "position": position, "operators": operators}  # fmt: skip


def _operators(nodes: Iterable[onnx.NodeProto]) -> Counter[str]:
    """How often each operator stands in the nodes and the graphs inside of them."""
    counts: Counter[str] = Counter()
    for node in nodes:
        counts[node.op_type] += 1
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                counts += _operators(attribute.g.node)
    return counts

"""ONNX as a target: `onnx` (standard operators only) and `onnx:contrib` (with operators of ONNX Runtime's own)."""

from __future__ import annotations

from importlib.util import find_spec

from tmlc.emit.targets import Coverage, Emitted, Progress, Target
from tmlc.errors import TargetError
from tmlc.ir.ops import spec_of
from tmlc.ir.program import Program
from tmlc.ir.weights import TensorSource

if find_spec("onnx") is None:
    raise TargetError("the target onnx needs the library onnx", where="--target", fix="Run `pip install 'tmlc[onnx]'`.")

import onnx

from tmlc import __version__
from tmlc.emit.onnx.graph import OPSET
from tmlc.emit.onnx.method import emit_method
from tmlc.emit.onnx.readme import readme
from tmlc.emit.onnx.signature import signature_json
from tmlc.emit.onnx.states import slot_of
from tmlc.emit.onnx.table import LOWERINGS, REFUSED
from tmlc.emit.onnx.weights import Weights

FOLDER = "engines/onnx"
PLAN = f"{FOLDER}/signature.json"
README = f"{FOLDER}/README.md"
FEATURE = "onnx.graphs.v1"
FLAVOURS = ("", "contrib")


class OnnxTarget(Target):
    """One graph a method, weights in a file beside them."""

    family = "onnx"

    def __init__(self, name: str) -> None:
        flavour = name.partition(":")[2]
        if flavour not in FLAVOURS or name.endswith(":"):
            fix = "Use onnx, or onnx:contrib for ONNX Runtime's own operators."
            raise TargetError(f"target onnx has no flavour {flavour!r}", where="--target", fix=fix)
        super().__init__(name)
        self.contrib = flavour == "contrib"

    def coverage(self, program: Program) -> list[Coverage]:
        counts: dict[tuple[str, str], int] = {}
        for method in program.methods.values():
            for node in method.calls():
                key = (method.name, spec_of(node.target).name)  # type: ignore[union-attr]
                counts[key] = counts.get(key, 0) + 1
        rows = []
        for (method_name, op), count in counts.items():
            found = LOWERINGS.get(op)
            reason = "" if found else " ".join(REFUSED.get(op, ("nothing lowers it",)))
            rows.append(Coverage(method_name, op, count, found.operators if found else None, reason))
        return rows

    def emit(self, program: Program, source: TensorSource, tell: Progress) -> Emitted:
        weights, count = Weights(program), len(program.methods)
        graphs = []
        for number, method in enumerate(program.methods.values()):
            tell("writing graphs", number, count)
            graphs.append(emit_method(program, method, weights, self.contrib))
        entries, start = weights.places()
        states, slot_bytes = slot_of([tensor for graph in graphs for tensor in graph.states])
        files: dict[str, object] = {
            f"{graph.info.name}.onnx": graph.model(entries, start, __version__) for graph in graphs
        }
        contrib = any(graph.graph.shared.contrib for graph in graphs)
        files[PLAN] = signature_json(graphs, OPSET, contrib)
        files[README] = readme(str(program.meta.get("name", "")), graphs, contrib).encode()
        tell("writing graphs", count, count)
        return Emitted(
            plan=PLAN,
            layout="rows",
            files=files,
            weights=list(weights.stored.values()),
            methods=tuple(graph.info for graph in graphs),
            states=states,
            slot_bytes=slot_bytes,
            arena_bytes=0,
            scratch_bytes=0,
            features=(FEATURE,),
            producer={"onnx": onnx.__version__},
        )


TARGET = OnnxTarget

"""Where in the model's code a node comes from: `model.layers.0.self_attn.q_proj at model_zoo/interaction/layers.py:24`.

`meta["source"]` of a call holds it. The tracer notes it, `tmlc.ir.program.replace` hands it on to what takes a node's
place, and the pass manager fills in the rest after every pass, so that a pass author has nothing to do.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import fx

from tmlc.ir.program import Program

__all__ = ["inherit_sources", "source_of", "traced_source"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_NOT_MODEL = ("ops/functional.py",)


def source_of(node: fx.Node) -> str:
    """The place in the model that a node was made for; "" where it is not known."""
    return str(node.meta.get("source", ""))


def traced_source(node: fx.Node) -> str:
    """The place of a node as `torch.export` made it: the path of its module and the innermost line outside torch."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = str(stack[-1][0]) if stack else ""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    ours = [(file, line) for file, line in frames if "/torch/" not in file and not file.endswith(_NOT_MODEL)]
    place = f"{_short(ours[-1][0])}:{ours[-1][1]}" if ours else ""
    return " at ".join(part for part in (module, place) if part)


def inherit_sources(program: Program) -> None:
    """Gives every call that a pass made without saying where from the place of what reads it, else of what it reads."""
    for method in program.methods.values():
        nodes = [node for node in method.graph.nodes if node.op == "call_function"]
        for node in reversed(nodes):
            _take(node, list(node.users))
        for node in nodes:
            _take(node, node.all_input_nodes)


def _take(node: fx.Node, others: list[fx.Node]) -> None:
    if not node.meta.get("source"):
        found = next((source for other in others if (source := source_of(other))), "")
        if found:
            node.meta["source"] = found


def _short(file: str) -> str:
    """A file from its topmost package on, which is the same on every machine."""
    path = Path(file)
    root = path.parent
    while os.path.isfile(root / "__init__.py") and root != root.parent:
        root = root.parent
    return path.relative_to(root).as_posix()

"""`engines/onnx/README.md`: how to drive the graphs of a package from any language."""

from __future__ import annotations

from tmlc.emit.onnx.method import WEIGHTS, MethodGraph
from tmlc.emit.onnx.states import NEXT

TEXT = """# {name}: ONNX graphs

Made by tmlc. Each method of the model is one graph at the top of this package, beside `{weights}`, in which all of
them have their weights (ONNX external data). Unpack the package if it is a single file (it is a zip, stored), and load
a graph by its path; nothing else is needed. {operators}

## A call

`n` is the number of new positions of a call, 1 to the method's largest. All tensors are dense, rows first.

1. Start a session with every state of `signature.json` as zeros of its dtype and shape.
2. Feed a method its inputs and its states.
3. It gives its outputs and, for each state S, `S{next}`. That is S in the next call of this session. A method reads and
   writes its own states only.

Where `signature.json` says `in_place`, the buffer of S may be bound to `S{next}` too (I/O binding): only the rows of
the new positions are written then. Without that, the whole state is copied in every call.

Ids below 0, or not below what `below` says, are not checked everywhere: do not feed them. A method with a `position`
counts its positions in that state; where its `limit` is not 0, stop before position + n passes it.

A key is (seed, tick, number of the output in its tick), and a temperature of 0 takes the most likely token.

## Methods

{methods}
"""


def readme(name: str, graphs: list[MethodGraph], contrib: bool) -> str:
    """The text for these graphs."""
    operators = (
        "Beside standard operators they use `com.microsoft` ones, so they run in ONNX Runtime only."
        if contrib
        else "They use standard operators only."
    )
    parts = [_method(graph) for graph in graphs]
    return TEXT.format(name=name, weights=WEIGHTS, next=NEXT, operators=operators, methods="\n\n".join(parts))


def _method(graph: MethodGraph) -> str:
    lines = [f"### {graph.info.name} (`{graph.info.name}.onnx`, n up to {graph.info.max_n})"]
    for what, signatures in (("in", graph.info.inputs), ("out", graph.info.outputs)):
        for s in signatures:
            rows = "·".join(str(v) for v in (s.rows[0], "n") if v != 1) if s.rows[0] else ""
            rows += ("+" if rows and s.rows[1] else "") + (str(s.rows[1]) if s.rows[1] or not rows else "")
            lines.append(f"- {what} `{s.name}`: {s.dtype}[{rows}, {s.cols}]")
    lines += [f"- state `{t.name}`: {t.dtype}{list(t.shape)}" for t in graph.states]
    return "\n".join(lines)

"""memory.verify: an independent check of a memory plan, which shares no code with the planner.

It does not compute lifetimes. It executes the plan on paper: every write takes its bytes away from whoever held them,
and every read must find its value still whole.
"""

from __future__ import annotations

import operator

from torch import fx

from tmlc.errors import IRError
from tmlc.ir.program import Fact, Method, Program
from tmlc.ir.types import TensorType
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

_FIX = "the memory planner is wrong or the plan was edited: run memory.plan as the last rewrite"
_Value = tuple[fx.Node, int]


@register_pass("memory.verify")
class VerifyMemory(Pass):
    """Replays the memory plan; refuses one in which a result is overwritten before its last reader, or does not fit."""

    requires = frozenset({Fact.MEMORY_PLANNED})

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(program, verify_memory(program))


def verify_memory(program: Program) -> int:
    """Checks the plan of every method and returns the number of results that have a place.

    Raises:
        IRError: a result without a place, outside the arena, unaligned, too small for max_n, or overwritten while it is
            still to be read; the message names method and node.
    """
    size = program.meta.get("arena_bytes")
    if not isinstance(size, int) or size < 0:
        raise IRError(f"the arena has {size!r} bytes", where="memory plan", fix=_FIX)
    return sum(_replay(method, size) for method in program.methods.values())


def _replay(method: Method, size: int) -> int:
    held: dict[_Value, tuple[int, int]] = {}
    checked = 0
    for node in method.graph.nodes:
        if node.op == "output" or _computes(node):
            for read in node.all_input_nodes:
                value = _origin(read)
                if value is not None and value not in held:
                    raise _error(method, node, f"reads {value[0].name}, whose bytes were overwritten before")
        if not _computes(node):
            continue
        reads = {value for value in map(_origin, node.all_input_nodes) if value is not None}
        written: list[tuple[int, int]] = []
        for index, (begin, end) in enumerate(_spans(method, node, size)):
            if any(begin < e and b < end for b, e in written):
                raise _error(method, node, "its own results overlap")
            for value, (b, e) in list(held.items()):
                if begin < e and b < end:
                    if value in reads:
                        raise _error(method, node, f"writes over {value[0].name}, which it reads")
                    del held[value]
            written.append((begin, end))
            held[node, index] = (begin, end)
            checked += 1
    return checked


def _computes(node: fx.Node) -> bool:
    """Whether a node writes bytes: everything but placeholders, views and the output."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return node.target._schema.name not in ("tmlc::columns", "tmlc::reshape")  # type: ignore[union-attr]


def _origin(node: fx.Node) -> _Value | None:
    """The result whose bytes a node reads; None for inputs, weights and states."""
    index = 0
    while node.op == "call_function" and not _computes(node):
        if node.target is operator.getitem:
            index = int(node.args[1])  # type: ignore[arg-type]
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return (node, index) if node.op == "call_function" else None


def _spans(method: Method, node: fx.Node, size: int) -> list[tuple[int, int]]:
    kind, arena = node.meta["type"], node.meta.get("arena")
    types = [kind] if isinstance(kind, TensorType) else list(kind)
    places = [arena] if isinstance(kind, TensorType) else arena
    if not isinstance(places, list) or len(places) != len(types) or not all(_is_span(place) for place in places):
        raise _error(method, node, "has no place in the arena")
    spans = []
    for place, one in zip(places, types, strict=True):
        offset, nbytes = place
        if offset % 64 or offset < 0 or offset + nbytes > size:
            raise _error(method, node, f"lies at {offset}..{offset + nbytes} of an arena of {size} bytes")
        if nbytes < one.nbytes(method.max_n):
            raise _error(method, node, f"has {nbytes} bytes for {one} at n = {method.max_n}")
        spans.append((offset, offset + nbytes))
    return spans


def _is_span(place: object) -> bool:
    return isinstance(place, tuple | list) and len(place) == 2 and all(type(v) is int for v in place)


def _error(method: Method, node: fx.Node, what: str) -> IRError:
    return IRError(f"{node.name} {what}", where=f"memory plan of {method.name}", fix=_FIX)

"""memory.plan: every result gets its bytes in one arena that all calls share."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field
from torch import fx

from tmlc.errors import PipelineError
from tmlc.ir.ops import spec_of
from tmlc.ir.program import Fact, Method, Program
from tmlc.ir.types import TensorType
from tmlc.pipeline.pass_base import Pass, PassConfig, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

ALIGNMENT = 64


@register_pass("memory.plan")
class PlanMemory(Pass):
    """Gives each result a place in one arena, reusing bytes of results that nothing reads any more: no allocation in a
    tick, and a working set that stays in cache.

    A call's node gets `meta["arena"]`: (offset, bytes at max_n), or a list of them for a call with several results
    (empty for one with none). `columns`, `reshape` and `getitem` nodes get none: they are other readings of the bytes
    of what they read. `program.meta["arena_bytes"]` is the size of the arena, which the methods share (one runs at a
    time).
    """

    class Config(PassConfig):
        max_n: dict[str, int] = Field(default_factory=dict)

    provides = frozenset({Fact.MEMORY_PLANNED})
    config: Config

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        for name, max_n in self.config.max_n.items():
            if name not in program.methods or max_n < 1:
                raise PipelineError(
                    f"max_n has {name!r}: {max_n}",
                    where="memory.plan",
                    fix=f"give a positive number for methods of the program: {', '.join(program.methods)}",
                )
            program.methods[name].max_n = max_n
        result = PassResult(program, 0)
        sizes = {}
        for method in program.methods.values():
            buffers = _buffers(method)
            sizes[method.name] = _place(buffers)
            _write(buffers)
            result.matches += len(buffers)
            whole = sum(buffer.nbytes for buffer in buffers)
            result.notes.append(
                f"{method.name}: {sizes[method.name]} bytes for {len(buffers)} results of {whole} bytes"
            )
        program.meta["arena_bytes"] = max(sizes.values(), default=0)
        return result


@dataclass
class _Buffer:
    """One result: written by the call number `first`, last read by `last`."""

    node: fx.Node
    result: int | None
    nbytes: int
    first: int
    last: int
    offset: int = -1


def is_view(node: fx.Node) -> bool:
    """Whether a node reads the bytes of another one in place (getitem, columns, reshape)."""
    spec = spec_of(node.target)
    return node.op == "call_function" and (spec is None or spec.view)


def _buffers(method: Method) -> list[_Buffer]:
    order = {node: number for number, node in enumerate(method.graph.nodes)}
    buffers = []
    for node in method.calls():
        if is_view(node):
            continue
        kind = node.meta["type"]
        node.meta["arena"] = []
        if isinstance(kind, TensorType):
            buffers.append(_Buffer(node, None, _bytes(kind, method), order[node], _last_read(node, order)))
            continue
        for index, part in enumerate(kind):
            readers = [user for user in node.users if user.args[1] == index]
            last = max((_last_read(reader, order) for reader in readers), default=order[node])
            buffers.append(_Buffer(node, index, _bytes(part, method), order[node], last))
    return buffers


def _bytes(kind: TensorType, method: Method) -> int:
    return -(-kind.nbytes(method.max_n) // ALIGNMENT) * ALIGNMENT


def _last_read(node: fx.Node, order: dict[fx.Node, int]) -> int:
    """Number of the last node that reads `node`, directly or through a view."""
    return max((_last_read(u, order) if is_view(u) else order[u] for u in node.users), default=order[node])


def _place(buffers: list[_Buffer]) -> int:
    """Greedy by size: the largest first, each at the lowest offset that is free for as long as it lives."""
    placed: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.nbytes, b.first)):
        offset = 0
        for other in placed:
            alive_together = other.first <= buffer.last and buffer.first <= other.last
            if alive_together and offset < other.offset + other.nbytes and other.offset < offset + buffer.nbytes:
                offset = other.offset + other.nbytes
        buffer.offset = offset
        placed.append(buffer)
        placed.sort(key=lambda b: b.offset)
    return max((b.offset + b.nbytes for b in placed), default=0)


def _write(buffers: list[_Buffer]) -> None:
    for buffer in buffers:
        span = (buffer.offset, buffer.nbytes)
        if buffer.result is None:
            buffer.node.meta["arena"] = span
        else:
            buffer.node.meta["arena"].append(span)

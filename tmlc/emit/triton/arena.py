"""Where a method's values lie in device memory, for every bucket at once.

All rows of a method come in equal numbers for each padded position, so a plan for one position serves every bucket:
offsets are multiplied by the bucket's padded positions. Offsets stay multiples of 64 bytes in every bucket, so the
alignment that kernels are compiled for does not depend on the bucket either.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tmlc.emit.graph import is_view, up
from tmlc.errors import REPORT, EmitError
from tmlc.ir.dims import Dim
from tmlc.ir.ops import spec_of
from tmlc.ir.program import Method
from tmlc.ir.types import ITEM_BYTES, TensorType


@dataclass
class _Buffer:
    nbytes: int
    first: int
    last: int
    offset: int = -1


def unit_bytes(kind: TensorType) -> int:
    """Bytes of a value for each padded position, with rows `a·n + b` counted as a + b."""
    rows, cols = kind.shape[0], int(kind.shape[1])
    a, b = (rows.a, rows.b) if isinstance(rows, Dim) else (0, int(rows))
    return up(max(a + b, a) * cols * ITEM_BYTES[kind.dtype])


def plan_arena(method: Method, skip: set[tuple[fx.Node, int]]) -> tuple[dict[tuple[fx.Node, int], int], int]:
    """An offset in bytes a position for every result of every op but those in `skip`, and the bytes of all.

    Results whose lifetimes overlap never share bytes; a call's results share none with what it reads.
    """
    order = {node: number for number, node in enumerate(method.graph.nodes)}
    buffers: dict[tuple[fx.Node, int], _Buffer] = {}
    for node in method.calls():
        if is_view(node):
            continue
        kinds = node.meta["type"]
        for index, kind in enumerate((kinds,) if isinstance(kinds, TensorType) else tuple(kinds)):
            if (node, index) not in skip:
                readers = _readers(node, index, isinstance(kinds, TensorType))
                last = max((_last_read(reader, order) for reader in readers), default=order[node])
                buffers[node, index] = _Buffer(unit_bytes(kind), order[node], last)
    placed: list[_Buffer] = []
    for buffer in sorted(buffers.values(), key=lambda b: (-b.nbytes, b.first)):
        buffer.offset = 0
        for other in placed:  # by offset
            together = other.first <= buffer.last and buffer.first <= other.last
            if together and other.offset < buffer.offset + buffer.nbytes:
                buffer.offset = max(buffer.offset, other.offset + other.nbytes)
        placed.append(buffer)
        placed.sort(key=lambda b: b.offset)
    _check(method, list(buffers.values()))
    return {key: b.offset for key, b in buffers.items()}, max((b.offset + b.nbytes for b in placed), default=0)


def _readers(node: fx.Node, index: int, single: bool) -> list[fx.Node]:
    return list(node.users) if single else [user for user in node.users if user.args[1] == index]


def _last_read(node: fx.Node, order: dict[fx.Node, int]) -> int:
    """Number of the last node that reads `node`, directly or through views."""
    spec = spec_of(node.target) if node.op == "call_function" else None
    through = node.op == "call_function" and (spec is None or spec.view)
    return max((_last_read(user, order) for user in node.users), default=order[node]) if through else order[node]


def _check(method: Method, buffers: list[_Buffer]) -> None:
    """Raises EmitError when two buffers that live together share a byte (a fault of this file)."""
    held: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda b: b.first):
        held = [other for other in held if other.last >= buffer.first]
        for other in held:
            if buffer.offset < other.offset + other.nbytes and other.offset < buffer.offset + buffer.nbytes:
                where = f"method {method.name}, arena of the Triton plan"
                raise EmitError("two values share bytes", where=where, fix=REPORT)
        held.append(buffer)

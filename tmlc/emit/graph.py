"""What every emitter asks of a program: the tick, the slot, and of a method's graph results, views, arguments that need
their own bytes."""

import operator
from typing import Any

from torch import fx

from tmlc.ir.ops import spec_of
from tmlc.ir.program import Program
from tmlc.ir.types import ITEM_BYTES
from tmlc.package.manifest import StateInfo, TickLayout

ALIGN = 64


def up(count: int) -> int:
    """Bytes, rounded up to where the next buffer may begin."""
    return -(-count // ALIGN) * ALIGN


def slot_layout(program: Program) -> tuple[tuple[StateInfo, ...], int]:
    """Every state at a multiple of 64 bytes, in the order of the program, and the bytes of a slot."""
    states, offset = [], 0
    for spec in program.states.values():
        shape = tuple(int(size) for size in spec.shape)
        nbytes = ITEM_BYTES[spec.dtype]
        for size in shape:
            nbytes *= size
        states.append(StateInfo(spec.name, str(spec.kind), spec.method, spec.dtype, shape, offset, nbytes))
        offset = up(offset + nbytes)
    return tuple(states), offset


def results(output: fx.Node) -> tuple[fx.Node, ...]:
    """What an output node returns."""
    values = output.args[0]
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)  # type: ignore[return-value, arg-type]


def source_of(node: fx.Node) -> tuple[fx.Node, int]:
    """The node that computes a value and the number of its output."""
    if node.target is operator.getitem:
        return node.args[0], int(node.args[1])  # type: ignore[return-value, arg-type]
    return node, 0


def is_view(node: fx.Node) -> bool:
    """Whether a node is another reading of the bytes of what it reads."""
    spec = spec_of(node.target) if node.op == "call_function" else None
    return spec is not None and spec.view


def direct_outputs(graph: fx.Graph) -> dict[tuple[fx.Node, int], int]:
    """Values that their kernel can write straight into the result of the method, and which result that is.

    Not so for inputs, for views, and for values of which views are taken: these need bytes that can be
    addressed.
    """
    direct: dict[tuple[fx.Node, int], int] = {}
    output = next(node for node in graph.nodes if node.op == "output")
    for index, result in enumerate(results(output)):
        source, number = source_of(result)
        users = [u for u in source.users if u.target is not operator.getitem] + [
            u for g in source.users if g.target is operator.getitem for u in g.users
        ]
        if source.op == "call_function" and not is_view(source) and not any(is_view(u) for u in users):
            direct.setdefault((source, number), index)
    return direct


def key_values(graph: fx.Graph) -> set[tuple[fx.Node, int]]:
    """Values that reach the `key` argument of an op, directly or through views."""
    keys: set[tuple[fx.Node, int]] = set()
    for node in graph.nodes:
        spec = spec_of(node.target) if node.op == "call_function" else None
        if spec is None or "key" not in spec.args:
            continue
        key = (dict(zip(spec.args, node.args, strict=False)) | dict(node.kwargs))["key"]
        while isinstance(key, fx.Node):
            keys.add(source_of(key))
            key = key.args[0] if is_view(key) else None
    return keys


def tick_layout(tick: dict[str, Any]) -> TickLayout:
    """The frontend's description of a tick, under the manifest's names."""
    renamed = {"video_frames": "clip_frames", "samples_per_position": "out_hop", "eos": "eos_token_ids"}
    fields = {renamed.get(name, name): value for name, value in tick.items()}
    return TickLayout(**{**fields, "eos_token_ids": tuple(fields.get("eos_token_ids", ()))})

"""The states of a method as graphs keep them: explicit inputs and outputs, in layouts of their own.

Keys and values are [kv heads, capacity, columns]; a cache of codes has its scales in a second state. Every other state
is as the program has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import fx

from tmlc.emit.onnx.graph import Graph
from tmlc.emit.onnx.weights import ALIGN
from tmlc.ir.program import Method, Program, role
from tmlc.package.manifest import DTYPES, StateInfo

NEXT = ".next"


@dataclass
class StateTensor:
    """One state of a graph.

    Attributes:
        name: of the graph's input; the output is called `<name>.next`.
        in_place: may the output lie in the memory of the input? Only where nothing but the update reads the input.
        written: does the graph have the output?
    """

    name: str
    kind: str
    method: str
    dtype: str
    shape: tuple[int, ...]
    in_place: bool
    written: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype]


class MethodStates:
    """The states that the calls of one method read and write."""

    def __init__(self, program: Program, method: Method, graph: Graph) -> None:
        self._program, self._method, self._graph = program, method, graph
        self._tensors: dict[tuple[fx.Node, str], StateTensor] = {}
        self._values: dict[str, str] = {}

    def read(
        self,
        node: fx.Node,
        dtype: str = "",
        shape: tuple[int, ...] = (),
        part: str = "",
        in_place: bool = False,
    ) -> str:
        """The value of a state; dtype and shape where they are not those of the program."""
        if (node, part) not in self._tensors:
            spec = self._program.states[role(node)[1]]
            name = spec.name + (f".{part}" if part else "")
            made = StateTensor(
                name, str(spec.kind), self._method.name, dtype or spec.dtype, shape or tuple(spec.shape), in_place
            )
            self._tensors[node, part] = made
            self._values[name] = name
        return self._values[self._tensors[node, part].name]

    def next_name(self, node: fx.Node, part: str = "") -> str:
        """What the node that makes the new value of a state should be called."""
        return self._tensors[node, part].name + NEXT

    def write(self, node: fx.Node, value: str, part: str = "") -> None:
        """Makes `value` the state after the call."""
        tensor = self._tensors[node, part]
        tensor.written = True
        self._values[tensor.name] = value

    def finish(self) -> list[StateTensor]:
        """The states in the order of the program; gives every output its name."""
        order = {role(node)[1]: number for number, node in enumerate(self._method.placeholders("state"))}
        found = sorted(self._tensors.items(), key=lambda item: (order[role(item[0][0])[1]], item[0][1]))
        for _, tensor in found:
            value = self._values[tensor.name]
            if tensor.written and value != tensor.name + NEXT:
                self._graph.op("Identity", value, name=tensor.name + NEXT)
        return [tensor for _, tensor in found]


def slot_of(tensors: list[StateTensor]) -> tuple[tuple[StateInfo, ...], int]:
    """Every state at a multiple of 64 bytes of the session's slot, and the bytes of the slot."""
    states, offset = [], 0
    for t in tensors:
        states.append(StateInfo(t.name, t.kind, t.method, t.dtype, t.shape, offset, t.nbytes))
        offset = -(-(offset + t.nbytes) // ALIGN) * ALIGN
    return tuple(states), offset

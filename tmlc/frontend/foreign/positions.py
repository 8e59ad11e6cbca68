"""What a model computes from positions alone: attention masks and rotary angles.

These parts of a graph read no token and no weight, so they are not matched by form: they are evaluated for a few small
sizes and compared with what they are supposed to be. A mask's window is found by changing the number in the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tmlc.frontend.foreign.graph import name_of

_N = 17
_TRIALS = (4, 6)  # stand for a window that may be much larger than any size that is worth evaluating
_COMPARES = ("sub", "add", "rsub", "lt", "gt", "le", "ge")


@dataclass(frozen=True)
class Angles:
    """cos or sin of position·inv_freq, times scaling.

    layout: "half" has R/2 columns, "halves" those columns twice.
    """

    function: str
    inv_freq: str
    layout: str
    scaling: float


class Positions:
    """The nodes of a graph that depend on nothing but its size and constants."""

    def __init__(self, graph: fx.Graph, constants: Mapping[fx.Node, tuple[str, Tensor]]) -> None:
        """constants: placeholder → (name, value) of buffers that are not weights."""
        self._constants = constants
        self.nodes: set[fx.Node] = set()
        for node in graph.nodes:
            known = isinstance(node.meta.get("val"), torch.SymInt) or node in constants
            called = node.op == "call_function" and all(source in self.nodes for source in node.all_input_nodes)
            if known or called:
                self.nodes.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self.nodes

    def window(self, mask: fx.Node) -> int:
        """The window of a causal mask that is added to scores (0: all keys). ValueError says why it is none."""
        plain = self._visible(mask, {})
        found = []
        for node, at, value in self._numbers(mask):
            trial = _TRIALS[abs(value) == _TRIALS[0]]
            changed = self._visible(mask, {(node, at): trial if value > 0 else -trial})
            if torch.equal(changed, plain):
                continue
            if not torch.equal(changed, _band(trial)):
                raise ValueError(f"the mask depends on {value} in {node.name}, and not as a sliding window does")
            found.append(abs(value))
        if len(found) > 1:
            raise ValueError(f"the mask has more than one window: {found}")
        if not torch.equal(plain, _band(found[0] if found else 0)):
            raise ValueError("the mask is not causal")
        return found[0] if found else 0

    def angles(self, node: fx.Node) -> Angles:
        """What rotary factor a node is. ValueError says why it is none."""
        buffers = [source for source in self._cone(node) if source in self._constants]
        if len(buffers) != 1:
            raise ValueError(f"it is computed from {len(buffers)} constant tensors, not from one set of frequencies")
        name, inv_freq = self._constants[buffers[0]]
        value = self._evaluate(node, _N, {})
        rows = [size for size in value.shape[:-2] if size != 1]
        if value.dim() < 2 or rows or value.shape[-2] != _N:
            raise ValueError(f"its shape is {list(value.shape)} for {_N} positions")
        table = value.reshape(_N, -1)
        angle = torch.arange(_N, dtype=torch.float32)[:, None] * inv_freq.reshape(1, -1).float()
        layouts = {"half": angle, "halves": torch.cat([angle, angle], 1)}
        for layout, wanted in layouts.items():
            if table.shape[1] != wanted.shape[1]:
                continue
            for function, values in (("cos", wanted.cos()), ("sin", wanted.sin())):
                scaling = float((table.double() * values).sum() / values.double().square().sum().clamp(min=1e-30))
                if torch.allclose(table, values * scaling, rtol=0, atol=2e-5 * max(1.0, abs(scaling))):
                    return Angles(function, name, layout, scaling)
        raise ValueError("it is neither the cosine nor the sine of position times frequency")

    def _visible(self, mask: fx.Node, changes: dict[tuple[fx.Node, int], int]) -> Tensor:
        value = self._evaluate(mask, _N, changes)
        if value.numel() != _N * _N or value.shape[-2:] != (_N, _N):
            raise ValueError(f"the mask has shape {list(value.shape)} for {_N} positions")
        value = value.reshape(_N, _N)
        if value.dtype == torch.bool:
            return value
        if not bool(((value == 0) | (value < -1e30)).all()):
            raise ValueError("the mask adds a bias to the scores")
        return value == 0

    def _numbers(self, node: fx.Node) -> list[tuple[fx.Node, int, int]]:
        """Whole numbers that positions are moved by or compared with: (node, number of the argument, value)."""
        found = []
        for source in self._cone(node):
            if name_of(source) in _COMPARES:
                found += [(source, i, a) for i, a in enumerate(source.args) if type(a) is int and a != 0]
        return found

    def _cone(self, node: fx.Node) -> list[fx.Node]:
        seen: dict[fx.Node, None] = {}
        todo = [node]
        while todo:
            current = todo.pop()
            if current not in seen:
                seen[current] = None
                if not isinstance(current.meta.get("val"), torch.SymInt):
                    todo += current.all_input_nodes
        return list(seen)

    def _evaluate(self, node: fx.Node, n: int, changes: dict[tuple[fx.Node, int], int]) -> Tensor:
        needed = set(self._cone(node))
        values: dict[fx.Node, Any] = {}
        for current in node.graph.nodes:
            if current not in needed:
                continue
            size = current.meta.get("val")
            if current in self._constants:
                values[current] = self._constants[current][1]
            elif isinstance(size, torch.SymInt):
                expression = size.node.expr
                values[current] = int(expression.subs(dict.fromkeys(expression.free_symbols, n)))
            else:
                args = tuple(changes.get((current, i), a) for i, a in enumerate(current.args))
                values[current] = _run(current.target, args, current.kwargs, values)
        return values[node]


def _run(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: dict[fx.Node, Any]) -> Any:
    device = torch.device("cpu")
    plain = {name: device if name == "device" else fx.map_arg(a, values.__getitem__) for name, a in kwargs.items()}
    args = tuple(device if isinstance(a, torch.device) else fx.map_arg(a, values.__getitem__) for a in args)
    function: Callable[..., Any] = operator.getitem if target is operator.getitem else target
    return function(*args, **plain)


def _band(window: int) -> Tensor:
    """visible[p, j] of a causal mask over _N positions."""
    distance = torch.arange(_N)[:, None] - torch.arange(_N)[None]
    return (distance >= 0) & ((distance < window) | (window == 0))

"""Finds the op at which a program first says something else than it did before a pass."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from tmlc.ir.dims import Dim
from tmlc.ir.ops import spec_of
from tmlc.ir.program import Method
from tmlc.ir.source import source_of
from tmlc.ir.types import TensorType

#: (have, want) → whether they differ by more than is allowed.
Differs = Callable[[Tensor, Tensor], bool]


@dataclass
class Trace:
    """What the calls of one method computed, by the names of the nodes. Hand `note` to `ProgramRunner.session`."""

    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    grows: dict[str, bool] = field(default_factory=dict)

    def note(self, node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor):
            kind = node.meta["type"]
            rows = kind.rows if isinstance(kind, TensorType) else 0
            self.grows[node.name] = isinstance(rows, Dim) and bool(rows.a)
            self.parts.setdefault(node.name, []).append(value.clone())

    def value(self, name: str) -> Tensor | None:
        """All rows that were computed, chunk after chunk; None for a name that was not."""
        if name not in self.parts:
            return None
        return torch.cat(self.parts[name]) if self.grows[name] else self.parts[name][-1]


def first_difference(before: Trace, method: Method, after: Trace, differs: Differs) -> str:
    """The op of `method`, as a pass left it, that is to blame, with its place in the model; "" when none can be named.

    Nodes that a pass leaves alone keep their names. The first of them with another value reads what went wrong: the
    earliest node that the pass made among those it reads, or, where there is none, the node itself.
    """
    kept: set[fx.Node] = set()
    for node in method.graph.nodes:
        if node.op != "call_function":
            continue
        have, want = after.value(node.name), before.value(node.name)
        same_kind = have is not None and want is not None and have.dim() == want.dim() and have.dtype == want.dtype
        if not same_kind or have.shape[1:] != want.shape[1:]:  # type: ignore[union-attr]
            continue
        kept.add(node)
        if differs(have, want[: len(have)]):  # type: ignore[arg-type, index]
            return _say(_earliest_new(node, kept) or node, node)
    return next((_say(made, None) for out in method.outputs if (made := _earliest_new(out, kept))), "")


def _earliest_new(node: fx.Node, kept: set[fx.Node]) -> fx.Node | None:
    """The earliest computing node that `node` reads through nodes that were not there before (itself if it is new)."""
    found: set[fx.Node] = set()
    todo = [node] if node not in kept else list(node.all_input_nodes)
    while todo:
        made = todo.pop()
        if made.op == "call_function" and made not in kept and made not in found:
            found.add(made)
            todo += made.all_input_nodes
    computing = [made for made in found if made.target is not operator.getitem]
    return min(computing) if computing else None


def _say(node: fx.Node, seen: fx.Node | None) -> str:
    spec = spec_of(node.target)
    text = f"first at %{node.name} = {spec.name if spec is not None else node.target}"
    if source_of(node):
        text += f" of {source_of(node)}"
    return text if seen is None or seen is node else f"{text}; seen in %{seen.name}"

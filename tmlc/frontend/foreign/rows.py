"""The value of a matched node: rows of the IR, and how the foreign tensor's axes lie over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

#: An axis of a foreign tensor: the positions, one of size one, a repetition of one head, or feature axis number i.
Axis = int | str
N, ONE, REPEAT = "n", "1", "r"


@dataclass(frozen=True)
class Rows:
    """An IR value [n, c] seen as a foreign tensor.

    Attributes:
        node: in the IR graph.
        axes: what each axis of the foreign tensor is.
        dims: sizes of the feature axes; their product is c, the last one varies fastest.
        group: how often each head is repeated in the foreign tensor (grouped-query attention).
        swizzle: (first, count) of columns of each head that the foreign tensor holds even ones first, then odd ones.
    """

    node: fx.Node
    axes: tuple[Axis, ...]
    dims: tuple[int, ...]
    group: int = 1
    swizzle: tuple[int, int] | None = None

    @property
    def heads(self) -> int:
        """Number of heads, where the last feature axis is a head's columns."""
        return prod(self.dims[:-1])

    @property
    def plain(self) -> bool:
        """Nothing is repeated or in another order than in the IR."""
        return self.group == 1 and self.swizzle is None and REPEAT not in self.axes

    @property
    def matrix(self) -> bool:
        """Positions, then one feature axis (and axes of size one)."""
        return self.plain and [a for a in self.axes if a != ONE] == [N, 0]

    @property
    def last(self) -> bool:
        """Whether the last axis is the last feature axis."""
        return bool(self.dims) and self.axes[-1] == len(self.dims) - 1

    def permute(self, order: Sequence[int]) -> Rows:
        return replace(self, axes=tuple(self.axes[i] for i in order))

    def with_columns(self, node: fx.Node, width: int) -> Rows:
        """Another IR value whose last feature axis is `width` wide."""
        return replace(self, node=node, dims=(*self.dims[:-1], width))

    def expand(self, sizes: Sequence[Any]) -> Rows | None:
        """One axis of size one, repeated."""
        grown = [i for i, (axis, size) in enumerate(zip(self.axes, sizes, strict=True)) if axis == ONE and size != 1]
        if not grown:
            return self
        if len(grown) > 1 or self.group > 1 or isinstance(sizes[grown[0]], torch.SymInt):
            return None
        axes = list(self.axes)
        axes[grown[0]] = REPEAT
        return replace(self, axes=tuple(axes), group=int(sizes[grown[0]]))

    def reshape(self, sizes: Sequence[Any], symbol: str) -> Rows | None:
        """Another cut of the feature axes; `symbol` is how the number of positions is written."""
        if REPEAT in self.axes:
            return self._joined(sizes)
        if not self.plain or [a for a in self.axes if a != ONE] != [N, *range(len(self.dims))]:
            return None
        axes: list[Axis] = []
        dims: list[int] = []
        for size in sizes:
            if isinstance(size, torch.SymInt):
                if str(size) != symbol or N in axes or dims:
                    return None
                axes.append(N)
            elif size == 1:
                axes.append(ONE)
            elif N not in axes:
                return None
            else:
                axes.append(len(dims))
                dims.append(int(size))
        if not dims and axes[-1] == ONE:
            axes[-1], dims = 0, [1]
        return replace(self, axes=tuple(axes), dims=tuple(dims)) if prod(dims) == prod(self.dims) else None

    def _joined(self, sizes: Sequence[Any]) -> Rows | None:
        """[1, G, r, n, D] → [1, G·r, n, D]: every head, repeated behind itself."""
        at = self.axes.index(REPEAT)
        before = self.axes[at - 1] if at else None
        axes = (*self.axes[: at - 1], before, *self.axes[at + 1 :])
        heads = self.group * (self.dims[before] if isinstance(before, int) else 1)
        if before not in (0, ONE) or len(sizes) != len(axes) or sizes[at - 1] != heads:
            return None
        if any(axis == N and not isinstance(size, torch.SymInt) for axis, size in zip(axes, sizes, strict=True)):
            return None
        return replace(self, axes=tuple(a for a in axes if a is not None))


@dataclass(frozen=True)
class Param:
    """A parameter or buffer of the module, by its name there."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """Results of a split."""

    items: tuple[Rows, ...]


Value = Rows | Param | Parts

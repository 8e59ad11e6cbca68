"""Which buckets a call runs in: its sessions, each with some new positions, put into the shapes that there are.

A call that no bucket holds is cut: a session's positions into pieces that follow each other, sessions into groups. No
bit depends on it, so what counts is how often the weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Shape(Protocol):
    """So many sessions with so many positions each at most."""

    @property
    def batch(self) -> int: ...
    @property
    def n(self) -> int: ...


S = TypeVar("S", bound=Shape)
Piece = tuple[int, int, int]
"""(session of the call, its first position of this piece, positions)"""


def schedule(counts: Sequence[int], shapes: Sequence[S]) -> list[tuple[S, list[Piece]]]:
    """Runs that cover `counts` (positions of each session, at least 1), in order; a session's pieces are in order.

    One run where a shape holds all sessions, the one with the fewest padded positions. `shapes` holds (1, 1).
    """
    done = [0] * len(counts)
    runs: list[tuple[S, list[Piece]]] = []
    while waiting := [k for k, count in enumerate(counts) if done[k] < count]:
        left = {k: counts[k] - done[k] for k in waiting}
        whole = [s for s in shapes if s.batch >= len(waiting) and s.n >= max(left.values())]
        if whole:
            shape, taken = min(whole, key=lambda s: (s.batch * s.n, s.n)), waiting
        else:
            shape = max(shapes, key=lambda s: (_positions(s, left), -s.batch * s.n, -s.n))
            taken = sorted(waiting, key=lambda k: -left[k])[: shape.batch]
        pieces = [(k, done[k], min(left[k], shape.n)) for k in sorted(taken)]
        for k, _, n in pieces:
            done[k] += n
        runs.append((shape, pieces))
    return runs


def _positions(shape: Shape, left: dict[int, int]) -> int:
    """How many positions a run in this shape gets done."""
    return sum(sorted((min(n, shape.n) for n in left.values()), reverse=True)[: shape.batch])

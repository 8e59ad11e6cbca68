"""Kernel calls added up: by kernel of a method, and by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Group:
    """Several calls of a plan.

    Attributes:
        calls: how many entries of plans; runs: how often they ran, all together.
        ms: time of all runs; bytes, operations: of all runs, 0 where the target does not tell them.
        share: of the time of all timed kernels.
        at_multiply: time, weighted by the part of the multiply rate that was reached.
    """

    method: str
    name: str
    calls: int = 0
    runs: float = 0.0
    ms: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0
    share: float = 0.0
    at_multiply: float = 0.0
    _bounds: dict[str, float] = field(default_factory=dict)

    def add(self, call: Mapping[str, Any]) -> None:
        runs = float(call["runs"])
        self.calls += 1
        self.runs += runs
        self.ms += runs * call["ms"]
        self.bytes += runs * (call["bytes"] or 0.0)
        self.operations += runs * (call["operations"] or 0.0)
        self.share += call["share"]
        if call["of_multiply"]:
            self.at_multiply += runs * call["ms"] * call["of_multiply"]
        if call["bound"]:
            self._bounds[call["bound"]] = self._bounds.get(call["bound"], 0.0) + runs * call["ms"]

    @property
    def bound(self) -> str:
        """What bounds most of the time; a dash where nothing is known of it."""
        return max(self._bounds, key=lambda name: self._bounds[name], default="–")

    @property
    def gb_s(self) -> float:
        return self.bytes / self.ms / 1e6 if self.ms else 0.0

    @property
    def gflop_s(self) -> float:
        return self.operations / self.ms / 1e6 if self.ms else 0.0

    @property
    def of_multiply(self) -> float | None:
        """Part of the ceiling of its arithmetic, the mean over its time; None without products."""
        return self.at_multiply / self.ms if self.ms and self.at_multiply else None

    def of_bandwidth(self, ceiling_gb_s: float | None) -> float | None:
        return self.gb_s / ceiling_gb_s if ceiling_gb_s and self.bytes else None


def grouped(calls: Iterable[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], tuple[str, str]]) -> list[Group]:
    """The calls that ran, by `key` (method and name), the longest first."""
    groups: dict[tuple[str, str], Group] = {}
    for call in calls:
        if call["runs"]:
            method, name = key(call)
            groups.setdefault((method, name), Group(method, name)).add(call)
    return sorted(groups.values(), key=lambda g: (-g.ms, g.method, g.name))


def by_kernel(calls: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Each kernel of each method."""
    return grouped(calls, lambda call: (call["method"], call["op"]))


def by_layer(calls: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Each layer of each method, methods by their time and layers in their order; last what belongs to none."""
    listed = list(calls)
    made = grouped(
        listed, lambda call: (call["method"], "no layer" if call["layer"] is None else f"layer {call['layer']}")
    )
    methods = [g.method for g in grouped(listed, lambda call: (call["method"], ""))]
    order = {name: k for k, name in enumerate(methods)}
    number = {g.name: int(g.name.removeprefix("layer ")) for g in made if g.name != "no layer"}
    return sorted(made, key=lambda g: (order[g.method], number.get(g.name, len(listed))))

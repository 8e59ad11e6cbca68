"""Times of single nodes, from the profile that ONNX Runtime itself writes of a session.

ONNX Runtime profiles a session from when it is made until the profile is ended, so every graph is loaded a second time,
and the ticks that are timed run on these sessions. Their states lie in the same slots. Times are whole microseconds.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmlc.runtimes.core.kernels import KernelCall, KernelTimer

if TYPE_CHECKING:
    from tmlc.runtimes.onnx.backend import Loaded

MOST_EVENTS = 100_000
"""Nodes that are timed at most: ONNX Runtime keeps each in memory, and writes about 500 bytes for it."""
PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm"})
VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Shape", "Identity"})
PICKS = frozenset({"Gather", "GatherElements", "Slice"})
"""Read no more of their operand than they give."""


@dataclass
class _Node:
    op: str
    name: str
    runs: int = 0
    rows: int = 0
    ns: float = 0.0
    nbytes: float = 0.0
    operations: float = 0.0


@dataclass
class _Runs:
    """The runs of a method's profiled session: positions of each; was it disturbed? None: it counts for nothing."""

    rows: list[int] = field(default_factory=list)
    disturbed: list[bool | None] = field(default_factory=list)


class OnnxTimer(KernelTimer):
    """Args:
    load: makes the methods again with sessions that write profiles with this prefix.
    use: puts these methods in the place of the backend's own, or with None takes them away.
    """

    def __init__(
        self, load: Callable[[Path], dict[str, Loaded]], use: Callable[[dict[str, Loaded] | None], None]
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tmlc-profile-")
        self._loaded, self._use = load(Path(self._folder.name) / "profile"), use
        self._runs = {name: _Runs() for name in self._loaded}
        for name, loaded in self._loaded.items():
            loaded.runs = self._runs[name].rows
        self._started = self._events = 0

    def start(self) -> None:
        if self._events < MOST_EVENTS:
            self._use(self._loaded)

    def stop(self, disturbed: bool) -> bool:
        full = self._events >= MOST_EVENTS
        self._use(None)
        self._started += 1
        counts = not full and self._started > 1  # the first runs of a session reserve its memory
        self._events = 0
        for name, runs in self._runs.items():
            runs.disturbed += [disturbed if counts else None] * (len(runs.rows) - len(runs.disturbed))
            self._events += len(runs.rows) * self._loaded[name].nodes
        return counts

    def calls(self, disturbed: bool) -> list[KernelCall]:
        found: list[KernelCall] = []
        for name, loaded in self._loaded.items():
            path = loaded.session.end_profiling()
            events = json.loads(Path(path).read_text(encoding="utf-8"))
            runs = self._runs[name]
            counts = [was is not None and (disturbed or not was) for was in runs.disturbed]
            found += node_times(name, events, runs.rows, counts)
        self._loaded = {}
        self._folder.cleanup()
        return found


def node_times(method: str, events: list[dict[str, Any]], rows: list[int], counts: list[bool]) -> list[KernelCall]:
    """The nodes of one session's profile, summed up over the runs that count; in the order in which they first ran."""
    runs = sorted((e for e in events if e.get("name") == "model_run"), key=_begin)
    nodes = _outermost(sorted((e for e in events if e.get("cat") == "Node"), key=_begin))
    sums: dict[str, _Node] = {}
    event = next(nodes, None)
    for run, n, counted in zip(runs, rows, counts, strict=True):
        while event is not None and _begin(event)[0] < run["ts"] + run["dur"]:
            if counted and _begin(event)[0] >= run["ts"]:
                _add(sums, event, n)
            event = next(nodes, None)
    return [
        KernelCall(method, k, n.op, n.name, n.runs, n.rows, n.ns, nbytes=n.nbytes, operations=n.operations)
        for k, n in enumerate(sums.values())
    ]


def _begin(event: Mapping[str, Any]) -> tuple[int, int]:
    return event["ts"], -event["dur"]


def _outermost(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Without the nodes of graphs inside of others, whose time is that of the node they are in."""
    end = -1
    for event in events:
        if event["ts"] + event["dur"] > end or event["ts"] >= end:
            end = event["ts"] + event["dur"]
            yield event


def _add(sums: dict[str, _Node], event: Mapping[str, Any], rows: int) -> None:
    args, name = event["args"], event["name"].removesuffix("_kernel_time")
    node = sums.setdefault(name, _Node(args["op_name"], name))
    node.runs += 1
    node.rows += rows
    node.ns += 1000.0 * event["dur"]
    given = int(args.get("output_size", 0))
    if node.op in PICKS:
        node.nbytes += 2 * given
    elif node.op not in VIEWS:
        node.nbytes += given + int(args.get("parameter_size", 0)) + int(args.get("activation_size", 0))
    if node.op in PRODUCTS:
        first, out = (next(iter(args[key][0].values())) for key in ("input_type_shape", "output_type_shape"))
        depth = first[-1] if first else 1
        node.operations += 2.0 * math.prod(out) * depth
        if len(args["input_type_shape"]) == 1 and out:  # a float32 weight in a form of ONNX Runtime's own: not listed
            node.nbytes += 4.0 * depth * out[-1]

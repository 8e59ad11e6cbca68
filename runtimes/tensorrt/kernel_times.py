"""Times of single layers of TensorRT engines, as TensorRT itself reports them of a run. This never ran on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from tmlc.runtimes.core.kernels import KernelCall, KernelTimer
from tmlc.runtimes.tensorrt.device import LoadedEngine

Sum = list[float]
"""Runs and nanoseconds."""


class TensorRTTimer(KernelTimer):
    """Args: engines: by method. A layer is what TensorRT made of one or several layers of the network, by its name."""

    def __init__(self, engines: Mapping[str, LoadedEngine]) -> None:
        self._engines = engines
        self._fresh: dict[tuple[str, str], Sum] = {}
        self._sums: tuple[dict[tuple[str, str], Sum], ...] = ({}, {})  # of undisturbed runs, and of disturbed ones

    def start(self) -> None:
        self._fresh.clear()
        for method, engine in self._engines.items():
            engine.report_layers(partial(self._note, method))

    def _note(self, method: str, layer: str, ms: float) -> None:
        fresh = self._fresh.setdefault((method, layer), [0, 0.0])
        fresh[0] += 1
        fresh[1] += 1e6 * ms

    def stop(self, disturbed: bool) -> bool:
        for engine in self._engines.values():
            engine.report_layers(None)
        _add(self._sums[int(disturbed)], self._fresh)
        return True

    def calls(self, disturbed: bool) -> list[KernelCall]:
        total: dict[tuple[str, str], Sum] = {}
        for sums in self._sums[: 1 + disturbed]:
            _add(total, sums)
        places = dict.fromkeys(self._engines, 0)
        found = []
        for (method, layer), (runs, ns) in total.items():
            found.append(KernelCall(method, places[method], "layer", layer, int(runs), 0, ns))
            places[method] += 1
        return sorted(found, key=lambda call: list(self._engines).index(call.method))


def _add(into: dict[tuple[str, str], Sum], more: Mapping[tuple[str, str], Sum]) -> None:
    for key, (runs, ns) in more.items():
        held = into.setdefault(key, [0, 0.0])
        held[0] += runs
        held[1] += ns

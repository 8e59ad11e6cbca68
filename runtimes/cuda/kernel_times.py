"""Times of single launches: graphs of every bucket with a mark before the first launch and behind each.

A mark is an event in the graph, so launches follow each other as they do in a tick that nobody times; what a mark
itself takes is part of the launch before it. This never ran on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.runtimes.core.kernels import KernelCall, KernelTimer
from tmlc.runtimes.cuda.driver import Driver
from tmlc.runtimes.cuda.plan import BucketInfo, LaunchInfo, PointerArg

if TYPE_CHECKING:
    from tmlc.runtimes.cuda.backend import CudaBackend

Key = tuple[str, int, int]
"""Method, sessions and positions of a bucket."""


@dataclass
class _Timed:
    """A bucket's graph with marks; nanoseconds of each launch, and runs with their positions, of undisturbed runs and
    disturbed ones; `fresh` is what was timed since the timer was started."""

    bucket: BucketInfo
    graph: Any
    marks: list[Any]
    ns: np.ndarray
    runs: np.ndarray
    fresh_ns: np.ndarray
    fresh_runs: np.ndarray


def _keep_mark(driver: Driver, marks: list[Any]) -> None:
    marks.append(driver.mark())


class CudaTimer(KernelTimer):
    """Args:
    backend: whose slots are reserved already.
    use: makes the backend replay these graphs, and tell of each replay once it is over; None: its own again.
    """

    def __init__(
        self,
        backend: CudaBackend,
        use: Callable[[dict[Key, Any] | None, Callable[[Key, int], None] | None], None],
    ) -> None:
        self._backend, self._use = backend, use
        self._timed: dict[Key, _Timed] = {}
        driver = backend.driver
        driver.activate()
        for name, method in backend.plan.methods.items():
            for bucket in method.buckets:
                marks: list[Any] = []
                graph = driver.capture(backend.work(bucket, partial(_keep_mark, driver, marks)))
                count = len(bucket.launches)
                self._timed[name, bucket.batch, bucket.n] = _Timed(
                    bucket, graph, marks, np.zeros((2, count)), np.zeros((2, 2), np.int64), np.zeros(count),
                    np.zeros(2, np.int64),
                )  # fmt: skip

    def start(self) -> None:
        self._use({key: timed.graph for key, timed in self._timed.items()}, self._note)

    def _note(self, key: Key, rows: int) -> None:
        """After a replay: the marks hold its times until the next."""
        timed, elapsed = self._timed[key], self._backend.driver.elapsed
        pairs = zip(timed.marks, timed.marks[1:], strict=False)
        timed.fresh_ns += [1e9 * elapsed(begin, end) for begin, end in pairs]
        timed.fresh_runs += (1, rows)

    def stop(self, disturbed: bool) -> bool:
        self._use(None, None)
        for timed in self._timed.values():
            timed.ns[int(disturbed)] += timed.fresh_ns
            timed.runs[int(disturbed)] += timed.fresh_runs
            timed.fresh_ns[:], timed.fresh_runs[:] = 0, 0
        return True

    def calls(self, disturbed: bool) -> list[KernelCall]:
        found: list[KernelCall] = []
        first: dict[str, int] = {}
        for (method, batch, n), timed in self._timed.items():
            begin = first.get(method, 0)
            first[method] = begin + len(timed.bucket.launches)
            ns = timed.ns[: 1 + disturbed].sum(0)
            runs, rows = map(int, timed.runs[: 1 + disturbed].sum(0))
            name = f"bucket {batch}×{n}"
            for k, launch in enumerate(timed.bucket.launches if runs else ()):
                found.append(self._call(method, begin + k, launch, name, batch, runs, rows, float(ns[k])))
            self._backend.driver.forget(timed.graph)
        self._timed = {}
        return found

    def _call(
        self, method: str, index: int, launch: LaunchInfo, name: str, batch: int, runs: int, rows: int, ns: float
    ) -> KernelCall:
        plan = self._backend.plan
        pointers = [arg for arg in launch.args if isinstance(arg, PointerArg)]
        nbytes = sum(arg.nbytes * (batch if arg.space == "state" else 1) for arg in pointers)
        weights = tuple(plan.weights[arg.which] for arg in pointers if arg.space == "weight")
        op = plan.variants[launch.variant].kernel
        return KernelCall(method, index, op, name, runs, rows, ns, nbytes=float(nbytes * runs), weights=weights)

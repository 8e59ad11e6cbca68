"""What the scheduler costs on top of the engine, for each session and tick, and what a step table of the machine says.

The cost is everything that the device thread does between two batches: taking what clients sent, the detector of voice,
the batch's lists, the counters, handing out. Waiting for an edge is no cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tmlc_cli

import tmlc
from tmlc.runtimes.core.admission import HEADROOM, measure
from tmlc.runtimes.core.clock import ManualClock
from tmlc.runtimes.core.live import Published
from tmlc.runtimes.core.scheduler import Scheduler

SESSIONS, WARM, EDGES = 16, 5, 60
BUDGET = 0.160


@pytest.fixture(scope="module")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano in int8."""
    path = tmp_path_factory.mktemp("live") / "nano.tmlc"
    tmlc_cli("compile", checkpoint, "-o", path, "--precision", "int8")
    return path


class Timed:
    """The engine, with the time that its batches took."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.spent = engine, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def tick_batch(self, *given: Any) -> Any:
        begun = time.perf_counter()
        out = self._engine.tick_batch(*given)
        self.spent += time.perf_counter() - begun
        return out


def test_cost_of_the_scheduler(package: Path, figure: Callable[..., None], benchmark: Any) -> None:
    rng = np.random.default_rng(0)
    pieces = rng.normal(0, 0.1, (EDGES + WARM, 3200)).astype(np.float32)
    with tmlc.load(package, sessions=SESSIONS) as engine:
        timed = Timed(engine)
        scheduler = Scheduler(timed, clock=ManualClock())
        events: list[Any] = []
        seats = [scheduler.open(events.append, seed=k) for k in range(SESSIONS)]
        scheduler.step()
        own, hearing, steps = [], [], []

        def edge(number: int) -> None:
            begun = time.perf_counter()
            for seat in seats:
                for piece in pieces[number].reshape(10, 320):  # as a client sends it: 20 ms at a time
                    seat.hear(piece)
            heard = time.perf_counter()
            timed.spent = 0.0
            scheduler.clock.advance(0.2)
            scheduler.step()
            took = time.perf_counter() - heard
            if number >= WARM:
                own.append((took - timed.spent) / SESSIONS)
                hearing.append((heard - begun) / SESSIONS / 10)
                steps.append(timed.spent)

        benchmark.pedantic(lambda: [edge(number) for number in range(EDGES + WARM)], rounds=1)
        assert sum(isinstance(event, Published) for event in events) == SESSIONS * (EDGES + WARM)
        scheduler.close()
    figure(f"scheduler, {SESSIONS} sessions: own cost a session and tick", float(np.median(own)) * 1e6, "µs", 100.0)
    figure(f"scheduler, {SESSIONS} sessions: the same, p99", float(np.quantile(own, 0.99)) * 1e6, "µs")
    figure("seat: hear() of 20 ms", float(np.median(hearing)) * 1e6, "µs")
    figure(f"nano int8: step of {SESSIONS} sessions, audio only", float(np.median(steps)) * 1e3, "ms")


def test_step_table_of_this_machine(package: Path, figure: Callable[..., None]) -> None:
    sizes = (1, 2, 4, 8, 16)
    with tmlc.load(package, sessions=SESSIONS) as engine:
        begun = time.perf_counter()
        table = measure(engine, sizes=sizes)
        took = time.perf_counter() - begun
    for size in sizes:
        figure(f"nano int8: p99 step of {size}, all inputs, long context", table.predict(size) * 1e3, "ms")
    figure("nano int8: time to measure the table", took, "s")
    figure("nano int8: sessions that it admits", table.largest(HEADROOM * BUDGET, 1000), "")

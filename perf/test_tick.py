"""What a tick of nano costs on one thread: its step, its growth over a long session, its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import long_session
import numpy as np
import pytest

import tmlc
from tmlc.report.latency import spread

STEP_TICKS = 1000
YOUNG, OLD, COMPARED = 100, 3000, 200


@pytest.fixture
def engine(nano: Path) -> Iterator[Any]:
    with tmlc.load(nano, threads=1, sessions=2) as loaded:
        yield loaded


def timed(session: Any, given: Any) -> float:
    """One tick; its time in ms, everything around the kernels included."""
    started = time.perf_counter()
    session.tick(given)
    return (time.perf_counter() - started) * 1000


def test_step(engine: Any, benchmark: Any, figure: Callable[..., None], facts: dict[str, Any]) -> None:
    """p99 of a step of a warm session with a full context."""
    facts["isa"] = engine.model.backend.isa
    session = engine.session(seed=0)
    given = long_session.busy_ticks(engine, STEP_TICKS + 101)
    for _ in range(100):
        session.tick(next(given))
    steps: list[float] = []
    benchmark.pedantic(lambda: steps.append(timed(session, next(given))), rounds=STEP_TICKS, iterations=1)
    measured = spread(steps)
    benchmark.extra_info.update({"p50_ms": measured.p50, "p99_ms": measured.p99, "isa": engine.model.backend.isa})
    figure("nano step p50, 1 thread", measured.p50, "ms")
    figure("nano step p99, 1 thread", measured.p99, "ms", target=20.0)
    figure("nano step max, 1 thread", measured.max, "ms")


def test_growth(engine: Any, benchmark: Any, figure: Callable[..., None]) -> None:
    """Tick 3,000 and the 200 after it against tick 100 and the 200 after it.

    Two sessions of one engine take turns, one at each age, with the same inputs: whatever else the machine does in
    that time falls on both alike.
    """
    young, old = engine.session(seed=0), engine.session(seed=0)
    for given in long_session.busy_ticks(engine, OLD):
        old.tick(given)
    for given in long_session.busy_ticks(engine, YOUNG):
        young.tick(given)
    times: dict[int, list[float]] = {YOUNG: [], OLD: []}

    def take_turns() -> None:
        for index, given in enumerate(long_session.busy_ticks(engine, COMPARED)):
            pair = [(YOUNG, young), (OLD, old)]
            for age, session in pair if index % 2 else reversed(pair):
                times[age].append(timed(session, given))

    benchmark.pedantic(take_turns, rounds=1)
    early, late = (float(np.median(times[age])) for age in (YOUNG, OLD))
    benchmark.extra_info.update({"tick_100_ms": early, "tick_3000_ms": late})
    figure("nano tick 3000 / tick 100", late / early, "×", target=1.05)


def test_memory(nano: Path, benchmark: Any, figure: Callable[..., None]) -> None:
    """Resident memory of a fresh process after 1,000 ticks and after 10,000 of one session."""

    def run() -> dict[str, int | None]:
        command = [sys.executable, long_session.__file__, str(nano)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    resident = benchmark.pedantic(run, rounds=1)
    if resident["early"] is None:
        pytest.skip("resident memory is read from /proc, which this system does not have")
    benchmark.extra_info.update(resident)
    figure("resident after 10,000 ticks", resident["end"] / 1e6, "MB")
    figure("resident growth, tick 1,000 to 10,000", (resident["end"] - resident["early"]) / 1e6, "MB", target=1.0)

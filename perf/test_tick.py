"""What a tick of nano costs on one thread: its step, its growth over a long session, its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tmlc
from tmlc.cli.inputs import tick_shape
from tmlc.report.latency import spread
from tmlc.report.profile import resident_bytes, synthetic_recording

STEP_TICKS, LONG_TICKS, MEMORY_TICKS = 1000, 3050, 10_000


@pytest.fixture
def engine(nano: Path) -> Iterator[Any]:
    with tmlc.load(nano, threads=1, sessions=1) as loaded:
        yield loaded


def inputs(engine: Any, count: int) -> Iterator[Any]:
    """`count` busy ticks or a few more: audio in each, video as often as the model takes it, typed text."""
    shape = tick_shape(engine.manifest)
    part = round(30 / shape.seconds)
    recordings = (synthetic_recording(shape, 30.0, True, seed=seed) for seed in range(-(-count // part)))
    return chain.from_iterable(r.ticks(part) for r in recordings)


def played(engine: Any, count: int) -> list[float]:
    """Step times in ms of `count` ticks of one session."""
    session = engine.session(seed=0)
    times = [timed(session, given) for given in islice(inputs(engine, count), count)]
    session.close()
    return times


def timed(session: Any, given: Any) -> float:
    """One tick; its time in ms, everything around the kernels included."""
    started = time.perf_counter()
    session.tick(given)
    return (time.perf_counter() - started) * 1000


def test_step(engine: Any, benchmark: Any, figure: Callable[..., None]) -> None:
    """p99 of a step of a warm session with a full context."""
    session = engine.session(seed=0)
    given = inputs(engine, STEP_TICKS + 101)
    for _ in range(100):
        session.tick(next(given))
    steps: list[float] = []

    def tick() -> None:
        steps.append(timed(session, next(given)))

    benchmark.pedantic(tick, rounds=STEP_TICKS, iterations=1)
    measured = spread(steps)
    benchmark.extra_info.update({"p50_ms": measured.p50, "p99_ms": measured.p99, "isa": engine.model.backend.isa})
    figure("nano step p50, 1 thread", measured.p50, "ms")
    figure("nano step p99, 1 thread", measured.p99, "ms", target=20.0)
    figure("nano step max, 1 thread", measured.max, "ms")


def test_growth(engine: Any, benchmark: Any, figure: Callable[..., None]) -> None:
    """Tick 3,000 against tick 100: medians of the hundred ticks around each."""
    times = np.array(benchmark.pedantic(lambda: played(engine, LONG_TICKS), rounds=1))
    early, late = (float(np.median(times[at - 50 : at + 50])) for at in (100, 3000))
    benchmark.extra_info.update({"tick_100_ms": early, "tick_3000_ms": late})
    figure("nano tick 3000 / tick 100", late / early, "×", target=1.05)


def test_memory(engine: Any, benchmark: Any, figure: Callable[..., None]) -> None:
    """Resident memory after 1,000 ticks and after 10,000 of one session."""
    session = engine.session(seed=0)
    resident: dict[int, int] = {}

    def long_session() -> None:
        for index, given in enumerate(islice(inputs(engine, MEMORY_TICKS), MEMORY_TICKS)):
            session.tick(given)
            if index + 1 in (1000, MEMORY_TICKS):
                resident[index + 1] = resident_bytes() or 0

    benchmark.pedantic(long_session, rounds=1)
    if not all(resident.values()):
        pytest.skip("resident memory is read from /proc, which this system does not have")
    grown = resident[MEMORY_TICKS] - resident[1000]
    benchmark.extra_info.update({f"resident_after_{ticks}": count for ticks, count in resident.items()})
    figure("resident after 10,000 ticks", resident[MEMORY_TICKS] / 1e6, "MB")
    figure("resident growth, tick 1,000 to 10,000", grown / 1e6, "MB", target=1.0)

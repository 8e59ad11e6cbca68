"""What the second thread and pinning are worth to a tick of nano; the engines take turns tick by tick."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import long_session
import numpy as np
import pytest

import tmlc

WARM, TICKS = 50, 300


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores and a system that pins",
)
def test_two_threads(nano: Path, benchmark: Any, figure: Callable[..., None]) -> None:
    """Median step on one thread, on two, and on two with the worker pinned."""
    kinds: dict[str, dict[str, Any]] = {
        "one": {"threads": 1},
        "two": {"threads": 2},
        "pinned": {"threads": 2, "pin": True},
    }
    with ExitStack() as stack:
        engines = {name: stack.enter_context(tmlc.load(nano, sessions=1, **given)) for name, given in kinds.items()}
        sessions = {name: engine.session(seed=0) for name, engine in engines.items()}
        times: dict[str, list[float]] = {name: [] for name in kinds}

        def take_turns() -> None:
            for index, given in enumerate(long_session.busy_ticks(engines["one"], WARM + TICKS)):
                for name in list(kinds) if index % 2 else list(kinds)[::-1]:
                    started = time.perf_counter()
                    sessions[name].tick(given)
                    if index >= WARM:
                        times[name].append((time.perf_counter() - started) * 1000)

        benchmark.pedantic(take_turns, rounds=1)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    benchmark.extra_info.update(medians)
    figure("nano step p50, 2 threads / 1 thread", medians["two"] / medians["one"], "×")
    figure("nano step p50, 2 threads pinned / not pinned", medians["pinned"] / medians["two"], "×")

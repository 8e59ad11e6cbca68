"""What bounds a tick of `small`: the bytes it reads, how it grows with the cache, and a full tick at 8,000 positions.

The floor of a method is the bytes of its weights and of the cache that it attends to, over the read bandwidth measured
beside it. `perf/peers` holds the same against other engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import long_session
import numpy as np
import pytest
from conftest import tmlc_cli

import tmlc
from tmlc.kernels.cpu import MemoryReader, Pool, load_library
from tmlc.package import open_package
from tmlc.report.latency import spread
from tmlc.runtimes.core.backend import DTYPES

AGES = (500, 2000, 8000)
THREADS, TICKS, ROUNDS, PIECE = 2, 120, 15, 500
STEP_TARGET = {"int8": 160.0, "int4": 160.0}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    tmlc_cli("zoo", "create", "small", "--seed", 0, "-o", folder)
    return folder


@pytest.fixture(scope="module", params=("int8", "int4"))
def loaded(request: Any, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Any]]:
    """Precision, package, engine on two threads."""
    path = tmp_path_factory.mktemp("engines") / f"{request.param}.tmlc"
    tmlc_cli("compile", small, "-o", path, "--precision", request.param)
    with tmlc.load(path, threads=THREADS, sessions=len(AGES)) as engine:
        yield request.param, path, engine


def aged(engine: Any, positions: int) -> Any:
    """A session with so many positions of typed text in its cache."""
    session, random = engine.session(seed=0), np.random.default_rng(positions)
    for start in range(0, positions, PIECE):
        count = min(PIECE, positions - start)
        session.append(tokens=random.integers(0, 256, count).tolist(), logits="none")
    return session


def cache_bytes(path: Path, positions: int) -> float:
    """What attention reads of a session that is so old: rings end at their window."""
    with open_package(path) as package:
        plan = package.json(package.manifest.targets["cpu"].plan)
    tensors, total = plan["tensors"], 0.0
    for call in next(m for m in plan["methods"] if m["name"] == "decode")["code"]:
        if call["op"] != "attention":
            continue
        capacity = call["i"][4]
        caches = [tensors[t] for t in call["t"][5:7]]
        whole = sum(t["rows"][1] * t["stride"] * DTYPES[t["dtype"]].itemsize for t in caches)
        total += whole * min(positions, capacity) / capacity
    return total


def test_growth_with_the_cache(loaded: tuple[str, Path, Any], figure: Callable[..., None]) -> None:
    """One decoded position at three ages, in turns: what it costs more, beside the bytes that it reads more."""
    precision, path, engine = loaded
    sessions = {age: aged(engine, age) for age in AGES}
    reader = MemoryReader(Pool(load_library(), THREADS))
    times: dict[int, list[float]] = {age: [] for age in AGES}
    bandwidth = []
    for _ in range(ROUNDS):
        bandwidth.append(reader.bandwidth())  # its memory also empties the caches
        for age, session in sessions.items():
            for token in range(4):
                started = time.perf_counter()
                session.append(tokens=[token], logits="none")
                times[age].append(time.perf_counter() - started)
    for session in sessions.values():
        session.close()
    speed = float(np.median(bandwidth))
    middle = {age: float(np.median(times[age])) for age in AGES}
    figure(f"small {precision}, read bandwidth, {THREADS} threads", speed / 1e9, "GB/s")
    for age in AGES:
        figure(f"small {precision}, one position at {age:,}", middle[age] * 1e3, "ms")
    for young, old in ((AGES[0], AGES[1]), (AGES[1], AGES[2])):
        more = cache_bytes(path, old) - cache_bytes(path, young)
        name = f"small {precision}, {young:,} to {old:,}: added time / added bytes at that bandwidth"
        figure(name, (middle[old] - middle[young]) / (more / speed), "×")
        grown = 1 + more / (cache_bytes(path, young) + weight_bytes(path))
        figure(
            f"small {precision}, {young:,} to {old:,}: time / bytes, both grown",
            middle[old] / middle[young] / grown,
            "×",
            1.0,
        )


def weight_bytes(path: Path) -> float:
    """What one decoded position reads of the weights: of the experts, the share that one position chooses."""
    with open_package(path) as package:
        plan = package.json(package.manifest.targets["cpu"].plan)
    tensors, total = plan["tensors"], 0.0
    for call in next(m for m in plan["methods"] if m["name"] == "decode")["code"]:
        weights = [tensors[t] for t in call["t"] if tensors[t]["space"] == "weight"]
        size = sum(t["rows"][1] * t["stride"] * DTYPES[t["dtype"]].itemsize for t in weights)
        total += size * (CHOSEN / EXPERTS if call["op"] == "moe" else 1)
    return total


EXPERTS, CHOSEN = 49, 5  # of small: 48 and a shared one, which every position takes


def test_full_tick(loaded: tuple[str, Path, Any], benchmark: Any, figure: Callable[..., None]) -> None:
    """p99 of a whole step at 8,000 positions: audio in each tick, video every fifth, typed text, audio out."""
    precision, _, engine = loaded
    session = aged(engine, AGES[-1])
    given = long_session.busy_ticks(engine, TICKS + 11)
    for _ in range(10):
        session.tick(next(given))
    steps: list[float] = []
    spoke = 0

    def step() -> None:
        nonlocal spoke
        tick = next(given)
        started = time.perf_counter()
        out = session.tick(tick)
        steps.append((time.perf_counter() - started) * 1e3)
        spoke += not out.stats["silent"]

    benchmark.pedantic(step, rounds=TICKS, iterations=1)
    session.close()
    measured = spread(steps)
    figure(f"small {precision}, step p50, {AGES[-1]:,} positions, {THREADS} threads", measured.p50, "ms")
    figure(
        f"small {precision}, step p99, {AGES[-1]:,} positions, {THREADS} threads",
        measured.p99,
        "ms",
        STEP_TARGET[precision],
    )
    figure(f"small {precision}, margin of the p99", STEP_TARGET[precision] - measured.p99, "ms")
    figure(f"small {precision}, ticks that spoke", 100 * spoke / TICKS, "%")

"""What a tick of several sessions costs against the tick of one: experts are read once, states and arithmetic are not.

Prediction for `small` in int8 (48 experts top-4 and a shared one in 11 layers, 1.67 MB an expert; without video a tick
is calls of 6, 1, 3, 1, 1 and 1 positions): b positions touch 48·(1 - (11/12)^b) routed experts a layer, so eight
sessions read 3.1 times the bytes of one in `decode`, and about the same in the flow head, the vocoder and the choice of
tokens: 2.4 times in all where bytes bind, before the work that grows with positions (attention over each session's own
cache, short convolutions, and the arithmetic of 48 rows).
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

SIZES = (1, 2, 4, 8)
WARM = 3


@pytest.fixture(scope="module")
def packages(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """nano and small, random, in int8."""
    folder = tmp_path_factory.mktemp("batches")
    tmlc_cli("zoo", "create", "small", "--seed", 0, "-o", folder / "small")
    made = {"nano": checkpoint, "small": folder / "small"}
    for name, source in made.items():
        tmlc_cli("compile", source, "-o", folder / f"{name}.tmlc", "--precision", "int8")
    return {name: folder / f"{name}.tmlc" for name in made}


def without_video(engine: Any, count: int) -> Iterator[tmlc.TickInput]:
    for given in long_session.busy_ticks(engine, count):
        yield tmlc.TickInput(audio=given.audio, text=given.text)


def compared(
    engine: Any, rounds: int, inputs: Callable[[Any, int], Iterator[tmlc.TickInput]]
) -> dict[int, list[float]]:
    """Milliseconds of a tick for each size of batch, taken in turns; all sessions tick once a round, so they are of
    one age."""
    groups = {size: [engine.session(seed=100 * size + k) for k in range(size)] for size in SIZES}
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    feeds = [inputs(engine, WARM + rounds) for _ in range(max(SIZES))]
    for number in range(WARM + rounds):
        given = [next(feed) for feed in feeds]
        for size in SIZES if number % 2 else reversed(SIZES):
            started = time.perf_counter()
            outs = engine.tick_batch(groups[size], given[:size])
            taken = (time.perf_counter() - started) * 1000
            assert not any(isinstance(out, Exception) for out in outs)
            if number >= WARM:
                times[size].append(taken)
    for sessions in groups.values():
        for session in sessions:
            session.close()
    return times


@pytest.mark.parametrize(("model", "rounds"), [("nano", 100), ("small", 20)])
@pytest.mark.parametrize("threads", [1, 2])
def test_cost_of_a_batch(
    packages: dict[str, Path], benchmark: Any, figure: Callable[..., None], model: str, rounds: int, threads: int
) -> None:
    with tmlc.load(packages[model], threads=threads, sessions=sum(SIZES)) as engine:
        found: dict[int, list[float]] = {}
        benchmark.pedantic(lambda: found.update(compared(engine, rounds, without_video)), rounds=1)
        one = np.array(found[1])
        what = f"{model} int8, {threads} thread{'s' * (threads > 1)}"
        figure(f"{what}: tick of 1 session", float(np.median(one)), "ms")
        for size in SIZES[1:]:
            ratio = float(np.median(np.array(found[size]) / one))
            target = 2.5 if (model, size) == ("small", 8) else None
            figure(f"{what}: tick of {size} sessions / of 1", ratio, "×", target)


def test_where_the_time_goes(packages: dict[str, Path], figure: Callable[..., None]) -> None:
    """`small`, two threads: how much each kind of operation grows from one session to eight."""
    spent: dict[int, dict[str, float]] = {}
    with tmlc.load(packages["small"], threads=2, sessions=9) as engine:
        for size in (1, 8):
            sessions = [engine.session(seed=k) for k in range(size)]
            for given in without_video(engine, WARM):
                engine.tick_batch(sessions, [given] * size)
            timer = engine.backend.kernel_timer()
            timer.start()
            for given in without_video(engine, 10):
                engine.tick_batch(sessions, [given] * size)
            sums = spent.setdefault(size, {})
            timer.stop(disturbed=False)
            for call in timer.calls(disturbed=False):
                key = f"{call.method} {call.op}"
                sums[key] = sums.get(key, 0.0) + call.ns / 1e7
            for session in sessions:
                session.close()
    for key, ms in sorted(spent[8].items(), key=lambda item: -item[1])[:10]:
        figure(f"small int8, {key}: 1 session", spent[1][key], "ms")
        figure(f"small int8, {key}: 8 sessions", ms, "ms")

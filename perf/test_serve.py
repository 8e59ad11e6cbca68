"""A server under load: a thousand synthetic sessions on a virtual clock, and `nano` behind `tmlc serve`.

`pytest perf/test_serve.py --minutes 30` is the length that the targets are meant for; `make perf` runs two minutes.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tmlc_cli

from tmlc.runtimes.core.admission import StepTable
from tmlc.runtimes.core.clock import VirtualClock
from tmlc.runtimes.core.live import Ended, Published
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.synthetic import StepTime, SyntheticEngine

SESSIONS = 16
THOUSAND = 1000
JITTER = 0.05
SPEAKS, LISTENS = 2.0, 2.0
"""Seconds for which a client of the virtual server speaks, and is silent, in turn."""


class Times:
    """Milliseconds in bins of 0.1 ms up to 2 s, so that keeping them takes the same memory however many there are."""

    def __init__(self) -> None:
        self.bins = np.zeros(20_001, np.int64)

    def add(self, ms: float) -> None:
        self.bins[min(20_000, int(10 * ms))] += 1

    @property
    def count(self) -> int:
        return int(self.bins.sum())

    def above(self, ms: float) -> int:
        return int(self.bins[int(10 * ms) :].sum())

    def quantile(self, part: float) -> float:
        """The upper edge of its bin."""
        return (int(np.searchsorted(np.cumsum(self.bins), part * self.count)) + 1) / 10


class Crowd:
    """Clients of a virtual server. Each sends 200 ms of audio in every period, the end of its speech falls on one of
    ten places in a tick, and every tick that it gets is dated by the virtual clock."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.ages, self.answers, self.voices = Times(), Times(), Times()
        self.lost = self.ended = 0
        self.seats: list[Any] = []
        self.ends: dict[str, float] = {}  # of speech that no tick has taken in
        self.waiting: dict[str, float] = {}  # of speech that nobody has answered with a voice
        self.period = round((SPEAKS + LISTENS) / 0.2)
        self.pieces = [np.full(3200, 0.1, np.float32) for _ in range(10)]
        for place, piece in enumerate(self.pieces):
            piece[3200 - 320 * place :] = 0.0  # the voice ends within the tick
        self.hush = np.zeros(3200, np.float32)

    def join(self) -> None:
        self.seats.append(self.scheduler.open(self.sink, seed=len(self.seats)))

    def sink(self, event: Published | Ended) -> None:
        if isinstance(event, Ended):
            self.ended += 1
            return
        self.lost += event.collapsed
        self.ages.add(1000 * (event.done - event.due) + 200.0 * (1 + event.collapsed))
        if event.seat in self.ends and event.due >= self.ends[event.seat] - 1e-9:
            end = self.waiting[event.seat] = self.ends.pop(event.seat)
            self.answers.add(1000 * (event.done - end))
        if event.model_speaking and event.seat in self.waiting:
            self.voices.add(1000 * (event.done - self.waiting.pop(event.seat)))

    def speak(self, edge: int) -> None:
        """What everybody said in the period that ends at `edge`."""
        due, talks = self.scheduler.clock.due(edge), round(SPEAKS / 0.2)
        for number, seat in enumerate(self.seats):
            phase = (edge + 7 * number) % self.period
            last = phase == talks - 1
            seat.hear(self.hush if phase >= talks else self.pieces[number % 10 if last else 0])
            if last:
                self.ends[seat.id] = due - 0.02 * (number % 10)

    def forget(self) -> None:
        """Begins to measure anew."""
        self.ages, self.answers, self.voices = Times(), Times(), Times()
        self.lost = 0


def resident() -> float:
    """Megabytes of this process in memory."""
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize() / 1e6


def test_a_thousand_sessions(figure: Callable[..., None], request: pytest.FixtureRequest, benchmark: Any) -> None:
    minutes = request.config.getoption("--minutes")
    clock = VirtualClock()
    # 112 ms for all of them, 70 % of what a step may take, and 5 % of scatter.
    engine = SyntheticEngine(clock, StepTime(0.012, 0.0001, jitter=JITTER), sessions=THOUSAND)
    scheduler = Scheduler(engine, clock=clock, table=StepTable({1: 0.0121, THOUSAND: 0.112}))
    crowd, spent, memory = Crowd(scheduler), [], []

    def edge(sent: int) -> int:
        clock.wait(scheduler.next_edge)
        now = clock.edge(clock.now())
        for at in range(sent + 1, now + 1):
            crowd.speak(at)
        begun = time.perf_counter()
        scheduler.step()
        spent.append(time.perf_counter() - begun)
        return now

    def serve() -> None:
        sent = 0
        while len(crowd.seats) < THOUSAND:
            for _ in range(50):
                crowd.join()
            sent = edge(sent)
        for _ in range(10):
            sent = edge(sent)
        crowd.forget()
        spent.clear()
        until = clock.now() + 60 * minutes
        while clock.now() < until:
            sent = edge(sent)
            memory.append(resident())

    benchmark.pedantic(serve, rounds=1)
    ticks = crowd.ages.count + crowd.lost
    what = f"virtual server, {THOUSAND} sessions, {minutes:g} min"
    figure(f"{what}: answering tick p99", crowd.answers.quantile(0.99), "ms", 400.0)
    figure(f"{what}: the same, max", crowd.answers.quantile(1.0), "ms")
    figure(f"{what}: end of speech to first voice, p99", crowd.voices.quantile(0.99), "ms")
    figure(f"{what}: ticks late or lost", 100 * (crowd.ages.above(400.0) + crowd.lost) / ticks, "%", 0.1)
    figure(f"{what}: sessions that ended", crowd.ended, "", 0)
    third = len(spent) // 3
    figure(f"{what}: real time of an edge", 1000 * float(np.median(spent)), "ms")
    ratio = float(np.median(spent[-third:]) / np.median(spent[:third]))
    figure(f"{what}: the same, last third / first", ratio, "×", 1.1)
    figure(f"{what}: memory, last / first", memory[-1] / memory[0], "×", 1.05)
    assert crowd.answers.count and crowd.voices.count and ticks >= 1000 * 300 * minutes - 2000
    scheduler.close()
    assert crowd.ended == THOUSAND and engine.capacity().free == THOUSAND


def test_nano_by_bench(checkpoint: Path, tmp_path: Path, figure: Callable[..., None], request: Any) -> None:
    """Two cores for all of it, the clients included."""
    minutes = request.config.getoption("--minutes")
    package = tmp_path / "nano.tmlc"
    tmlc_cli("compile", checkpoint, "-o", package, "--precision", "int8")
    options = ["--sessions", SESSIONS, "--seconds", 60 * minutes, "--ramp", 4, "-o", tmp_path / "report"]
    tmlc_cli("bench", package, *options)
    view = json.loads((tmp_path / "report.json").read_text())
    what = f"nano int8 behind tmlc serve, {SESSIONS} sessions, {minutes:g} min"
    attempts = view["attempts"]
    figure(f"{what}: attempts that were not held", attempts["all"] - attempts["held"], "", 0)
    figure(f"{what}: turn latency p50", view["turn_latency_ms"]["p50"], "ms")
    figure(f"{what}: turn latency p99", view["turn_latency_ms"]["p99"], "ms", 400.0)
    figure(f"{what}: misses", 100 * view["misses"], "%", 0.1)
    figure(f"{what}: age of a tick, last minute / first", view["growth"]["ratio"], "×", 1.05)
    figure(f"{what}: answering tick, last minute / first", view["latency_growth"]["ratio"], "×")
    figure(f"{what}: resident memory after warming up", view["server_memory"]["mb_per_minute"], "MB/min")
    figure(f"{what}: load generator late, p99", view["generator"]["send_late_ms"]["p99"], "ms", 20.0)
    assert not view["generator"]["bottleneck"], "the load generator was late: nothing was measured"

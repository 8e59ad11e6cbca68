"""What is read around every tick beside the clock: instructions, energy, the cores that the system took away."""

from __future__ import annotations

import time

from tmlc.report.noise import noise
from tmlc.report.profile.counters import Counter, instructions
from tmlc.report.profile.energy import Meter, energy
from tmlc.report.profile.parts import Parts


class Meters:
    """The meters that this machine has. `start` once the engine's threads are there."""

    def __init__(self) -> None:
        self._counter: Counter | None = None
        self._meter: Meter | None = None
        self._reasons: dict[str, str] = {}
        self._before, self._per_tick = 0, list[int]()
        self._idle: float | None = None
        self._begun = self._ended = 0.0
        self._joules = self._joules_before = 0.0

    def start(self) -> None:
        """Opens the counters, and measures the idle machine for a second where it tells its energy."""
        try:
            self._counter = Counter()
        except OSError as error:
            self._reasons["instructions"] = str(error)
        try:
            self._meter = Meter()
            self._idle = self._meter.idle_watts()
            self._joules_before = self._meter.joules()
        except OSError as error:
            self._reasons["energy"] = str(error)
        self._begun = time.perf_counter()

    def before(self) -> None:
        """Right before a tick."""
        if self._counter is not None:
            self._before = self._counter.read()

    def after(self) -> None:
        """Right after it."""
        if self._counter is not None:
            self._per_tick.append(self._counter.read() - self._before)
        if self._meter is not None:
            self._joules = self._meter.joules()
        self._ended = time.perf_counter()

    def fill(self, parts: Parts, steps: list[float], preempted: int) -> None:
        """The parts of a profile; frees the counters. `steps` from the first tick on, in ms."""
        if self._counter is not None:
            self._counter.close()
            parts.measured("instructions", instructions(self._per_tick))
        if self._meter is not None:
            spent = self._joules - self._joules_before
            parts.measured("energy", energy(spent, self._ended - self._begun, len(steps), self._idle))
        for part, why in self._reasons.items():
            parts.missing(part, why)
        parts.measured("noise", noise(steps[1:], preempted, len(steps)))

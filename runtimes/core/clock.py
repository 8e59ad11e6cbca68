"""When the next tick is due: ticks lie on the grid t0 + k·period and never drift off it.

`wall` follows real time, `input` is due as soon as data is there (offline runs, CI), `manual` moves when
a test says so.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from math import floor

from tmlc.errors import UsageError


class Clock(ABC):
    """A grid of ticks. `start()` sets t0; `wait(k)` returns when tick k is due.

    Args:
        period: seconds from one tick to the next.
    """

    def __init__(self, period: float = 0.2) -> None:
        if not period > 0:
            raise UsageError(
                f"a clock's period must be positive, not {period}",
                fix="give the seconds of a tick: engine.layout.duration_ms / 1000",
            )
        self.period = period
        self.t0 = 0.0

    @abstractmethod
    def now(self) -> float:
        """Seconds on this clock."""

    def start(self) -> None:
        """Puts tick 0 at the present moment."""
        self.t0 = self.now()

    def due(self, tick: int) -> float:
        """The moment of `tick` on this clock, computed from t0: a late tick does not shift later ones."""
        return self.t0 + tick * self.period

    def edge(self, now: float) -> int:
        """The last tick that is due at `now`. Sums of tenths are not exact: a tick counts as due when the clock is
        within a nanosecond of it."""
        return floor((now - self.t0 + 1e-9) / self.period)

    @abstractmethod
    def wait(self, tick: int) -> float:
        """Returns at `due(tick)`, or at once when that has passed; the answer is the lateness in seconds."""


class WallClock(Clock):
    """Real time, from the monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, tick: int) -> float:
        due = self.due(tick)
        while (left := due - self.now()) > 0:
            time.sleep(left)
        return -left


class InputClock(Clock):
    """Time as the data tells it: asking for tick k moves the clock to tick k, without waiting."""

    def __init__(self, period: float = 0.2) -> None:
        super().__init__(period)
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def wait(self, tick: int) -> float:
        self._now = max(self._now, self.due(tick))
        return 0.0


class VirtualClock(Clock):
    """Time that passes by work: `advance` says how long something took, `wait` jumps over the time in which nothing is
    done. For one thread; hours of serving take the seconds that the bookkeeping takes."""

    def __init__(self, period: float = 0.2) -> None:
        super().__init__(period)
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Something took so long."""
        self._now += _forward(seconds)

    def wait(self, tick: int) -> float:
        due = self.due(tick)
        late = self._now - due
        self._now = max(self._now, due)
        return max(0.0, late)


def _forward(seconds: float) -> float:
    """`seconds`, if a clock can move by them. Raises UsageError."""
    if seconds < 0:
        raise UsageError(f"a clock cannot go back by {-seconds} s", fix="start a new clock for an earlier time")
    return seconds


class ManualClock(Clock):
    """Time that only `advance` moves; `wait` blocks until another thread has moved it far enough."""

    def __init__(self, period: float = 0.2) -> None:
        super().__init__(period)
        self._now = 0.0
        self._moved = threading.Condition()

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Moves the clock forward and wakes whoever waits for the new time."""
        with self._moved:
            self._now += _forward(seconds)
            self._moved.notify_all()

    def wait(self, tick: int) -> float:
        due = self.due(tick)
        # Sums of tenths are not exact: a tick counts as due when the clock is within a nanosecond of it.
        with self._moved:
            self._moved.wait_for(lambda: self._now >= due - 1e-9)
            return max(0.0, self._now - due)


CLOCKS: dict[str, type[Clock]] = {"wall": WallClock, "input": InputClock, "manual": ManualClock}


def make_clock(name: str, period: float = 0.2) -> Clock:
    """The clock called `name` (wall, input or manual) with ticks every `period` seconds."""
    if name not in CLOCKS:
        raise UsageError(f"unknown clock {name!r}", fix=f"use one of: {', '.join(CLOCKS)}")
    return CLOCKS[name](period)

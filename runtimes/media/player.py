"""Plays a recording into a session, tick by tick on a clock, and says what each tick gave and took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tmlc.runtimes.core.clock import Clock
from tmlc.runtimes.core.session import Session
from tmlc.runtimes.core.tick import TickInput, TickOutput
from tmlc.runtimes.media.recording import Recording


@dataclass(frozen=True)
class Played:
    """One tick: its input, its output, how long the step took and how late it started (both ms), and when it started
    (ns of `time.perf_counter_ns`).
    """

    index: int
    given: TickInput
    output: TickOutput
    step_ms: float
    late_ms: float
    started_ns: int

    def record(self, tick_seconds: float) -> dict[str, Any]:
        """The tick as one line of a timeline: JSON types only, audio left out."""
        return {
            "tick": self.index,
            "at": round(self.index * tick_seconds, 6),
            "typed": self.given.text,
            "frames": 0 if self.given.video is None else len(self.given.video),
            "tokens": [int(token) for token in self.output.tokens],
            "text": self.output.text,
            "step_ms": round(self.step_ms, 4),
            "late_ms": round(self.late_ms, 4),
            "timings_ms": {name: round(float(ms), 4) for name, ms in self.output.timings.items()},
            "counters": {name: _plain(value) for name, value in self.output.stats.items()},
        }


def play(session: Session, recording: Recording, count: int, clock: Clock) -> Iterator[Played]:
    """The first `count` ticks of `recording`, one after the other.

    Tick k is due when its input is complete: one period after it began. With an input clock nothing waits.
    """
    clock.start()
    for index, given in enumerate(recording.ticks(count)):
        late = clock.wait(index + 1)
        started = time.perf_counter_ns()
        output = session.tick(given)
        yield Played(index, given, output, (time.perf_counter_ns() - started) / 1e6, late * 1000, started)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value

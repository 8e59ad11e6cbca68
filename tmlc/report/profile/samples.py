"""What a profile keeps of every tick: the step, its stages, and the time that no stage accounts for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tmlc.report.profile.stages import MethodCall, in_order, tick_stages
from tmlc.runtimes.media.player import Played

MOST_SAMPLES = 20_000
"""A longer session keeps every second tick, every third and so on in its JSON; its statistics see all of them."""
Column = list[float | None]


@dataclass
class Samples:
    """Times of each tick in ms, one list a figure, all of one length; None where a stage did not run in a tick.

    `between_calls` is what is left of a step when its stages and the wait for the device are taken off: copies, Python
    between the calls, clocks.
    """

    step: list[float] = field(default_factory=list)
    wait: list[float] = field(default_factory=list)
    between_calls: list[float] = field(default_factory=list)
    first_audio: Column = field(default_factory=list)
    stages: dict[str, Column] = field(default_factory=dict)

    def add(self, played: Played, calls: Sequence[MethodCall]) -> None:
        timings = {name: float(ms) for name, ms in played.output.timings.items()}
        waited = timings.get("wait", 0.0)
        ended = played.started_ns + round(played.step_ms * 1e6)
        stages = tick_stages(calls, played.started_ns, ended, waited)
        for name in stages:
            self.stages.setdefault(name, [None] * len(self.step))
        for name, column in self.stages.items():
            column.append(stages.get(name))
        self.step.append(played.step_ms)
        self.wait.append(waited)
        self.first_audio.append(timings.get("first_audio"))
        self.between_calls.append(played.step_ms - waited - sum(stages.values()))

    def to_json(self) -> dict[str, Any]:
        """The columns from the second tick on, to 0.1 µs; `every` is the distance of the ticks that are kept."""
        count = len(self.step) - 1
        every = -(-count // MOST_SAMPLES)

        def kept(column: Column | list[float]) -> Column:
            return [None if ms is None else round(ms, 4) for ms in column[1::every]]

        return {
            "every": every,
            "step_ms": kept(self.step),
            "wait_ms": kept(self.wait),
            "between_calls_ms": kept(self.between_calls),
            "first_audio_ms": kept(self.first_audio),
            "stages_ms": {name: kept(self.stages[name]) for name in in_order(self.stages)},
        }


def ran(column: Column) -> list[float]:
    """The ticks of a column in which there was something to time, without the first tick."""
    return [ms for ms in column[1:] if ms is not None]

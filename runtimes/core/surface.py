"""What the scheduler needs of an engine, and the numbers that it shows of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tmlc.package.manifest import TickLayout
from tmlc.runtimes.core.admission import Level
from tmlc.runtimes.core.text import Tokenizer
from tmlc.runtimes.core.tick import TickInput, TickOutput

LogSink = Callable[[dict[str, Any]], None]
"""Called with each record of a session's tick log."""


class LiveSession(Protocol):
    """What the scheduler needs of a session; `Session` and `SyntheticSession` have it."""

    @property
    def ticks(self) -> int: ...

    @property
    def state(self) -> str: ...

    def append(self, tokens: Sequence[int] = ..., *, logits: str = ...) -> np.ndarray: ...

    def snapshot(self) -> bytes: ...

    def detach(self) -> None: ...

    def attach(self) -> None: ...

    def close(self) -> None: ...


class LiveEngine(Protocol):
    """What the scheduler needs of an engine; `Engine` and `SyntheticEngine` have it."""

    kind: str
    layout: TickLayout
    batched: bool
    tokenizer: Tokenizer | None

    @property
    def vocab(self) -> int: ...

    def capacity(self) -> Any: ...

    def session(self, seed: int = ..., temperature: float = ..., log: LogSink | None = ...) -> Any: ...

    def restore(self, blob: bytes, log: LogSink | None = ...) -> Any: ...

    def tick_batch(
        self, sessions: Any, inputs: Sequence[TickInput | None], missed: Sequence[Sequence[TickInput]] | None = ...
    ) -> list[TickOutput | Exception]: ...


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """The scheduler in numbers; counters count from its start.

    Attributes:
        running: can sessions be served? False after `close`, and after a failure of the device.
        slots, joining, ticking, detached: sessions that there is memory for, and seats by state.
        edge: the last edge at which something ran.
        lateness, step, batch: of the last batch: seconds from its edge to its beginning, seconds that it took,
        sessions.
        utilisation, pressure, level: of the ladder (`tmlc.runtimes.core.admission.Ladder`).
        admits: would a session be admitted now?
        predicted: seconds that the table predicts for a step with one session more; 0 without a table.
        ticks, batches, late, over_budget, collapses, collapsed: ticks done (collapsed ones included), batches, ticks
            that began late, ticks that were done later than the budget after their edge, collapses, ticks collapsed.
        missing, dropped_late, dropped_overflow, skipped, dropped_frames: of all seats, those that have ended included.
        opened, refused: sessions admitted and refused.
        ended: sessions by the reason why they ended.
    """

    running: bool
    slots: int
    joining: int
    ticking: int
    detached: int
    edge: int
    lateness: float
    step: float
    batch: int
    utilisation: float
    pressure: float
    level: Level
    admits: bool
    predicted: float
    ticks: int
    batches: int
    late: int
    over_budget: int
    collapses: int
    collapsed: int
    missing: int
    dropped_late: int
    dropped_overflow: int
    skipped: int
    dropped_frames: int
    opened: int
    refused: int
    ended: dict[str, int] = field(default_factory=dict)

"""The log of what happened in a session: events with numbers, of which a bounded window is kept for who comes back.

Dialects are projections of it: each makes its own messages of the same events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tmlc.runtimes.background.delegations import DelegationEvent
from tmlc.runtimes.background.injections import InjectionEvent

WINDOW = 512
"""Events that are kept, beside ticks."""
FRESH = 25
"""Ticks that are kept, with their output: 5 s. Older speech is stale, and nobody who comes back gets it."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick was done.

    Attributes:
        index: of the tick.
        audio: float32 at the model's output rate, owned by the log; zeros where the model is silent.
        text: what the model said to the user in it.
        late_ms, step_ms: from its edge to the beginning of its step; the step of its batch.
        user_speaking, model_speaking: whose voice was heard.
        collapsed, missing_ms, batch: ticks taken in with it; input that had not come; sessions of its batch.
        heard_ms: of the client's audio, that is behind this tick: taken in by it or an earlier one, or dropped.
    """

    index: int
    audio: np.ndarray
    text: str
    late_ms: float
    step_ms: float
    user_speaking: bool
    model_speaking: bool
    collapsed: int
    missing_ms: float
    batch: int
    heard_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Delegated:
    """Something happened to a delegation."""

    event: DelegationEvent


@dataclass(frozen=True, slots=True)
class Injected:
    """Something happened to an injection."""

    event: InjectionEvent


@dataclass(frozen=True, slots=True)
class ClientTask:
    """The model delegated work that the client is to do."""

    id: str
    tick: int
    task: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The session has ended; nothing follows."""

    reason: str
    detail: str


Happening = Tick | Delegated | Injected | ClientTask | Closed


class EventLog:
    """The events of one session, numbered from 1. Only the event loop touches it."""

    def __init__(self, last: int = 0) -> None:
        self._ticks: deque[tuple[int, Tick]] = deque(maxlen=FRESH)
        self._others: deque[tuple[int, Happening]] = deque(maxlen=WINDOW)
        self.last = last

    def add(self, happening: Happening) -> int:
        """Its number."""
        self.last += 1
        if isinstance(happening, Tick):
            self._ticks.append((self.last, happening))
        else:
            self._others.append((self.last, happening))
        return self.last

    def after(self, number: int) -> Iterator[tuple[int, Happening]]:
        """What came after event `number`, in order, as far as it is kept: a copy, which later events do not change."""
        newest = self._ticks[-1][1].index if self._ticks else 0
        fresh = [(n, tick) for n, tick in self._ticks if tick.index > newest - FRESH]  # collapsed ticks are gaps
        kept: list[tuple[int, Happening]] = [*self._others, *fresh]
        return iter(sorted((one for one in kept if one[0] > number), key=lambda one: one[0]))

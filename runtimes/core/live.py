"""What passes between the scheduler and whoever serves its sessions. Plain data and protocols; nothing here acts.

One thread owns the device (`scheduler.py`). At each edge of the grid it asks the inbox of every session that is due
what should enter the conversation there, runs the ticks, and hands each session's sink one `Published`. A session that
ends gets one `Ended`, and nothing after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from tmlc.runtimes.core.tick import MAX_INJECTED, TickOutput


@dataclass(frozen=True, slots=True)
class Moment:
    """What an inbox is told when a tick is about to run.

    Attributes:
        tick: the index of the session's tick.
        now: seconds on the scheduler's clock.
        user_speaking, model_speaking: was there voice in the last tick's input, in its output?
        quiet: seconds since either of them was last heard (0 while one is).
        inject_room: positions that may still be injected at this edge.
        say_room: tokens that one tick can say (`text_out` of the tick layout).
    """

    tick: int
    now: float
    user_speaking: bool
    model_speaking: bool
    quiet: float
    inject_room: int = MAX_INJECTED
    say_room: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """What enters a session at one edge.

    Attributes:
        inject: tokens that are appended before the tick's own input; nobody hears them.
        say: tokens that this tick says, in place of those that the model would choose; at most `say_room`.
        parts: ids of the injections of which this delivery has the last position.
    """

    inject: tuple[int, ...] = ()
    say: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()


NOTHING = Delivery()


class Inbox(Protocol):
    """Where a session's injections wait. Both methods are called by the device thread and may take microseconds only;
    they never raise for what a stranger sent."""

    def take(self, moment: Moment) -> Delivery:
        """What enters at this edge."""

    def published(self, out: Published) -> None:
        """The tick was done and its output handed out."""


@dataclass(frozen=True, slots=True)
class Published:
    """What one tick of one session gave. Immutable; the arrays in `output` are the receiver's.

    Attributes:
        seat: the session's id on the scheduler.
        due, started, done: seconds on the scheduler's clock: the edge, when its step began, when it ended.
        output: tokens, text, audio, timings and counts of the tick.
        collapsed: ticks before it whose input went in with it and whose output is silence.
        delivery: what was injected and said at this edge.
        missing: samples of input that had not come and ran as silence.
        heard: samples that the client ever sent and that wait no more: this tick and those before it took them in, or
            they were dropped.
        user_speaking, model_speaking: was there voice in the tick's input, in its output?
    """

    seat: str
    due: float
    started: float
    done: float
    output: TickOutput
    collapsed: int = 0
    delivery: Delivery = NOTHING
    missing: int = 0
    heard: int = 0
    user_speaking: bool = False
    model_speaking: bool = False

    @property
    def late(self) -> float:
        """Seconds from the edge to the start of the step."""
        return self.started - self.due

    @property
    def step(self) -> float:
        """Seconds that the step took, for the whole batch."""
        return self.done - self.started


class EndReason(StrEnum):
    """Why a session left the scheduler."""

    CLOSED = "closed"  # its owner asked for it
    BEHIND = "behind"  # more than 5 ticks late, or 3 collapses in 10 s
    CONTEXT = "context"  # its context is used up and the package's policy is `end`
    FAILED = "failed"  # a kernel stopped, or its log could not be written
    EXPIRED = "expired"  # nobody came back for it in time
    SHUTDOWN = "shutdown"  # the server drains


@dataclass(frozen=True, slots=True)
class Ended:
    """A session left the scheduler; its slot is free.

    Attributes:
        reason, detail: why, for a program and for a person.
        snapshot: the session as it was after its last tick, to be restored on this engine or another one with the same
            package; None when there is nothing to go on from.
    """

    seat: str
    reason: EndReason
    detail: str = ""
    snapshot: bytes | None = field(default=None, repr=False)


Sink = Callable[[Published | Ended], None]
"""Called by the device thread with each event of a session, in order; it must return at once."""

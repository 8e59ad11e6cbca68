"""A seat: one live session as its client sees it. Thread-safe, and nothing here waits for a tick.

What a client sends goes into bounded streams; what it asks for (attach, snapshot, close …) is noted and done by the
scheduler's device thread between two batches.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import StrEnum
from threading import Lock
from typing import Any, Protocol

import numpy as np

from tmlc.errors import CapacityError, InputError, SessionError
from tmlc.package.manifest import TickLayout
from tmlc.runtimes.core import ticklog
from tmlc.runtimes.core.admission import Level
from tmlc.runtimes.core.live import NOTHING, Delivery, Inbox, Moment, Sink
from tmlc.runtimes.core.streams import FrameSlot, Pace, SampleStream, Taken, TokenStream
from tmlc.runtimes.core.surface import LiveEngine, LiveSession, LogSink
from tmlc.runtimes.core.tick import TickInput, TickOutput, check_audio, check_reads, check_tokens, check_video
from tmlc.runtimes.core.voice import VoiceDetector, hops_of

MAX_SNAPSHOTS = 16
"""Snapshots of one seat that may be waited for at once."""


class SeatState(StrEnum):
    """Where a seat is in its life."""

    JOINING = "joining"  # opened; its session begins before the next edge
    TICKING = "ticking"
    DETACHED = "detached"  # no client; the slot is kept for the resume window
    ENDED = "ended"


@dataclass(slots=True)
class SeatCounters:
    """What happened to a session so far. `Seat.counters` gives a copy.

    Attributes:
        ticks: done, collapsed ones included.
        late: ticks whose step began more than a tenth of a tick after their edge.
        over_budget: ticks that were done later after their edge than the step budget.
        collapses, collapsed: how often missed ticks were taken in at once, and how many they were.
        missing: samples that had not come and ran as silence.
        dropped_late: samples dropped because they were older than 400 ms.
        dropped_overflow: samples dropped because the stream was full, or because nobody was attached.
        skipped: silent samples of a backlog left out to catch up.
        dropped_frames: frames that were replaced by newer ones or came too soon after the last.
        injected, said: positions that were injected, tokens that the session was made to say.
    """

    ticks: int = 0
    late: int = 0
    over_budget: int = 0
    collapses: int = 0
    collapsed: int = 0
    missing: int = 0
    dropped_late: int = 0
    dropped_overflow: int = 0
    skipped: int = 0
    dropped_frames: int = 0
    injected: int = 0
    said: int = 0


class Host(Protocol):
    """What a seat needs of its scheduler."""

    @property
    def level(self) -> Level: ...

    @property
    def request_lock(self) -> Lock: ...

    def wake(self, seat: Seat) -> None: ...


@dataclass(slots=True)
class Requests:
    """What a client asks for and the device thread has not done yet; all of it bounded."""

    move: Sink | str | None = None  # the newest of: attach (its sink), "detach"
    snapshots: list[Future[bytes]] = field(default_factory=list)
    close: bool = False

    def refuse(self) -> None:
        """The session has ended: there is no snapshot of it."""
        for future in self.snapshots:
            if future.set_running_or_notify_cancel():
                future.set_exception(_gone())


@dataclass(slots=True)
class Gathered:
    """What goes into one session at an edge."""

    given: TickInput
    missed: list[TickInput]
    delivery: Delivery
    taken: Taken
    user_speaking: bool


class Seat:
    """Made by `Scheduler.open`.

    Attributes:
        id: unguessable name of the session.
        pace: how its samples come.
    """

    def __init__(
        self, host: Host, engine: LiveEngine, period: float, sink: Sink, inbox: Inbox | None, pace: Pace,
        log: LogSink | None, totals: Counter[str],
    ) -> None:  # fmt: skip
        self.id = "sess_" + secrets.token_urlsafe(18)
        self.pace = pace
        self._host, self._engine, self._period = host, engine, period
        self.layout: TickLayout = engine.layout
        self.state = SeatState.JOINING
        self._counters, self._totals, self._requests = SeatCounters(), totals, Requests()
        samples = self.layout.audio_in * self.layout.hop
        self._audio = SampleStream(self.layout.sample_rate, samples, pace) if samples else None
        self._frames, self._typed = FrameSlot(), TokenStream()
        # From here on, only the device thread.
        self.sink, self.inbox, self.log = sink, inbox, log
        self.session: LiveSession | None = None
        self.due = self.order = 0
        self.detached_at = 0.0
        self.collapses: deque[float] = deque(maxlen=3)
        self.user, self.model = VoiceDetector(), VoiceDetector()
        self.user_speaking = self.model_speaking = False
        self._quiet_ticks = 0
        self._starved = True
        self._last_look = -math.inf
        self.at_rest = engine.kind == "tokens"

    def __repr__(self) -> str:
        return f"<Seat {self.id[:10]}… {self.state} tick {self.engine_session_tick}>"

    @property
    def engine_session_tick(self) -> int:
        """The index of the next tick."""
        return self.session.ticks if self.session is not None else 0

    @property
    def level(self) -> Level:
        """What the scheduler gives up at present."""
        return self._host.level

    # What the client sends.

    def hear(self, samples: np.ndarray) -> None:
        """Samples for the model: float32 mono at its input rate (`layout.sample_rate`), any number. What is heard while
        nobody is attached is dropped and counted.

        Raises InputError: wrong dtype or shape, not finite, or a model that does not hear.
        """
        check_audio(samples, self.layout)
        if self._audio is not None:
            if self.state in (SeatState.DETACHED, SeatState.ENDED):
                self._audio.refuse(samples.size)
            else:
                self._audio.put(samples)

    def see(self, frame: np.ndarray) -> None:
        """A frame for the model: uint8 [height, width, 3] of its size. The newest wins.

        Raises InputError: wrong dtype or shape, or a model that does not see.
        """
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            size = (self.layout.frame_height, self.layout.frame_width, 3)
            raise InputError(
                f"a frame must be uint8 {list(size)}, in one array",
                fix=f"give one RGB picture of {size[1]} × {size[0]} pixels, without an axis of frames",
            )
        self._frames.put(check_video(frame[None], self.layout).copy())

    def read(self, text: str) -> None:
        """Typed text for the model; it reads `layout.text_in` tokens a tick.

        Raises InputError: a model or a package that takes no text, or 65,536 tokens wait already.
        """
        check_reads(self._engine.kind, self.layout)
        if self._engine.tokenizer is None:
            raise InputError(
                "this package has no tokenizer: it takes no text",
                fix="serve one that was compiled with its checkpoint's tokenizer.json",
            )
        self._typed.put(check_tokens(self._engine.tokenizer.encode(text), self._engine.vocab))

    def forget_input(self) -> None:
        """Drops the samples that wait; what was heard stays heard."""
        if self._audio is not None:
            self._audio.clear()

    # What the client asks for.

    def detach(self) -> None:
        """The client left: ticks stop, the slot is kept for the resume window, then the session ends (EXPIRED) with a
        snapshot. The sink is told of a tick that runs meanwhile, and of the end."""
        self._ask(move="detach")

    def attach(self, sink: Sink) -> None:
        """A new client took over; ticks go on at the next edge and go to `sink`. Also while the old client is attached.

        Raises SessionError: the session has ended.
        """
        self._ask(move=sink)

    def snapshot(self) -> Future[bytes]:
        """The session as it is after the tick that runs now; `Scheduler.open(snapshot=…)` and `Engine.restore` go on
        from it.

        Raises SessionError: the session has ended. CapacityError: 16 snapshots are waited for.
        """
        future: Future[bytes] = Future()
        self._ask(snapshot=future)
        return future

    def close(self) -> None:
        """Ends the session: Ended(CLOSED) follows. Closing twice does nothing."""
        with self._host.request_lock:
            self._requests.close = True
        self._host.wake(self)

    def _ask(self, move: Sink | str | None = None, snapshot: Future[bytes] | None = None) -> None:
        with self._host.request_lock:
            if self.state is SeatState.ENDED:
                raise _gone()
            if move is not None:
                self._requests.move = move
            if snapshot is not None:
                if len(self._requests.snapshots) >= MAX_SNAPSHOTS:
                    raise CapacityError(
                        f"{MAX_SNAPSHOTS} snapshots of this session are waited for",
                        fix="wait for the result of one of them first",
                    )
                self._requests.snapshots.append(snapshot)
        self._host.wake(self)

    def counters(self) -> SeatCounters:
        """What happened to the session so far."""
        return replace(self._counters)

    # What the device thread does.

    def take_requests(self) -> Requests:
        """What was asked for since the last call; the caller holds the request lock."""
        asked, self._requests = self._requests, Requests()
        return asked

    def note(self, event: str, **facts: Any) -> None:
        """Writes a decision to the session's log; raises what the log raises."""
        if self.log is not None:
            self.log(ticklog.decided(event, self.engine_session_tick, **facts))

    def count(self, **counts: int) -> None:
        """Adds to the session's counters and to those of the scheduler."""
        for name, count in counts.items():
            if count:
                setattr(self._counters, name, getattr(self._counters, name) + count)
                self._totals[name] += count

    def restart(self, due: int) -> None:
        """The session joins the grid, for the first time or again: its next tick is due at edge `due`. What was said in
        real time to nobody is forgotten."""
        if self._audio is not None and self.state is SeatState.DETACHED and self.pace is Pace.REALTIME:
            self._audio.clear()
        self.due, self.state = due, SeatState.TICKING
        self.collapses.clear()

    @property
    def typed_waiting(self) -> int:
        """Typed tokens that wait."""
        return len(self._typed)

    def take_typed(self, most: int) -> list[int]:
        return self._typed.take(most)

    def idle(self) -> bool:
        """Is there nothing to do? Only a token model rests: before its first token, and from the end of a sequence
        until something comes."""
        return self.at_rest and not len(self._typed) and not (self._audio is not None and len(self._audio))

    def gather(self, missed: int, now: float) -> Gathered:
        """What the next tick takes in, and `missed` ticks before it. Raises what the inbox or the log raises."""
        taken = self._audio.take(missed + 1) if self._audio is not None else Taken([None] * (missed + 1))
        self._note_streams(taken)
        hops = hops_of(self._period)
        heard = [self.user.heard(audio, hops) for audio in taken.ticks] if self._audio is not None else [False]
        inputs = [TickInput(audio, tokens=self._typed.take(self._reads())) for audio in taken.ticks]
        newest = inputs.pop()
        newest.video = self._look(self.engine_session_tick + missed)
        delivery = NOTHING
        if self.inbox is not None:
            quiet = 0.0 if self.user_speaking or self.model_speaking else self._quiet_ticks * self._period
            tick, room = self.engine_session_tick + missed, self.layout.text_out
            delivery = self.inbox.take(
                Moment(tick, now, self.user_speaking, self.model_speaking, quiet, say_room=room)
            )
            newest.inject, newest.say = delivery.inject, delivery.say
        return Gathered(newest, inputs, delivery, taken, any(heard))

    def _reads(self) -> int:
        return self.layout.text_in if self._engine.kind == "interaction" else len(self._typed)

    def _look(self, tick: int) -> np.ndarray | None:
        """The newest frame, when it is time to look again."""
        every = max(1, self.layout.video_every)
        if self.level >= Level.SLOW_VIDEO:
            every = max(every, math.ceil(1.0 / self._period - 1e-9))
        if tick - self._last_look < every:
            return None
        frame = self._frames.take()
        if frame is not None:
            self._last_look = tick
        return frame

    def _note_streams(self, taken: Taken) -> None:
        """Counts and logs what is missing and what was dropped."""
        whole = self.layout.audio_in * self.layout.hop
        overflow, frames = self._audio.dropped() if self._audio is not None else 0, self._frames.dropped()
        self.count(
            missing=taken.missing, dropped_late=taken.late, skipped=taken.skipped,
            dropped_overflow=overflow, dropped_frames=frames,
        )  # fmt: skip
        starved = taken.missing >= whole
        if taken.missing and not (starved and self._starved):  # of a stream that stays empty, only the first
            self.note("missing", samples=taken.missing)
        self._starved = starved
        reasons = (("audio", "late", taken.late), ("audio", "overflow", overflow), ("audio", "silence", taken.skipped),
                   ("video", "newer", frames))  # fmt: skip
        for stream, why, count in reasons:
            if count:
                self.note("dropped", stream=stream, why=why, count=count)

    def done(self, gathered: Gathered, output: TickOutput) -> None:
        """The tick was run; follows whose voice was heard."""
        hops = hops_of(self._period)
        self.user_speaking = gathered.user_speaking
        silent = bool(output.stats["silent"])
        self.model_speaking = bool(output.audio.size) and self.model.heard(None if silent else output.audio, hops)
        voice = self.user_speaking or self.model_speaking
        self._quiet_ticks = 0 if voice else self._quiet_ticks + 1 + len(gathered.missed)
        self.at_rest = self._engine.kind == "tokens" and _ended(output.tokens, self.layout.eos_token_ids)
        collapsed = len(gathered.missed)
        self.count(
            ticks=collapsed + 1, collapses=int(collapsed > 0), collapsed=collapsed,
            dropped_frames=output.stats["dropped_clips"], injected=len(gathered.delivery.inject),
            said=len(gathered.delivery.say),
        )  # fmt: skip


def _gone() -> SessionError:
    return SessionError("the session has ended", fix="open a new one, or one from its snapshot")


def _ended(tokens: Sequence[int], eos: Sequence[int]) -> bool:
    return bool(tokens) and tokens[-1] in eos

"""The scheduler: one thread owns the device and runs every session's ticks at the edges of one common grid.

Tick n of a session that joined at edge j is due at edge j + n: at t0 + 200·(j + n) ms, whatever happened before. At an
edge all sessions that are due run together, in as few batches as the step budget allows, earliest deadline first.

| a session is late by | what happens |
| --- | --- |
| ≤ 1 tick | its tick runs now |
| more | collapse: the input of the missed ticks is taken in with the newest one; they are silent, only it is decoded |
| > 5 ticks, or collapses for the third time in 10 s | it ends (BEHIND) with a snapshot, alone |

When several would end in one pass because of collapses, only as many do as the length of the last passes says are too
many, at least one: those that joined last. The others collapse once more, and may recover in the room that is left.

Whatever is wrong with one session (an inbox, a sink or a log that raises) ends that session and no other.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from math import ceil
from statistics import median

from tmlc.errors import CapacityError, ContextFullError, DeviceError, TmlcError, UsageError
from tmlc.runtimes.core.admission import HEADROOM, Ladder, Level, StepTable
from tmlc.runtimes.core.clock import Clock, WallClock
from tmlc.runtimes.core.live import Ended, EndReason, Inbox, Published, Sink
from tmlc.runtimes.core.seat import Gathered, Seat, SeatState
from tmlc.runtimes.core.streams import MAX_LATE, Pace
from tmlc.runtimes.core.surface import LiveEngine, LogSink, SchedulerStats
from tmlc.runtimes.core.tick import TickOutput, finite_temperature, whole_seed

COLLAPSES, COLLAPSE_SECONDS = 3, 10.0
"""So many collapses within so many seconds end a session."""
LATE_PART = 0.1
"""A tick that begins later than this part of a period after its edge counts as late."""

_say = logging.getLogger(__name__)


class Scheduler:
    """Sessions of one engine, live. It owns the engine's slots: nobody else opens sessions on the engine.

    Args:
        engine: an interaction model's or a token model's; the caller closes it after the scheduler.
        clock: its period is the model's tick; None is real time.
        table: what steps take (`measure`); None admits by free slots only and runs all due sessions in one batch.
        resume_window: seconds for which a detached session keeps its slot.
        step_budget: seconds that a step may take.
    """

    def __init__(
        self, engine: LiveEngine, *, clock: Clock | None = None, table: StepTable | None = None,
        resume_window: float = 30.0, step_budget: float = 0.160,
    ) -> None:  # fmt: skip
        period = engine.layout.duration_ms / 1000
        self.engine, self.clock, self.table = engine, clock or WallClock(period), table
        if abs(self.clock.period - period) > 1e-9:
            raise UsageError(
                f"a tick of this model is {period} s, the clock's period is {self.clock.period} s",
                where="clock",
                fix=f"make the clock with the period {period}, or leave it out for real time",
            )
        if not resume_window >= 0 or not step_budget > 0:
            raise UsageError(
                f"resume_window must be 0 or more and step_budget positive, not {resume_window} and {step_budget}",
                fix="give seconds, or leave them out for 30 and 0.16",
            )
        self.resume_window, self.step_budget = resume_window, step_budget
        capacity = engine.capacity()
        self._slots, self._chunk = capacity.sessions, capacity.max_append
        self.request_lock = threading.Lock()
        self._woken = threading.Condition(self.request_lock)
        self._asking: dict[Seat, None] = {}  # seats with requests, in order
        self._opening: dict[Seat, tuple[int, float, bytes | None]] = {}
        self._seats: dict[str, Seat] = {}
        self._ladder = Ladder(period)
        self._refused = 0
        self._stopping = self._closed = False
        self._drain_at: float | None = None
        self._thread: threading.Thread | None = None
        # From here on, only the device thread.
        self._live: dict[Seat, None] = {}  # with a session
        self._totals, self._ended = Counter[str](), Counter[str]()
        self._order = 0
        self._busy = self._worst = 0.0
        self._passes: deque[float] = deque(maxlen=8)  # seconds of the last ones without a collapse
        self._last = (0, 0.0, 0.0, 0)  # edge, lateness, step, batch
        self._events: list[Published | Ended] | None = None
        self.clock.start()
        self._edge = 0

    # For any thread.

    @property
    def level(self) -> Level:
        """What is given up at present."""
        return self._ladder.level

    @property
    def next_edge(self) -> int:
        """The next edge of the grid; `clock.wait(next_edge)` and `step()` run it."""
        return self.clock.edge(self.clock.now()) + 1

    def start(self) -> None:
        """Starts the device thread, which needs a clock of real time."""
        if not isinstance(self.clock, WallClock):
            raise UsageError("a thread needs a clock of real time", fix="call step() at each edge of this clock")
        if self._thread is not None or self._closed:
            raise UsageError("a scheduler is started once", fix="make a new one when this one is closed")
        self._thread = threading.Thread(target=self._work, name="tmlc-device", daemon=True)
        self._thread.start()

    def open(
        self, sink: Sink, *, seed: int = 0, temperature: float = 0.0, inbox: Inbox | None = None,
        pace: Pace = Pace.REALTIME, log: LogSink | None = None, snapshot: bytes | None = None,
    ) -> Seat:  # fmt: skip
        """Admits a session; its first tick is due at the next edge after the device thread has opened it.

        Args:
            sink: called by the device thread with each Published and, last, one Ended.
            seed, temperature: of a new session; a snapshot brings its own.
            inbox: asked at each edge what enters there.
            pace: how samples come.
            log: called by the device thread with each record of the tick log.
            snapshot: go on from it. One that does not fit ends the session at once (FAILED).

        Raises:
            CapacityError: no slot is free, or one more session would make the others late; `retry_after` is set.
            InputError: a seed or temperature out of range.
        """
        chosen, heat = whole_seed(seed), finite_temperature(temperature)
        seat = Seat(self, self.engine, self.clock.period, sink, inbox, Pace(pace), log, self._totals)
        with self._woken:
            why, wait = self._refusal()
            if wait is not None:
                self._refused += 1
                error = CapacityError(why, fix=f"try again in {wait:.0f} s")
                error.retry_after = wait
                raise error
            self._seats[seat.id] = seat
            self._opening[seat] = (chosen, heat, snapshot)
            self._woken.notify()
        return seat

    def admit(self) -> float | None:
        """None: a session would be admitted now. Else the seconds after which to try again."""
        with self.request_lock:
            return self._refusal()[1]

    def _refusal(self) -> tuple[str, float | None]:
        """Why a session would be refused now, and when to try again; the caller holds the lock."""
        if self._closed or self._stopping or self._drain_at is not None:
            return "the server takes no sessions any more", 30.0
        if len(self._seats) >= self._slots:
            since = [seat.detached_at for seat in self._seats.values() if seat.state is SeatState.DETACHED]
            left = min((at + self.resume_window - self.clock.now() for at in since), default=5.0)
            return f"all {self._slots} sessions are in use", min(max(left, 1.0), 30.0)
        if self.level >= Level.NO_ADMISSION:
            return "the sessions that are open need all of the device", 5.0
        if self._predicted() > HEADROOM * self.step_budget:
            return "one more session would make the others late", 5.0
        return "", None

    def _predicted(self) -> float:
        return self.table.predict(len(self._seats) + 1) if self.table is not None else 0.0

    def wake(self, seat: Seat) -> None:
        """A seat has asked for something."""
        with self._woken:
            self._asking[seat] = None
            self._woken.notify()

    @property
    def draining(self) -> bool:
        """Whether `drain` was called: who sees it is admitted no more."""
        return self._drain_at is not None

    def drain(self, grace: float) -> None:
        """Admits nobody any more; after `grace` seconds every session that is left ends (SHUTDOWN) with a snapshot.

        With a device thread it returns when the last one has ended; without, `step` does it.
        """
        with self._woken:
            self._drain_at = self.clock.now() + grace
            if self._thread is not None and threading.current_thread() is not self._thread:
                self._woken.wait_for(lambda: not self._seats or self._closed)

    def close(self) -> None:
        """Ends every session (SHUTDOWN) with a snapshot and stops the device thread. Closing twice does nothing."""
        with self._woken:
            self._stopping = True
            self._woken.notify_all()
        if self._thread is None:
            self._serve()
            self._end_all(EndReason.SHUTDOWN, "the server is shutting down")
        elif threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> SchedulerStats:
        """The present numbers."""
        with self.request_lock:
            states = Counter(seat.state for seat in self._seats.values())
            admits = self._refusal()[1] is None
            predicted = self._predicted()
        totals, ladder = self._totals, self._ladder
        edge, lateness, step, batch = self._last
        names = ("ticks", "batches", "late", "over_budget", "collapses", "collapsed", "missing", "dropped_late",
                 "dropped_overflow", "skipped", "dropped_frames", "opened")  # fmt: skip
        return SchedulerStats(
            running=not self._closed, slots=self._slots, edge=edge, lateness=lateness, step=step, batch=batch,
            joining=states[SeatState.JOINING], ticking=states[SeatState.TICKING],
            detached=states[SeatState.DETACHED],
            utilisation=ladder.utilisation, pressure=ladder.pressure, level=ladder.level, admits=admits,
            predicted=predicted, refused=self._refused, ended=dict(self._ended),
            **{name: totals[name] for name in names},
        )  # fmt: skip

    # The device thread.

    def step(self) -> list[Published | Ended]:
        """Does, on the caller's thread, all that is due now: what seats asked for, and one tick of each session whose
        tick is due. Returns the events that the sinks got. Never waits."""
        if self._thread is not None:
            raise UsageError("a scheduler with a device thread steps by itself", fix="call start() or step(), not both")
        events: list[Published | Ended] = []
        self._events = events
        self._serve()
        self._pass()
        self._events = None
        return events

    def _work(self) -> None:
        try:
            while not self._closed and not self._stopping:
                self._serve()
                if self._pass():
                    continue
                with self._woken:
                    left = self.clock.due(self.next_edge) - self.clock.now()
                    if not (self._asking or self._opening or self._stopping) and left > 0:
                        self._woken.wait(left)
            self._serve()  # who asked for something before the end gets it
        except BaseException as error:
            _say.exception("the device thread stopped")
            self._end_all(EndReason.FAILED, f"the scheduler stopped: {error!r}")
        else:
            self._end_all(EndReason.SHUTDOWN, "the server is shutting down")

    def _serve(self) -> None:
        """Does what seats asked for."""
        with self.request_lock:
            opening, self._opening = self._opening, {}
            asking = [(seat, seat.take_requests()) for seat in self._asking]
            self._asking = {}
        for seat, (seed, heat, blob) in opening.items():
            self._join(seat, seed, heat, blob)
        now = self.clock.now()
        for seat, asked in asking:
            if seat.state is SeatState.ENDED:
                asked.refuse()
                continue
            if asked.move is not None:
                self._move(seat, asked.move, now)
            for future in asked.snapshots:
                self._snapshot(seat, future)
            if asked.close:
                self._end(seat, EndReason.CLOSED, "its owner closed it", keep=False)
        for seat in [s for s in self._live if s.state is SeatState.DETACHED]:
            if now >= seat.detached_at + self.resume_window:
                self._end(seat, EndReason.EXPIRED, f"nobody came back within {self.resume_window:g} s")
        if self._drain_at is not None and now >= self._drain_at and self._seats:
            self._end_all(EndReason.SHUTDOWN, "the server is shutting down")

    def _join(self, seat: Seat, seed: int, heat: float, blob: bytes | None) -> None:
        """Opens the session of a seat that was admitted; it ticks from the next edge on."""
        try:
            if blob is not None:
                seat.session = self.engine.restore(blob, log=seat.log)
            else:
                seat.session = self.engine.session(seed=seed, temperature=heat, log=seat.log)
            self._live[seat] = None
            self._order += 1
            seat.order = self._order
            seat.restart(self.next_edge)
            seat.note("join", edge=seat.due, level=int(self.level))
            self._totals["opened"] += 1
        except Exception as error:
            self._end(seat, EndReason.FAILED, _detail(error), keep=False)

    def _move(self, seat: Seat, move: Sink | str, now: float) -> None:
        assert seat.session is not None
        try:
            if move == "detach":
                if seat.state is SeatState.TICKING:
                    seat.session.detach()
                    seat.state, seat.detached_at = SeatState.DETACHED, now
                    seat.note("detach")
                return
            assert callable(move)
            seat.sink = move
            if seat.state is SeatState.DETACHED:
                seat.session.attach()
                seat.restart(self.next_edge)
            seat.note("attach", edge=seat.due)
        except Exception as error:
            self._end(seat, EndReason.FAILED, _detail(error))

    def _snapshot(self, seat: Seat, future: Future[bytes]) -> None:
        assert seat.session is not None
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(seat.session.snapshot())
            except Exception as error:
                future.set_exception(error)

    def _pass(self) -> bool:
        """One tick of each session that is due now; False when none is."""
        now = self.clock.now()
        edge = self.clock.edge(now)
        self._close_edges(edge, now)
        due = [s for s in self._live if s.state is SeatState.TICKING and s.due <= edge]
        if not due:
            return False
        due.sort(key=lambda seat: (seat.due, seat.order))
        shedding, collapsed = self._shed(due, now), self._totals["collapses"]
        while due:
            most = self.table.largest(self.step_budget, len(due)) if self.table is not None else len(due)
            most = most if self.engine.batched else 1
            batch, due = due[:most], due[most:]
            self._run([s for s in batch if s.state is SeatState.TICKING and s.due <= edge], shedding)
            if due:
                self._serve()
        took = self.clock.now() - now
        self._busy += took
        if self._totals["collapses"] == collapsed:
            self._passes.append(took)
        return True

    def _close_edges(self, edge: int, now: float) -> None:
        """Tells the ladder of the periods that are over."""
        passed = edge - self._edge
        if passed <= 0:
            return
        self._edge = edge
        for _ in range(min(passed, MAX_LATE)):
            if self._ladder.edge(now, self._busy / passed, self._worst):
                self._note_level()
        self._busy = self._worst = 0.0

    def _note_level(self) -> None:
        for seat in list(self._live):
            try:
                seat.note("ladder", level=int(self.level), pressure=round(self._ladder.pressure, 3))
            except Exception as error:
                self._end(seat, EndReason.FAILED, _detail(error))

    def _missed(self, seat: Seat, now: float) -> int:
        """Ticks of a session that are to be collapsed if it runs now."""
        late = now - self.clock.due(seat.due)
        return self.clock.edge(now) - seat.due if late > self.clock.period + 1e-9 else 0

    def _shed(self, due: Sequence[Seat], now: float) -> set[Seat]:
        """Of the sessions that collapse too often, those that end in this pass."""
        often = [s for s in due if self._missed(s, now) and self._often(s, now)]
        usual = median(self._passes) if self._passes else 0.0
        most = max(1, ceil(len(due) * (1.0 - self.clock.period / usual))) if usual else 1
        return set(sorted(often, key=lambda seat: -seat.order)[:most])

    def _often(self, seat: Seat, now: float) -> bool:
        """Would one more collapse be the third within ten seconds?"""
        recent = [at for at in seat.collapses if now - at <= COLLAPSE_SECONDS]
        return len(recent) >= COLLAPSES - 1

    def _run(self, batch: Sequence[Seat], shedding: set[Seat]) -> None:
        """One batch: gathers what goes in, ticks, hands out."""
        started = self.clock.now()
        running: list[tuple[Seat, Gathered]] = []
        for seat in batch:
            missed, late = self._missed(seat, started), (started - self.clock.due(seat.due)) / self.clock.period
            if late > MAX_LATE + 1e-6:
                self._end(seat, EndReason.BEHIND, f"{late:.1f} ticks late")
            elif missed and seat in shedding:
                self._end(seat, EndReason.BEHIND, f"{COLLAPSES} collapses in {COLLAPSE_SECONDS:g} s")
            elif seat.idle():
                seat.due += missed + 1
            else:
                try:
                    self._feed(seat, missed, started, running)
                except Exception as error:
                    self._end(seat, EndReason.FAILED, _detail(error))
        if not running:
            return
        results = self.engine.tick_batch(
            [seat.session for seat, _ in running],
            [gathered.given for _, gathered in running],
            [gathered.missed for _, gathered in running],
        )
        done = self.clock.now()
        self._totals["batches"] += 1
        if self.table is not None and not any(gathered.missed for _, gathered in running):
            self.table.observe(len(running), done - started)
        for (seat, gathered), result in zip(running, results, strict=True):
            self._hand_out(seat, gathered, result, started, done)
        gone = [result for result in results if isinstance(result, DeviceError)]
        if gone:
            self._end_all(EndReason.FAILED, _detail(gone[0]))

    def _feed(self, seat: Seat, missed: int, now: float, running: list[tuple[Seat, Gathered]]) -> None:
        """Puts a session into the batch, with what it takes in; notes that it is late."""
        late = now - self.clock.due(seat.due)
        if late > LATE_PART * self.clock.period:
            seat.count(late=1)
            seat.note("late", ms=round(1000 * late, 3))
        assert seat.session is not None
        if self.engine.kind == "tokens" and seat.typed_waiting > self._chunk:
            # A long prompt goes in by pieces, one an edge, so that nobody else waits for the whole of it.
            seat.session.append(seat.take_typed(self._chunk), logits="none")
            seat.due += missed + 1
            return
        if missed:
            seat.collapses.append(now)
            seat.note("collapse", missed=missed)
        running.append((seat, seat.gather(missed, now)))

    def _hand_out(
        self, seat: Seat, gathered: Gathered, result: TickOutput | Exception, started: float, done: float
    ) -> None:
        if not isinstance(result, TickOutput):
            full = isinstance(result, ContextFullError)
            self._end(seat, EndReason.CONTEXT if full else EndReason.FAILED, _detail(result))
            return
        collapsed = len(gathered.missed)
        seat.due += collapsed + 1
        due = self.clock.due(seat.due - 1)
        self._worst = max(self._worst, started - self.clock.due(seat.due - 1 - collapsed))
        self._last = (seat.due - 1, started - due, done - started, result.stats["batch"])
        seat.done(gathered, result)
        seat.count(over_budget=int(done - due > self.step_budget))
        out = Published(
            seat.id, due, started, done, result, collapsed, gathered.delivery, gathered.taken.missing,
            gathered.taken.heard, seat.user_speaking, seat.model_speaking,
        )  # fmt: skip
        try:
            if self._events is not None:
                self._events.append(out)
            seat.sink(out)
            if seat.inbox is not None:
                seat.inbox.published(out)
        except Exception as error:
            self._end(seat, EndReason.FAILED, _detail(error))

    def _end(self, seat: Seat, reason: EndReason, detail: str, keep: bool = True) -> None:
        """A session leaves: its slot is free, its sink is told. Nothing here raises."""
        blob = None
        if seat.session is not None:
            if keep and seat.session.state in ("new", "open", "detached"):
                try:
                    blob = seat.session.snapshot()
                except TmlcError as error:
                    detail = f"{detail}; no snapshot: {_detail(error)}"
            try:
                seat.note("end", reason=str(reason), detail=detail)
            except Exception as error:
                _say.warning("the log of %s… could not be written: %r", seat.id[:10], error)
            seat.session.close()
        with self._woken:
            self._seats.pop(seat.id, None)
            seat.state = SeatState.ENDED
            self._ended[str(reason)] += 1
            asked = seat.take_requests()
            self._woken.notify_all()
        self._live.pop(seat, None)
        asked.refuse()
        event = Ended(seat.id, reason, detail, blob)
        if self._events is not None:
            self._events.append(event)
        try:
            seat.sink(event)
        except Exception as error:
            _say.warning("the sink of %s… did not take its end: %r", seat.id[:10], error)

    def _end_all(self, reason: EndReason, detail: str) -> None:
        with self.request_lock:
            self._closed = self._closed or self._stopping or reason is EndReason.FAILED
            opening, self._opening, self._asking = self._opening, {}, {}
        for seat in [*opening, *self._live]:
            self._end(seat, reason, detail)


def _detail(error: Exception) -> str:
    """One line that says what happened, and what to do where that is known."""
    text = f"{error.what}. {error.fix}" if isinstance(error, TmlcError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:400]

"""The sessions of a server: each one's seat, background and event log; who is connected to it; how one is resumed.

Everything here runs on the event loop, except `LiveSession.sink`, which the device thread calls and which hands over.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tmlc.errors import CapacityError, InputError, SessionError, TmlcError
from tmlc.runtimes.background.delegations import DelegationEvent
from tmlc.runtimes.background.injections import Fate, InjectionEvent, Policy
from tmlc.runtimes.background.session import Background, BackgroundSession
from tmlc.runtimes.core.live import Ended, EndReason, Published
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.seat import Seat
from tmlc.runtimes.core.streams import Pace
from tmlc.runtimes.core.surface import LogSink
from tmlc.runtimes.gateway.events import ClientTask, Closed, Delegated, EventLog, Happening, Injected, Tick
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.snapshots import EndedSessions, Kept, SnapshotStore

SNAPSHOT_TICKS = 25
"""With a folder of snapshots, a session is kept on disk every so many ticks."""
TOKEN_SECONDS = 600.0
"""How long a kept session may be resumed after its last snapshot."""
FADE_SECONDS = 0.005
"""Silence is handed out as zeros; the voice before it fades for so long."""
MAX_CLIENT_TASKS = 64
log = logging.getLogger(__name__)


class Attached(Protocol):
    """A connection, as a session sees it."""

    def push(self, number: int, happening: Happening) -> None:
        """An event of the session; must return at once."""

    def replaced(self) -> None:
        """Another connection has taken the session over."""


@dataclass
class Opening:
    """How a session is to be.

    Attributes:
        dialect: of the client; config: what the dialect keeps of it, plain data, written to disk with snapshots.
        seed, temperature, pace: see `Scheduler.open`.
        playback: the client reports what it has played.
        client_tasks: what the model delegates is the client's to do.
        instructions: for the background model.
    """

    dialect: str
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    temperature: float = 0.0
    pace: Pace = Pace.REALTIME
    playback: bool = False
    client_tasks: bool = False
    instructions: str | None = None


class LiveSession:
    """Made by `Sessions.open` and `Sessions.resume`.

    Attributes:
        id: of the session, for its client. token: with which it is resumed; it changes at every use.
        opening, events, seat, beside: how it was opened, its events, its place on the scheduler, its background.
        tick: index of the next tick.
        expires: seconds since the epoch, after which nobody may go on with it.
    """

    def __init__(self, home: Sessions, opening: Opening, last_event: int = 0) -> None:
        self._home, self.opening = home, opening
        self.events = EventLog(last_event)
        self.token = new_token()
        self.beside: BackgroundSession = home.background.open(
            home.scheduler.engine.tokenizer,
            home.scheduler.engine.layout,
            playback=opening.playback,
            instructions=opening.instructions,
            on_injection=self._injected,
            on_delegation=self._delegated,
        )
        self.client_tasks = opening.client_tasks
        self.seat: Seat = None  # type: ignore[assignment]  # set before anything can arrive
        self.connection: Attached | None = None
        self.sent = last_event  # number of the last event that was written to a client
        self.tick = 0
        self.began = time.time()
        self.tasks: dict[str, None] = {}  # of the client, by id; the oldest is forgotten
        self.ended: Closed | None = None
        self.talk: Any = None  # what the dialect keeps between two connections
        self.disk = asyncio.Lock()  # one writes it to disk at a time, so that the last one stays
        self._voiced = False
        self._over: int | None = None  # tick at which the user's voice came over the model's
        self._keeping = False

    @property
    def id(self) -> str:
        return self.seat.id

    @property
    def client_tasks(self) -> bool:
        """Is what the model delegates the client's to do? Else the server's background model does it."""
        return self.beside.on_task is not None

    @client_tasks.setter
    def client_tasks(self, value: bool) -> None:
        self.beside.on_task = self._client_task if value else None

    @property
    def offset_ms(self) -> int:
        """Where the session is, in milliseconds from its start."""
        return self.tick * self._home.tick_ms

    # From the scheduler.

    def sink(self, item: Published | Ended) -> None:
        """On the device thread."""
        self._home.loop.call_soon_threadsafe(self._arrived, item)

    def _arrived(self, item: Published | Ended) -> None:
        try:
            if isinstance(item, Ended):
                self._end(item)
            else:
                self._ticked(item)
        except Exception:
            log.exception("an event of a session could not be handled")
            self.seat.close()

    def _ticked(self, out: Published) -> None:
        self.tick = out.output.index + 1
        noted = self.beside.tick(out)
        rate = max(1, self._home.scheduler.engine.layout.sample_rate)
        self._add(
            Tick(
                index=out.output.index,
                audio=self._faded(out.output.audio, bool(out.output.stats["silent"])),
                text=noted.text,
                late_ms=1000 * out.late,
                step_ms=1000 * out.step,
                user_speaking=out.user_speaking,
                model_speaking=out.model_speaking,
                collapsed=out.collapsed,
                missing_ms=1000 * out.missing / rate,
                batch=int(out.output.stats["batch"]),
                heard_ms=1000 * out.heard / rate,
            )
        )
        self._watch_interruption(out)
        self._home.observer.tick(out)
        if self._home.store is not None and self.tick % SNAPSHOT_TICKS == 0:
            self._home.keep(self)

    def _faded(self, audio: np.ndarray, silent: bool) -> np.ndarray:
        """What is handed out: clients tell silence by its zeros, and the voice must not break off with a click."""
        voiced, self._voiced = self._voiced, bool(audio.size) and not silent
        if not silent or not audio.size:
            return audio
        out = np.zeros_like(audio)
        if voiced:
            count = min(audio.size, round(FADE_SECONDS * self._home.scheduler.engine.layout.out_sample_rate))
            out[:count] = audio[:count] * np.linspace(1.0, 0.0, count, dtype=np.float32)
        return out

    def _watch_interruption(self, out: Published) -> None:
        if out.user_speaking and out.model_speaking and self._over is None:
            self._over = out.output.index
        elif not out.model_speaking and self._over is not None:
            self._home.observer.interrupted(self.id, (out.output.index - self._over) * self._home.tick_ms / 1000)
            self._over = None
        elif not out.user_speaking:
            self._over = None

    def _end(self, ended: Ended) -> None:
        self.beside.close()
        self.ended = Closed(str(ended.reason), ended.detail)
        self._home.forget(self, ended)
        self._add(self.ended)
        self._home.observer.session_ended(self.id, str(ended.reason))

    # From the background.

    def _injected(self, event: InjectionEvent) -> None:
        if event.fate is Fate.DELIVERED:
            self._home.observer.injected(self.id, str(event.policy))
        if self.ended is None:
            self._add(Injected(event))

    def _delegated(self, event: DelegationEvent) -> None:
        self._home.observer.delegation(self.id, str(event.stage), event.seconds)
        if self.ended is None:
            self._add(Delegated(event))

    def _client_task(self, task: str) -> None:
        if self.ended is not None:  # of a rule that fired at the last edge
            return
        name = "dlg_" + secrets.token_urlsafe(12)
        self.tasks[name] = None
        while len(self.tasks) > MAX_CLIENT_TASKS:
            del self.tasks[next(iter(self.tasks))]
        self._home.observer.delegation(self.id, "created", 0.0)
        self._add(ClientTask(name, self.tick, task))

    def _add(self, happening: Happening) -> None:
        number = self.events.add(happening)
        if self.connection is not None:
            self.connection.push(number, happening)

    # From the client.

    def hear(self, samples: np.ndarray) -> None:
        self.seat.hear(samples)

    def see(self, frame: np.ndarray) -> None:
        self.seat.see(frame)
        self.beside.saw(frame)

    def read(self, text: str) -> None:
        """Typed text. Raises InputError: too much waits."""
        self.seat.read(text)
        self.beside.heard(text)

    def think(self, text: str, coalesce: str | None = None) -> str:
        """Puts a text into the conversation that nobody hears, joined to one with the same key that still waits; its
        id. Raises CapacityError, UsageError."""
        return self.beside.inject(text, policy=Policy.SILENT, coalesce=coalesce)

    def say(self, text: str, policy: Policy | None = None) -> str:
        """Lets the model say a text when `policy` (None: the server's for results) allows; its id. Raises
        CapacityError, UsageError."""
        return self.beside.inject(text, spoken=True, policy=policy or self._home.background.limits.policy)

    def attach(self, connection: Attached) -> None:
        """A connection takes the session over; the one that had it is told."""
        before, self.connection = self.connection, connection
        if before is not None and before is not connection:
            before.replaced()

    def detach(self, connection: Attached) -> None:
        """The connection was lost. Does nothing when another one has the session."""
        if self.connection is not connection:
            return
        self.connection = None
        if self.ended is None:
            try:
                self.seat.detach()
            except SessionError:  # it ends just now, and tells so itself
                return

    def close(self) -> None:
        """Ends the session; `Closed` follows."""
        self.seat.close()


def new_token() -> str:
    return "tmlcr_" + secrets.token_urlsafe(32)


def _hash(token: str) -> bytes:
    """Tokens are looked up by their hash: how long a look-up takes tells nothing about a token."""
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


class Sessions:
    """All sessions of a server.

    Args:
        scheduler: started by the caller.
        background: shared by the sessions.
        observer: told of what happens.
        store: where sessions are kept on disk; None keeps them in memory only.
        logs: makes the tick log's sink of a session from its id; None writes none.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        background: Background,
        observer: Observer,
        store: SnapshotStore | None = None,
        logs: Callable[[], LogSink] | None = None,
    ) -> None:
        self.scheduler, self.background, self.observer, self.store = scheduler, background, observer, store
        self._logs = logs
        self.loop = asyncio.get_running_loop()
        self.tick_ms = int(scheduler.engine.layout.duration_ms)
        self._by_token: dict[bytes, LiveSession] = {}
        self._writing: set[asyncio.Future[Any]] = set()
        self._ended = EndedSessions()

    def __len__(self) -> int:
        return len(self._by_token)

    def open(self, opening: Opening, blob: bytes | None = None, last_event: int = 0) -> LiveSession:
        """A new session, or one that goes on from a snapshot.

        Raises CapacityError, InputError, UsageError: see `Scheduler.open` and `Background.open`.
        """
        session = LiveSession(self, opening, last_event)
        try:
            session.seat = self.scheduler.open(
                session.sink,
                seed=opening.seed,
                temperature=opening.temperature,
                inbox=session.beside,
                pace=opening.pace,
                log=self._logs() if self._logs is not None else None,
                snapshot=blob,
            )
        except Exception as error:
            session.beside.close()
            if isinstance(error, CapacityError):
                self.observer.refused("capacity")
            raise
        self._by_token[_hash(session.token)] = session
        self.observer.session_opened(session.id, opening.dialect)
        return session

    async def resume(self, token: str, dialect: str) -> LiveSession:
        """The session of a token, which gets a new one. Ticks go on at the next edge.

        Raises SessionError: no session has this token (any more), or it speaks another dialect. CapacityError: it was
        kept on disk, and the server is full.
        """
        session = self._by_token.get(_hash(token))
        if session is not None:
            _check_dialect(session.opening.dialect, dialect)
            # No await from here until the new connection has it: the old one may be lost meanwhile, and must not
            # detach it.
            session.seat.attach(session.sink)
            self._rotate(session)
        else:
            session = await self._restored(token, dialect)
        self.observer.session_resumed(session.id)
        return session

    def _rotate(self, session: LiveSession) -> None:
        old, session.token = session.token, new_token()
        del self._by_token[_hash(old)]
        self._by_token[_hash(session.token)] = session
        if self.store is not None:
            self._spawn(self._drop(old))
            self.keep(session)

    async def _drop(self, token: str) -> None:
        assert self.store is not None
        try:
            await asyncio.to_thread(self.store.drop, token)
        except OSError as error:
            log.warning("a kept session could not be removed: %s", error)

    async def _restored(self, token: str, dialect: str) -> LiveSession:
        if (wait := self.scheduler.admit()) is not None:  # before the token is used up
            error = CapacityError("the server is full", fix=f"try again in {wait:.0f} s")
            error.retry_after = wait
            raise error
        kept = self._ended.take(token)
        if kept is None and self.store is not None:
            kept = await asyncio.to_thread(self.store.take, token)
        if kept is None:
            raise SessionError("no session can be resumed with this token", fix="start a new session")
        try:
            _check_dialect(kept.dialect, dialect)
            opening = Opening(dialect, kept.config, **_options(kept.config))
            session = self.open(opening, kept.blob, kept.last_event)
        except TmlcError:  # the token was used up for nothing
            if self.store is None:
                self._ended.write(token, kept)
            else:
                await asyncio.to_thread(self.store.write, token, kept)
            raise
        session.tasks = dict.fromkeys(_tasks(kept.config))
        return session

    def keep(self, session: LiveSession) -> None:
        """Writes the session to disk, after the tick that runs now. Skipped while the last one is still written."""
        if self.store is None or session._keeping:
            return
        try:
            future = session.seat.snapshot()
        except TmlcError:  # it has ended meanwhile
            return
        session._keeping = True
        self._spawn(self._write(session, future))

    async def _write(self, session: LiveSession, future: Future[bytes]) -> None:
        try:
            blob = await asyncio.wrap_future(future)
            async with session.disk:
                if session.ended is None:  # else there is a newer one
                    await self._store(session, blob)
        except Exception as error:
            log.warning("a session could not be kept: %s", error)
        finally:
            session._keeping = False

    async def _store(self, session: LiveSession, blob: bytes) -> None:
        """The caller holds `session.disk`. A session that gets another token meanwhile is written under that one."""
        assert self.store is not None
        while True:
            token = session.token
            await asyncio.to_thread(self.store.write, token, self._kept(session, blob))
            closed = session.ended is not None and session.ended.reason == EndReason.CLOSED
            if token == session.token and not closed:
                return
            await self._drop(token)
            if closed:
                return

    @staticmethod
    def _kept(session: LiveSession, blob: bytes) -> Kept:
        opening, expires = session.opening, time.time() + TOKEN_SECONDS
        config = {**opening.config, "tasks": list(session.tasks)}
        return Kept(opening.dialect, config, session.events.last, expires, blob)

    def forget(self, session: LiveSession, ended: Ended) -> None:
        """A session has ended. What can be gone on with is kept: on disk, or in memory where there is no folder."""
        self._by_token.pop(_hash(session.token), None)
        resumable = ended.snapshot is not None and ended.reason is not EndReason.CLOSED
        if self.store is None:
            if resumable:
                assert ended.snapshot is not None
                self._ended.write(session.token, self._kept(session, ended.snapshot))
            return
        if ended.snapshot is not None and resumable:
            self._spawn(self._last(session, ended.snapshot))
        else:
            self._spawn(self._drop(session.token))

    async def _last(self, session: LiveSession, blob: bytes) -> None:
        try:
            async with session.disk:
                await self._store(session, blob)
        except Exception as error:
            log.warning("a session could not be kept: %s", error)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def flush(self) -> None:
        """Waits until everything is on disk."""
        while self._writing:
            await asyncio.wait(list(self._writing), timeout=10.0)


def _check_dialect(own: str, asked: str) -> None:
    """Raises SessionError when a client asks for a session that speaks another dialect than its own."""
    if own != asked:
        raise SessionError(
            f"this session was opened in the dialect {own}", fix="resume it in that dialect, or start a new session"
        )


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a session that its dialect keeps under `options`, checked again: the file may be a stranger's."""
    found = config.get("options")
    if not isinstance(found, dict):
        raise SessionError("a kept session is damaged", fix="start a new session")
    try:
        return {
            "pace": Pace(found["pace"]),
            "playback": bool(found["playback"]),
            "client_tasks": bool(found["client_tasks"]),
            "instructions": found["instructions"] if isinstance(found["instructions"], str) else None,
        }
    except (KeyError, ValueError):
        raise InputError("a kept session is damaged", fix="start a new session") from None


def _tasks(config: dict[str, Any]) -> list[str]:
    """The tasks that the client of a kept session still has."""
    found = config.get("tasks")
    names = [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
    return names[-MAX_CLIENT_TASKS:]

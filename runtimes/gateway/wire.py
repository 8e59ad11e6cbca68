"""One WebSocket connection, whatever its dialect: messages in and out, both bounded, and errors in OpenAI's form.

| stream out | bound | overflow |
| --- | --- | --- |
| audio | 25 messages (5 s) | the oldest is dropped; the client gets a note once it reads again |
| everything else | 1,000 messages, 8 MiB | the connection is closed with 1013; the session can be resumed |
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Coroutine
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from tmlc.errors import TmlcError
from tmlc.runtimes.gateway.caps import Meter
from tmlc.runtimes.gateway.events import Happening
from tmlc.runtimes.gateway.fields import WireError, about, as_wire
from tmlc.runtimes.gateway.frames import picture_of
from tmlc.runtimes.gateway.hub import Hub
from tmlc.runtimes.gateway.sessions import LiveSession

MAX_MESSAGE = 4 << 20
MAX_AUDIO_OUT, MAX_OUT, MAX_OUT_BYTES = 25, 1000, 8 << 20
SLOW_READER, TAKEN_OVER, TOO_LATE = 1013, 4000, 4001
"""Codes with which we close: the client does not read (openai's clients come back after this one by themselves);
another connection has the session; it did not start in time."""
AFTER = "tmlc_after"
START_SECONDS = 30.0
"""A connection that has not started a session by then is closed."""
SEND_SECONDS = 20.0
"""A message that the client does not take for so long ends the connection (half-open TCP)."""
MAX_ASIDE = 4
"""Pictures of one connection that are decoded or wait for it; the next one is refused."""
METER = web.RequestKey("meter", Meter)
"""What the connection of a request may send; absent where nothing is bounded."""
log = logging.getLogger(__name__)


def event_id() -> str:
    return "event_" + secrets.token_urlsafe(12)


class Connection(ABC):
    """Reads and writes one socket. A dialect implements `handle` and `project`.

    Attributes:
        session: what it is connected to, once it is.
    """

    dialect: str

    def __init__(self, request: web.Request, socket: web.WebSocketResponse, hub: Hub) -> None:
        self.request, self.socket, self.hub, self.observer = request, socket, hub, hub.observer
        self.session: LiveSession | None = None
        self.meter: Meter | None = request.get(METER)
        # Type and text of a message, the tick of its audio or -1, the number of the event that it tells of or 0.
        self._out: deque[tuple[str, str, int, int]] = deque()
        self._number = 0
        self._audio_out = self._dropped = self._bytes_out = 0
        self._ready = asyncio.Event()
        self._close_code: int | None = None
        self._closing_after_flush = False
        self._opened = time.monotonic()
        self._asides: set[asyncio.Task[None]] = set()

    # Out.

    def send(self, message: dict[str, Any], tick: int = -1) -> None:
        """Queues a message; `tick` of its audio. Never blocks."""
        if self._close_code is not None or self._closing_after_flush:
            return
        text = json.dumps(message)
        if tick >= 0:
            self._audio_out += 1
            if self._audio_out > MAX_AUDIO_OUT:
                self._drop_oldest_audio()
        else:
            self._bytes_out += len(text)
            if len(self._out) - self._audio_out >= MAX_OUT or self._bytes_out > MAX_OUT_BYTES:
                self.close(SLOW_READER)
                return
        self._out.append((str(message["type"]), text, tick, self._number))
        self._ready.set()

    def _drop_oldest_audio(self) -> None:
        for index, waiting in enumerate(self._out):
            if waiting[2] >= 0:
                del self._out[index]
                break
        self._audio_out -= 1
        self._dropped += 1
        self.observer.dropped("output", 1)

    def close(self, code: int) -> None:
        """Closes at once; what waits is not sent."""
        if self._close_code is None:
            self._close_code = code
            self._out.clear()
            self._ready.set()

    def close_when_sent(self) -> None:
        """Closes once everything that waits is sent."""
        self._closing_after_flush = True
        self._ready.set()

    async def _write(self) -> None:
        """Whatever ends it, the socket is closed then: nobody reads on for a client that gets no answers."""
        try:
            await self._write_all()
        except Exception:
            log.exception("a connection could not be written to")
            await self._shut(WSCloseCode.INTERNAL_ERROR)

    async def _write_all(self) -> None:
        while True:
            await self._ready.wait()
            if self._close_code is not None:
                await self._shut(self._close_code)
                return
            if not self._out:
                if self._closing_after_flush:
                    await self._shut(WSCloseCode.OK)
                    return
                self._ready.clear()
                continue
            kind, text, tick, number = self._out.popleft()
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await self.socket.send_str(text)
            except (TimeoutError, ConnectionError, RuntimeError):
                await self._shut(WSCloseCode.GOING_AWAY)
                return
            self.observer.message(self.dialect, "out", kind)
            if number and self.session is not None and not (self._out and self._out[0][3] == number):
                self.session.sent = max(self.session.sent, number)
            if tick < 0:
                self._bytes_out -= len(text)
            else:
                self._audio_out -= 1
                if self.session is not None:
                    self.observer.handed_out(self.session.id, tick, time.monotonic())
            if self._dropped and self._audio_out < MAX_AUDIO_OUT // 2:
                dropped, self._dropped = self._dropped, 0
                self.note("output_dropped", f"{dropped} pieces of audio were dropped: the connection is too slow")

    async def _shut(self, code: int) -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2.0):
                await self.socket.close(code=code)
        if self.request.transport is not None:  # whoever does not read does not take the close either
            self.request.transport.abort()

    # In.

    async def run(self) -> None:
        """Serves the socket until it is closed; then the session, if any, is detached."""
        writer = asyncio.create_task(self._write())
        try:
            await self.begin()
            while not self.socket.closed and self._close_code is None:
                timeout = None if self.session is not None else self._left()
                try:
                    if timeout is not None and timeout <= 0:
                        raise TimeoutError
                    message = await self.socket.receive(timeout)
                except TimeoutError:
                    self.close(TOO_LATE)
                    break
                if message.type is not WSMsgType.TEXT:
                    if message.type is WSMsgType.BINARY:
                        self.fail(WireError("messages are JSON text, not binary", "invalid_event"), None)
                        continue
                    break
                await self._receive(message.data)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            for task in self._asides:
                task.cancel()
            if self.session is not None:
                self.session.detach(self)
            if not self._closing_after_flush and self._close_code is None:
                self.close(WSCloseCode.OK)
            with contextlib.suppress(asyncio.CancelledError):
                await writer

    def _left(self) -> float:
        return START_SECONDS - (time.monotonic() - self._opened)

    async def _receive(self, text: str) -> None:
        own: str | None = None
        try:
            size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
            if self.meter is not None and (why := self.meter.message(size)):
                self.observer.refused("rate")
                raise WireError(f"more {why} than this server takes", "rate_limit_exceeded", kind="rate_limit_error")
            try:
                event = json.loads(text)
            except (ValueError, RecursionError):
                raise WireError("the message is not JSON", "invalid_json") from None
            if not isinstance(event, dict) or not isinstance(event.get("type"), str):
                raise WireError("an event is an object with a type", "invalid_event", "type")
            if isinstance(event.get("event_id"), str):
                own = event["event_id"][:512]
            self.observer.message(self.dialect, "in", event["type"] if event["type"] in self.accepted() else "other")
            await self.handle(event["type"], event, own)
        except Exception as error:
            self._refuse(error, own)

    def _refuse(self, error: Exception, own: str | None) -> None:
        """Tells the client what was wrong. Any other exception is our fault: it ends nothing, and is logged."""
        if isinstance(error, WireError):
            self.fail(error, own)
        elif isinstance(error, TmlcError):
            self.fail(as_wire(error), own)
        else:
            log.error("a message could not be handled", exc_info=error)
            self.fail(WireError("internal error", "server_error", kind="server_error"), own)

    def aside(self, work: Coroutine[Any, Any, None], own: str | None) -> None:
        """Does what takes a while beside the messages that follow, which do not wait for it.

        Raises WireError: too much of it is under way.
        """
        if len(self._asides) >= MAX_ASIDE:
            work.close()
            self.observer.dropped("input_video", 1)
            what = f"{MAX_ASIDE} pictures of this connection wait to be decoded"
            raise WireError(what, "rate_limit_exceeded", kind="rate_limit_error")
        task = asyncio.create_task(self._aside(work, own))
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)

    async def _aside(self, work: Coroutine[Any, Any, None], own: str | None) -> None:
        try:
            await work
        except Exception as error:
            self._refuse(error, own)

    def _see(self, url: Any, param: str, own: str | None) -> None:
        """A picture for the session, decoded beside the messages that follow. Raises WireError."""
        if self.meter is not None and not self.meter.frame():
            self.observer.dropped("input_video", 1)
            message = "more pictures a second than this server takes"
            raise WireError(message, "rate_limit_exceeded", param, "rate_limit_error")
        with about(param):
            picture = picture_of(url, self.hub.image_limits)
        self.aside(self._look(picture, param), own)

    async def _look(self, picture: bytes, param: str) -> None:
        session = self.session
        frame = await self.hub.frame(picture, param)
        if session is not None and self.session is session and session.ended is None:
            session.see(frame)

    # What a dialect does.

    @abstractmethod
    async def begin(self) -> None:
        """The socket is open; the server may speak first."""

    @abstractmethod
    def accepted(self) -> frozenset[str]:
        """The types of events that the dialect knows."""

    @abstractmethod
    async def handle(self, kind: str, event: dict[str, Any], own: str | None) -> None:
        """One event of the client; `own` is the event_id that it gave. Raises WireError or TmlcError to refuse it."""

    def push(self, number: int, happening: Happening) -> None:
        """An event of the session: what the dialect makes of it is queued under its number."""
        self._number = number
        try:
            self.project(number, happening)
        finally:
            self._number = 0

    def after(self, session: LiveSession) -> int:
        """The event after which one that comes back goes on: the last that it says it has, or that was written."""
        given = self.request.query.get(AFTER, "")
        return int(given) if given.isascii() and given.isdecimal() and len(given) < 16 else session.sent

    @abstractmethod
    def project(self, number: int, happening: Happening) -> None:
        """Sends what the dialect makes of an event of the session."""

    @abstractmethod
    def fail(self, error: WireError, own: str | None) -> None:
        """Tells the client what was refused."""

    @abstractmethod
    def note(self, code: str, message: str) -> None:
        """Tells the client something that needs no answer."""

    def abandon(self, session: LiveSession) -> None:
        """A start failed half way: the session that was opened for it ends."""
        session.detach(self)
        session.close()
        self.session = None

    def replaced(self) -> None:
        """Another connection has the session now."""
        self.session = None
        self.close(TAKEN_OVER)

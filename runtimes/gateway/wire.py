"""One WebSocket connection, whatever its dialect: messages in and out, both bounded, and errors in OpenAI's form.

| stream out | bound | overflow |
| --- | --- | --- |
| audio | 25 messages (5 s) | the oldest is dropped; the client gets a note once it reads again |
| everything else | 1,000 messages, 8 MiB | the connection is closed with 1013; the session can be resumed |
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Coroutine, Iterator
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from tmlc.errors import CapacityError, InputError, SessionError, TmlcError, UsageError
from tmlc.runtimes.background.injections import Policy
from tmlc.runtimes.gateway.caps import Meter
from tmlc.runtimes.gateway.events import Happening
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.sessions import LiveSession

MAX_MESSAGE = 4 << 20
MAX_AUDIO = 1 << 20
"""Bytes of audio in one message: more than 20 s."""
MAX_AUDIO_OUT, MAX_OUT, MAX_OUT_BYTES = 25, 1000, 8 << 20
MAX_CONFIG = 1 << 17
"""Characters of a session's settings as JSON: they are kept with its snapshots."""
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


class WireError(Exception):
    """Something that a client sent is refused; the connection and the session go on.

    Args:
        code: OpenAI's, as far as it has one. param: the field that is wrong.
    """

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None, kind: str = "") -> None:
        super().__init__(message)
        self.message, self.code, self.param = message, code, param
        self.kind = kind or "invalid_request_error"


def as_wire(error: TmlcError) -> WireError:
    """An error of tmlc in the words of the wire."""
    message = f"{error.what}. {error.fix}" if error.fix else error.what
    if isinstance(error, CapacityError):
        return WireError(message, "rate_limit_exceeded", kind="rate_limit_error")
    if isinstance(error, InputError | UsageError):
        return WireError(message, "invalid_value")
    if isinstance(error, SessionError):
        return WireError(message, "session_not_found")
    return WireError(message, "server_error", kind="server_error")


@contextlib.contextmanager
def about(param: str) -> Iterator[None]:
    """What tmlc refuses in here is the fault of this field."""
    try:
        yield
    except TmlcError as error:
        wire = as_wire(error)
        wire.param = param
        raise wire from None


def event_id() -> str:
    return "event_" + secrets.token_urlsafe(12)


class Connection(ABC):
    """Reads and writes one socket. A dialect implements `handle` and `project`.

    Attributes:
        session: what it is connected to, once it is.
    """

    dialect: str

    def __init__(self, request: web.Request, socket: web.WebSocketResponse, observer: Observer) -> None:
        self.request, self.socket, self.observer = request, socket, observer
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
            if self.meter is not None and (why := self.meter.message(len(text))):
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

    def may_see(self, param: str) -> None:
        """Raises WireError when the client sends more pictures than it may."""
        if self.meter is not None and not self.meter.frame():
            self.observer.dropped("input_video", 1)
            message = "more pictures a second than this server takes"
            raise WireError(message, "rate_limit_exceeded", param, "rate_limit_error")

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


# What dialects read events with: each raises WireError that names the field.


def text_of(event: dict[str, Any], name: str, most: int, param: str | None = None) -> str:
    """A string of 1 to `most` characters."""
    value, where = event.get(name), param or name
    if not isinstance(value, str):
        raise WireError(
            f"{where} must be a string", "missing_required_parameter" if value is None else "invalid_type", where
        )
    if not value:
        raise WireError(f"{where} is empty", "invalid_value", where)
    if len(value) > most:
        raise WireError(f"{where} has {len(value)} characters, more than {most}", "string_above_max_length", where)
    return value


def object_of(event: dict[str, Any], name: str, param: str | None = None) -> dict[str, Any]:
    """An object; an empty one where there is none."""
    value = event.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise WireError(f"{param or name} must be an object", "invalid_type", param or name)
    return value


def check_config(config: dict[str, Any], param: str) -> None:
    """Refuses settings of a session that are too long to be kept."""
    try:
        size = len(json.dumps(config))
    except RecursionError:
        raise WireError(f"{param} is nested too deeply", "invalid_value", param) from None
    if size > MAX_CONFIG:
        raise WireError(f"{param} has more than {MAX_CONFIG} characters", "string_above_max_length", param)


def policy_of(event: dict[str, Any]) -> Policy | None:
    """When what the event brings may be said: `tmlc: {policy}`; None where the client leaves it to the server."""
    given = object_of(event, "tmlc").get("policy")
    if given is None:
        return None
    if given not in (Policy.WHEN_IDLE, Policy.NEXT_GAP, Policy.INTERRUPT):
        raise WireError("tmlc.policy must be when_idle, next_gap or interrupt", "invalid_value", "tmlc.policy")
    return Policy(given)


def known_only(event: dict[str, Any], names: frozenset[str], param: str) -> None:
    """Refuses fields that nobody here knows."""
    for name in event:
        if name not in names:
            raise WireError(
                f"unknown parameter: {param}.{str(name)[:64]}", "unknown_parameter", f"{param}.{str(name)[:64]}"
            )


def base64_of(value: Any, name: str, most: int) -> bytes:
    """Bytes from base64."""
    if not isinstance(value, str):
        raise WireError(f"{name} must be base64 in a string", "invalid_type", name)
    if len(value) > most * 4 // 3 + 4:
        raise WireError(f"{name} has more than {most} bytes", "string_above_max_length", name)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise WireError(f"{name} is not valid base64", "invalid_value", name) from None

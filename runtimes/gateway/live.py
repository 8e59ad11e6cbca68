"""OpenAI's Live dialect: `/v1/live/sessions`, a primary WebSocket. The client speaks first (docs/wire.md).

A session is one timeline: audio in and out all the time, no turns. What the model says comes as audio and transcript
of each tick. What it delegates goes to the client (`session.delegation.created`, answered by thinking and commentary)
or to the server's background model.
"""

from __future__ import annotations

import base64
from typing import Any

from aiohttp import web

from tmlc.errors import CapacityError
from tmlc.runtimes.background.delegations import Stage
from tmlc.runtimes.background.injections import MAX_CHARACTERS, Fate
from tmlc.runtimes.core.admission import Level
from tmlc.runtimes.core.live import EndReason
from tmlc.runtimes.core.streams import Pace
from tmlc.runtimes.gateway.audio import AudioFormat, Resampler, decode, encode
from tmlc.runtimes.gateway.events import ClientTask, Closed, Delegated, Happening, Injected, Tick
from tmlc.runtimes.gateway.fields import (
    MAX_AUDIO,
    WireError,
    about,
    base64_of,
    check_config,
    known_only,
    object_of,
    policy_of,
    text_of,
)
from tmlc.runtimes.gateway.held import Held
from tmlc.runtimes.gateway.hub import Hub
from tmlc.runtimes.gateway.sessions import LiveSession, Opening
from tmlc.runtimes.gateway.wire import Connection, event_id

USAGE_TICKS = 50
MAX_HISTORY, MAX_HISTORY_CHARACTERS = 128, 16_384
"""Messages before the start, and characters of them and of the instructions together."""
PIECE = 500
"""Characters of instructions or history in one injection: in any script fewer tokens than one may have."""

ACCEPTED = frozenset(
    {
        "session.start", "session.update", "session.close", "session.input_audio.append", "session.input_audio.mute",
        "session.input_audio.unmute", "session.instructions.append", "session.thinking.append",
        "session.commentary.append", "conversation.item.create", "tmlc.input_video_frame.append",
        "tmlc.input_text.append", "tmlc.playback", "tmlc.delegate",
    }
)  # fmt: skip
NOT_OFFERED = {
    "session.output_audio_fixture.play": "audio fixtures",
    "session.decision.create": "decisions",
    "session.decision_item.create": "decisions",
    "session.decision_item.delete": "decisions",
    "decision.create": "decisions",
    "decision.item.create": "decisions",
    "decision.item.delete": "decisions",
    "response.item.create": "client tools of a responses delegation",
    "response.create": "client tools of a responses delegation",
    "transport.dtmf.send": "telephony",
    "session.fork": "forks",
}
_START = frozenset(
    {
        "model",
        "audio",
        "client",
        "delegation",
        "input",
        "instructions",
        "safety_identifier",
        "store",
        "triggers",
        "tmlc",
    }
)
_OWN = frozenset({"events", "pace", "playback", "seed", "temperature"})
REASONS = {
    EndReason.CLOSED: "close_requested",
    EndReason.SHUTDOWN: "expired",
    EndReason.EXPIRED: "expired",
    EndReason.CONTEXT: "expired",
}
"""Live's words for why a session ended; everything else is a lost connection to the model."""


class LiveConnection(Connection):
    """One primary WebSocket."""

    dialect = "live"

    def __init__(self, request: web.Request, socket: web.WebSocketResponse, hub: Hub, token: str | None) -> None:
        super().__init__(request, socket, hub)
        self._token = token
        self._config: dict[str, Any] = {}
        self._format = AudioFormat()
        self._muted = self._events = False
        self._held = Held()
        self._closing: str | None = None

    def accepted(self) -> frozenset[str]:
        return ACCEPTED

    async def begin(self) -> None:
        """A client with a token goes on with its session; the server speaks first then."""
        if self._token is None:
            return
        try:
            session = await self.hub.sessions.resume(self._token, self.dialect)
        except Exception as error:
            self.fail(self.hub.explain(error), None)
            self.close_when_sent()
            return
        after = self.after(session)
        try:
            self._begin(session, session.opening.config)
            self._started(None, resumed=True, after=after)
        except Exception as error:  # what was kept of it is damaged
            self.abandon(session)
            self._refuse(error, None)
            self.close_when_sent()

    # In.

    async def handle(self, kind: str, event: dict[str, Any], own: str | None) -> None:
        if kind in NOT_OFFERED:
            raise WireError(f"this server does not offer {NOT_OFFERED[kind]}", "not_supported", "type")
        if kind not in ACCEPTED:
            raise WireError(f"unknown event type: {kind[:64]}", "unknown_event", "type")
        if kind == "session.start":
            self._start(event, own)
            return
        if self.session is None:
            raise WireError("send session.start first", "session_not_started", "type")
        match kind:
            case "session.input_audio.append":
                self._hear(event, own)
            case "session.input_audio.mute" | "session.input_audio.unmute":
                self._muted = kind.endswith(".mute")
                self._answer(kind + "d", own)
            case "session.instructions.append" | "session.thinking.append" | "session.commentary.append":
                self._append(kind, event, own)
            case "session.update":
                self._update(event, own)
            case "session.close":
                self._closing = own or ""
                self.session.close()
            case "tmlc.input_video_frame.append":
                self._see(event.get("image_url"), "image_url", own)
            case "conversation.item.create":
                self._item(event, own)
            case "tmlc.input_text.append":
                self.session.read(text_of(event, "text", MAX_CHARACTERS))
            case "tmlc.playback":
                self.hub.playback(self.session, event)
            case "tmlc.delegate":
                self.session.beside.delegate(text_of(event, "task", MAX_CHARACTERS))

    def _start(self, event: dict[str, Any], own: str | None) -> None:
        if self.session is not None:
            if self._token is None:
                raise WireError("the session has started already", "session_already_started", "type")
            self._tell_started(own, resumed=True)
            return
        config = object_of(event, "session")
        known_only(config, _START, "session")
        model = text_of(config, "model", 256, "session.model")
        self.hub.check_model(model, "session.model")
        options, resolved = self._options(config), self._resolved(config, model)
        check_config(resolved, "session")
        history = _history(config)
        opening = Opening(
            self.dialect, {"resolved": resolved, "options": options["kept"]}, options["seed"], options["temperature"],
            Pace(options["kept"]["pace"]), options["kept"]["playback"], options["kept"]["client_tasks"],
        )  # fmt: skip
        session = self.hub.open(opening)
        try:
            for text in history:
                session.think(text, "history")
            self._begin(session, opening.config)
            self._started(own, resumed=False, after=0)
        except Exception as error:
            self.abandon(session)
            if isinstance(error, CapacityError):
                what = f"instructions and input do not fit: {error.what}. {error.fix}"
                raise WireError(what, "string_above_max_length", "session.input") from None
            raise

    def _options(self, config: dict[str, Any]) -> dict[str, Any]:
        own = object_of(config, "tmlc", "session.tmlc")
        known_only(own, _OWN, "session.tmlc")
        for name in ("events", "playback"):
            if not isinstance(own.get(name, False), bool):
                raise WireError(f"session.tmlc.{name} must be true or false", "invalid_type", f"session.tmlc.{name}")
        if own.get("pace", "realtime") not in ("realtime", "buffered"):
            raise WireError("session.tmlc.pace must be realtime or buffered", "invalid_value", "session.tmlc.pace")
        target = self._delegation(config.get("delegation"))
        kept = {
            "events": own.get("events", False), "pace": own.get("pace", "realtime"),
            "playback": own.get("playback", False), "client_tasks": target == "client",
            "instructions": None, "format": [*self._read_format(config)],
        }  # fmt: skip
        return {"kept": kept, "seed": own.get("seed", 0), "temperature": own.get("temperature", 0.0)}

    def _delegation(self, given: Any) -> str:
        """Who does what the model delegates: "client" or "responses"."""
        if given is None:
            return "client"
        if not isinstance(given, dict) or given.get("type") not in ("client", "responses", "decisions"):
            raise WireError("delegation.type must be client or responses", "invalid_value", "session.delegation.type")
        if given["type"] == "decisions":
            raise WireError("this server does not offer decisions", "not_supported", "session.delegation.type")
        if given["type"] == "responses" and self.hub.sessions.background.model is None:
            raise WireError(
                "this server has no background model: delegate to the client, or serve with --background",
                "not_supported", "session.delegation.type",
            )  # fmt: skip
        return str(given["type"])

    @staticmethod
    def _read_format(config: dict[str, Any]) -> tuple[str, int]:
        audio = object_of(config, "audio", "session.audio")
        known_only(audio, frozenset({"format", "output"}), "session.audio")
        given = object_of(audio, "format", "session.audio.format")
        kind = given.get("type", "audio/pcm")
        rate = given.get("rate", 24000 if kind == "audio/pcm" else 8000)
        if not isinstance(kind, str) or type(rate) is not int:
            raise WireError("audio.format has a type and a rate", "invalid_type", "session.audio.format")
        with about("session.audio.format"):
            AudioFormat(kind, rate)
        return kind, rate

    def _resolved(self, config: dict[str, Any], model: str) -> dict[str, Any]:
        """The session as the server understands it; refuses what it does not offer."""
        if config.get("store"):
            raise WireError("this server does not store sessions", "not_supported", "session.store")
        if config.get("triggers"):
            raise WireError("this server does not offer decisions", "not_supported", "session.triggers")
        if config.get("client"):
            raise WireError("this server has no WebRTC sessions", "not_supported", "session.client")
        kind, rate = self._read_format(config)
        output = object_of(object_of(config, "audio", "session.audio"), "output", "session.audio.output")
        delegation = config.get("delegation") or {"type": "client"}
        resolved: dict[str, Any] = {
            "model": model,
            "audio": {"format": {"type": kind, "rate": rate}, "output": output or None},
            "delegation": delegation,
            "store": False,
        }
        if isinstance(config.get("instructions"), str):
            resolved["instructions"] = config["instructions"]
        return resolved

    def _begin(self, session: LiveSession, config: dict[str, Any]) -> None:
        layout, options = self.hub.layout, config["options"]
        self._config, self._events = config["resolved"], bool(options["events"])
        self._format = AudioFormat(str(options["format"][0]), int(options["format"][1]))
        self._in = Resampler(self._format.rate, layout.sample_rate or self._format.rate)
        self._out_stream = Resampler(layout.out_sample_rate or self._format.rate, self._format.rate)
        self.session, self._held = session, session.talk or self._held
        session.talk = self._held  # who comes back is told what the one before was not

    def _started(self, own: str | None, resumed: bool, after: int) -> None:
        session = self.session
        assert session is not None
        self._tell_started(own, resumed)
        session.attach(self)
        again = list(session.events.after(after))
        self._held.resume(after, {number for number, _ in again})
        for number, happening in again:
            self.push(number, happening)

    def _tell_started(self, own: str | None, resumed: bool) -> None:
        assert self.session is not None
        facts = {"resume_token": self.session.token, "resumed": resumed, "tick_ms": self.hub.sessions.tick_ms}
        self._answer("session.started", own, session=self._resource(), tmlc=facts)

    def _resource(self) -> dict[str, Any]:
        assert self.session is not None
        expires = int(self.session.began + self.hub.session_seconds)
        return {"id": self.session.id, "expires_at": expires, "status": "active", **self._config}

    def _hear(self, event: dict[str, Any], own: str | None) -> None:
        assert self.session is not None
        data = base64_of(event.get("audio"), "audio", MAX_AUDIO)
        ours = object_of(event, "tmlc")
        if data:
            with about("audio"):
                samples = self._in.push(decode(data, self._format))
            self.session.hear(samples * 0 if self._muted else samples)
        if ours.get("video") is not None:
            self._see(object_of(ours, "video", "tmlc.video").get("image_url"), "tmlc.video.image_url", own)

    def _item(self, event: dict[str, Any], own: str | None) -> None:
        """`conversation.item.create` of the other dialect, for pictures and text."""
        assert self.session is not None
        item = object_of(event, "item")
        content = item.get("content")
        if item.get("type") != "message" or not isinstance(content, list) or not 1 <= len(content) <= 16:
            raise WireError("item must be a message with 1 to 16 parts", "invalid_value", "item")
        for index, part in enumerate(content):  # all of it is checked before any of it is taken
            where = f"item.content[{index}]"
            if not isinstance(part, dict) or part.get("type") not in ("input_text", "input_image"):
                raise WireError(f"{where}.type must be input_text or input_image", "invalid_value", f"{where}.type")
            if part["type"] == "input_text":
                text_of(part, "text", MAX_CHARACTERS, f"{where}.text")
        for index, part in enumerate(content):
            if part["type"] == "input_text":
                self.session.read(part["text"])
            else:
                self._see(part.get("image_url"), f"item.content[{index}].image_url", own)

    def _append(self, kind: str, event: dict[str, Any], own: str | None) -> None:
        session = self.session
        assert session is not None
        content, task = text_of(event, "content", MAX_CHARACTERS), event.get("delegation_id")
        if task is not None and (not isinstance(task, str) or task not in session.tasks):
            raise WireError("no delegation of this session has that id", "delegation_not_found", "delegation_id")
        if kind == "session.commentary.append":
            session.say(content, policy_of(event))
        else:
            session.think(content)
        at = session.offset_ms
        self._answer(kind + "ed", own, start_ms=at, end_ms=at)

    def _update(self, event: dict[str, Any], own: str | None) -> None:
        assert self.session is not None
        config = object_of(event, "session")
        known_only(config, frozenset({"delegation", "triggers"}), "session")
        if config.get("triggers"):
            raise WireError("this server does not offer decisions", "not_supported", "session.triggers")
        given = config.get("delegation")
        if given is not None:
            if self._delegation(given) != self._config["delegation"]["type"]:
                raise WireError("who does delegated work cannot change", "invalid_value", "session.delegation.type")
            made = {**self._config, "delegation": given}
            check_config(made, "session")
            self._config = self.session.opening.config["resolved"] = made
        self._answer("session.updated", own, session=self._resource())

    # Out.

    def _answer(self, kind: str, own: str | None, **fields: Any) -> None:
        message: dict[str, Any] = {"type": kind, "event_id": event_id(), **fields}
        if own is not None:
            message["client_event_id"] = own
        self.send(message)

    def fail(self, error: WireError, own: str | None) -> None:
        body: dict[str, Any] = {"type": error.kind, "code": error.code, "message": error.message}
        if error.param is not None:
            body["param"] = error.param
        if own is not None:
            body["client_event_id"] = own
        self.send({"type": "error", "event_id": event_id(), "error": body})

    def note(self, code: str, message: str) -> None:
        self._answer("info", None, code=code, message=message)

    def project(self, number: int, happening: Happening) -> None:
        match happening:
            case Tick():
                self._tick(number, happening)
            case ClientTask(id, tick, task):
                self._delegated(id, "client", tick, {"task": task})
            case Delegated(event):
                if event.stage is Stage.CREATED:
                    self._delegated(event.delegation.id, "responses", event.delegation.tick, {})
                elif event.stage in (Stage.FAILED, Stage.TIMEOUT):
                    self.note("delegation_failed", f"{event.delegation.id}: {event.stage}")
            case Injected(event):
                if self._events and event.fate is not Fate.ENTERED:
                    self.send({"type": "tmlc.injection", "event_id": event_id(), "id": event.id, "fate": event.fate})
            case Closed():
                self._end(happening)

    def _delegated(self, id: str, target: str, tick: int, own: dict[str, Any]) -> None:
        """Live sends metadata only; the task itself stands under our key."""
        delegation = {"id": id, "type": "delegation", "target": target}
        offset = tick * self.hub.sessions.tick_ms
        fields = {"tmlc": own} if own else {}
        self._answer("session.delegation.created", None, delegation=delegation, offset_ms=offset, **fields)

    def _tick(self, number: int, tick: Tick) -> None:
        assert self.session is not None
        if tick.audio.size:
            data = encode(self._out_stream.push(tick.audio), self._format)
            message = {"type": "session.output_audio.delta", "delta": base64.b64encode(data).decode()}
            if self._events:
                message["tmlc"] = {"sequence": number, "tick": tick.index}  # type: ignore[assignment]
            self.send(message, tick.index)
        self._held.add(number, tick.index, tick.text)
        if self.session.seat.level < Level.NO_TRANSCRIPTS:
            self._transcribe()
        if self._events:
            self.send(
                {
                    "type": "tmlc.tick", "event_id": event_id(), "tick": tick.index, "late_ms": round(tick.late_ms, 3),
                    "step_ms": round(tick.step_ms, 3), "user_speaking": tick.user_speaking,
                    "model_speaking": tick.model_speaking, "collapsed": tick.collapsed,
                    "missing_ms": round(tick.missing_ms, 3), "heard_ms": round(tick.heard_ms, 3), "batch": tick.batch,
                }
            )  # fmt: skip
        if (tick.index + 1) % USAGE_TICKS == 0:
            self._answer("session.usage.updated", None, usage=self._usage())

    def _transcribe(self) -> None:
        """Sends the transcript that waits."""
        if self._held and self.session is not None:
            start, end = (tick * self.hub.sessions.tick_ms for tick in self._held.ticks)
            text = self._held.tell(self._number, self.session.sent)
            self._answer("session.output_transcript.delta", None, delta=text, start_ms=start, end_ms=end)

    def _usage(self) -> dict[str, Any]:
        assert self.session is not None
        return {"seconds": int(self.session.offset_ms / 1000)}

    def _end(self, closed: Closed) -> None:
        self._transcribe()
        reason = REASONS.get(EndReason(closed.reason), "connection_lost")
        own = self._closing or None
        facts = {"reason": closed.reason, "detail": closed.detail}
        self._answer("session.closed", own, reason=reason, session=self._resource(), usage=self._usage(), tmlc=facts)
        self.close_when_sent()


def _history(config: dict[str, Any]) -> list[str]:
    """Instructions and earlier messages, in pieces that are injected before the first word."""
    texts = []
    if config.get("instructions") is not None:
        given = config["instructions"]
        if not isinstance(given, str):
            raise WireError("session.instructions must be a string", "invalid_type", "session.instructions")
        texts += [given] if given.strip() else []
    items = config.get("input") or []
    if not isinstance(items, list) or len(items) > MAX_HISTORY:
        raise WireError(f"session.input takes up to {MAX_HISTORY} messages", "invalid_value", "session.input")
    for index, item in enumerate(items):
        where = f"session.input[{index}]"
        content = item.get("content") if isinstance(item, dict) else None
        if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], dict):
            raise WireError(f"{where}.content must be one text part", "invalid_value", f"{where}.content")
        if item.get("role") not in ("developer", "user", "assistant"):
            raise WireError(f"{where}.role must be developer, user or assistant", "invalid_value", f"{where}.role")
        text = text_of(content[0], "text", MAX_HISTORY_CHARACTERS, f"{where}.content[0].text")
        texts.append(f"{item['role']}: {text}")
    if sum(map(len, texts)) > MAX_HISTORY_CHARACTERS:
        what = f"instructions and input have more than {MAX_HISTORY_CHARACTERS} characters together"
        raise WireError(what, "string_above_max_length", "session.input")
    return [text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE)]

"""OpenAI's Realtime dialect (GA): `/v1/realtime?model=M`, a WebSocket on which the server speaks first (docs/wire.md).

Realtime knows turns and responses, a full-duplex model knows neither. So: a **response** is a stretch in which the
model speaks, made visible when it begins and done when it has been silent for `QUIET_TICKS`; the **turns** of the user
are those of the voice detector. `response.create` asks for nothing that the model would not decide itself, except that
it lets the results of function calls be said.
"""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tmlc.runtimes.background.injections import MAX_CHARACTERS, Fate
from tmlc.runtimes.core.admission import Level
from tmlc.runtimes.core.live import EndReason
from tmlc.runtimes.core.streams import Pace
from tmlc.runtimes.gateway.audio import AudioFormat, Resampler, decode, encode
from tmlc.runtimes.gateway.events import ClientTask, Closed, Delegated, Happening, Injected, Tick
from tmlc.runtimes.gateway.frames import picture_of
from tmlc.runtimes.gateway.hub import Hub
from tmlc.runtimes.gateway.sessions import Opening
from tmlc.runtimes.gateway.wire import (
    MAX_AUDIO,
    Connection,
    WireError,
    base64_of,
    event_id,
    known_only,
    object_of,
    policy_of,
    text_of,
)

QUIET_TICKS = 3
"""A response is done when the model has been silent for so long."""
ASKED_TICKS = 10
"""A response that was asked for and has brought nothing by then is done, empty."""
MAX_RESPONSE_TICKS = 150
"""A response of a model that never stops is cut into such pieces of 30 s."""
MAX_ITEMS = 256
"""Items that can still be asked for; the oldest are forgotten."""
MAX_TOOLS = 128

ACCEPTED = frozenset(
    {
        "session.update", "input_audio_buffer.append", "input_audio_buffer.commit", "input_audio_buffer.clear",
        "conversation.item.create", "conversation.item.truncate", "conversation.item.retrieve", "response.create",
        "response.cancel", "tmlc.input_video_frame.append", "tmlc.playback", "tmlc.delegate",
    }
)  # fmt: skip
NOT_OFFERED = {
    "conversation.item.delete": "forgetting what the model has heard",
    "output_audio_buffer.clear": "WebRTC",
}
_SESSION = frozenset(
    {
        "type", "model", "instructions", "audio", "tools", "tool_choice", "output_modalities", "max_output_tokens",
        "tracing", "truncation", "include", "prompt", "reasoning", "parallel_tool_calls", "tmlc", "id", "object",
        "expires_at",
    }
)  # fmt: skip
_OWN = frozenset({"events", "playback"})


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_urlsafe(12)}"


@dataclass
class _Response:
    """A stretch in which the model speaks, on its way to the client."""

    id: str
    item: str
    first: int  # tick of its first audio
    asked: bool = False
    shown: bool = False  # has its item been announced?
    cancelled: bool = False
    quiet: int = 0
    ticks: int = 0
    last: int = -1
    transcript: list[str] = field(default_factory=list)


class RealtimeConnection(Connection):
    """One WebSocket."""

    dialect = "realtime"

    def __init__(self, request: web.Request, socket: web.WebSocketResponse, hub: Hub, token: str | None) -> None:
        super().__init__(request, socket, hub.observer)
        self.hub, self._token = hub, token
        self._config: dict[str, Any] = {}
        self._items: dict[str, dict[str, Any]] = {}
        self._last_item: str | None = None
        self._response: _Response | None = None
        self._hushed = False  # a cancelled response: the model speaks on, and nobody is to hear it
        self._outputs: list[str] = []
        self._user_item: str | None = None
        self._held = ""

    def accepted(self) -> frozenset[str]:
        return ACCEPTED

    async def begin(self) -> None:
        """The session begins with the connection; the server speaks first."""
        try:
            if self._token is not None:
                session = await self.hub.sessions.resume(self._token, self.dialect)
            else:
                config = {"session": self._fresh(), "options": _kept(False, False)}
                session = self.hub.open(Opening(self.dialect, config, pace=Pace.BUFFERED))
        except Exception as error:
            self.fail(self.hub.explain(error), None)
            self.close_when_sent()
            return
        after = self.after(session) if self._token is not None else 0
        self._config = session.opening.config["session"]
        self.session = session
        self._streams()
        resumed = self._token is not None
        facts = {"resume_token": session.token, "resumed": resumed, "tick_ms": self.hub.sessions.tick_ms}
        self._tell("session.created", session=self._resource(), tmlc=facts)
        session.attach(self)
        for number, happening in session.events.after(after):
            self.push(number, happening)

    def _fresh(self) -> dict[str, Any]:
        """The settings of a session that has said nothing yet."""
        pcm = {"type": "audio/pcm", "rate": 24000}
        turns = {"type": "server_vad", "create_response": True, "interrupt_response": False}
        return {
            "model": self.request.query.get("model", self.hub.model),
            "instructions": "",
            "output_modalities": ["audio"],
            "audio": {
                "input": {"format": pcm, "transcription": None, "noise_reduction": None, "turn_detection": turns},
                "output": {"format": pcm, "voice": "default", "speed": 1.0},
            },
            "tools": [],
            "tool_choice": "auto",
            "max_output_tokens": "inf",
            "tracing": None,
            "truncation": "auto",
        }

    def _resource(self) -> dict[str, Any]:
        assert self.session is not None
        expires = int(self.session.began + self.hub.session_seconds)
        head = {"type": "realtime", "object": "realtime.session", "id": self.session.id, "expires_at": expires}
        return {**head, **self._config}

    def _streams(self) -> None:
        layout = self.hub.layout
        self._in_format, self._out_format = (
            _format(self._config["audio"][side].get("format"), f"session.audio.{side}.format")
            for side in ("input", "output")
        )
        self._in = Resampler(self._in_format.rate, layout.sample_rate or self._in_format.rate)
        self._out_stream = Resampler(layout.out_sample_rate or self._out_format.rate, self._out_format.rate)

    # In.

    async def handle(self, kind: str, event: dict[str, Any], own: str | None) -> None:
        if kind in NOT_OFFERED:
            raise WireError(f"this server does not offer {NOT_OFFERED[kind]}", "not_supported", "type")
        if kind not in ACCEPTED:
            raise WireError(f"unknown event type: {kind[:64]}", "unknown_event", "type")
        session = self.session
        if session is None:
            raise WireError("the session has not begun", "session_not_started", "type")
        match kind:
            case "session.update":
                self._update(object_of(event, "session"))
            case "input_audio_buffer.append":
                data = base64_of(event.get("audio"), "audio", MAX_AUDIO)
                if data:
                    session.hear(self._in.push(decode(data, self._in_format)))
                if (video := object_of(event, "tmlc").get("video")) is not None:
                    self._see(object_of({"video": video}, "video").get("image_url"), "tmlc.video.image_url", own)
            case "input_audio_buffer.commit":
                self._commit()
            case "input_audio_buffer.clear":
                session.seat.forget_input()
                self._tell("input_audio_buffer.cleared")
            case "conversation.item.create":
                self._create(event, own)
            case "conversation.item.truncate":
                self._truncate(event)
            case "conversation.item.retrieve":
                self._tell("conversation.item.retrieved", item=self._known(event))
            case "response.create":
                self._ask(object_of(event, "response"))
            case "response.cancel":
                self._cancel()
            case "tmlc.input_video_frame.append":
                self._see(event.get("image_url"), "image_url", own)
            case "tmlc.playback":
                self.hub.playback(session, event)
            case "tmlc.delegate":
                session.beside.delegate(text_of(event, "task", MAX_CHARACTERS))

    def _update(self, given: dict[str, Any]) -> None:
        session = self.session
        assert session is not None
        known_only(given, _SESSION, "session")
        if given.get("type", "realtime") != "realtime":
            raise WireError("this server has sessions of type realtime only", "not_supported", "session.type")
        if "model" in given:
            self.hub.check_model(text_of(given, "model", 256, "session.model"), "session.model")
        made = json.loads(json.dumps(self._config))
        for name in ("tool_choice", "max_output_tokens", "truncation"):
            if name in given:
                made[name] = given[name]
        for side in ("input", "output"):
            made["audio"][side] |= object_of(object_of(given, "audio", "session.audio"), side, f"session.audio.{side}")
            _format(made["audio"][side].get("format"), f"session.audio.{side}.format")
        made["output_modalities"] = _modalities(given.get("output_modalities", made["output_modalities"]))
        made["tools"] = _tools(given.get("tools", made["tools"]))
        own = object_of(given, "tmlc", "session.tmlc")
        known_only(own, _OWN, "session.tmlc")
        options = session.opening.config["options"]
        for name in own:
            if not isinstance(own[name], bool):
                raise WireError(f"session.tmlc.{name} must be true or false", "invalid_type", f"session.tmlc.{name}")
        told = given.get("instructions")
        if told is not None and (not isinstance(told, str) or len(told) > MAX_CHARACTERS):
            what = f"session.instructions must be a string of up to {MAX_CHARACTERS} characters"
            raise WireError(what, "invalid_value", "session.instructions")
        if told and told != made["instructions"]:
            session.think(told)  # may be refused; nothing has changed then
        made["instructions"] = told if told is not None else made["instructions"]
        formats = [
            made["audio"][side]["format"] != self._config["audio"][side]["format"] for side in ("input", "output")
        ]
        self._config = session.opening.config["session"] = made
        if any(formats):
            self._streams()
        options |= own
        session.client_tasks = options["client_tasks"] = bool(made["tools"])
        session.beside.queue.playback = options["playback"]
        self._tell("session.updated", session=self._resource())

    def _see(self, url: Any, param: str, own: str | None) -> None:
        self.may_see(param)
        self.aside(self._look(picture_of(url, self.hub.image_limits), param), own)

    async def _look(self, picture: bytes, param: str) -> None:
        session = self.session
        frame = await self.hub.frame(picture, param)
        if session is not None and self.session is session and session.ended is None:
            session.see(frame)

    def _commit(self) -> None:
        item = self._user_item or _id("item")
        self._user_item = None
        self._tell("input_audio_buffer.committed", item_id=item, previous_item_id=self._last_item)
        self._add_item({"id": item, "type": "message", "role": "user", "content": [{"type": "input_audio"}]})

    def _create(self, event: dict[str, Any], own: str | None) -> None:
        session = self.session
        assert session is not None
        item = dict(object_of(event, "item"))
        given = item.get("id")
        if given is not None and (not isinstance(given, str) or not 1 <= len(given) <= 64 or given in self._items):
            raise WireError("item.id must be a new name of up to 64 characters", "invalid_value", "item.id")
        if item.get("type") == "function_call_output":
            self._take_output(item)
        elif item.get("type") == "message":
            self._take_message(item, own)
        else:
            raise WireError("item.type must be message or function_call_output", "not_supported", "item.type")
        item["id"] = given or _id("item")
        self._add_item(item)

    def _take_output(self, item: dict[str, Any]) -> None:
        assert self.session is not None
        call, output = (
            text_of(item, "call_id", 64, "item.call_id"),
            text_of(item, "output", MAX_CHARACTERS, "item.output"),
        )
        if call not in self.session.tasks:
            raise WireError("no call of this session has that id", "delegation_not_found", "item.call_id")
        if len(self._outputs) >= 16:
            raise WireError("16 outputs wait for response.create", "rate_limit_exceeded", "item")
        self._outputs.append(output)

    def _take_message(self, item: dict[str, Any], own: str | None) -> None:
        session, role, content = self.session, item.get("role"), item.get("content")
        assert session is not None
        if role not in ("user", "system", "assistant"):
            raise WireError("item.role must be user, system or assistant", "invalid_value", "item.role")
        if not isinstance(content, list) or not 1 <= len(content) <= 16:
            raise WireError("item.content must have 1 to 16 parts", "invalid_value", "item.content")
        for index, part in enumerate(content):
            where = f"item.content[{index}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("input_text", "output_text", "text"):
                text = text_of(part, "text", MAX_CHARACTERS, f"{where}.text")
                session.read(text) if role == "user" else session.think(f"{role}: {text}")
            elif kind == "input_audio" and role == "user":
                data = base64_of(part.get("audio"), f"{where}.audio", MAX_AUDIO)
                session.hear(self._in.push(decode(data, self._in_format)))
            elif kind == "input_image" and role == "user":
                self._see(part.get("image_url"), f"{where}.image_url", own)
            else:
                raise WireError(f"{where}.type cannot be taken from this role", "invalid_value", f"{where}.type")
        # What was sent as bytes is not kept.
        item["content"] = [{k: v for k, v in p.items() if k not in ("audio", "image_url")} for p in content]

    def _known(self, event: dict[str, Any]) -> dict[str, Any]:
        name = text_of(event, "item_id", 64)
        if name not in self._items:
            raise WireError("no item has that id", "item_not_found", "item_id")
        return self._items[name]

    def _truncate(self, event: dict[str, Any]) -> None:
        """The client has played so much of an item: what the model said after that was not heard."""
        item, heard = self._known(event), event.get("audio_end_ms")
        if type(heard) is not int or heard < 0:
            raise WireError("audio_end_ms must be a whole number of milliseconds", "invalid_value", "audio_end_ms")
        ticks = item.get("tmlc", {}).get("ticks")
        if not ticks:
            raise WireError("only audio of the model can be truncated", "invalid_value", "item_id")
        assert self.session is not None
        first, last = ticks
        from_tick = first + heard // self.hub.sessions.tick_ms
        if first < from_tick:
            self.session.beside.played(from_tick - 1)
        if from_tick <= last:
            self.session.beside.unplayed(from_tick, last)
        self._tell(
            "conversation.item.truncated", item_id=item["id"], content_index=int(event.get("content_index") or 0),
            audio_end_ms=heard,
        )  # fmt: skip

    def _ask(self, given: dict[str, Any]) -> None:
        session = self.session
        assert session is not None
        if self._response is not None and self._response.asked:
            message = "a response that was asked for is under way"
            raise WireError(message, "conversation_already_has_active_response")
        told = given.get("instructions")
        if told is not None and told != "":
            session.think(text_of(given, "instructions", MAX_CHARACTERS, "response.instructions"))
        outputs, self._outputs = self._outputs, []
        for output in outputs:
            session.say(output, policy_of(given))
        if self._response is None:
            self._open(session.tick, asked=True)
        else:
            self._response.asked = True

    def _cancel(self) -> None:
        response = self._response
        if response is None:
            raise WireError("there is no response to cancel", "response_cancel_not_active")
        self._hushed = True
        response.cancelled = True
        self._finish()

    # Out.

    def _tell(self, kind: str, tick: int = -1, **fields: Any) -> None:
        self.send({"type": kind, "event_id": event_id(), **fields}, tick)

    def fail(self, error: WireError, own: str | None) -> None:
        body = {"type": error.kind, "code": error.code, "message": error.message, "param": error.param, "event_id": own}
        self._tell("error", error=body)

    def note(self, code: str, message: str) -> None:
        """Realtime has no event for a note, and its clients take unknown ones for something else: only after opt-in."""
        if self._events:
            self._tell("tmlc.note", code=code, message=message)

    @property
    def _events(self) -> bool:
        return self.session is not None and bool(self.session.opening.config["options"].get("events"))

    def _add_item(self, item: dict[str, Any]) -> None:
        item.setdefault("object", "realtime.item")
        item.setdefault("status", "completed")
        for kind in ("conversation.item.added", "conversation.item.done"):
            self._tell(kind, previous_item_id=self._last_item, item=item)
        self._keep_item(item)

    def _keep_item(self, item: dict[str, Any]) -> None:
        self._items[item["id"]] = item
        self._last_item = item["id"]
        while len(self._items) > MAX_ITEMS:
            del self._items[next(iter(self._items))]

    def project(self, number: int, happening: Happening) -> None:
        match happening:
            case Tick():
                self._user_turns(happening)
                self._model_turns(happening)
                if self._events:
                    self._tick_event(number, happening)
            case ClientTask(id, _, task):
                self._call(id, task)
            case Delegated(event):
                if self._events:
                    self._tell("tmlc.delegation", id=event.delegation.id, stage=event.stage)
            case Injected(event):
                if self._events and event.fate is not Fate.ENTERED:
                    self._tell("tmlc.injection", id=event.id, fate=event.fate)
            case Closed():
                self._finish()
                if happening.reason not in (EndReason.CLOSED, EndReason.SHUTDOWN):
                    message = happening.detail or happening.reason
                    self.fail(
                        WireError(f"the session has ended: {message}", "session_expired", kind="server_error"), None
                    )
                self.close_when_sent()

    def _tick_event(self, number: int, tick: Tick) -> None:
        self._tell(
            "tmlc.tick", tick=tick.index, sequence=number, late_ms=round(tick.late_ms, 3),
            step_ms=round(tick.step_ms, 3), user_speaking=tick.user_speaking, model_speaking=tick.model_speaking,
            collapsed=tick.collapsed, missing_ms=round(tick.missing_ms, 3),
            heard_ms=round(tick.heard_ms, 3), batch=tick.batch,
        )  # fmt: skip

    def _user_turns(self, tick: Tick) -> None:
        """Begin and end of the user's voice, as a server's voice detector would say it."""
        if self._config["audio"]["input"].get("turn_detection") is None:
            return
        period = self.hub.sessions.tick_ms
        if tick.user_speaking and self._user_item is None:
            self._user_item = _id("item")
            start = tick.index * period
            self._tell("input_audio_buffer.speech_started", audio_start_ms=start, item_id=self._user_item)
        elif not tick.user_speaking and self._user_item is not None:
            end = (tick.index + 1) * period
            self._tell("input_audio_buffer.speech_stopped", audio_end_ms=end, item_id=self._user_item)
            self._commit()

    def _model_turns(self, tick: Tick) -> None:
        speaks = tick.model_speaking or bool(tick.text)
        if self._hushed:
            self._hushed = speaks
            return
        if self._response is None:
            if not speaks:
                self._out_stream.push(tick.audio)  # the stream goes on, so that the next word has no seam
                return
            self._open(tick.index)
        response = self._response
        assert response is not None
        response.ticks += 1
        response.quiet = 0 if speaks else response.quiet + 1
        if speaks and not response.shown:
            self._show(tick.index)
        self._speak(tick)
        waited = ASKED_TICKS if response.asked and not response.shown else QUIET_TICKS
        if response.quiet >= waited or response.ticks >= MAX_RESPONSE_TICKS:
            self._finish()

    @property
    def _written(self) -> bool:
        return bool(self._config["output_modalities"] == ["text"])

    def _open(self, tick: int, asked: bool = False) -> None:
        self._response = _Response(_id("resp"), _id("item"), tick, asked)
        self._tell("response.created", response=self._summary("in_progress", []))

    def _summary(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        assert self._response is not None
        details = {"type": "cancelled", "reason": "client_cancelled"} if status == "cancelled" else None
        return {
            "id": self._response.id, "object": "realtime.response", "status": status, "status_details": details,
            "output": output, "output_modalities": self._config["output_modalities"], "metadata": None,
            "conversation_id": self.session.id if self.session is not None else None, "max_output_tokens": "inf",
            "audio": {"output": self._config["audio"]["output"]}, "usage": None,
        }  # fmt: skip

    def _place(self) -> dict[str, Any]:
        assert self._response is not None
        return {"response_id": self._response.id, "item_id": self._response.item, "output_index": 0, "content_index": 0}

    def _item(self, status: str) -> dict[str, Any]:
        response = self._response
        assert response is not None
        text = "".join(response.transcript)
        part = {"type": "output_text", "text": text} if self._written else {"type": "output_audio", "transcript": text}
        content = [part] if status != "in_progress" else []
        item: dict[str, Any] = {"id": response.item, "object": "realtime.item", "type": "message", "status": status,
                "role": "assistant", "content": content}  # fmt: skip
        if response.last >= 0:
            item["tmlc"] = {"ticks": [response.first, response.last]}
        return item

    def _show(self, tick: int) -> None:
        response = self._response
        assert response is not None
        response.shown, response.first = True, tick
        item = self._item("in_progress")
        self._tell("response.output_item.added", response_id=response.id, output_index=0, item=item)
        self._tell("conversation.item.added", previous_item_id=self._last_item, item=item)
        part = {"type": "text", "text": ""} if self._written else {"type": "audio", "transcript": ""}
        self._tell("response.content_part.added", **self._place(), part=part)

    def _speak(self, tick: Tick) -> None:
        response = self._response
        assert response is not None and self.session is not None
        samples = self._out_stream.push(tick.audio)
        if not response.shown:
            return
        response.last = tick.index
        if samples.size and not self._written:
            delta = base64.b64encode(encode(samples, self._out_format)).decode()
            self._tell("response.output_audio.delta", tick.index, **self._place(), delta=delta)
        if tick.text:
            response.transcript.append(tick.text)
        text, self._held = self._held + tick.text, ""
        if text and not self._written and self.session.seat.level >= Level.NO_TRANSCRIPTS:
            self._held = text[-MAX_CHARACTERS:]
        elif text:
            kind = "response.output_text.delta" if self._written else "response.output_audio_transcript.delta"
            self._tell(kind, **self._place(), delta=text)

    def _finish(self) -> None:
        """The stretch is over."""
        response = self._response
        if response is None:
            return
        status = "cancelled" if response.cancelled else "completed"
        output = []
        if response.shown:
            item = self._item("incomplete" if response.cancelled else "completed")
            text, place = "".join(response.transcript), self._place()
            if self._written:
                self._tell("response.output_text.done", **place, text=text)
            else:
                self._tell("response.output_audio.done", **place)
                self._tell("response.output_audio_transcript.done", **place, transcript=text)
            part = {"type": "text", "text": text} if self._written else {"type": "audio", "transcript": text}
            self._tell("response.content_part.done", **place, part=part)
            self._tell("response.output_item.done", response_id=response.id, output_index=0, item=item)
            self._tell("conversation.item.done", previous_item_id=self._last_item, item=item)
            self._keep_item(item)
            output.append(item)
        self._tell("response.done", response=self._summary(status, output))
        self._response = None

    def _call(self, id: str, task: str) -> None:
        """Work that the model gives away, as a call of the client's function."""
        before, self._response = self._response, None
        self._open(0)
        response = self._response
        assert response is not None
        names = [tool["name"] for tool in self._config["tools"]]
        name = "delegate" if "delegate" in names or not names else names[0]
        arguments = json.dumps({"task": task})
        item = {"id": response.item, "object": "realtime.item", "type": "function_call", "status": "in_progress",
                "call_id": id, "name": name, "arguments": ""}  # fmt: skip
        place = {"response_id": response.id, "item_id": response.item, "output_index": 0, "call_id": id}
        self._tell("response.output_item.added", response_id=response.id, output_index=0, item=item)
        self._tell("conversation.item.added", previous_item_id=self._last_item, item=item)
        self._tell("response.function_call_arguments.delta", **place, delta=arguments)
        self._tell("response.function_call_arguments.done", **place, name=name, arguments=arguments)
        done = {**item, "status": "completed", "arguments": arguments}
        self._tell("response.output_item.done", response_id=response.id, output_index=0, item=done)
        self._tell("conversation.item.done", previous_item_id=self._last_item, item=done)
        self._keep_item(done)
        self._tell("response.done", response=self._summary("completed", [done]))
        self._response = before


def _kept(playback: bool, client_tasks: bool) -> dict[str, Any]:
    return {
        "pace": "buffered",
        "playback": playback,
        "client_tasks": client_tasks,
        "instructions": None,
        "events": False,
    }


def _format(given: Any, param: str) -> AudioFormat:
    if not isinstance(given, dict):
        raise WireError(f"{param} has a type and a rate", "invalid_type", param)
    kind = given.get("type", "audio/pcm")
    rate = given.get("rate", 24000 if kind == "audio/pcm" else 8000)
    if not isinstance(kind, str) or type(rate) is not int:
        raise WireError(f"{param} has a type and a rate", "invalid_type", param)
    return AudioFormat(kind, rate)


def _modalities(given: Any) -> list[str]:
    if given not in (["audio"], ["text"]):
        raise WireError('output_modalities must be ["audio"] or ["text"]', "invalid_value", "session.output_modalities")
    return list(given)


def _tools(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise WireError(f"tools are a list of up to {MAX_TOOLS}", "invalid_value", "session.tools")
    for index, tool in enumerate(given):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("name"), str):
            raise WireError("only tools of type function with a name", "not_supported", f"session.tools[{index}]")
    return given

"""OpenAI's Realtime dialect (GA): `/v1/realtime?model=M`, a WebSocket on which the server speaks first (docs/wire.md).

Realtime knows turns and responses, a full-duplex model knows neither. So: a **response** is a stretch in which the
model speaks, made visible when it begins and done when it has been silent for `QUIET_TICKS`; the **turns** of the user
are those of the voice detector. `response.create` asks for nothing that the model would not decide itself, except that
it lets the results of function calls be said.
"""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from tmlc.runtimes.background.injections import MAX_CHARACTERS
from tmlc.runtimes.core.streams import Pace
from tmlc.runtimes.gateway.audio import decode
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
from tmlc.runtimes.gateway.hub import Hub
from tmlc.runtimes.gateway.responses import Responses, format_of, new_id
from tmlc.runtimes.gateway.sessions import LiveSession, Opening

MAX_OUTPUTS = 16
"""Outputs of function calls that wait for response.create."""
MAX_METADATA = 4096
"""Characters of a response's metadata."""
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


class RealtimeConnection(Responses):
    """One WebSocket: what it takes in. `Responses` is what it says."""

    def __init__(self, request: web.Request, socket: web.WebSocketResponse, hub: Hub, token: str | None) -> None:
        super().__init__(request, socket, hub)
        self._token = token

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
        try:
            self._begin(session)
        except Exception as error:  # what was kept of it is damaged
            self.abandon(session)
            self._refuse(error, None)
            self.close_when_sent()

    def _begin(self, session: LiveSession) -> None:
        resumed = self._token is not None
        after = self.after(session) if resumed else 0
        self._config, self.session = session.opening.config["session"], session
        self._streams()
        self._talk = session.talk = session.talk or self._talk
        facts = {"resume_token": session.token, "resumed": resumed, "tick_ms": self.hub.sessions.tick_ms}
        self._tell("session.created", session=self._resource(), tmlc=facts)
        session.attach(self)
        again = list(session.events.after(after))
        self._talk.held.resume(after, {number for number, _ in again})
        for number, happening in again:
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
                with about("audio"):
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
            format_of(made["audio"][side].get("format"), f"session.audio.{side}.format")
        made["output_modalities"] = _modalities(given.get("output_modalities", made["output_modalities"]))
        made["tools"] = _tools(given.get("tools", made["tools"]))
        own = object_of(given, "tmlc", "session.tmlc")
        known_only(own, _OWN, "session.tmlc")
        options = session.opening.config["options"]
        for name in own:
            if not isinstance(own[name], bool):
                raise WireError(f"session.tmlc.{name} must be true or false", "invalid_type", f"session.tmlc.{name}")
        check_config(made, "session")
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

    def _create(self, event: dict[str, Any], own: str | None) -> None:
        session = self.session
        assert session is not None
        item = object_of(event, "item")
        given = item.get("id")
        known = isinstance(given, str) and given in self._talk.items
        if given is not None and (not isinstance(given, str) or not 1 <= len(given) <= 64 or known):
            raise WireError("item.id must be a new name of up to 64 characters", "invalid_value", "item.id")
        if item.get("type") == "function_call_output":
            taken = self._take_output(item)
        elif item.get("type") == "message":
            taken = self._take_message(item, own)
        else:
            raise WireError("item.type must be message or function_call_output", "not_supported", "item.type")
        self._add_item({"id": given or new_id("item"), "type": item["type"], **taken})

    def _take_output(self, item: dict[str, Any]) -> dict[str, Any]:
        """What is kept of the item."""
        assert self.session is not None
        call, output = (
            text_of(item, "call_id", 64, "item.call_id"),
            text_of(item, "output", MAX_CHARACTERS, "item.output"),
        )
        if call not in self.session.tasks:
            raise WireError("no call of this session has that id", "delegation_not_found", "item.call_id")
        if len(self._talk.outputs) >= MAX_OUTPUTS:
            raise WireError(f"{MAX_OUTPUTS} outputs wait for response.create", "rate_limit_exceeded", "item")
        self._talk.outputs.append(output)
        return {"call_id": call, "output": output}

    def _take_message(self, item: dict[str, Any], own: str | None) -> dict[str, Any]:
        """All parts are checked before any of them is taken. What is kept: what was sent as bytes is not."""
        session, role, content = self.session, item.get("role"), item.get("content")
        assert session is not None
        if role not in ("user", "system", "assistant"):
            raise WireError("item.role must be user, system or assistant", "invalid_value", "item.role")
        if not isinstance(content, list) or not 1 <= len(content) <= 16:
            raise WireError("item.content must have 1 to 16 parts", "invalid_value", "item.content")
        found: list[tuple[str, Any]] = []
        for index, part in enumerate(content):
            where = f"item.content[{index}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("input_text", "output_text", "text"):
                found.append((kind, text_of(part, "text", MAX_CHARACTERS, f"{where}.text")))
            elif kind == "input_audio" and role == "user":
                data = base64_of(part.get("audio"), f"{where}.audio", MAX_AUDIO)
                with about(f"{where}.audio"):
                    found.append((kind, decode(data, self._in_format)))
            elif kind == "input_image" and role == "user":
                found.append((kind, part.get("image_url")))
            else:
                raise WireError(f"{where}.type cannot be taken from this role", "invalid_value", f"{where}.type")
        for index, (kind, value) in enumerate(found):
            if kind == "input_audio":
                session.hear(self._in.push(value))
            elif kind == "input_image":
                self._see(value, f"item.content[{index}].image_url", own)
            elif role == "user":
                session.read(value)
            else:
                session.think(f"{role}: {value}")
        parts = [{"type": k, "text": v} if k.endswith("text") else {"type": k} for k, v in found]
        return {"role": role, "content": parts}

    def _known(self, event: dict[str, Any]) -> dict[str, Any]:
        """Also the item that the model is at: who speaks over it truncates that one."""
        name, response = text_of(event, "item_id", 64), self._response
        if response is not None and response.shown and response.item == name:
            return self._item("in_progress")
        if (item := self._talk.items.get(name)) is None:
            raise WireError("no item has that id", "item_not_found", "item_id")
        return item

    def _truncate(self, event: dict[str, Any]) -> None:
        """The client has played so much of an item: what the model said after that was not heard."""
        item, heard = self._known(event), event.get("audio_end_ms")
        if type(heard) is not int or heard < 0:
            raise WireError("audio_end_ms must be a whole number of milliseconds", "invalid_value", "audio_end_ms")
        part = event.get("content_index", 0)
        if type(part) is not int or part != 0:
            raise WireError("the audio of an item is its part 0", "invalid_value", "content_index")
        ticks = item.get("tmlc", {}).get("ticks")
        if not ticks:
            raise WireError("only audio of the model can be truncated", "invalid_value", "item_id")
        assert self.session is not None
        first, last = ticks
        from_tick = first + heard // self.hub.sessions.tick_ms
        if first < from_tick:
            self.session.beside.played(min(from_tick - 1, last))
        if from_tick <= last:
            self.session.beside.unplayed(from_tick, last)
        self._tell(
            "conversation.item.truncated", item_id=item["id"], content_index=part, audio_end_ms=heard,
        )  # fmt: skip

    def _ask(self, given: dict[str, Any]) -> None:
        session = self.session
        assert session is not None
        if self._response is not None and self._response.asked:
            message = "a response that was asked for is under way"
            raise WireError(message, "conversation_already_has_active_response")
        told, policy = given.get("instructions"), policy_of(given)
        metadata = object_of(given, "metadata", "response.metadata")
        if len(json.dumps(metadata)) > MAX_METADATA:
            what = f"response.metadata has more than {MAX_METADATA} characters"
            raise WireError(what, "string_above_max_length", "response.metadata")
        if told is not None and told != "":
            session.think(text_of(given, "instructions", MAX_CHARACTERS, "response.instructions"))
        outputs = self._talk.outputs
        while outputs:  # one for which there is no room waits for the next time
            session.say(outputs[0], policy)
            del outputs[0]
        self._finish()  # what the model was saying by itself; what follows is the response that was asked for
        self._open(session.tick, asked=True, metadata=metadata or None)

    def _cancel(self) -> None:
        response = self._response
        if response is None:
            raise WireError("there is no response to cancel", "response_cancel_not_active")
        self._talk.hushed = response.shown
        response.cancelled = True
        self._finish()

def _kept(playback: bool, client_tasks: bool) -> dict[str, Any]:
    return {
        "pace": "buffered",
        "playback": playback,
        "client_tasks": client_tasks,
        "instructions": None,
        "events": False,
    }


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

"""The way out of the Realtime dialect: what becomes of ticks, tasks and ends of a session, as responses and items.

A **response** is a stretch in which the model speaks. One is under way at a time, as clients know it.
"""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tmlc.runtimes.background.injections import Fate
from tmlc.runtimes.core.admission import Level
from tmlc.runtimes.core.live import EndReason
from tmlc.runtimes.gateway.audio import AudioFormat, Resampler, encode
from tmlc.runtimes.gateway.events import ClientTask, Closed, Delegated, Happening, Injected, Tick
from tmlc.runtimes.gateway.fields import WireError, about
from tmlc.runtimes.gateway.held import Held
from tmlc.runtimes.gateway.hub import Hub
from tmlc.runtimes.gateway.wire import Connection, event_id

QUIET_TICKS = 3
"""A response is done when the model has been silent for so long."""
ASKED_TICKS = 10
"""A response that was asked for and has brought nothing by then is done, empty."""
MAX_RESPONSE_TICKS = 150
"""A response of a model that never stops is cut into such pieces of 30 s."""
MAX_ITEMS, MAX_ITEM_CHARACTERS = 256, 1 << 20
"""Items that can still be asked for, and characters in them; the oldest are forgotten."""


def new_id(prefix: str) -> str:
    """An unguessable name."""
    return f"{prefix}_{secrets.token_urlsafe(12)}"


@dataclass
class Response:
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
    metadata: dict[str, Any] | None = None
    transcript: list[str] = field(default_factory=list)


class Items:
    """What the client may still ask for, bounded."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[dict[str, Any], int]] = {}
        self._size = 0
        self.last: str | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def get(self, name: str) -> dict[str, Any] | None:
        return self._kept[name][0] if name in self._kept else None

    def keep(self, item: dict[str, Any]) -> None:
        """Keeps an item, or its newer state."""
        if item["id"] in self._kept:
            self._size -= self._kept.pop(item["id"])[1]
        size = len(json.dumps(item))
        self._kept[item["id"]], self.last = (item, size), item["id"]
        self._size += size
        while len(self._kept) > MAX_ITEMS or (self._size > MAX_ITEM_CHARACTERS and len(self._kept) > 1):
            self._size -= self._kept.pop(next(iter(self._kept)))[1]


class Talk:
    """What outlives a connection: the items, outputs that were not said yet, words that the client was not told, and
    whether the model is hushed."""

    def __init__(self) -> None:
        self.items, self.held = Items(), Held()
        self.outputs: list[str] = []
        self.hushed = False  # a cancelled response: the model speaks on, and nobody is to hear it


class Responses(Connection):
    """The half of a Realtime connection that speaks; `realtime.py` has the one that listens."""

    dialect = "realtime"

    def __init__(self, request: web.Request, socket: web.WebSocketResponse, hub: Hub) -> None:
        super().__init__(request, socket, hub)
        self._config: dict[str, Any] = {}
        self._talk = Talk()
        self._response: Response | None = None
        self._user_item: str | None = None

    def _streams(self) -> None:
        layout = self.hub.layout
        self._in_format, self._out_format = (
            format_of(self._config["audio"][side].get("format"), f"session.audio.{side}.format")
            for side in ("input", "output")
        )
        self._in = Resampler(self._in_format.rate, layout.sample_rate or self._in_format.rate)
        self._out_stream = Resampler(layout.out_sample_rate or self._out_format.rate, self._out_format.rate)

    def _commit(self) -> None:
        item = self._user_item or new_id("item")
        self._user_item = None
        self._tell("input_audio_buffer.committed", item_id=item, previous_item_id=self._talk.items.last)
        self._add_item({"id": item, "type": "message", "role": "user", "content": [{"type": "input_audio"}]})

    def _tell(self, kind: str, tick: int = -1, /, **fields: Any) -> None:
        """`tick`: of the audio in it."""
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
            self._tell(kind, previous_item_id=self._talk.items.last, item=item)
        self._talk.items.keep(item)

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
                if self._response is None and self._talk.held:
                    self._open(self._talk.held.ticks[0])
                    self._show(self._talk.held.ticks[0])
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
            self._user_item = new_id("item")
            start = tick.index * period
            self._tell("input_audio_buffer.speech_started", audio_start_ms=start, item_id=self._user_item)
        elif not tick.user_speaking and self._user_item is not None:
            end = (tick.index + 1) * period
            self._tell("input_audio_buffer.speech_stopped", audio_end_ms=end, item_id=self._user_item)
            self._commit()

    def _model_turns(self, tick: Tick) -> None:
        speaks = tick.model_speaking or bool(tick.text)
        if self._talk.hushed:
            self._talk.hushed = speaks
            self._out_stream.push(tick.audio)
            if speaks and self.session is not None:  # a result that is being said is not heard: it waits again
                self.session.beside.unplayed(tick.index, tick.index)
            return
        if self._response is None:
            speaks = speaks or (self._tells and bool(self._talk.held))  # of before the connection was cut
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
    def _tells(self) -> bool:
        """Does the transcript go out at once? Written answers always do."""
        return self._written or (self.session is not None and self.session.seat.level < Level.NO_TRANSCRIPTS)

    @property
    def _written(self) -> bool:
        return bool(self._config["output_modalities"] == ["text"])

    def _open(self, tick: int, asked: bool = False, metadata: dict[str, Any] | None = None) -> None:
        self._response = Response(new_id("resp"), new_id("item"), tick, asked, metadata=metadata)
        self._tell("response.created", response=self._summary("in_progress", []))

    def _summary(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        assert self._response is not None
        details = {"type": "cancelled", "reason": "client_cancelled"} if status == "cancelled" else None
        return {
            "id": self._response.id, "object": "realtime.response", "status": status, "status_details": details,
            "output": output, "output_modalities": self._config["output_modalities"],
            "metadata": self._response.metadata,
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
        response.transcript = [self._talk.held.text] if self._talk.held else []
        item = self._item("in_progress")
        self._tell("response.output_item.added", response_id=response.id, output_index=0, item=item)
        self._tell("conversation.item.added", previous_item_id=self._talk.items.last, item=item)
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
            self._talk.held.add(self._number, tick.index, tick.text)
        if self._tells:
            self._transcribe()

    def _transcribe(self) -> None:
        """Sends the transcript that waits."""
        if self._talk.held and self.session is not None:
            kind = "response.output_text.delta" if self._written else "response.output_audio_transcript.delta"
            number = self._number or self.session.events.last + 1  # a message of no event goes out before the next one
            self._tell(kind, **self._place(), delta=self._talk.held.tell(number, self.session.sent))

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
            self._transcribe()
            if self._written:
                self._tell("response.output_text.done", **place, text=text)
            else:
                self._tell("response.output_audio.done", **place)
                self._tell("response.output_audio_transcript.done", **place, transcript=text)
            part = {"type": "text", "text": text} if self._written else {"type": "audio", "transcript": text}
            self._tell("response.content_part.done", **place, part=part)
            self._tell("response.output_item.done", response_id=response.id, output_index=0, item=item)
            self._tell("conversation.item.done", previous_item_id=self._talk.items.last, item=item)
            self._talk.items.keep(item)
            output.append(item)
        self._tell("response.done", response=self._summary(status, output))
        self._response = None

    def _call(self, id: str, task: str) -> None:
        """Work that the model gives away, as a call of the client's function."""
        if self._response is not None and self._response.shown:  # clients know one response at a time
            self._finish()
        if self._response is None:
            self._open(0)
        response = self._response
        assert response is not None
        names = [tool["name"] for tool in self._config["tools"]]
        name = "delegate" if "delegate" in names or not names else names[0]
        arguments = json.dumps({"task": task})
        item = {"id": response.item, "object": "realtime.item", "type": "function_call", "status": "in_progress",
                "call_id": id, "name": name, "arguments": ""}  # fmt: skip
        place: dict[str, Any] = {
            "response_id": response.id, "item_id": response.item, "output_index": 0, "call_id": id,
        }  # fmt: skip
        self._tell("response.output_item.added", response_id=response.id, output_index=0, item=item)
        self._tell("conversation.item.added", previous_item_id=self._talk.items.last, item=item)
        self._tell("response.function_call_arguments.delta", **place, delta=arguments)
        self._tell("response.function_call_arguments.done", **place, name=name, arguments=arguments)
        done = {**item, "status": "completed", "arguments": arguments}
        self._tell("response.output_item.done", response_id=response.id, output_index=0, item=done)
        self._tell("conversation.item.done", previous_item_id=self._talk.items.last, item=done)
        self._talk.items.keep(done)
        self._tell("response.done", response=self._summary("completed", [done]))
        self._response = None


def format_of(given: Any, param: str) -> AudioFormat:
    """A format of the wire. Raises WireError, InputError."""
    if not isinstance(given, dict):
        raise WireError(f"{param} has a type and a rate", "invalid_type", param)
    kind = given.get("type", "audio/pcm")
    rate = given.get("rate", 24000 if kind == "audio/pcm" else 8000)
    if not isinstance(kind, str) or type(rate) is not int:
        raise WireError(f"{param} has a type and a rate", "invalid_type", param)
    with about(param):
        return AudioFormat(kind, rate)

"""What the unmodified openai client says to a server, and what it hears: printed as one JSON object.

    python openai_talk.py SCENARIO BASE_URL

SCENARIO is live, live-resume, realtime, realtime-resume or refused.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
import sys
import time
import zlib
from array import array
from collections import Counter
from typing import Any

import openai

RATE, FRAME = 24000, 480
MODEL = "nano"
ANSWER = "the answer is 42"


def png(width: int, height: int) -> str:
    """A data URL of a red picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xff\0\0" * width) * height
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def tone(count: int) -> str:
    """20 ms of a tone."""
    at = range(count * FRAME, (count + 1) * FRAME)
    wave = array("h", [int(9000 * math.sin(math.tau * 220 * n / RATE)) for n in at])
    return base64.b64encode(wave.tobytes()).decode()


SILENCE = base64.b64encode(bytes(2 * FRAME)).decode()


class Heard:
    """Counts what came."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.samples, self.loud = 0, 0
        self.said = ""
        self.errors: list[Any] = []
        self.token = ""
        self.facts: dict[str, Any] = {}

    def take(self, event: Any) -> None:
        self.kinds[event.type] += 1
        if event.type in ("session.output_audio.delta", "response.output_audio.delta"):
            pcm = array("h", base64.b64decode(event.delta))
            self.samples += len(pcm)
            self.loud += sum(abs(x) > 200 for x in pcm)
        if event.type in ("session.output_transcript.delta", "response.output_audio_transcript.delta"):
            self.said += event.delta
        if event.type == "error":
            self.errors.append(event.error.to_dict())
        if event.type in ("session.started", "session.created"):
            self.token = event.tmlc["resume_token"]

    def print(self, **more: Any) -> None:
        seconds = self.samples / RATE
        facts = {"kinds": self.kinds, "seconds": seconds, "loud": self.loud, "said": self.said, "errors": self.errors}
        print(json.dumps({**facts, "version": openai.__version__, **self.facts, **more}))


async def microphone(append: Any, seconds: float, voiced: float) -> None:
    """A tone for `voiced` seconds and silence after it, in real time."""
    begun = time.monotonic()
    for count in range(int(seconds * RATE / FRAME)):
        await asyncio.sleep(max(0.0, begun + count * FRAME / RATE - time.monotonic()))
        await append(audio=tone(count) if count * FRAME / RATE < voiced else SILENCE)


async def live(client: openai.AsyncOpenAI) -> None:
    heard = Heard()
    async with client.live.connect() as connection:
        audio = {"format": {"type": "audio/pcm", "rate": RATE}}
        session: Any = {"model": MODEL, "instructions": "Be brief.", "audio": audio}
        await connection.session.start(session=session, event_id="begin")
        started = await connection.recv()
        heard.take(started)
        heard.facts["started"] = [started.type, started.client_event_id, started.session.model, started.session.status]
        speaking = asyncio.create_task(microphone(connection.session.input_audio.append, 25.0, 1.0))
        content = [{"type": "input_text", "text": "hello"}, {"type": "input_image", "image_url": png(96, 64)}]
        item = {"type": "message", "role": "user", "content": content}
        await connection.send({"type": "conversation.item.create", "item": item})
        await connection.send({"type": "tmlc.input_video_frame.append", "image_url": png(64, 64)})
        append = {"type": "session.input_audio.append", "audio": SILENCE, "tmlc": {"video": {"image_url": png(32, 32)}}}
        await connection.send(append)
        await connection.session.thinking.append(content="The user is Ada.", delegation_id=None, event_id="think")
        await connection.session.instructions.append(content="Whisper.", delegation_id=None)
        await connection.session.input_audio.mute(event_id="mute")
        await connection.session.input_audio.unmute()
        await connection.send({"type": "decision.create", "event_id": "nope"})
        acks = {}
        async for event in connection:
            heard.take(event)
            if getattr(event, "client_event_id", None):
                acks[event.client_event_id] = event.type
            if event.type == "session.delegation.created":
                heard.facts["target"] = event.delegation.target
                await connection.session.commentary.append(content=ANSWER, delegation_id=event.delegation.id)
            if ANSWER in heard.said or speaking.done():
                break
        speaking.cancel()
        await connection.session.close(event_id="end")
        async for event in connection:
            heard.take(event)
            if event.type == "session.closed":
                heard.facts["closed"] = [event.reason, event.client_event_id, event.usage.seconds]
    heard.print(acks=acks)


async def resume(client: openai.AsyncOpenAI, dialect: str) -> None:
    """The connection is cut under the client, which comes back with its token by itself."""
    heard, tokens, sessions = Heard(), [], []

    def come_back(event: Any) -> Any:
        return {"extra_query": {**event.extra_query, "tmlc_resume": heard.token}}

    options: Any = dict(on_reconnecting=come_back, initial_delay=0.05)
    if dialect == "realtime":
        options["model"] = MODEL
    async with getattr(client, dialect).connect(**options) as connection:
        if dialect == "live":
            await connection.session.start(session={"model": MODEL})
        ticks = []
        async for event in connection:
            heard.take(event)
            if event.type in ("session.started", "session.created"):
                tokens.append(heard.token)
                sessions.append([event.session.to_dict()["id"], event.tmlc["resumed"]])
                if len(sessions) == 1:
                    await asyncio.sleep(0.5)
                    connection._connection.transport.abort()
            if len(sessions) == 2:
                ticks.append(event.type)
                if len(ticks) > 3 and (dialect == "realtime" or "session.output_audio.delta" in ticks[1:]):
                    break
                if dialect == "realtime":
                    await connection.input_audio_buffer.clear()
    heard.print(sessions=sessions, tokens=len(set(tokens)))


async def realtime(client: openai.AsyncOpenAI) -> None:
    heard = Heard()
    order: list[str] = []
    async with client.realtime.connect(model=MODEL) as connection:
        created = await connection.recv()
        heard.take(created)
        heard.facts["first"] = created.type
        tool = {"type": "function", "name": "delegate", "description": "", "parameters": {"type": "object"}}
        await connection.session.update(session={"type": "realtime", "instructions": "Be brief.", "tools": [tool]})
        speaking = asyncio.create_task(microphone(connection.input_audio_buffer.append, 25.0, 1.0))
        await connection.conversation.item.create(item={"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "hello"}, {"type": "input_image", "image_url": png(96, 64)}]})  # fmt: skip
        await connection.send({"type": "tmlc.input_video_frame.append", "image_url": png(64, 64)})
        await connection.conversation.item.delete(item_id="nothing", event_id="nope")
        spoken: dict[str, int] = {}
        async for event in connection:
            heard.take(event)
            if event.type.startswith("response."):
                order.append(event.type)
            if event.type == "response.output_audio.delta":
                spoken[event.item_id] = spoken.get(event.item_id, 0) + 1
            if event.type == "response.output_audio.delta" and "cut" not in heard.facts:
                heard.facts["cut"] = event.item_id
                await connection.response.cancel()
                await connection.conversation.item.truncate(item_id=event.item_id, content_index=0, audio_end_ms=100)
            if event.type == "response.done" and event.response.status == "cancelled":
                heard.facts["cancelled"] = event.response.status_details.reason
            if event.type == "response.function_call_arguments.done":
                heard.facts["task"] = json.loads(event.arguments)["task"]
                await connection.conversation.item.create(
                    item={"type": "function_call_output", "call_id": event.call_id, "output": ANSWER}
                )
                await connection.response.create()
            if ANSWER in heard.said and event.type == "response.done":
                break
            if speaking.done():
                break
        speaking.cancel()
    heard.print(order=order)


async def refused(client: openai.AsyncOpenAI) -> None:
    """Both dialects of a server that is full: what the user of the client gets to see."""
    found = []
    for connect in (lambda: client.live.connect(), lambda: client.realtime.connect(model=MODEL)):
        try:
            async with connect():
                found.append({"status": 101})
        except Exception as error:
            answer = error.response  # type: ignore[attr-defined]
            body = json.loads(answer.body)
            found.append({"status": answer.status_code, "retry": answer.headers["Retry-After"], "error": body["error"]})
    models = [model.id async for model in client.models.list()]
    print(json.dumps({"refused": found, "models": models, "one": (await client.models.retrieve(MODEL)).id}))


async def patient(scenario: str, url: str) -> None:
    """Comes again when the server is full: on a busy machine it takes nobody for a while."""
    while True:
        try:
            return await main(scenario, url)
        except Exception as error:
            if scenario == "refused" or getattr(getattr(error, "response", None), "status_code", 0) != 503:
                raise
            await asyncio.sleep(1.0)


async def main(scenario: str, url: str) -> None:
    client = openai.AsyncOpenAI(base_url=url, api_key="sk-test", max_retries=0)
    match scenario.partition("-"):
        case ("live", "", _):
            await live(client)
        case ("realtime", "", _):
            await realtime(client)
        case (dialect, "-", "resume"):
            await resume(client, dialect)
        case _:
            await refused(client)


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(patient(sys.argv[1], sys.argv[2]), 60))

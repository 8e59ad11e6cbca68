"""Messages that are damaged in every way, to both dialects: no crash, no session lost, nothing left behind.

The engine is synthetic: what is tested stands between a stranger and it. A few thousand messages run in the fast suite,
more than 100,000 in the slow one.
"""

import asyncio
import copy
import gc
import json
import logging
import random

import pytest
from aiohttp import WSMsgType
from aiohttp.test_utils import TestClient, TestServer

from tmlc.runtimes.background.session import Background
from tmlc.runtimes.core.clock import VirtualClock
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.synthetic import SyntheticEngine
from tmlc.runtimes.core.text import ByteTokenizer
from tmlc.runtimes.gateway.hub import Hub
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.server import make_app
from tmlc.runtimes.gateway.sessions import LiveSession, Sessions

MARKS = ("<injection>", "<end_of_injection>")
PICTURE = "data:image/png;base64,iVBORw0KGgo="
TEXT = {"type": "input_text", "text": "hello"}
START = {
    "type": "session.start",
    "session": {
        "model": "m", "instructions": "x",
        "audio": {"format": {"type": "audio/pcm", "rate": 16000}, "output": {"voice": "v"}},
        "delegation": {"type": "client"}, "store": False, "triggers": [], "tmlc": {"events": True, "playback": True},
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
    },
}  # fmt: skip
SHARED = [
    {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [TEXT]}},
    {"type": "conversation.item.create",
     "item": {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": PICTURE}]}},
    {"type": "tmlc.input_video_frame.append", "image_url": PICTURE},
    {"type": "tmlc.playback", "played_ms": 400},
    {"type": "tmlc.playback", "unplayed": [1, 2]},
    {"type": "tmlc.delegate", "task": "t"},
]  # fmt: skip
SEEDS = {
    "live": [
        START,
        {"type": "session.update", "session": {"delegation": {"type": "client"}}},
        {"type": "session.input_audio.append", "audio": "AAAAAAAA", "tmlc": {"video": {"image_url": PICTURE}}},
        {"type": "session.input_audio.mute"}, {"type": "session.input_audio.unmute"},
        *({"type": f"session.{what}.append", "content": "c", "delegation_id": None}
          for what in ("instructions", "thinking", "commentary")),
        {"type": "tmlc.input_text.append", "text": "t"},
        {"type": "response.create"}, {"type": "decision.create"}, {"type": "transport.dtmf.send", "event": "1"},
        *SHARED,
    ],
    "realtime": [
        {"type": "session.update", "session": {
            "type": "realtime", "instructions": "i", "output_modalities": ["audio"], "tool_choice": "auto",
            "audio": {"input": {"format": {"type": "audio/pcm", "rate": 24000},
                                "turn_detection": {"type": "server_vad"}},
                      "output": {"format": {"type": "audio/pcmu"}}},
            "tools": [{"type": "function", "name": "f", "parameters": {}}], "tmlc": {"events": True}}},
        {"type": "input_audio_buffer.append", "audio": "AAAAAAAA"},
        {"type": "input_audio_buffer.commit"}, {"type": "input_audio_buffer.clear"},
        {"type": "conversation.item.create",
         "item": {"type": "function_call_output", "call_id": "c", "output": "o"}},
        {"type": "conversation.item.create", "previous_item_id": "root", "item": {
            "id": "i", "type": "message", "role": "user", "content": [{"type": "input_audio", "audio": "AAAA"}]}},
        {"type": "conversation.item.truncate", "item_id": "i", "content_index": 0, "audio_end_ms": 10},
        {"type": "conversation.item.retrieve", "item_id": "i"}, {"type": "conversation.item.delete", "item_id": "i"},
        {"type": "response.create", "response": {"instructions": "i"}}, {"type": "response.cancel"},
        *SHARED,
    ],
}  # fmt: skip
ODD = [
    None, True, False, 0, -1, 1, 2**63, -(2**70), 1.5, float("nan"), float("inf"), "", "\0", "\ud800", "a" * 9000, "🎈",
    [], {}, [[]], [None], {"": None}, {"type": None}, {"type": []}, "audio/pcm", "AAA", "data:image/png;base64,",
    "https://example.com/a.png", [0, 1], [2**64, -1], {"image_url": 1}, {"format": 3},
]  # fmt: skip


def places(value, path=()):
    """Every place inside a message."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damaged(chance: random.Random, seeds: list[dict]) -> str | bytes:
    """A message with one to three things wrong with it; now and then not even JSON."""
    message = copy.deepcopy(chance.choice(seeds))
    for _ in range(chance.randint(1, 3)):
        *path, last = chance.choice(list(places(message)))
        holder = message
        for key in path:
            holder = holder[key]
        act = chance.random()
        if act < 0.6:
            holder[last] = copy.deepcopy(chance.choice(ODD))
        elif act < 0.8 and len(message) > 1:
            del holder[last]
        elif isinstance(holder, dict):
            holder[chance.choice(["id", "tmlc", "x" * 70, "event_id"])] = copy.deepcopy(chance.choice(ODD))
        if not message:
            break
    text = json.dumps(message)
    act = chance.random()
    if act < 0.05:
        return text[: chance.randrange(len(text))]
    if act < 0.07:
        return chance.choice(["[" * 3000, '{"type":' * 3000, "[]", "null", '"x"', "1" * 5000, '{"type":1}', "{}"])
    if act < 0.09:
        return chance.randbytes(20)
    if act < 0.12:
        at = chance.randrange(len(text))
        return text[:at] + chr(chance.randrange(1, 0x2FF)) + text[at:]
    return text


async def bombard(dialect: str, count: int, seed: int) -> dict:
    """Sends `count` damaged messages to one server, over as many connections as it takes."""
    chance, clock, loop = random.Random(seed), VirtualClock(0.2), asyncio.get_running_loop()
    escaped: list = []
    loop.set_exception_handler(lambda _, context: escaped.append(context))
    engine = SyntheticEngine(clock, sessions=2)
    engine.tokenizer = ByteTokenizer({b: b for b in range(256)}, {name: 258 + n for n, name in enumerate(MARKS)})
    scheduler = Scheduler(engine, clock=clock, resume_window=1.0)
    hub = Hub(Sessions(scheduler, Background(), Observer()), Observer(), "m")
    path = "/v1/live/sessions" if dialect == "live" else "/v1/realtime?model=m"
    kinds: dict = {}
    answered: set = set()
    connections, sent = 0, 0

    def edge() -> None:
        clock.wait(scheduler.next_edge)
        scheduler.step()

    async def read(socket) -> None:
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                event = json.loads(message.data)
                kinds[event["type"]] = kinds.get(event["type"], 0) + 1
                if event["type"] == "error":
                    answered.add(event["error"].get("client_event_id") or event["error"].get("event_id"))

    async with TestClient(TestServer(make_app(hub))) as client:
        while sent < count:
            socket = await client.ws_connect(path)
            connections += 1
            reader = asyncio.create_task(read(socket))
            if dialect == "live":
                await socket.send_json(START)
            for _ in range(min(500, count - sent)):
                if socket.closed:
                    break
                message = damaged(chance, SEEDS[dialect])
                sent += 1
                await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_str(message))
                if sent % 20 == 0:
                    await asyncio.sleep(0)
                    edge()
            if not socket.closed:
                await socket.send_json({"type": "last", "event_id": f"last {connections}"})
            while not socket.closed and f"last {connections}" not in answered:  # every message before it was handled
                await asyncio.sleep(0.002)
                edge()
            closed = socket.closed
            await socket.close()
            await reader
            for _ in range(40):  # longer than the resume window: what was left is ended
                edge()
                await asyncio.sleep(0)
            kinds["closed"] = kinds.get("closed", 0) + closed
    await hub.close()
    left = scheduler.stats()
    scheduler.close()
    await asyncio.sleep(0)
    return {"kinds": kinds, "escaped": escaped, "left": left, "connections": connections, "tokens": len(hub.sessions)}


def check(dialect, count, seed, caplog):
    with caplog.at_level(logging.WARNING):
        found = asyncio.run(bombard(dialect, count, seed))
    assert not found["escaped"] and not [r for r in caplog.records if r.exc_info or r.levelno >= logging.ERROR]
    assert found["kinds"]["error"] > count / 4  # most were refused, by an event
    assert not found["kinds"]["closed"]  # and no connection was closed for it
    assert not found["left"].ticking and not found["left"].detached and not found["left"].joining
    assert found["left"].opened == found["connections"]
    assert found["tokens"] == 0
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, LiveSession)]


@pytest.mark.parametrize("dialect", ["live", "realtime"])
def test_damaged_messages_are_answered_and_leave_nothing_behind(dialect, caplog):
    check(dialect, 1500, 7, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["live", "realtime"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_hundred_thousand_damaged_messages(dialect, seed, caplog):
    check(dialect, 26_000, seed, caplog)

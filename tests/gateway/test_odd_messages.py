"""Messages that a client sends by mistake or on purpose: each is taken or refused by an error that names what is wrong;
none is a fault of the server, and none costs the session."""

import base64
import copy
import logging
import sys
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "security"))  # edits.py

from edits import dumps, mutate_json

PICTURE = "data:image/png;base64,iVBORw0KGgo="
SOUND = base64.b64encode(b"\0\1" * 480).decode()
TEXT = {"type": "input_text", "text": "hi"}
START = {
    "model": "m", "instructions": "Be kind.", "delegation": {"type": "client"}, "store": False,
    "audio": {"format": {"type": "audio/pcm", "rate": 16000}, "output": {"voice": "x"}},
    "input": [{"type": "message", "role": "user", "content": [TEXT]},
              {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes"}]}],
    "tmlc": {"pace": "buffered", "events": True, "playback": True, "seed": 1, "temperature": 0.5},
}  # fmt: skip
BOTH = [
    {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [TEXT]}},
    {"type": "tmlc.playback", "played_ms": 100},
    {"type": "tmlc.playback", "unplayed": [3, 5]},
    {"type": "tmlc.delegate", "task": "look it up"},
]
MESSAGES = {
    "live": [
        *BOTH,
        {"type": "session.update", "session": {"delegation": {"type": "client", "x": 1}}},
        {"type": "session.input_audio.append", "audio": SOUND, "tmlc": {"video": {"image_url": PICTURE}}},
        {"type": "session.input_audio.mute"},
        {"type": "session.input_audio.unmute"},
        {"type": "session.instructions.append", "content": "shorter"},
        {"type": "session.thinking.append", "content": "it is noon"},
        {"type": "session.commentary.append", "content": "It is noon.", "tmlc": {"policy": "next_gap"}},
        {"type": "tmlc.input_text.append", "text": "typed"},
        {"type": "tmlc.input_video_frame.append", "image_url": PICTURE},
    ],
    "realtime": [
        *BOTH,
        {"type": "session.update", "session": {
            "type": "realtime", "model": "m", "instructions": "Be kind.", "output_modalities": ["audio"],
            "audio": {"input": {"format": {"type": "audio/pcm", "rate": 24000}, "turn_detection": None},
                      "output": {"format": {"type": "audio/pcmu"}, "voice": "x"}},
            "tools": [{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}],
            "tool_choice": "auto", "max_output_tokens": "inf", "truncation": "auto", "tmlc": {"events": True},
        }},
        {"type": "input_audio_buffer.append", "audio": SOUND, "tmlc": {"video": {"image_url": PICTURE}}},
        {"type": "input_audio_buffer.commit"},
        {"type": "input_audio_buffer.clear"},
        {"type": "conversation.item.create", "item": {"id": "one", "type": "message", "role": "user", "content": [
            TEXT, {"type": "input_audio", "audio": SOUND}, {"type": "input_image", "image_url": PICTURE}]}},
        {"type": "conversation.item.retrieve", "item_id": "one"},
        {"type": "conversation.item.truncate", "item_id": "one", "content_index": 0, "audio_end_ms": 100},
        {"type": "response.create", "response": {"instructions": "Greet.", "metadata": {"a": "b"}}},
        {"type": "response.cancel"},
        {"type": "tmlc.input_video_frame.append", "image_url": PICTURE},
    ],
}  # fmt: skip


#: Why a message of these that is sound may be refused: the picture is no whole one, and the model has said nothing.
OF_ANOTHER_TIME = ("picture", "only audio of the model can be truncated", "response")


def changed(message, rng):
    """The text of the message with one to three edits; None where a text frame cannot hold it."""
    made = copy.deepcopy(message)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if made:
            mutate_json(made, rng)
    try:
        return dumps(made).decode()
    except UnicodeDecodeError:
        return None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dialect", MESSAGES)
def test_no_message_is_a_fault_of_the_server_or_costs_the_session(desk, caplog, dialect, seed):
    rng = Random(seed)

    async def test(desk):
        wire = await desk.connect("live")
        if dialect == "live":
            assert (await wire.ask("session.start", session=START))[0]["type"] == "session.started"
            await desk.edges()
        else:
            wire = await desk.realtime()
        for message in copy.deepcopy(MESSAGES[dialect]):  # as they are, they are taken
            errors = [e["error"]["message"] for e in await wire.ask(message.pop("type"), **message) if "error" in e]
            assert all(any(reason in error for reason in OF_ANOTHER_TIME) for error in errors), (message, errors)
        for k in range(150):
            text = changed(rng.choice(MESSAGES[dialect]), rng)
            if text is not None:
                await wire.socket.send_str(text)
            if k % 10 == 0:
                await desk.edges()
        await desk.edges(2)
        assert not wire.ended.done() and desk.open_seats == 1
        wire.events.clear()
        await desk.edges(3)
        assert wire.of("error") == [] and desk.scheduler.stats().ended == {}

    desk(test, answer=lambda delegation, context: "done", sees=True)
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("seed", range(4))
def test_no_start_is_a_fault_of_the_server(desk, caplog, seed):
    rng, started = Random(seed), []

    async def test(desk):
        for _ in range(40):
            wire = await desk.connect("live")
            text = changed({"type": "session.start", "session": START}, rng)
            if text is not None:
                await wire.socket.send_str(text)
                await wire.sync()
                (first, *_) = wire.events
                started.append(first["type"] == "session.started")
                assert started[-1] or first["error"]["code"] != "server_error"
            await wire.socket.close()
            desk.wires.remove(wire)
            while len(desk.hub.sessions):  # who left is waited for, for ten seconds
                await desk.edges(60)

    desk(test)
    assert any(started) and not all(started)
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []

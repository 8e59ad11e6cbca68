"""The Realtime dialect, event by event, over a real socket."""

import base64

import numpy as np
import pytest
from aiohttp import WSServerHandshakeError

from tmlc.runtimes.gateway import responses
from tmlc.runtimes.gateway import wire as wires
from tmlc.runtimes.gateway.audio import AudioFormat, decode, encode

TOOL = {"type": "function", "name": "delegate", "parameters": {"type": "object"}}


def pcm(samples, kind="audio/pcm", rate=24000):
    return base64.b64encode(encode(samples, AudioFormat(kind, rate))).decode()


def message(role, *parts, **fields):
    return {"type": "message", "role": role, "content": [*parts], **fields}


def text(words):
    return {"type": "input_text", "text": words}


def kinds(events):
    return [event["type"] for event in events]


def both_formats(kind, rate):
    return {side: {"format": {"type": kind, "rate": rate}} for side in ("input", "output")}


def test_a_session_begins_with_the_connection_and_is_updated(desk):
    async def test(desk):
        wire = await desk.realtime()
        created = wire.events[0]
        found = created["session"]
        assert found["object"] == "realtime.session" and found["model"] == "m" and found["id"].startswith("sess_")
        assert not created["tmlc"]["resumed"]
        given = {
            "type": "realtime", "model": "also", "instructions": "Be brief.", "tools": [TOOL], "tool_choice": "auto",
            "output_modalities": ["text"], "max_output_tokens": 100, "truncation": "auto",
            "audio": {"input": {"turn_detection": None}, "output": {"voice": "v"}}, "tmlc": {"events": True},
        }  # fmt: skip
        (updated,) = await wire.ask("session.update", session=given)
        assert updated["type"] == "session.updated"
        made = updated["session"]
        assert made["instructions"] == "Be brief." and made["tools"] == [TOOL] and made["max_output_tokens"] == 100
        assert made["audio"]["input"]["turn_detection"] is None and made["audio"]["output"]["voice"] == "v"
        assert made["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": 24000}
        (again,) = await wire.ask("session.update", session={})  # what is not named stays
        assert again["session"] == made
        await desk.edges(2)
        assert desk.model.thoughts == "Be brief."  # once

    desk(test)


REFUSED = [
    ({"type": "session.fly"}, "unknown_event", "type"),
    ({"type": "conversation.item.delete", "item_id": "i"}, "not_supported", "type"),
    ({"type": "output_audio_buffer.clear"}, "not_supported", "type"),
    *(({"type": "session.update", "session": session}, code, param) for session, code, param in (
        ([], "invalid_type", "session"),
        ({"vioce": 1}, "unknown_parameter", "session.vioce"),
        ({"type": "transcription"}, "not_supported", "session.type"),
        ({"model": "other"}, "model_not_found", "session.model"),
        ({"output_modalities": ["audio", "text"]}, "invalid_value", "session.output_modalities"),
        ({"tools": [{"type": "mcp"}]}, "not_supported", "session.tools[0]"),
        ({"tools": [TOOL] * 129}, "invalid_value", "session.tools"),
        ({"tools": [{**TOOL, "description": "x" * 140_000}]}, "string_above_max_length", "session"),
        ({"audio": {"input": {"format": {"type": "audio/mp3"}}}}, "invalid_value", "session.audio.input.format"),
        ({"audio": {"output": {"format": None}}}, "invalid_type", "session.audio.output.format"),
        ({"audio": {"output": {"format": {"rate": "x"}}}}, "invalid_type", "session.audio.output.format"),
        ({"instructions": "x" * 8193}, "invalid_value", "session.instructions"),
        ({"tmlc": {"pace": "buffered"}}, "unknown_parameter", "session.tmlc.pace"),
        ({"tmlc": {"events": "yes"}}, "invalid_type", "session.tmlc.events"))),
    ({"type": "input_audio_buffer.append"}, "invalid_type", "audio"),
    ({"type": "input_audio_buffer.append", "audio": "AAAA"}, "invalid_value", "audio"),
    ({"type": "conversation.item.create"}, "not_supported", "item.type"),
    *(({"type": "conversation.item.create", "item": item}, code, param) for item, code, param in (
        (message("user", text("x"), id=""), "invalid_value", "item.id"),
        (message("user", text("x"), id=["a"]), "invalid_value", "item.id"),
        (message("robot", text("x")), "invalid_value", "item.role"),
        (message("user"), "invalid_value", "item.content"),
        (message("user", text("kept out"), {"type": "video"}), "invalid_value", "item.content[1].type"),
        (message("user", text("kept out"), text("")), "invalid_value", "item.content[1].text"),
        (message("system", {"type": "input_audio", "audio": "AAA="}), "invalid_value", "item.content[0].type"),
        (message("user", {"type": "input_image", "image_url": "https://example.com/a.png"}), "invalid_value",
         "item.content[0].image_url"),
        (message("user", {"type": "input_audio", "audio": "AAAA"}), "invalid_value", "item.content[0].audio"),
        ({"type": "function_call_output", "call_id": "no", "output": "x"}, "delegation_not_found", "item.call_id"),
        ({"type": "function_call_output", "output": "x"}, "missing_required_parameter", "item.call_id"))),
    ({"type": "conversation.item.retrieve", "item_id": "no"}, "item_not_found", "item_id"),
    ({"type": "conversation.item.truncate", "item_id": "no", "audio_end_ms": 1}, "item_not_found", "item_id"),
    ({"type": "response.cancel"}, "response_cancel_not_active", None),
    ({"type": "response.create", "response": {"instructions": 1}}, "invalid_type", "response.instructions"),
    ({"type": "response.create", "response": {"metadata": {"x": "y" * 5000}}}, "string_above_max_length",
     "response.metadata"),
    ({"type": "response.create", "response": {"tmlc": {"policy": "now"}}}, "invalid_value", "tmlc.policy"),
    ({"type": "tmlc.playback"}, "invalid_value", "played_ms"),
    ({"type": "tmlc.delegate", "task": ""}, "invalid_value", "task"),
]  # fmt: skip


def test_what_is_refused_is_an_error_that_names_the_field_and_the_session_goes_on(desk):
    async def test(desk):
        wire = await desk.realtime()
        for number, (event, code, param) in enumerate(REFUSED):
            given = {**{k: v for k, v in event.items() if k != "type"}, "event_id": f"e{number}"}
            error = await wire.error(event["type"], **given)
            assert (error["code"], error["param"], error["event_id"]) == (code, param, f"e{number}"), event
        for sent, code in (("{", "invalid_json"), ("null", "invalid_event")):
            before = len(wire.events)
            await wire.socket.send_str(sent)
            await wire.sync()
            assert [event["error"]["code"] for event in wire.events[before:]] == [code]
        await desk.edges(3)
        assert not desk.model.typed and not desk.model.injected
        (updated,) = await wire.ask("session.update", session={})
        assert updated["session"] == wire.events[0]["session"]  # nothing has changed

    desk(test)


def test_items_are_answered_read_and_kept(desk):
    async def test(desk):
        wire = await desk.realtime()
        item = message("user", text("hello"), id="one", extra="x" * 100_000)
        added, done = await wire.ask("conversation.item.create", item=item)
        assert kinds([added, done]) == ["conversation.item.added", "conversation.item.done"]
        kept = {"id": "one", "type": "message", "role": "user", "content": [text("hello")], "object": "realtime.item",
                "status": "completed"}  # fmt: skip
        assert added["item"] == done["item"] == kept and added["previous_item_id"] is None
        (got,) = await wire.ask("conversation.item.retrieve", item_id="one")
        assert got["item"] == kept
        assert (await wire.error("conversation.item.create", item=item))["param"] == "item.id"  # the name is taken
        added, _ = await wire.ask("conversation.item.create", item=message("system", text("It is night.")))
        assert added["previous_item_id"] == "one"
        await desk.edges(3)
        assert bytes(desk.model.typed).decode() == "hello" and desk.model.thoughts == "system: It is night."
        for number in range(responses.MAX_ITEMS):
            await wire.send("conversation.item.create", item=message("user", text("x"), id=f"more {number}"))
        await wire.sync()
        assert (await wire.error("conversation.item.retrieve", item_id="one"))["code"] == "item_not_found"

    desk(test)


def test_the_turns_of_the_user_are_told(desk, sine):
    async def test(desk):
        wire = await desk.realtime()
        await wire.ask("input_audio_buffer.append", audio=pcm(sine[0](300, 0.6, 24000)))
        await desk.edges(6)
        turn = [event for event in wire.events if "input_audio_buffer" in event["type"] or "item" in event["type"]]
        assert kinds(turn) == [
            "input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped", "input_audio_buffer.committed",
            "conversation.item.added", "conversation.item.done",
        ]  # fmt: skip
        assert turn[0]["audio_start_ms"] < turn[1]["audio_end_ms"]
        assert turn[0]["item_id"] == turn[2]["item_id"] == turn[3]["item"]["id"]
        committed, added, _ = await wire.ask("input_audio_buffer.commit")  # by hand
        assert committed["previous_item_id"] == turn[0]["item_id"]
        assert added["item"]["content"] == [{"type": "input_audio"}]
        await wire.ask("session.update", session={"audio": {"input": {"turn_detection": None}}})
        before = len(wire.events)
        await wire.ask("input_audio_buffer.append", audio=pcm(sine[0](300, 0.6, 24000)))
        await desk.edges(6)
        assert len(wire.events) == before

    desk(test)


def test_what_was_not_heard_yet_is_forgotten_on_clear(desk, sine):
    async def test(desk):
        wire = await desk.realtime()
        await wire.send("input_audio_buffer.append", audio=pcm(sine[0](300, 1.0, 24000)))
        await wire.sync()
        await desk.edges()
        (cleared,) = await wire.ask("input_audio_buffer.clear")
        assert cleared["type"] == "input_audio_buffer.cleared"
        await desk.edges(3)
        assert [float(np.abs(tick).max()) > 0.1 for tick in desk.model.heard] == [True, False, False, False]

    desk(test)


@pytest.mark.parametrize(
    ("kind", "rate", "noise"),
    [("audio/pcm", 24000, 0.01), ("audio/pcm", 16000, 0.01), ("audio/pcmu", 8000, 0.05), ("audio/pcma", 8000, 0.05)],
)
def test_a_tone_goes_through_in_each_format_both_ways_without_a_seam(desk, sine, kind, rate, noise):
    tone, fitted = sine

    async def test(desk):
        wire = await desk.realtime(audio=both_formats(kind, rate))
        samples = tone(330, 2.0, rate)
        for at in range(0, samples.size, rate // 50):
            await wire.send("input_audio_buffer.append", audio=pcm(samples[at : at + rate // 50], kind, rate))
        desk.model.says("x" * 10)
        await wire.sync()
        await desk.edges(10)
        level, rest = fitted(desk.model.sound_heard[3200:-3200], 330, 16000)
        assert level == pytest.approx(0.3, rel=0.03) and rest < noise
        deltas = [base64.b64decode(event["delta"]) for event in wire.of("response.output_audio.delta")]
        out = np.concatenate([decode(delta, AudioFormat(kind, rate)) for delta in deltas])
        level, rest = fitted(out[rate // 5 : -rate // 5], 440, rate)
        assert level == pytest.approx(0.3, rel=0.03) and rest < noise

    desk(test)


def test_notes_and_ticks_are_told_after_opt_in_only(desk):
    async def test(desk):
        plain, told = await desk.realtime(), await desk.realtime(tmlc={"events": True})
        await desk.edges(3)
        assert not [event for event in plain.events if event["type"].startswith("tmlc.")]
        ticks = told.of("tmlc.tick")
        assert [event["tick"] for event in ticks] == [0, 1, 2]
        assert [event["sequence"] for event in ticks] == [1, 2, 3]

    desk(test)


def test_who_comes_back_still_has_its_items_and_its_outputs(desk):
    async def test(desk):
        wire = await desk.realtime(tools=[TOOL])
        token = wire.of("session.created")[0]["tmlc"]["resume_token"]
        await wire.ask("conversation.item.create", item=message("user", text("hello"), id="one"))
        desk.model.delegates("t")
        await desk.edges(2)
        call = wire.of("response.function_call_arguments.done")[0]["call_id"]
        output = {"type": "function_call_output", "call_id": call, "output": "Three."}
        await wire.ask("conversation.item.create", item=output)
        again = await desk.connect("realtime", f"tmlc_resume={token}")
        await again.sync()
        assert await wire.close_code() == wires.TAKEN_OVER
        created = again.events[0]
        assert created["tmlc"]["resumed"] and created["session"]["tools"] == [TOOL]
        (got,) = await again.ask("conversation.item.retrieve", item_id="one")
        assert got["item"]["content"] == [text("hello")]
        await again.ask("response.create")
        await desk.until(lambda: again.said.endswith("Three."))

    desk(test)


def test_a_model_that_is_not_served_is_404_before_the_upgrade(desk):
    async def test(desk):
        with pytest.raises(WSServerHandshakeError) as refused:
            await desk.client.ws_connect("/v1/realtime?model=x")
        assert refused.value.status == 404
        answer = await desk.client.get("/v1/realtime?model=m")
        assert answer.status == 426  # no WebSocket

    desk(test)


def test_a_session_that_ends_says_so(desk):
    async def test(desk):
        wire = await desk.realtime()
        desk.model.says("ab")
        await desk.edges(2)
        (session,) = desk.hub.sessions._by_token.values()
        desk.model.clock.advance(1.5)  # more than five ticks
        desk.scheduler.step()
        assert await wire.close_code() == 1000
        assert kinds(wire.events)[-2:] == ["response.done", "error"]
        assert wire.events[-1]["error"]["code"] == "session_expired"
        assert session.ended.reason == "behind"

    desk(test)

"""The Live dialect, event by event, over a real socket; test_live_connection.py has what becomes of the connection."""

import asyncio
import base64

import numpy as np
import pytest

from tmlc.runtimes.core.admission import Level
from tmlc.runtimes.gateway.audio import AudioFormat, decode, encode

BUFFERED = {"pace": "buffered"}
PICTURE = "data:image/png;base64,iVBORw0KGgo="


def pcm(samples, kind="audio/pcm", rate=24000):
    return base64.b64encode(encode(samples, AudioFormat(kind, rate))).decode()


def text_item(*parts):
    return {"type": "message", "role": "user", "content": [*parts]}


def test_a_session_from_its_start_to_its_end(desk):
    async def test(desk):
        wire = await desk.connect("live")
        audio = {"format": {"type": "audio/pcm", "rate": 16000}}
        session = {"model": "also", "instructions": "Be kind.", "audio": audio}
        (started,) = await wire.ask("session.start", event_id="a", session=session)
        assert started["type"] == "session.started" and started["client_event_id"] == "a"
        found = started["session"]
        assert found["model"] == "also" and found["status"] == "active" and found["instructions"] == "Be kind."
        assert found["audio"]["format"] == {"type": "audio/pcm", "rate": 16000}
        assert found["delegation"] == {"type": "client"} and found["store"] is False
        assert not started["tmlc"]["resumed"] and started["tmlc"]["tick_ms"] == 200
        (updated,) = await wire.ask("session.update", event_id="b", session={"delegation": {"type": "client", "x": 1}})
        assert updated["type"] == "session.updated" and updated["client_event_id"] == "b"
        assert updated["session"] == found | {"delegation": {"type": "client", "x": 1}}
        await desk.edges(51)
        assert [event["usage"]["seconds"] for event in wire.of("session.usage.updated")] == [10]
        assert len(wire.of("session.output_audio.delta")) == 50  # silence, too
        await wire.send("session.close", event_id="c")
        await asyncio.sleep(0.02)
        desk.scheduler.step()
        assert await wire.close_code() == 1000
        closed = wire.events[-1]
        assert closed["type"] == "session.closed" and closed["reason"] == "close_requested"
        assert closed["client_event_id"] == "c" and closed["usage"] == {"seconds": 10}
        assert desk.open_seats == 0 and len(desk.hub.sessions) == 0

    desk(test)


STARTS = [
    ({}, "missing_required_parameter", "session.model"),
    ({"model": 3}, "invalid_type", "session.model"),
    ({"model": "x" * 300}, "string_above_max_length", "session.model"),
    ({"model": "other"}, "model_not_found", "session.model"),
    ({"modle": "m"}, "unknown_parameter", "session.modle"),
    ({"audio": []}, "invalid_type", "session.audio"),
    ({"audio": {"input": {}}}, "unknown_parameter", "session.audio.input"),
    ({"audio": {"format": {"type": "audio/opus"}}}, "invalid_value", "session.audio.format"),
    ({"audio": {"format": {"type": "audio/pcm", "rate": 44100}}}, "invalid_value", "session.audio.format"),
    ({"audio": {"format": {"type": "audio/pcmu", "rate": 16000}}}, "invalid_value", "session.audio.format"),
    ({"audio": {"format": {"rate": "24000"}}}, "invalid_type", "session.audio.format"),
    ({"delegation": {"type": "mine"}}, "invalid_value", "session.delegation.type"),
    ({"delegation": {"type": "decisions"}}, "not_supported", "session.delegation.type"),
    ({"delegation": {"type": "responses"}}, "not_supported", "session.delegation.type"),
    ({"delegation": {"type": "client", "x": "y" * 140_000}}, "string_above_max_length", "session"),
    ({"store": True}, "not_supported", "session.store"),
    ({"triggers": [{}]}, "not_supported", "session.triggers"),
    ({"client": {"a": 1}}, "not_supported", "session.client"),
    ({"instructions": 1}, "invalid_type", "session.instructions"),
    ({"instructions": "x" * 16_385}, "string_above_max_length", "session.input"),
    ({"instructions": "я" * 16_000}, "string_above_max_length", "session.input"),  # as tokens it is too long
    ({"input": [{}] * 129}, "invalid_value", "session.input"),
    ({"input": [{"role": "user", "content": "hi"}]}, "invalid_value", "session.input[0].content"),
    ({"input": [{"role": "robot", "content": [{"text": "hi"}]}]}, "invalid_value", "session.input[0].role"),
    ({"input": [{"role": "user", "content": [{"text": ""}]}]}, "invalid_value", "session.input[0].content[0].text"),
    ({"tmlc": {"event": True}}, "unknown_parameter", "session.tmlc.event"),
    ({"tmlc": {"events": 1}}, "invalid_type", "session.tmlc.events"),
    ({"tmlc": {"pace": "fast"}}, "invalid_value", "session.tmlc.pace"),
    ({"tmlc": {"seed": -1}}, "invalid_value", None),
    ({"tmlc": {"temperature": "hot"}}, "invalid_value", None),
]


def test_a_start_that_is_refused_leaves_nothing_open_and_the_next_one_works(desk):
    async def test(desk):
        wire = await desk.connect("live")
        for session, code, param in STARTS:
            given = {"model": "m", **session} if session else {}
            error = await wire.error("session.start", event_id="e", session=given)
            assert (error["code"], error.get("param"), error["client_event_id"]) == (code, param, "e"), session
            await desk.edges()
            assert desk.open_seats == 0 and len(desk.hub.sessions) == 0, session
        assert (await wire.error("session.update", session={}))["code"] == "session_not_started"
        (started,) = await wire.ask("session.start", session={"model": "m"})
        assert started["type"] == "session.started"
        assert (await wire.error("session.start", session={"model": "m"}))["code"] == "session_already_started"

    desk(test)


REFUSED = [
    ({"type": "session.fly"}, "unknown_event", "type"),
    *(({"type": kind}, "not_supported", "type") for kind in (
        "session.output_audio_fixture.play", "session.decision.create", "session.decision_item.create",
        "session.decision_item.delete", "decision.create", "decision.item.create", "decision.item.delete",
        "response.item.create", "response.create", "transport.dtmf.send", "session.fork")),
    ({"type": "session.input_audio.append"}, "invalid_type", "audio"),
    ({"type": "session.input_audio.append", "audio": "?"}, "invalid_value", "audio"),
    ({"type": "session.input_audio.append", "audio": "AAAA"}, "invalid_value", "audio"),  # a sample and a half
    ({"type": "session.input_audio.append", "audio": "A" * 1_500_000}, "string_above_max_length", "audio"),
    ({"type": "session.input_audio.append", "audio": "", "tmlc": 1}, "invalid_type", "tmlc"),
    ({"type": "session.input_audio.append", "audio": "", "tmlc": {"video": 1}}, "invalid_type", "tmlc.video"),
    ({"type": "session.thinking.append"}, "missing_required_parameter", "content"),
    ({"type": "session.instructions.append", "content": ""}, "invalid_value", "content"),
    ({"type": "session.commentary.append", "content": "x" * 8193}, "string_above_max_length", "content"),
    ({"type": "session.commentary.append", "content": "x", "tmlc": {"policy": "silent"}}, "invalid_value",
     "tmlc.policy"),
    ({"type": "session.thinking.append", "content": "x", "delegation_id": "dlg_no"}, "delegation_not_found",
     "delegation_id"),
    ({"type": "session.update", "session": {"model": "m"}}, "unknown_parameter", "session.model"),
    ({"type": "session.update", "session": {"triggers": [1]}}, "not_supported", "session.triggers"),
    ({"type": "session.update", "session": {"delegation": {"type": "responses"}}}, "not_supported",
     "session.delegation.type"),
    ({"type": "conversation.item.create"}, "invalid_value", "item"),
    ({"type": "conversation.item.create", "item": text_item({"type": "input_text", "text": "kept out"}, {"type": "x"})},
     "invalid_value", "item.content[1].type"),
    ({"type": "conversation.item.create", "item": text_item({"type": "input_text", "text": ""})}, "invalid_value",
     "item.content[0].text"),
    ({"type": "tmlc.input_video_frame.append", "image_url": "https://x.com/a.png"}, "invalid_value", "image_url"),
    ({"type": "tmlc.input_video_frame.append", "image_url": PICTURE}, "not_supported", "image_url"),
    ({"type": "tmlc.input_text.append"}, "missing_required_parameter", "text"),
    ({"type": "tmlc.playback", "played_ms": -1}, "invalid_value", "played_ms"),
    ({"type": "tmlc.playback", "unplayed": [1]}, "invalid_value", "played_ms"),
    ({"type": "tmlc.delegate", "task": "t"}, "invalid_value", None),  # no background model
]  # fmt: skip


def test_what_is_refused_is_an_error_that_names_the_field_and_the_session_goes_on(desk):
    async def test(desk):
        wire = await desk.live()
        for event, code, param in REFUSED:
            error = await wire.error(kind=event["type"], **{k: v for k, v in event.items() if k != "type"})
            assert (error["code"], error.get("param")) == (code, param), event
        for text, code in (("{", "invalid_json"), ("[]", "invalid_event"), ('{"type": 1}', "invalid_event"),
                           ("[" * 5000, "invalid_json")):  # fmt: skip
            before = len(wire.events)
            await wire.socket.send_str(text)
            await wire.sync()
            assert [event["error"]["code"] for event in wire.events[before:]] == [code]
        before = len(wire.events)
        await wire.socket.send_bytes(b"{}")
        await wire.sync()
        assert wire.events[before]["error"]["code"] == "invalid_event"
        await desk.edges(3)
        assert not desk.model.typed and not desk.model.injected  # nothing of what was refused came in
        assert len(wire.of("session.output_audio.delta")) == 3

    desk(test)


SAID = [
    ({"type": "tmlc.input_video_frame.append", "image_url": "https://x.com/a.png"},
     "a picture must be a data URL of a JPEG, PNG or WebP file in base64. "
     "send data:image/jpeg;base64, and the bytes of the file in base64"),
    ({"type": "tmlc.input_video_frame.append", "image_url": "data:image/png;base64,?"},
     "the picture is not valid base64. send data:image/jpeg;base64, and the bytes of the file in base64"),
    ({"type": "tmlc.input_text.append", "text": "a\ud800"},
     "text is not valid Unicode at character 1. leave out the lone surrogate there"),
    ({"type": "tmlc.delegate", "task": " "},
     "this server has no background model. name one in the background's settings"),
]  # fmt: skip


def test_a_refusal_says_what_is_wrong_and_what_to_do(desk):
    async def test(desk):
        for own, message in (
            ({"seed": "x"}, "seed must be a whole number from 0 to 2^63 - 1, not 'x'. "
             "give such a number, or leave it out for 0"),
            ({"temperature": -1}, "temperature must be 0 or a positive number, not -1. "
             "give 0 for the most likely token each time, or 1 to draw as the model predicts"),
        ):  # fmt: skip
            wire = await desk.connect("live")
            assert (await wire.error("session.start", session={"model": "m", "tmlc": own}))["message"] == message
        wire = await desk.live()
        for event, message in SAID:
            error = await wire.error(kind=event["type"], **{k: v for k, v in event.items() if k != "type"})
            assert error["message"] == message

    desk(test)


def test_muted_the_model_hears_silence(desk, sine):
    async def test(desk):
        wire = await desk.live(tmlc=BUFFERED)
        voice = pcm(sine[0](440, 0.2, 24000))
        await wire.send("session.input_audio.append", audio=voice)
        (muted,) = await wire.ask("session.input_audio.mute", event_id="m")
        assert (muted["type"], muted["client_event_id"]) == ("session.input_audio.muted", "m")
        await wire.send("session.input_audio.append", audio=voice)
        (unmuted,) = await wire.ask("session.input_audio.unmute", event_id="u")
        assert (unmuted["type"], unmuted["client_event_id"]) == ("session.input_audio.unmuted", "u")
        await wire.ask("session.input_audio.append", audio=voice)
        await desk.edges(3)
        loud = [float(np.abs(tick[400:2800]).max()) > 0.1 for tick in desk.model.heard]
        assert loud == [True, False, True]

    desk(test)


def test_texts_enter_silently_and_commentary_is_said(desk):
    async def test(desk):
        wire = await desk.live()
        await desk.edges(2)
        for kind in ("instructions", "thinking"):
            (ack,) = await wire.ask(f"session.{kind}.append", event_id=kind, content=f"<{kind}>", delegation_id=None)
            assert ack["type"] == f"session.{kind}.appended" and ack["client_event_id"] == kind
            assert ack["start_ms"] == ack["end_ms"] == 400
        await desk.edges()
        assert desk.model.thoughts == "<instructions><thinking>" and not wire.said
        (ack,) = await wire.ask("session.commentary.append", content="It rains.", event_id="c")
        assert ack["type"] == "session.commentary.appended"
        await desk.edges(10)
        assert wire.said == "It rains." and "rains" not in desk.model.thoughts
        first = wire.of("session.output_transcript.delta")[0]
        assert first["end_ms"] - first["start_ms"] == 200
        await wire.ask("tmlc.input_text.append", text="typed")
        await wire.ask("conversation.item.create", item=text_item({"type": "input_text", "text": " too"}))
        await desk.edges(4)
        assert bytes(desk.model.typed).decode() == "typed too"

    desk(test)


def test_instructions_and_history_enter_before_the_first_word_whole_in_any_script(desk):
    async def test(desk):
        told = "Отвечай коротко. " * 100
        history = [{"role": role, "content": [{"text": role}]} for role in ("developer", "user", "assistant")]
        await desk.live(instructions=told, input=history)
        await desk.edges(120)
        found = desk.model.thoughts
        assert found.replace("\n", "").startswith(told) and "[…]" not in found
        at = [found.index(f"{role}: {role}") for role in ("developer", "user", "assistant")]
        assert at == sorted(at)

    desk(test)


FORMATS = [
    ("audio/pcm", 16000, 0.01), ("audio/pcm", 24000, 0.01), ("audio/pcmu", 8000, 0.05), ("audio/pcma", 8000, 0.05),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rate", "noise"), FORMATS)
def test_a_tone_goes_through_in_each_format_both_ways_without_a_seam(desk, sine, kind, rate, noise):
    tone, fitted = sine

    async def test(desk):
        wire = await desk.live(audio={"format": {"type": kind, "rate": rate}}, tmlc=BUFFERED)
        samples = tone(330, 2.0, rate)
        for at in range(0, samples.size, rate // 50):
            await wire.send("session.input_audio.append", audio=pcm(samples[at : at + rate // 50], kind, rate))
        desk.model.says("x" * 10)
        await wire.sync()
        await desk.edges(10)
        level, rest = fitted(desk.model.sound_heard[3200:-3200], 330, 16000)
        assert level == pytest.approx(0.3, rel=0.03) and rest < noise
        deltas = [base64.b64decode(event["delta"]) for event in wire.of("session.output_audio.delta")]
        out = np.concatenate([decode(delta, AudioFormat(kind, rate)) for delta in deltas])
        assert out.size == pytest.approx(2.0 * rate, abs=rate // 12)  # the stream is as long as the session
        level, rest = fitted(out[rate // 5 : -rate // 5], 440, rate)
        assert level == pytest.approx(0.3, rel=0.03) and rest < noise

    desk(test)


def test_the_client_does_delegated_work(desk):
    async def test(desk):
        wire = await desk.live()
        desk.model.delegates("count the cats")
        await desk.edges(2)
        (created,) = wire.of("session.delegation.created")
        assert created["delegation"]["target"] == "client" and created["tmlc"] == {"task": "count the cats"}
        name = created["delegation"]["id"]
        assert "cats" not in wire.said
        (ack,) = await wire.ask("session.thinking.append", content="two so far", delegation_id=name)
        assert ack["type"] == "session.thinking.appended"
        await wire.ask("session.commentary.append", content="Three cats.", delegation_id=name)
        await desk.edges(12)
        assert desk.model.thoughts == "two so far" and wire.said.endswith("Three cats.")
        error = await wire.error("session.update", session={"delegation": {"type": "responses"}})
        assert error["code"] == "not_supported"

    desk(test)


def test_the_background_model_does_delegated_work_and_its_result_is_said(desk):
    def answer(delegation, context):
        if delegation.task == "fail":
            raise ValueError("no")
        return f"Done: {delegation.task}."

    async def test(desk):
        wire = await desk.live(delegation={"type": "responses"})
        desk.model.delegates("add")
        await desk.until(lambda: wire.said.endswith("Done: add."))
        (created,) = wire.of("session.delegation.created")
        assert created["delegation"]["target"] == "responses" and "tmlc" not in created
        await wire.send("tmlc.delegate", task="asked")
        await desk.until(lambda: wire.said.endswith("Done: asked."))
        await wire.send("tmlc.delegate", task="fail")
        await desk.until(lambda: wire.of("info"))
        assert wire.of("info")[0]["code"] == "delegation_failed"
        error = await wire.error("session.update", session={"delegation": {"type": "client"}})
        assert (error["code"], error["param"]) == ("invalid_value", "session.delegation.type")

    desk(test, answer=answer)


def fates(wire):
    return [event["fate"] for event in wire.of("tmlc.injection")]


def test_a_result_that_was_not_played_is_said_again(desk):
    async def test(desk):
        wire = await desk.live(tmlc={"events": True, "playback": True})
        await wire.ask("session.commentary.append", content="abcd")
        await desk.until(lambda: wire.said == "abcd")
        await desk.edges(3)
        assert not fates(wire)  # said, but nobody knows whether it was played
        last = wire.of("tmlc.tick")[-1]["tick"]
        await wire.ask("tmlc.playback", unplayed=[0, last])
        await desk.until(lambda: wire.said == "abcdabcd")
        await wire.ask("tmlc.playback", played_ms=1e9)
        assert fates(wire) == ["cut", "delivered"]

    desk(test)


def test_a_voice_over_a_result_cuts_it_off_and_it_is_said_again(desk, sine):
    async def test(desk):
        wire = await desk.live(tmlc={"events": True, **BUFFERED})
        await wire.ask("session.commentary.append", content="a long result, " * 4, tmlc={"policy": "next_gap"})
        await desk.until(lambda: wire.said)
        await wire.send("session.input_audio.append", audio=pcm(sine[0](300, 1.0, 24000)))
        await wire.sync()
        await desk.until(lambda: fates(wire) == ["cut"])
        assert len(wire.said) < 30
        await desk.until(lambda: fates(wire) == ["cut", "delivered"])
        assert wire.said.endswith("a long result, " * 4)

    desk(test)


def test_ticks_are_told_after_opt_in_only(desk):
    async def test(desk):
        plain, told = await desk.live(), await desk.live(tmlc={"events": True})
        await desk.edges(3)
        assert not [event for event in plain.events if event["type"].startswith("tmlc.")]
        assert all("tmlc" not in event for event in plain.of("session.output_audio.delta"))
        assert [event["tick"] for event in told.of("tmlc.tick")] == [0, 1, 2]
        keys = {"late_ms", "step_ms", "user_speaking", "model_speaking", "collapsed", "missing_ms", "batch"}
        assert keys < set(told.of("tmlc.tick")[0]) and told.of("tmlc.tick")[-1]["batch"] == 2
        numbers = [event["tmlc"]["sequence"] for event in told.of("session.output_audio.delta")]
        assert numbers == sorted(set(numbers))

    desk(test)


def test_under_pressure_transcripts_wait_and_nothing_of_them_is_lost(desk):
    async def test(desk):
        wire = await desk.live()
        desk.scheduler._ladder.edge = lambda *_: False  # the level is the test's
        desk.scheduler._ladder.level = Level.NO_TRANSCRIPTS
        desk.model.says("abc")
        await desk.edges(4)
        assert not wire.said and len(wire.of("session.output_audio.delta")) == 4
        desk.scheduler._ladder.level = Level.NORMAL
        await desk.edges()
        (delta,) = wire.of("session.output_transcript.delta")
        assert (delta["delta"], delta["start_ms"], delta["end_ms"]) == ("abc", 0, 600)
        desk.scheduler._ladder.level = Level.NO_TRANSCRIPTS
        desk.model.says("de")
        await desk.edges(2)
        await wire.send("session.close")
        await asyncio.sleep(0.02)
        desk.scheduler.step()
        await wire.close_code()
        assert wire.said == "abcde" and wire.events[-1]["type"] == "session.closed"

    desk(test)


@pytest.mark.parametrize("after", ["", "&tmlc_after=2"])
def test_who_comes_back_under_pressure_is_told_what_was_said_before_once(desk, after):
    async def test(desk):
        wire = await desk.live()
        desk.scheduler._ladder.edge = lambda *_: False
        desk.scheduler._ladder.level = Level.NO_TRANSCRIPTS
        desk.model.says("abc")
        await desk.edges(4)
        token = wire.of("session.started")[0]["tmlc"]["resume_token"]
        again = await desk.connect("live", f"tmlc_resume={token}{after}")
        desk.wires.remove(wire)
        await desk.edges()
        desk.scheduler._ladder.level = Level.NORMAL
        desk.model.says("d")
        await desk.edges(2)
        assert again.said == "abcd"

    desk(test)


def test_pictures_come_three_ways(desk):
    async def test(desk):
        from io import BytesIO

        from PIL import Image

        def picture(color):
            file = BytesIO()
            Image.new("RGB", (32, 32), color).save(file, "PNG")
            return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

        wire = await desk.live()
        ways = [
            lambda url: wire.ask("tmlc.input_video_frame.append", image_url=url),
            lambda url: wire.ask("session.input_audio.append", audio="AAAA" * 2, tmlc={"video": {"image_url": url}}),
            lambda url: wire.ask("conversation.item.create", item=text_item({"type": "input_image", "image_url": url})),
        ]
        for count, (way, color) in enumerate(zip(ways, [(200, 0, 0), (0, 200, 0), (0, 0, 200)], strict=True)):
            await way(picture(color))
            await desk.until(lambda count=count: len(desk.model.frames) > count, edges=3000)
            assert desk.model.frames[-1].reshape(-1, 3)[0].tolist() == list(color)
        await wire.ask("tmlc.input_video_frame.append", image_url=PICTURE, event_id="bad")
        await desk.until(lambda: wire.of("error"))
        error = wire.of("error")[0]["error"]
        assert (error["code"], error["param"], error["client_event_id"]) == ("invalid_value", "image_url", "bad")
        assert error["message"].startswith("the picture cannot be decoded: ")
        assert error["message"].endswith(". send a whole JPEG, PNG or WebP file")

    desk(test, sees=True)

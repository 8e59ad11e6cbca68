"""Responses of the Realtime dialect over a real socket: speech, function calls, said results, words held back."""

import json

import pytest

from tmlc.runtimes.core.admission import Level
from tmlc.runtimes.gateway import responses

TOOL = {"type": "function", "name": "delegate", "parameters": {"type": "object"}}


def kinds(events):
    return [event["type"] for event in events]


def test_a_stretch_of_speech_is_a_whole_response(desk):
    async def test(desk):
        wire = await desk.realtime()
        desk.model.says("abc")
        await desk.edges(8)
        order = [kind for kind in kinds(wire.events) if kind.startswith(("response", "conversation"))]
        assert order == [
            "response.created", "response.output_item.added", "conversation.item.added",
            "response.content_part.added",
            *["response.output_audio.delta", "response.output_audio_transcript.delta"] * 3,
            *["response.output_audio.delta"] * 4,  # a voice ends 200 ms after it was heard last; then three ticks
            "response.output_audio.done", "response.output_audio_transcript.done", "response.content_part.done",
            "response.output_item.done", "conversation.item.done", "response.done",
        ]  # fmt: skip
        done = wire.of("response.done")[0]["response"]
        (item,) = done["output"]
        assert done["status"] == "completed" and item["content"] == [{"type": "output_audio", "transcript": "abc"}]
        assert wire.of("response.output_audio_transcript.done")[0]["transcript"] == wire.said == "abc"
        told = [event for event in wire.events if event["type"].startswith("response")]
        assert {event.get("response_id") or event["response"]["id"] for event in told} == {done["id"]}

    desk(test)


def test_text_as_the_only_modality(desk):
    async def test(desk):
        wire = await desk.realtime(output_modalities=["text"])
        desk.model.says("hey")
        await desk.edges(8)
        assert "".join(event["delta"] for event in wire.of("response.output_text.delta")) == "hey"
        assert wire.of("response.output_text.done")[0]["text"] == "hey" and not wire.of("response.output_audio.delta")
        assert wire.of("response.content_part.added")[0]["part"] == {"type": "text", "text": ""}
        (item,) = wire.of("response.done")[0]["response"]["output"]
        assert item["content"] == [{"type": "output_text", "text": "hey"}]

    desk(test)


def test_a_response_that_is_asked_for_has_the_metadata_and_ends_empty_where_the_model_is_silent(desk):
    async def test(desk):
        wire = await desk.realtime()
        (created,) = await wire.ask("response.create", response={"metadata": {"mine": "1"}, "instructions": "Greet."})
        assert created["response"]["metadata"] == {"mine": "1"} and created["response"]["status"] == "in_progress"
        assert (await wire.error("response.create"))["code"] == "conversation_already_has_active_response"
        await desk.edges(responses.ASKED_TICKS)
        (done,) = wire.of("response.done")
        assert done["response"]["output"] == [] and done["response"]["metadata"] == {"mine": "1"}
        assert desk.model.thoughts == "Greet."

    desk(test)


def test_a_response_that_is_asked_for_while_the_model_speaks_follows_the_one_that_is_under_way(desk):
    async def test(desk):
        wire = await desk.realtime()
        desk.model.says("abcdef")
        await desk.edges(3)
        await wire.ask("response.create", response={"metadata": {"mine": "1"}})
        await desk.edges(8)
        order = [kind for kind in kinds(wire.events) if kind in ("response.created", "response.done")]
        assert order == ["response.created", "response.done"] * 2
        first, second = (event["response"] for event in wire.of("response.done"))
        assert first["metadata"] is None and second["metadata"] == {"mine": "1"}
        parts = [response["output"][0]["content"][0]["transcript"] for response in (first, second)]
        assert "".join(parts) == "abcdef" and all(parts)

    desk(test)


def test_a_cancelled_response_is_not_heard_until_the_model_falls_silent(desk):
    async def test(desk):
        wire = await desk.realtime()
        desk.model.says("abcd", 2)
        desk.model.says("ef")
        await desk.edges(2)
        before = len(wire.events)
        cancelled = await wire.ask("response.cancel")
        assert kinds(cancelled)[-1] == "response.done" and cancelled[-1]["response"]["status"] == "cancelled"
        assert cancelled[-1]["response"]["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
        assert cancelled[-1]["response"]["output"][0]["status"] == "incomplete"
        await desk.edges(8)
        later = [event["delta"] for event in wire.events[before:] if "transcript.delta" in event["type"]]
        assert "".join(later) == "ef"

    desk(test)


def test_work_that_the_model_gives_away_is_a_function_call_and_its_output_is_said(desk):
    async def test(desk):
        wire = await desk.realtime(tools=[{**TOOL, "name": "other"}, TOOL])
        desk.model.says("ok")
        desk.model.delegates("count the cats")
        await desk.edges(8)
        calls = [event["response"] for event in wire.of("response.done")
                 if any(item["type"] == "function_call" for item in event["response"]["output"])]  # fmt: skip
        (item,) = calls[0]["output"]
        assert item["name"] == "delegate" and json.loads(item["arguments"]) == {"task": "count the cats"}
        order = [kind for kind in kinds(wire.events) if kind in ("response.created", "response.done")]
        assert order == ["response.created", "response.done"] * (len(order) // 2)  # one at a time
        (arguments,) = wire.of("response.function_call_arguments.done")
        assert arguments["call_id"] == item["call_id"] and arguments["arguments"] == item["arguments"]
        output = {"type": "function_call_output", "call_id": item["call_id"], "output": "Three."}
        added, _ = await wire.ask("conversation.item.create", item=output)
        assert added["item"]["output"] == "Three." and added["item"]["call_id"] == item["call_id"]
        await desk.edges(10)
        assert "Three" not in wire.said  # only once a response is asked for
        await wire.ask("response.create")
        await desk.until(lambda: wire.said.endswith("Three."))
        await desk.edges(4)
        assert wire.of("response.done")[-1]["response"]["output"][0]["content"][0]["transcript"].endswith("Three.")

    desk(test)


def test_a_call_takes_the_response_that_was_asked_for(desk):
    async def test(desk):
        wire = await desk.realtime(tools=[TOOL])
        (created,) = await wire.ask("response.create", response={"metadata": {"mine": "1"}})
        desk.model.delegates("add")
        await desk.edges()
        (done,) = wire.of("response.done")
        assert done["response"]["id"] == created["response"]["id"] and done["response"]["metadata"] == {"mine": "1"}
        assert done["response"]["output"][0]["type"] == "function_call"

    desk(test)


def test_the_background_model_works_where_the_client_has_no_tools(desk):
    async def test(desk):
        wire = await desk.realtime(tmlc={"events": True})
        desk.model.delegates("add")
        await desk.until(lambda: wire.said.endswith("It is 4."))
        stages = [event["stage"] for event in wire.of("tmlc.delegation")]
        assert stages[0] == "created" and stages[-1] == "done"
        await wire.ask("tmlc.delegate", task="again")
        await desk.until(lambda: wire.said.count("It is 4.") == 2)

    desk(test, answer=lambda delegation, context: "It is 4.")


def fates(wire):
    return [event["fate"] for event in wire.of("tmlc.injection")]


async def say(desk, wire, words):
    """Lets a function call's output be said; returns when its first words were."""
    desk.model.delegates("t")
    await desk.edges(2)
    call = wire.of("response.function_call_arguments.done")[-1]["call_id"]
    output = {"type": "function_call_output", "call_id": call, "output": words}
    await wire.ask("conversation.item.create", item=output)
    await wire.ask("response.create")
    before = len(wire.said)
    await desk.until(lambda: wire.said[before:].startswith(words[:4]))


def test_a_result_that_is_truncated_while_it_is_said_is_said_again(desk):
    async def test(desk):
        wire = await desk.realtime(tools=[TOOL], tmlc={"events": True, "playback": True})
        await say(desk, wire, "one two three four")
        await desk.edges()
        item = wire.of("response.output_item.added")[-1]["item"]["id"]
        (got,) = await wire.ask("conversation.item.retrieve", item_id=item)
        assert got["item"]["status"] == "in_progress"  # under way, and known already
        assert (await wire.error("conversation.item.truncate", item_id=item))["param"] == "audio_end_ms"
        for wrong in (1, "0", [0], None):
            error = await wire.error("conversation.item.truncate", item_id=item, audio_end_ms=0, content_index=wrong)
            assert error["param"] == "content_index"
        events = await wire.ask("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=200)
        assert events[0] == {"type": "conversation.item.truncated", "event_id": events[0]["event_id"], "item_id": item,
                             "content_index": 0, "audio_end_ms": 200}  # fmt: skip
        assert fates(wire) == ["cut"]
        await desk.until(lambda: wire.said.endswith("one two three four"))
        await desk.edges(5)
        item = wire.of("response.done")[-1]["response"]["output"][0]
        await wire.ask("conversation.item.truncate", item_id=item["id"], audio_end_ms=10**9)  # all of it was played
        assert fates(wire) == ["cut", "delivered"]

    desk(test)


def test_a_result_whose_response_is_cancelled_waits_and_is_said_again(desk):
    async def test(desk):
        wire = await desk.realtime(tools=[TOOL], tmlc={"events": True})
        await say(desk, wire, "one two three four five")
        await wire.ask("response.cancel")
        await desk.until(lambda: fates(wire) == ["cut", "delivered"])
        await desk.edges(4)
        assert wire.said.endswith("one two three four five")

    desk(test)


def test_under_pressure_a_transcript_waits_for_the_end_of_its_response(desk):
    async def test(desk):
        wire = await desk.realtime()
        desk.scheduler._ladder.edge = lambda *_: False
        desk.scheduler._ladder.level = Level.NO_TRANSCRIPTS
        desk.model.says("abc")
        await desk.edges(4)
        assert not wire.said and wire.of("response.output_audio.delta")
        await desk.edges(3)
        assert wire.said == wire.of("response.output_audio_transcript.done")[0]["transcript"] == "abc"

    desk(test)


@pytest.mark.parametrize("says_more", [False, True])
def test_words_that_were_held_back_when_the_connection_was_cut_are_told_once(desk, says_more):
    async def test(desk):
        wire = await desk.realtime()
        token = wire.of("session.created")[0]["tmlc"]["resume_token"]
        desk.scheduler._ladder.edge = lambda *_: False
        desk.scheduler._ladder.level = Level.NO_TRANSCRIPTS
        desk.model.says("abc", ticks=0 if says_more else 2)
        await desk.edges(3)
        assert not wire.said and wire.of("response.output_audio.delta")
        again = await desk.connect("realtime", f"tmlc_resume={token}")
        desk.wires.remove(wire)
        await again.sync()
        desk.scheduler._ladder.level = Level.NORMAL
        if says_more:
            desk.model.says("d")
        await desk.edges(6)
        whole = "abcd" if says_more else "abc"
        assert again.said == whole == again.of("response.output_audio_transcript.done")[0]["transcript"]

    desk(test)


def test_words_that_were_held_back_are_told_before_the_end(desk):
    async def test(desk):
        wire = await desk.realtime()
        token = wire.of("session.created")[0]["tmlc"]["resume_token"]
        desk.scheduler._ladder.edge = lambda *_: False
        desk.scheduler._ladder.level = Level.NO_TRANSCRIPTS
        desk.model.says("ab", ticks=9)
        await desk.edges(2)
        again = await desk.connect("realtime", f"tmlc_resume={token}")
        desk.wires.remove(wire)
        await desk.edges(2)
        desk.scheduler.close()
        await again.close_code()
        assert again.said == "ab" and again.events[-1]["type"] in ("response.done", "error")

    desk(test)

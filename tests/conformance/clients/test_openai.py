"""The unmodified openai client, the oldest that speaks Live and the newest, in conversation with nano."""

import pytest
from live_server import answer_of, serve, start_client

from tmlc.runtimes.background.rules import Rule

CLIENTS = ("openai-oldest", "openai-newest")
TASK = "six times seven"
DELEGATES = (Rule(at="3 s", delegate=TASK),)


@pytest.fixture(scope="module")
def talks(nano):
    """What each client heard of one conversation in each dialect, both at the same time, on one server."""
    heard = {}
    with serve(nano, sessions=4, rules=DELEGATES) as server:
        for client in CLIENTS:
            started = {d: start_client(client, "openai_talk.py", d, server.url) for d in ("live", "realtime")}
            heard |= {(client, dialect): answer_of(process) for dialect, process in started.items()}
    return heard


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_of_live_holds_a_conversation(talks, client):
    heard = talks[client, "live"]
    assert heard["started"] == ["session.started", "begin", "nano", "active"]
    assert heard["seconds"] > 3 and heard["loud"] > 0  # the model's voice, and its silences
    assert heard["target"] == "client" and "the answer is 42" in heard["said"]  # the delegation's result is spoken
    assert heard["acks"]["think"] == "session.thinking.appended"
    assert heard["acks"]["mute"] == "session.input_audio.muted"
    assert heard["closed"][:2] == ["close_requested", "end"]
    # What is not offered is an error that names the command, and the session goes on; nothing else was refused.
    assert [(e["code"], e["client_event_id"]) for e in heard["errors"]] == [("not_supported", "nope")]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_of_realtime_holds_a_conversation(talks, client):
    heard = talks[client, "realtime"]
    assert heard["first"] == "session.created" and heard["kinds"]["session.updated"] == 1
    assert heard["loud"] > 0
    assert heard["task"] == TASK and "the answer is 42" in heard["said"]
    assert heard["cancelled"] == "client_cancelled" and heard["kinds"]["conversation.item.truncated"] == 1
    started, stopped = (heard["kinds"].get(f"input_audio_buffer.speech_{what}") for what in ("started", "stopped"))
    assert started == stopped == 1  # the tone, by the detector of voice
    assert [(e["code"], e["event_id"]) for e in heard["errors"]] == [("not_supported", "nope")]


@pytest.mark.parametrize("client", CLIENTS)
def test_each_response_is_a_whole_sequence(talks, client):
    order, done = talks[client, "realtime"]["order"], "response.done"
    assert order.count("response.created") == order.count(done)
    first = order[: order.index(done) + 1]
    assert first[:3] == ["response.created", "response.output_item.added", "response.content_part.added"]
    assert first[-5:] == [
        "response.output_audio.done", "response.output_audio_transcript.done", "response.content_part.done",
        "response.output_item.done", done,
    ]  # fmt: skip


@pytest.mark.parametrize("dialect", ["live", "realtime"])
def test_a_client_whose_connection_is_cut_goes_on_with_its_session(nano, dialect):
    with serve(nano, sessions=2) as server:
        started = [start_client(client, "openai_talk.py", f"{dialect}-resume", server.url) for client in CLIENTS]
        for process in started:
            heard = answer_of(process)
            (first, fresh), (second, resumed) = heard["sessions"]
            assert first == second and not fresh and resumed
            assert heard["tokens"] == 2  # a token serves once


def test_a_server_that_is_full_refuses_before_the_upgrade(nano):
    with serve(nano, sessions=1) as server:
        server.scheduler.open(lambda event: None)
        for process in [start_client(client, "openai_talk.py", "refused", server.url) for client in CLIENTS]:
            heard = answer_of(process)
            assert [one["status"] for one in heard["refused"]] == [503, 503]
            assert all(int(one["retry"]) >= 1 and one["error"]["type"] == "server_error" for one in heard["refused"])
            assert heard["models"] == ["nano"] == [heard["one"]]

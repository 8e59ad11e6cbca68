"""Connections of the Live dialect that are slow, idle, taken over, refused or cut; their sessions live on."""

import asyncio
import contextlib
import json

import pytest

from tmlc.runtimes.gateway import wire as wires


def gate(connection):
    """Holds back what the server writes, as a client does that does not read."""
    opened, write = asyncio.Event(), connection.socket.send_str

    async def send_str(text, *more):
        await opened.wait()
        await write(text, *more)

    connection.socket.send_str = send_str
    return opened


def test_of_audio_that_a_slow_client_does_not_take_the_oldest_is_dropped_and_it_is_told(desk):
    async def test(desk):
        wire = await desk.live(tmlc={"events": True})
        opened = gate(desk.connection)
        wires, desk.wires = desk.wires, []  # nobody waits for answers meanwhile
        await desk.edges(40)
        opened.set()
        desk.wires = wires
        await desk.edges()
        ticks = [event["tmlc"]["tick"] for event in wire.of("session.output_audio.delta")]
        assert ticks == sorted(ticks) and 25 <= len(ticks) <= 27 and ticks[-1] == 40
        assert [event["tick"] for event in wire.of("tmlc.tick")] == list(range(41))  # the rest is not dropped
        (note,) = wire.of("info")
        assert note["code"] == "output_dropped" and str(41 - len(ticks)) in note["message"]

    desk(test)


@pytest.mark.parametrize("what", ["many", "long"])
def test_a_client_that_takes_no_messages_is_closed_and_can_come_back(desk, what):
    async def test(desk):
        wire = await desk.live()
        token = wire.of("session.started")[0]["tmlc"]["resume_token"]
        connection = desk.connection
        opened = gate(connection)
        if what == "many":
            for _ in range(wires.MAX_OUT + 5):
                await wire.send("nothing")
        else:
            for _ in range(wires.MAX_OUT_BYTES // 120_000 + 3):
                await wire.send("session.update", session={"delegation": {"type": "client", "x": "y" * 120_000}})
        async with asyncio.timeout(5):
            while connection._close_code is None:
                await asyncio.sleep(0.01)
        opened.set()
        assert await wire.close_code() == wires.SLOW_READER
        await desk.edges()
        again = await desk.connect("live", f"tmlc_resume={token}")
        await again.sync()
        assert again.events[0]["tmlc"]["resumed"]

    desk(test)


def test_a_client_that_takes_nothing_at_all_loses_its_connection_and_not_its_session(desk, monkeypatch):
    monkeypatch.setattr(wires, "SEND_SECONDS", 0.05)

    async def test(desk):
        wire = await desk.live()
        gate(desk.connection)
        desk.wires = []
        await desk.edges()
        await wire.close_code()
        await desk.edges()
        assert desk.scheduler.stats().detached == 1

    desk(test)


def test_a_connection_that_does_not_start_is_closed_also_when_it_talks(desk, monkeypatch):
    monkeypatch.setattr(wires, "START_SECONDS", 0.1)

    async def test(desk):
        idle, busy = await desk.connect("live"), await desk.connect("live")
        while not busy.ended.done():
            await busy.socket.send_str("{}")
            await asyncio.sleep(0)
        assert await idle.close_code() == await busy.close_code() == wires.TOO_LATE

    desk(test)


def test_who_takes_a_session_over_has_it_and_may_say_start_again(desk):
    async def test(desk):
        first = await desk.live(tmlc={"events": True})
        await desk.edges(2)
        token = first.of("session.started")[0]["tmlc"]["resume_token"]
        second = await desk.connect("live", f"tmlc_resume={token}")
        await second.sync()
        assert await first.close_code() == wires.TAKEN_OVER
        (started,) = await second.ask("session.start", event_id="again", session={"model": "m"})
        assert started["type"] == "session.started" and started["client_event_id"] == "again"
        await desk.edges(3)
        assert [event["tick"] for event in second.of("tmlc.tick")][-3:] == [2, 3, 4]
        wrong = await desk.connect("live", f"tmlc_resume={token}")
        assert await wrong.close_code() == 1000
        assert [event["error"]["code"] for event in wrong.events] == ["session_not_found"]

    desk(test)


def test_a_full_server_says_so_before_the_upgrade(desk):
    async def test(desk):
        await desk.live()
        for path in ("/v1/live/sessions", "/realtime"):
            answer = await desk.client.get(path, headers={"Connection": "Upgrade", "Upgrade": "websocket"})
            assert answer.status == 503 and int(answer.headers["Retry-After"]) >= 1
            assert (await answer.json())["error"]["code"] == "server_overloaded"
        assert (await desk.client.get("/v1/models/also")).status == 200
        assert (await desk.client.get("/v1/models/none")).status == 404
        assert [one["id"] for one in (await (await desk.client.get("/models")).json())["data"]] == ["m", "also"]

    desk(test, sessions=1)


def test_a_message_that_is_too_large_closes_the_connection(desk):
    async def test(desk):
        wire = await desk.live()
        with contextlib.suppress(ConnectionError):  # closed before all of it was sent
            await wire.socket.send_str(json.dumps({"type": "x" * (wires.MAX_MESSAGE + 1)}))
        assert await wire.close_code() in (1009, 1006)  # the code is lost where the client still sends
        await desk.edges()
        assert desk.scheduler.stats().detached == 1

    desk(test)

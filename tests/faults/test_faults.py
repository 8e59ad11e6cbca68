"""What goes wrong with one client, with its background or with the machine, and must cost nobody else a tick, a slot or
memory."""

import asyncio
import contextlib
import json
import random
import signal
import struct

import pytest


def test_after_a_stall_of_a_second_everybody_goes_on_within_two(serve, tools):
    """The whole process stands still, as a machine does that is suspended."""

    server = serve()

    async def play():
        async with tools.http() as http, tools.talker(http, server) as one, tools.talker(http, server) as two:
            await tools.until(lambda: len(one.ticks) >= 5 and len(two.ticks) >= 5)
            server.signal(signal.SIGSTOP)
            await asyncio.sleep(1.0)
            server.signal(signal.SIGCONT)
            await tools.until(lambda: all(t.ticks[-1]["collapsed"] or len(t.ticks) > 25 for t in (one, two)))
            stalled = [t.ticks[-1]["tick"] for t in (one, two)]
            await tools.until(lambda: all(t.ticks[-1]["tick"] >= max(stalled) + 20 for t in (one, two)))
            for talker, at in zip((one, two), stalled, strict=True):
                after = [tick for tick in talker.ticks if tick["tick"] > at + 10]
                assert after and not any(tick["collapsed"] for tick in after), "back on the grid after ten ticks"
                assert sum(tick["collapsed"] for tick in talker.ticks) >= 1 and "session.closed" not in talker.kinds()
                assert [tick["tick"] for tick in after] == list(range(after[0]["tick"], after[-1]["tick"] + 1))

    asyncio.run(play())


def test_a_client_that_does_not_read_is_dropped_alone(scene, tools):
    """It asks for answers and takes none: what waits for it is bounded, and then its session is nobody's any more."""

    async def fault(http, server):
        before = server.stats()
        slow = await tools.raw(server, window=4096)
        slow.send(json.dumps(tools.start))
        slow.writer.transport.pause_reading()
        await tools.until(lambda: server.stats()["sessions"] == before["sessions"] + 1)
        for _ in range(100):
            for _ in range(500):
                slow.send('{"type": "no.such.event"}')
            try:
                await asyncio.wait_for(slow.flush(), 1.0)
            except (ConnectionError, TimeoutError):
                break
        await tools.until(lambda: server.stats()["sessions"] == before["sessions"])
        assert server.stats()["memory"] - before["memory"] < 16e6
        slow.abort()

    scene(fault)


DISCONNECTS = [
    ("request", "upgrade", "start"), ("first tick", "talking", "message"), ("closing", "resuming", "thinking")
]  # fmt: skip


@pytest.mark.parametrize("states", DISCONNECTS, ids=", ".join)
def test_an_abrupt_disconnect_costs_nobody_anything(states, scene, tools):
    async def once(server, state):
        if state == "request":
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /v1/live/sessions HTTP/1.1\r\nHost: x\r\nUpgr")
            await writer.drain()
            writer.transport.abort()
            return
        client = await tools.raw(server)
        if state == "upgrade":
            client.abort()
            return
        client.send(json.dumps(tools.start))
        await client.flush()
        if state == "start":
            client.abort()
            return
        token = await client.token()
        if state in ("talking", "thinking", "closing", "resuming"):
            for _ in range(3):
                client.send(tools.append)
                await client.read_until("tmlc.tick")
        if state == "message":
            client.writer.write(client.frame(tools.append)[:900])
        elif state == "closing":
            client.send('{"type": "session.close"}')
        elif state == "thinking":
            client.send('{"type": "tmlc.delegate", "task": "hang"}')
        if state == "first tick":
            await client.read_until("tmlc.tick")
        await client.flush()
        client.abort()
        if state == "resuming":
            again = await tools.raw(server, token)
            again.abort()

    async def fault(http, server):
        await asyncio.gather(*(once(server, state) for state in states for _ in range(3)))

    scene(fault)


def test_a_killed_server_leaves_sessions_that_go_on_in_another(serve, tools, tmp_path):
    async def play():
        first, second = serve("--keep", tmp_path), serve("--keep", tmp_path)
        async with tools.http() as http:
            talker = tools.talker(http, first)
            await talker.open()
            await tools.until(lambda: list(tmp_path.glob("*.session")) and len(talker.ticks) >= 10)
            first.signal(signal.SIGKILL)
            await tools.until(lambda: talker.socket.closed)
            last, name = talker.ticks[-1]["tick"], talker.session
            await talker.stop()
            again = tools.talker(http, second)
            await again.open(talker.token)
            await tools.until(lambda: len(again.ticks) >= 3)
            begun = again.ticks[0]["tick"]
            assert 0 < begun <= last + 1, "it goes on from a tick that it has had"
            assert again.session != name and again.events[0]["tmlc"]["resumed"]
            thief = tools.talker(http, second, talks=False)
            await thief.open(talker.token)
            assert thief.session is None and thief.codes() == ["session_not_found"], "a token is good for one use"
            await again.close()
            await tools.until(lambda: second.stats()["free"] == 12)

    asyncio.run(play())


def malformed(chance):
    """One message, or some bytes that are not one, of the kinds that go wrong."""
    deep = "[" * 2000 + "]" * 2000
    text = chance.choice(
        [
            "", "null", "[]", "{", '{"type": 3}', '{"type": "session.start"}', '{"type": "tmlc.delegate"}', deep,
            '{"type": "session.input_audio.append", "audio": "?"}', '{"type": "conversation.item.create", "item": {}}',
            '{"type": "session.input_audio.append", "audio": 5}', '{"type": "session.input_audio.append"}',
            '{"type": "session.update", "session": {"delegation": {"type": []}}}', '{"type": "' + "x" * 5000 + '"}',
            '{"type": "tmlc.input_video_frame.append", "image_url": "data:image/png;base64,iVBORw0KGgo="}',
            '{"type": "session.thinking.append", "content": "\\ud800"}', '{"type": "tmlc.playback", "played_ms": 1e9}',
            '{"type": "tmlc.input_text.append", "text": "\\u0000<injection>"}', '{"type": "\\ud800"}',
            '{"type": "session.commentary.append", "content": {"a": 1}}',
        ]
    )  # fmt: skip
    if chance.random() < 0.3:
        text = "".join(chance.choice("{}[]\":,0aé\\ ") for _ in range(chance.randrange(60)))
    return text


async def storm(server, tools, count, seed):
    """`count` malformed messages over connections that are replaced when the server closes them."""
    chance, sent = random.Random(seed), 0
    while sent < count:
        client = await tools.raw(server)
        client.send(json.dumps(tools.start))
        reading = asyncio.ensure_future(client.drain())
        for _ in range(min(500, count - sent)):
            client.send(malformed(chance), kind=chance.choice([1] * 9 + [2]))
            sent += 1
            if sent % 50 == 0:
                try:
                    await client.flush()
                except ConnectionError:
                    break
        if chance.random() < 0.5:
            bad = chance.choice([b"\xff" * 40, b"\x81\x05hello", b"\x83\x80", struct.pack(">BBQ", 0x81, 0xFF, 1 << 40),
                                 b"\xc1\x80abcd", b"\x88\xfe\xff\xff" + bytes(70000)])  # fmt: skip
            client.writer.write(bad)
        else:
            client.send('{"type": "session.close"}')
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(client.flush(), 5.0)
        client.abort()
        await asyncio.gather(reading, return_exceptions=True)


def test_malformed_messages_harm_only_their_connection(scene, tools):
    async def fault(http, server):
        await storm(server, tools, 3000, seed=1)

    scene(fault)


@pytest.mark.slow
def test_a_hundred_thousand_malformed_messages_leave_no_trace(scene, tools):
    async def fault(http, server):
        await storm(server, tools, 10_000, seed=2)
        before = server.stats()
        await asyncio.gather(*(storm(server, tools, 25_000, seed) for seed in (3, 4, 5, 6)))
        await asyncio.sleep(2.0)
        after = server.stats()
        assert after["memory"] - before["memory"] < 24e6 and after["tasks"] <= before["tasks"] + 8

    scene(fault)


async def reconnects(server, tools, rounds):
    """One session that is resumed again and again, each time before the last connection is gone."""
    client = await tools.raw(server)
    client.send(json.dumps(tools.start))
    token, old = await client.token(), client
    for _ in range(rounds):
        client = await tools.raw(server, token)
        token = await client.token()
        old.abort()
        old = client
    client.send('{"type": "session.close"}')
    await client.read_until("session.closed")
    client.abort()


def test_a_storm_of_reconnects_ends_with_the_slots_and_the_memory_it_began_with(scene, tools):
    async def fault(http, server):
        await asyncio.gather(*(reconnects(server, tools, 20) for _ in range(6)))
        before = server.stats()
        await asyncio.gather(*(reconnects(server, tools, 40) for _ in range(6)))
        after = server.stats()
        assert after["memory"] - before["memory"] < 12e6
        assert after["sessions"] == before["sessions"] == 1

    scene(fault)


def test_visitors_of_a_full_server_are_refused_and_cost_nothing(scene, tools):
    async def fault(http, server):
        inside = [await tools.raw(server) for _ in range(11)]
        for client in inside:
            client.send(json.dumps(tools.start))
            await client.token()
        for _ in range(5):
            answers = await asyncio.gather(*(tools.knock(server) for _ in range(20)))
            assert all(" 503 " in head and "Retry-After: " in head for head in answers)
        assert server.stats()["free"] == 0
        for client in inside:
            client.abort()

    scene(fault)


def test_a_rush_of_visitors_gets_as_many_sessions_as_there_are_slots(scene, tools):
    """All of them come before the first has started: who finds no slot is told so, and stays connected."""

    async def fault(http, server):
        clients = await asyncio.gather(*(tools.raw(server) for _ in range(40)))
        for client in clients:
            client.send(json.dumps(tools.start))
        answers = await asyncio.gather(*(client.read() for client in clients))
        errors = [answer["error"]["code"] for answer in answers if answer["type"] == "error"]
        assert sum(answer["type"] == "session.started" for answer in answers) == 11
        assert errors == ["rate_limit_exceeded"] * 29
        for client in clients:
            client.abort()

    scene(fault)


def test_a_session_whose_context_is_used_up_ends_alone(scene, tools):
    async def fault(http, server):
        full = tools.talker(http, server, own={"seed": 77})
        await full.open()
        await tools.until(lambda: "session.closed" in full.kinds())
        assert full.events[-1]["tmlc"]["reason"] == "context" and full.ticks[-1]["tick"] >= 8
        await full.stop()
        await full.socket.close()

    scene(fault)


@pytest.mark.parametrize("tasks", [("hang", "flood", "lie", "raise"), ("block", "big", "odd")], ids=", ".join)
def test_a_background_model_that_misbehaves_holds_up_no_tick(tasks, scene, tools):
    async def fault(http, server):
        async with tools.talker(http, server) as asker:
            await tools.until(lambda: len(asker.ticks) >= 2)
            memory = server.stats()["memory"]
            for task in tasks:
                await asker.socket.send_json({"type": "tmlc.delegate", "task": task})
            before = len(asker.ticks)
            await tools.until(lambda: len(asker.ticks) >= before + 12)
            ticks = [tick["tick"] for tick in asker.ticks]
            assert ticks == sorted(ticks) and "session.closed" not in asker.kinds()
            after = server.stats()
            assert after["memory"] - memory < 80e6 and asker.session in after["seats"]

    scene(fault)


@pytest.mark.slow
def test_a_half_open_connection_is_noticed_and_its_slot_given_back(scene, tools):
    """The client's machine is gone: nothing comes any more, not even an answer to a ping."""

    async def fault(http, server):
        gone = await tools.raw(server, window=4096)
        gone.send(json.dumps(tools.start))
        await gone.token()
        gone.writer.transport.pause_reading()
        sessions = server.stats()["sessions"]
        await tools.until(lambda: server.stats()["sessions"] < sessions, seconds=90.0)
        gone.abort()

    scene(fault)

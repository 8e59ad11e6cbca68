"""What a connection may send; how many sessions a key may hold, whatever it opens, drops and takes over again."""

import asyncio
import json

import pytest
from aiohttp import WSMsgType, WSServerHandshakeError
from aiohttp.test_utils import TestClient, TestServer

from tmlc.runtimes.background.session import Background
from tmlc.runtimes.core.clock import VirtualClock
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.synthetic import SyntheticEngine
from tmlc.runtimes.core.text import ByteTokenizer
from tmlc.runtimes.gateway.caps import Bucket, Meter
from tmlc.runtimes.gateway.hub import Hub
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.places import KeyedSessions, Places
from tmlc.runtimes.gateway.security import Guard, Keys
from tmlc.runtimes.gateway.server import make_app
from tmlc.runtimes.gateway.serving import caps_middleware
from tmlc.runtimes.gateway.settings import Caps

KEYS = {"me": "m" * 32, "you": "y" * 32}
PATHS = {"live": "/v1/live/sessions", "realtime": "/v1/realtime"}
MARKS = {"<injection>": 258, "<end_of_injection>": 259}


class Ticker:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def caps(**given) -> Caps:
    return Caps.model_validate(given)


def test_a_bucket_gives_twice_its_rate_at_once_and_its_rate_on_average():
    clock = Ticker()
    bucket = Bucket(10, clock)
    assert sum(bucket.take() for _ in range(50)) == 20
    clock.now = 1.0
    assert sum(bucket.take() for _ in range(50)) == 10
    clock.now = 1000.0
    assert sum(bucket.take() for _ in range(50)) == 20


def test_one_picture_in_ten_seconds_is_one_and_not_none():
    clock = Ticker()
    meter = Meter(caps(frames=0.1), clock)
    assert [meter.frame(), meter.frame()] == [True, False]
    clock.now = 10.0
    assert meter.frame()


def test_a_message_that_can_never_pass_is_told_so():
    clock = Ticker()
    meter = Meter(caps(bytes=1024), clock)
    assert meter.message(2049) == "bytes in one message (2049, 2048 at most)"
    assert meter.message(2048) == ""
    assert meter.message(1) == "bytes a second"
    clock.now = 1.0
    assert meter.message(1024) == ""


def test_too_many_messages_are_told_so():
    meter = Meter(caps(messages=1), Ticker())
    assert [meter.message(1) for _ in range(3)] == ["", "", "messages a second"]


class Desk:
    """A server with two keys and room for four sessions, of which each key may have `most`; on a virtual clock."""

    def __init__(self, client, scheduler, clock, guard, places) -> None:
        self.client, self.scheduler, self.clock, self.guard, self.places = client, scheduler, clock, guard, places

    async def edges(self, count=1) -> None:
        for _ in range(count):
            self.clock.wait(self.scheduler.next_edge)
            self.scheduler.step()
            await asyncio.sleep(0.002)

    async def connect(self, key="me", dialect="live", query=""):
        bearer = KEYS.get(key, key)
        headers = {"Authorization": f"Bearer {bearer}"}
        return await self.client.ws_connect(PATHS[dialect] + query, headers=headers)

    async def open(self, key="me", model="m", dialect="live"):
        """A session: its socket and its token."""
        socket = await self.connect(key, dialect)
        if dialect == "live":
            await socket.send_json({"type": "session.start", "session": {"model": model}})
        first = await self.first(socket)
        await self.edges()
        return socket, first["tmlc"]["resume_token"]

    async def leave(self, socket) -> None:
        await socket.close()
        await self.edges()

    @staticmethod
    async def first(socket, kinds=("session.started", "session.created", "error")) -> dict:
        async with asyncio.timeout(5):
            while True:
                message = await socket.receive()
                assert message.type is WSMsgType.TEXT, message
                event = json.loads(message.data)
                if event["type"] in kinds:
                    return event

    async def refused(self, **how) -> int:
        with pytest.raises(WSServerHandshakeError) as error:
            await self.connect(**how)
        return error.value.status


@pytest.fixture
def served(tmp_path):
    """Runs a test's coroutine with a `Desk`."""
    file = tmp_path / "keys"
    file.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    file.chmod(0o600)

    def run(test, most=1):
        async def main():
            clock, observer, places = VirtualClock(0.2), Observer(), Places(most)
            engine = SyntheticEngine(clock, sessions=4)
            engine.tokenizer = ByteTokenizer({b: b for b in range(256)}, MARKS)
            scheduler = Scheduler(engine, clock=clock, resume_window=10.0)
            hub = Hub(KeyedSessions(places, scheduler, Background(), observer), observer, "m", ("n",))
            guard = Guard(Keys(file), (), True, observer, ("m", "n"))
            app = make_app(hub, (guard.middleware(), caps_middleware(places, caps(bytes=1024), observer)))
            app.add_routes(guard.routes())
            async with TestClient(TestServer(app)) as client:
                await test(Desk(client, scheduler, clock, guard, places))
                scheduler.close()
            await hub.close()

        asyncio.run(main())

    return run


@pytest.mark.parametrize("dialect", ["live", "realtime"])
def test_a_session_whose_client_left_still_takes_its_keys_place(served, dialect):
    async def test(desk):
        socket, _ = await desk.open(dialect=dialect)
        assert await desk.refused(dialect=dialect) == 429
        await desk.leave(socket)
        assert await desk.refused(dialect=dialect) == 429
        await (await desk.open("you", dialect=dialect))[0].close()  # another key has places of its own
        await desk.edges(60)  # beyond the resume window
        await (await desk.open(dialect=dialect))[0].close()

    served(test)


def test_who_comes_back_needs_no_other_place(served):
    async def test(desk):
        socket, token = await desk.open()
        for _ in range(5):
            await desk.leave(socket)
            socket = await desk.connect(query=f"?tmlc_resume={token}")
            started = await desk.first(socket)
            assert started["tmlc"]["resumed"]
            token = started["tmlc"]["resume_token"]
        again = await desk.connect(query=f"?tmlc_resume={token}")  # while the old socket is still there
        assert (await desk.first(again))["tmlc"]["resumed"]
        assert await desk.refused() == 429

    served(test)


def test_tokens_of_ended_sessions_open_no_more_than_a_key_may_have(served):
    async def test(desk):
        tokens = []
        for _ in range(3):
            socket, token = await desk.open()
            tokens.append(token)
            await desk.leave(socket)
            await desk.edges(60)
        held = []
        for token, kind in ((tokens[0], "session.started"), (tokens[1], "error")):
            held.append(await desk.connect(query=f"?tmlc_resume={token}"))
            found = await desk.first(held[-1])
            assert found["type"] == kind, found
        assert found["error"]["code"] == "rate_limit_exceeded"
        assert desk.scheduler.stats().slots - 1 == 3 and len(desk.places._sessions) == 1
        await held[0].send_json({"type": "session.close"})
        await desk.edges(2)
        late = await desk.connect(query=f"?tmlc_resume={tokens[1]}")  # its refusal did not use it up
        assert (await desk.first(late))["type"] == "session.started"

    served(test)


def test_a_made_up_token_opens_no_session_beyond_the_places(served):
    async def test(desk):
        await desk.open()
        socket = await desk.connect(query="?tmlc_resume=tmlcr_made_up")
        await socket.send_json({"type": "session.start", "session": {"model": "m"}})
        assert (await desk.first(socket))["type"] == "error"
        await desk.edges()
        assert desk.scheduler.stats().ticking == 1

    served(test)


def test_sockets_without_a_session_are_bounded_and_hold_no_place(served):
    async def test(desk):
        held = [await desk.connect() for _ in range(4)]
        assert await desk.refused() == 429
        for socket in held:
            await socket.close()
        for _ in range(100):
            if not desk.places._sockets:
                break
            await asyncio.sleep(0.01)
        assert not desk.places._sockets and not desk.places._sessions
        await desk.open()

    served(test, most=2)


def test_two_sockets_that_came_while_there_was_room_open_one_session(served):
    async def test(desk):
        sockets = [await desk.connect() for _ in range(2)]
        found = []
        for socket in sockets:
            await socket.send_json({"type": "session.start", "session": {"model": "m"}})
            found.append((await desk.first(socket))["type"])
        assert found == ["session.started", "error"]

    served(test)


def test_a_session_that_is_refused_gives_its_place_back(served):
    async def test(desk):
        for _ in range(3):
            socket = await desk.connect()
            wrong = {"model": "m", "tmlc": {"seed": "not a number"}}
            await socket.send_json({"type": "session.start", "session": wrong})
            assert (await desk.first(socket))["type"] == "error"
            await socket.close()
        await desk.open()

    served(test)


def test_a_secret_for_a_model_opens_sessions_of_that_model_only(served):
    async def test(desk):
        secret, _ = desk.guard.secrets.make("me", 60, "n")
        socket = await desk.connect(secret)
        await socket.send_json({"type": "session.start", "session": {"model": "m"}})
        assert "another model" in (await desk.first(socket))["error"]["message"]
        await socket.send_json({"type": "session.start", "session": {"model": "n"}})
        assert (await desk.first(socket))["type"] == "session.started"
        assert await desk.refused() == 429  # it is a session of the key that made the secret

    served(test)


def test_a_secret_is_bound_in_the_other_dialect_too(served):
    async def test(desk):
        secret, _ = desk.guard.secrets.make("me", 60, "n")
        wrong = await desk.connect(secret, "realtime", "?model=m")
        assert "another model" in (await desk.first(wrong))["error"]["message"]
        await wrong.close()
        right = await desk.connect(secret, "realtime", "?model=n")
        assert (await desk.first(right))["type"] == "session.created"

    served(test)


def test_a_message_over_the_burst_is_refused_with_the_bound_and_the_session_goes_on(served):
    async def test(desk):
        socket, _ = await desk.open()
        await socket.send_json({"type": "session.input_audio.append", "audio": "A" * 4096})
        error = (await desk.first(socket, ("error",)))["error"]
        assert error["code"] == "rate_limit_exceeded" and "2048 at most" in error["message"]
        await socket.send_json({"type": "session.input_audio.mute"})
        assert (await desk.first(socket, ("session.input_audio.muted",)))["type"]

    served(test)


def test_a_message_counts_with_its_bytes_and_not_its_characters(served):
    async def test(desk):
        socket, _ = await desk.open()
        await socket.send_str('{"type": "tmlc.input_text.append", "text": "' + "я" * 1500 + '"}')
        error = (await desk.first(socket, ("error",)))["error"]
        assert error["code"] == "rate_limit_exceeded" and "(3046, 2048 at most)" in error["message"]

    served(test)

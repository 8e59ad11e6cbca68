"""A client comes back with its token: what it missed is sent again, a token serves once, an ended session goes on."""

import asyncio
import json

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
from tmlc.runtimes.gateway.sessions import Sessions
from tmlc.runtimes.gateway.snapshots import SnapshotStore

START = {"type": "session.start", "session": {"model": "m", "tmlc": {"events": True}}}
PATH = "/v1/live/sessions"


class Desk:
    """A server on a virtual clock, and its client."""

    def __init__(self, client, scheduler, clock, hub):
        self.client, self.scheduler, self.clock, self.hub = client, scheduler, clock, hub

    async def edges(self, count=1):
        for _ in range(count):
            self.clock.wait(self.scheduler.next_edge)
            self.scheduler.step()
            await asyncio.sleep(0.002)

    async def start(self):
        socket = await self.client.ws_connect(PATH)
        await socket.send_json(START)
        started = await self.until(socket, "session.started")
        await self.edges()  # it joins here and ticks from the next edge on
        return socket, started

    async def back(self, token, after=None):
        more = "" if after is None else f"&tmlc_after={after}"
        return await self.client.ws_connect(f"{PATH}?tmlc_resume={token}{more}")

    @staticmethod
    async def until(socket, kind):
        async with asyncio.timeout(5):
            while True:
                message = await socket.receive()
                assert message.type is WSMsgType.TEXT, message
                event = json.loads(message.data)
                if event["type"] == kind:
                    return event

    async def ticks(self, socket, count):
        return [(await self.until(socket, "tmlc.tick"))["tick"] for _ in range(count)]


@pytest.fixture
def served(tmp_path):
    """Runs a test's coroutine with a `Desk`; `folder` of snapshots when it asks for one."""

    def run(test, folder=False):
        async def main():
            clock = VirtualClock(0.2)
            engine = SyntheticEngine(clock, sessions=2)
            marks = {"<injection>": 258, "<end_of_injection>": 259}
            engine.tokenizer = ByteTokenizer({b: b for b in range(256)}, marks)
            scheduler = Scheduler(engine, clock=clock, resume_window=10.0)
            store = SnapshotStore(tmp_path / "kept") if folder else None
            hub = Hub(Sessions(scheduler, Background(), Observer(), store), Observer(), "m")
            async with TestClient(TestServer(make_app(hub))) as client:
                await test(Desk(client, scheduler, clock, hub))
                scheduler.close()
            await hub.close()

        asyncio.run(main())

    return run


def test_what_a_client_did_not_have_is_sent_again(served):
    async def test(desk):
        socket, started = await desk.start()
        await desk.edges(6)
        assert await desk.ticks(socket, 6) == list(range(6))
        await socket.close()
        await desk.edges()  # the server has seen that it left
        again = await desk.back(started["tmlc"]["resume_token"], after=3)
        assert (await desk.until(again, "session.started"))["tmlc"]["resumed"]
        assert await desk.ticks(again, 3) == [3, 4, 5]

    served(test)


def test_who_says_nothing_goes_on_after_what_was_written(served):
    async def test(desk):
        socket, started = await desk.start()
        await desk.edges(4)
        await desk.ticks(socket, 4)
        await socket.close()
        await desk.edges()
        again = await desk.back(started["tmlc"]["resume_token"])
        await desk.edges(3)
        first, *_ = await desk.ticks(again, 1)
        assert first == 4

    served(test)


def test_a_token_serves_once(served):
    async def test(desk):
        socket, started = await desk.start()
        await desk.edges(2)
        token = started["tmlc"]["resume_token"]
        again = await desk.back(token)
        renewed = (await desk.until(again, "session.started"))["tmlc"]["resume_token"]
        assert renewed != token
        assert (await socket.receive()).type in (WSMsgType.TEXT, WSMsgType.CLOSE)
        for wrong in (token, renewed + "x", "", "\ud800".encode("utf-8", "replace").decode()):
            if wrong:
                refused = await desk.back(wrong)
                assert (await desk.until(refused, "error"))["error"]["code"] == "session_not_found"
        assert len(desk.hub.sessions) == 1

    served(test)


@pytest.mark.parametrize("folder", [True, False])
def test_a_session_that_ended_while_nobody_was_there_goes_on_from_its_snapshot(served, folder):
    async def test(desk):
        socket, started = await desk.start()
        await desk.edges(5)
        await socket.close()
        await desk.edges(60)  # beyond the resume window
        assert desk.scheduler.stats().ended == {"expired": 1}
        await desk.hub.sessions.flush()
        again = await desk.back(started["tmlc"]["resume_token"])
        assert (await desk.until(again, "session.started"))["tmlc"]["resumed"]
        await desk.edges(2)
        assert (await desk.ticks(again, 1))[0] >= 5  # its clock goes on, it does not begin anew

    served(test, folder)

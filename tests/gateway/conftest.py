"""A server on a virtual clock, with a model that remembers what it was given and says what the test wants."""

import asyncio
import json
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from aiohttp import WSMsgType
from aiohttp.test_utils import TestClient, TestServer

from tmlc.runtimes.background.callable import CallableModel
from tmlc.runtimes.background.session import Background
from tmlc.runtimes.core.clock import VirtualClock
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.synthetic import SyntheticEngine, SyntheticSession
from tmlc.runtimes.core.text import ByteTokenizer
from tmlc.runtimes.gateway.hub import Hub
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.server import CONNECTIONS, make_app
from tmlc.runtimes.gateway.sessions import Sessions
from tmlc.runtimes.gateway.snapshots import SnapshotStore

MARKS = {"<injection>": 258, "<end_of_injection>": 259, "<delegation>": 260, "<end_of_delegation>": 261}
PATHS = {"live": "/v1/live/sessions", "realtime": "/v1/realtime?model=m"}


class Session(SyntheticSession):
    """Keeps what comes in; what the script has is said in place of silence."""

    def run(self, given, missed, batch, ms):
        out = super().run(given, missed, batch, ms)
        if given.say or not self.engine.script:
            return out
        tokens = self.engine.script.popleft()
        return replace(
            out, tokens=tokens, audio=self.engine.sound(bool(tokens)), stats={**out.stats, "silent": int(not tokens)}
        )

    def _take_in(self, given):
        super()._take_in(given)
        model = self.engine
        model.heard.append(np.zeros(model._samples, np.float32) if given.audio is None else given.audio)
        model.typed += given.tokens
        model.injected += given.inject
        if given.video is not None:
            model.frames.append(given.video)


class Model(SyntheticEngine):
    """`heard` (samples of each tick), `typed`, `injected`, `frames`: what came; `script`: tokens of ticks to come."""

    def __init__(self, clock, sessions, sees):
        super().__init__(clock, sessions=sessions, reply_ticks=0)
        if not sees:
            self.layout = replace(self.layout, video_positions=0)
        self.tokenizer = ByteTokenizer({b: b for b in range(256)}, MARKS)
        self.heard, self.typed, self.injected, self.frames, self.script = [], [], [], [], deque()

    def session(self, seed=0, temperature=0.0, log=None):
        made = super().session(seed, temperature, log)
        made.__class__ = Session
        return made

    def restore(self, blob, log=None):
        made = super().restore(blob, log)
        made.__class__ = Session
        return made

    def says(self, text, ticks=0):
        """Says the text, a letter a tick; then is silent for so many ticks."""
        self.script += [[letter] for letter in text.encode()] + [[]] * ticks

    def delegates(self, task):
        self.script.append([MARKS["<delegation>"], *task.encode(), MARKS["<end_of_delegation>"]])

    @property
    def thoughts(self):
        """What was injected, without the marks."""
        return bytes(token for token in self.injected if token < 256).decode()

    @property
    def sound_heard(self):
        return np.concatenate(self.heard)


class Wire:
    """A client's end of a connection. `events`: all that came, without the answers to `sync`."""

    def __init__(self, socket):
        self.socket, self.events, self._synced = socket, [], 0
        self._answers = {}
        self.ended = asyncio.create_task(self._read())

    async def _read(self):
        async for message in self.socket:
            assert message.type is WSMsgType.TEXT, message
            event = json.loads(message.data)
            error = event.get("error", {})
            own = str(error.get("client_event_id") or error.get("event_id"))
            if own in self._answers:
                self._answers.pop(own).set_result(None)
            else:
                self.events.append(event)

    async def send(self, kind, **fields):
        await self.socket.send_json({"type": kind, **fields})

    async def sync(self):
        """Everything before is handled, and what the server has to say is here."""
        if self.ended.done():
            return
        self._synced += 1
        name = f"sync {self._synced}"
        self._answers[name] = answered = asyncio.get_running_loop().create_future()
        await self.send("sync", event_id=name)
        async with asyncio.timeout(5):
            await asyncio.wait([answered, self.ended], return_when=asyncio.FIRST_COMPLETED)

    async def ask(self, kind, **fields):
        """Sends an event; what came because of it."""
        before = len(self.events)
        await self.send(kind, **fields)
        await self.sync()
        return self.events[before:]

    async def error(self, kind, **fields):
        """Sends an event that is refused by exactly one error; that error."""
        (event,) = await self.ask(kind, **fields)
        assert event["type"] == "error", event
        return event["error"]

    def of(self, kind):
        return [event for event in self.events if event["type"] == kind]

    @property
    def said(self):
        kinds = ("session.output_transcript.delta", "response.output_audio_transcript.delta")
        return "".join(event["delta"] for event in self.events if event["type"] in kinds)

    async def close_code(self):
        """Waits until the server closes."""
        async with asyncio.timeout(5):
            await self.ended
        return self.socket.close_code


class Desk:
    """The server of a test."""

    def __init__(self, client, app, hub, clock, scheduler, model):
        self.client, self.app, self.hub, self.clock = client, app, hub, clock
        self.scheduler, self.model, self.wires = scheduler, model, []

    async def connect(self, dialect, more=""):
        path = PATHS[dialect]
        if more:
            path += ("&" if "?" in path else "?") + more
        self.wires.append(Wire(await self.client.ws_connect(path)))
        return self.wires[-1]

    async def live(self, **session):
        """A session of Live that has started and joined."""
        wire = await self.connect("live")
        (started,) = await wire.ask("session.start", session={"model": "m", **session})
        assert started["type"] == "session.started", started
        await self.edges()
        return wire

    async def realtime(self, **session):
        wire = await self.connect("realtime")
        await wire.sync()
        assert wire.events[0]["type"] == "session.created"
        if session:
            (updated,) = await wire.ask("session.update", session={"type": "realtime", **session})
            assert updated["type"] == "session.updated", updated
        await self.edges()
        return wire

    async def edges(self, count=1):
        """So many edges of the grid; what came of them is at the clients then."""
        for _ in range(count):
            self.clock.wait(self.scheduler.next_edge)
            self.scheduler.step()
            await asyncio.sleep(0)
        for wire in self.wires:
            await wire.sync()

    async def until(self, true, edges=100):
        """Edges until something holds that another thread brings about."""
        for _ in range(edges):
            if true():
                return
            await asyncio.sleep(0.005)
            await self.edges()
        raise AssertionError("it never came")

    @property
    def connection(self):
        """The server's end of the only connection."""
        (connection,) = self.app[CONNECTIONS]
        return connection

    @property
    def open_seats(self):
        stats = self.scheduler.stats()
        return stats.joining + stats.ticking + stats.detached


@pytest.fixture
def desk(tmp_path):
    """Runs a test's coroutine with a `Desk`.

    `answer`: a callable that is the background model; `folder`: with snapshots on disk; `sees`: a model with eyes.
    """

    def run(test, answer=None, folder=False, sees=False, sessions=2):
        async def main():
            clock = VirtualClock(0.2)
            model = Model(clock, sessions, sees)
            scheduler = Scheduler(model, clock=clock, resume_window=10.0)
            store = SnapshotStore(tmp_path / "kept") if folder else None
            background = Background(CallableModel(answer) if answer else None)
            hub = Hub(Sessions(scheduler, background, Observer(), store), Observer(), "m", aliases=("also",))
            app = make_app(hub)
            async with TestClient(TestServer(app)) as client:
                await test(Desk(client, app, hub, clock, scheduler, model))
                scheduler.close()
            await hub.close()

        asyncio.run(main())

    return run


def tone(frequency, seconds, rate, level=0.3):
    """float32 samples of a sine."""
    at = np.arange(round(seconds * rate))
    return (level * np.sin(2 * np.pi * frequency * at / rate)).astype(np.float32)


def fitted(samples, frequency, rate):
    """Level of the sine of that frequency in `samples`, and the root mean square of what is left without it, as part of
    the sine's: clicks at seams are in there."""
    at = 2 * np.pi * frequency * np.arange(samples.size) / rate
    basis = np.stack([np.sin(at), np.cos(at)], 1)
    (a, b), *_ = np.linalg.lstsq(basis, samples, rcond=None)
    level = float(np.hypot(a, b))
    return level, float(np.sqrt(np.mean((samples - basis @ [a, b]) ** 2))) * np.sqrt(2) / level


@pytest.fixture
def sine():
    """`tone` and `fitted`."""
    return tone, fitted

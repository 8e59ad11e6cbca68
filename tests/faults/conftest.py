"""Servers to hurt, clients that hurt them, and a control session beside whose ticks nothing may be late."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest

TICK = 0.2
PIECE = base64.b64encode((3000 * np.sin(np.arange(3200) * 0.1)).astype("<i2").tobytes()).decode()
FORMAT = {"type": "audio/pcm", "rate": 16000}
START = {"type": "session.start", "session": {"model": "synthetic", "audio": {"format": FORMAT}}}
APPEND = json.dumps({"type": "session.input_audio.append", "audio": PIECE})


class Witness:
    """Counts how often this machine did not let a thread run for more than a quarter of a tick, on any of its
    processors: such a pause is nobody's fault, and may make as many ticks late."""

    def __init__(self):
        self._counts, self._stop = Counter(), threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=(cpu,), daemon=True) for cpu in os.sched_getaffinity(0)
        ]
        for thread in self._threads:
            thread.start()

    def _watch(self, cpu):
        os.sched_setaffinity(0, {cpu})  # of this thread: a pause of the server's processor is not seen on another one
        while not self._stop.is_set():
            due = time.monotonic() + 0.02
            time.sleep(0.02)
            self._counts[cpu] += int((time.monotonic() - due) / (TICK / 4))

    @property
    def pauses(self):
        return sum(self._counts.values())

    def close(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Server:
    """`served.py` in a process of its own."""

    def __init__(self, *options):
        script = Path(__file__).with_name("served.py")
        command = [sys.executable, str(script), *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.port = json.loads(self.process.stdout.readline())["port"]
        self.url = f"http://127.0.0.1:{self.port}"

    def stats(self):
        with urllib.request.urlopen(f"{self.url}/stats", timeout=20) as answer:
            return json.load(answer)

    def signal(self, number):
        self.process.send_signal(number)

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Talker:
    """A client that speaks the Live dialect: sends 200 ms of audio in each period, and keeps what comes."""

    def __init__(self, http, server, own=None, talks=True):
        self.http, self.server, self.own, self.talks = http, server, own or {}, talks
        self.events, self.ticks = [], []
        self.session = self.token = None
        self._tasks = []

    async def __aenter__(self):
        await self.open()
        return self

    async def __aexit__(self, *_):
        await self.close()

    async def open(self, token=None):
        query = {} if token is None else {"tmlc_resume": token}
        self.socket = await self.http.ws_connect(f"{self.server.url}/v1/live/sessions", params=query)
        if token is None:
            asked = {**START["session"], "tmlc": {"events": True, **self.own}}
            await self.socket.send_json({"type": "session.start", "session": asked})
        self._tasks = [asyncio.create_task(self._read())]
        await until(lambda: self.session is not None or self.socket.closed)
        if self.talks:
            self._tasks.append(asyncio.create_task(self._talk()))

    async def _read(self):
        async for message in self.socket:
            event = json.loads(message.data)
            if event["type"] == "session.started":
                self.session, self.token = event["session"]["id"], event["tmlc"]["resume_token"]
            elif event["type"] == "tmlc.tick":
                self.ticks.append(event)
            if event["type"] not in ("tmlc.tick", "session.output_audio.delta"):
                self.events.append(event)

    async def _talk(self):
        begin, number = time.monotonic(), 0
        while not self.socket.closed:
            await self.socket.send_str(APPEND)
            number += 1
            await asyncio.sleep(max(0.0, begin + number * TICK - time.monotonic()))

    def kinds(self):
        return [event["type"] for event in self.events]

    def codes(self):
        return [event["error"]["code"] for event in self.events if event["type"] == "error"]

    async def stop(self):
        """Ends what this client does, without a word to the server."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self):
        if not self.socket.closed:
            await self.socket.send_json({"type": "session.close"})
            await until(lambda: self.socket.closed or "session.closed" in self.kinds())
        await self.stop()
        await self.socket.close()

    def abort(self):
        """The connection is gone, without a goodbye."""
        self.socket._response.connection.transport.abort()


class Raw:
    """A WebSocket by hand: it can stop reading, break off in a message, and send what no library sends."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self._left = b""

    @staticmethod
    def frame(text, kind=1):
        data = text.encode("utf-8", "surrogatepass")
        size = len(data)
        head = bytes([0x80 | kind])
        if size < 126:
            head += bytes([0x80 | size])
        elif size < 1 << 16:
            head += bytes([0x80 | 126]) + size.to_bytes(2, "big")
        else:
            head += bytes([0x80 | 127]) + size.to_bytes(8, "big")
        return head + bytes(4) + data  # a mask of zeros changes nothing

    def send(self, text, kind=1):
        self.writer.write(self.frame(text, kind))

    async def flush(self):
        await self.writer.drain()

    async def read(self):
        """The next message; pings are not answered. ConnectionError at its end."""
        try:
            head = await self.reader.readexactly(2)
            size = head[1] & 127
            if size > 125:
                size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
            data = await self.reader.readexactly(size)
        except asyncio.IncompleteReadError:
            raise ConnectionResetError("the server closed") from None
        return json.loads(data) if head[0] & 15 == 1 else {"type": f"frame {head[0] & 15}"}

    async def read_until(self, kind):
        async with asyncio.timeout(20.0):
            while True:
                event = await self.read()
                if event["type"] == kind:
                    return event
                assert event["type"] != "error", event

    async def token(self):
        return (await self.read_until("session.started"))["tmlc"]["resume_token"]

    async def drain(self):
        """Reads until the connection ends."""
        while await self.reader.read(1 << 16):
            pass

    def abort(self):
        self.writer.transport.abort()


async def knock(server, token=None, window=None):
    """A raw connection after its upgrade, or the head of the HTTP answer that refused it; `window` bytes are received
    ahead of what is read."""
    line = socket.socket()
    line.setblocking(False)
    if window is not None:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    await asyncio.get_running_loop().sock_connect(line, ("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=line, limit=window or 1 << 22)
    query = "" if token is None else f"?tmlc_resume={token}"
    writer.write(
        f"GET /v1/live/sessions{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    if " 101 " not in head.split("\r\n")[0]:
        writer.close()
        return head
    return Raw(reader, writer)


async def raw(server, token=None, window=None):
    """A raw connection; comes again, as it is told to, while the server has no room."""
    limit = time.monotonic() + 30
    while not isinstance(client := await knock(server, token, window), Raw):
        assert client.startswith("HTTP/1.1 503") and time.monotonic() < limit, client
        await asyncio.sleep(1.0)
    return client


async def until(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


class Bystander:
    """What must hold for who has nothing to do with a fault: the control session's ticks are on time, no slot is
    lost."""

    def __init__(self, server, talker, witness):
        self.server, self.talker = server, talker
        self.witness, self.pauses = witness, witness.pauses
        stats = server.stats()
        self.free = stats["free"]
        self.before = stats["seats"][talker.session]
        self.began = talker.ticks[-1]["tick"] if talker.ticks else -1

    def check(self):
        """No tick of the control session was collapsed, or ready too late, beyond what this machine itself did."""
        now = self.server.stats()["seats"][self.talker.session]
        pauses = self.witness.pauses - self.pauses
        for name in ("collapses", "over_budget"):
            more = now[name] - self.before[name]
            assert more <= pauses, f"{name}: {more}, while this machine paused {pauses} times"
        ticks = [tick["tick"] for tick in self.talker.ticks if tick["tick"] > self.began]
        assert len(ticks) >= (ticks[-1] - self.began) - now["collapsed"] + self.before["collapsed"]
        assert now["ticks"] > self.before["ticks"]

    async def check_slots(self):
        """Slots are as free as before, once the server has noticed."""
        await until(lambda: self.server.stats()["free"] == self.free)


@pytest.fixture(scope="session")
def tools():
    """What the tests are written with."""
    asked = {**START, "session": {**START["session"], "tmlc": {"events": True}}}
    return SimpleNamespace(
        http=aiohttp.ClientSession, talker=Talker, raw=raw, knock=knock, until=until, start=asked, append=APPEND
    )


@pytest.fixture(scope="module")
def witness():
    made = Witness()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server():
    """12 slots; a session that nobody comes back to ends after a second."""
    made = Server("--slots", 12, "--window", 1.0)
    yield made
    made.close()


@pytest.fixture
def serve():
    """make(*options) -> a server of one's own."""
    made = []

    def make(*options):
        made.append(Server(*options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def scene(server, witness):
    """run(fault): the control session talks while `fault(http, server, bystander)` happens; then it is checked."""

    def run(fault, on=None):
        async def play():
            # The ladder admits nobody for some seconds after this machine was slow.
            await until(lambda: (on or server).stats()["scheduler"]["admits"])
            async with aiohttp.ClientSession() as http, Talker(http, on or server) as control:
                await until(lambda: len(control.ticks) >= 3)
                bystander = Bystander(on or server, control, witness)
                await fault(http, on or server)
                await asyncio.sleep(3 * TICK)
                bystander.check()
                await bystander.check_slots()

        asyncio.run(play())

    return run

"""A server that speaks the Live dialect by a script: so many sessions, so late, so many ticks."""

import asyncio
import base64
import json
import threading
import time

import numpy as np
import pytest
from aiohttp import web

TICK = 0.2
TONE = base64.b64encode((8000 * np.sin(np.arange(3200) * 0.17)).astype("<i2").tobytes()).decode()
HUSH = base64.b64encode(bytes(6400)).decode()


class ScriptedServer:
    """Ticks on a grid of its own. It is silent in ticks that heard a voice and speaks in the others.

    Args:
        slots: sessions at once; more are refused with 503 and Retry-After.
        delay: seconds from an edge to its output.
        cut_after: ticks after which the connection is dropped (None: never).
        skip: every so many ticks one is left out (0: none).
    """

    def __init__(self, slots=100, delay=0.01, cut_after=None, skip=0):
        self.slots, self.delay, self.cut_after, self.skip = slots, delay, cut_after, skip
        self.open = self.most = self.heard = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self):
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._serve())

    async def _serve(self):
        app = web.Application()
        app.router.add_get("/v1/live/sessions", self._session)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        self._stop = asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    def close(self):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _models(self, request):
        listed = [{"id": "scripted", "object": "model", "created": 0, "owned_by": "test"}]
        return web.json_response({"object": "list", "data": listed})

    async def _metrics(self, request):
        lines = ["# TYPE tmlc_samples counter", f'tmlc_samples{{of="all"}} {self.heard}', 'tmlc_step_bucket{le="1"} 3']
        return web.Response(text="\n".join(lines) + "\n")

    async def _session(self, request):
        if self.open >= self.slots:
            return web.json_response({"error": {"message": "full"}}, status=503, headers={"Retry-After": "7"})
        self.open += 1
        self.most = max(self.most, self.open)
        socket = web.WebSocketResponse()
        try:
            await socket.prepare(request)
            await self._hold(socket)
        finally:
            self.open -= 1
        return socket

    async def _hold(self, socket):
        state = {"heard": 0, "loud": False}
        ticking = None
        async for message in socket:
            event = json.loads(message.data)
            if event["type"] == "session.start":
                session = {"id": "sess_1", "expires_at": 1, "model": event["session"]["model"], "status": "active"}
                await socket.send_json({"type": "session.started", "event_id": "e", "session": session})
                ticking = asyncio.create_task(self._tick(socket, state))
            elif event["type"] == "session.input_audio.append":
                pcm = np.frombuffer(base64.b64decode(event["audio"]), "<i2")
                state["heard"] += pcm.size
                self.heard += pcm.size
                state["loud"] |= bool(np.abs(pcm).max() > 1000)
            elif event["type"] == "session.close":
                await socket.send_json({"type": "session.closed", "event_id": "e", "reason": "close_requested"})
                break
        if ticking is not None:
            ticking.cancel()
        await socket.close()

    async def _tick(self, socket, state):
        begin, number = time.monotonic(), 0
        while self.cut_after is None or number < self.cut_after:
            await asyncio.sleep(begin + (number + 1) * TICK - time.monotonic())
            ours = {"tick": number, "heard_ms": state["heard"] / 16}
            loud, state["loud"] = state["loud"], False
            number += 1
            if self.skip and number % self.skip == 0:
                continue
            asyncio.get_running_loop().call_later(self.delay, self._send, socket, ours, loud)
        socket._req.transport.abort()

    def _send(self, socket, ours, loud):
        if not socket.closed:
            self._saying = asyncio.ensure_future(self._say(socket, {"delta": HUSH if loud else TONE}, ours))

    async def _say(self, socket, audio, ours):
        await socket.send_json({"type": "session.output_audio.delta", **audio})
        await socket.send_json({"type": "tmlc.tick", "event_id": "e", **ours})


@pytest.fixture
def scripted():
    """make(**options) -> a running ScriptedServer."""
    made = []

    def make(**options):
        made.append(ScriptedServer(**options))
        return made[-1]

    yield make
    for server in made:
        server.close()

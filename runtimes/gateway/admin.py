"""The admin port: `/livez`, `/readyz` and `/metrics`. It has no keys, and is for this machine or a private network."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tmlc.runtimes.core.surface import SchedulerStats
from tmlc.runtimes.gateway.metrics import Metrics

MAX_LATE = 2.0
"""Seconds without a tick, while sessions tick, after which the server is not ready: its device hangs."""
WATCH_SECONDS = 0.5


class Health:
    """Whether the server should get new clients.

    Args:
        stats: the scheduler's.
        draining: does the server end?
        now: seconds, for tests.
    """

    def __init__(
        self, stats: Callable[[], SchedulerStats], draining: Callable[[], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._stats, self._draining, self._now = stats, draining, now
        self._ticks, self._moved = -1, now()

    def watch(self) -> None:
        """Looks whether ticks go on. Done all the time, not only when asked, so that a session that comes after a long
        silence of the server is not taken for one that waits."""
        stats = self._stats()
        if stats.ticks != self._ticks or not stats.ticking:
            self._ticks, self._moved = stats.ticks, self._now()

    def not_ready(self) -> str | None:
        """Why the server is not ready; None when it is. A server that is full is ready: it refuses by itself."""
        if self._draining():
            return "draining"
        if not self._stats().running:
            return "the scheduler has stopped"
        self.watch()
        quiet = self._now() - self._moved
        return f"no tick for {quiet:.1f} s" if quiet > MAX_LATE else None


def make_admin(health: Health, metrics: Metrics) -> web.Application:
    """The application of the admin port."""

    async def livez(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(request: web.Request) -> web.Response:
        why = health.not_ready()
        return web.Response(text="ok\n") if why is None else web.Response(text=f"{why}\n", status=503)

    async def numbers(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def watching(app: web.Application) -> AsyncIterator[None]:
        async def watch() -> None:
            while True:
                health.watch()
                await asyncio.sleep(WATCH_SECONDS)

        task = asyncio.create_task(watch())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    app = web.Application(client_max_size=1 << 10)
    app.cleanup_ctx.append(watching)
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz), web.get("/metrics", numbers)])
    return app

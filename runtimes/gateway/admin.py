"""The admin port: is the process alive, would it take a session, and its numbers. On loopback unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.gateway.metrics import Metrics

STUCK_SECONDS = 2.0
"""A device thread that is later than this is not ready."""


def unready(scheduler: Scheduler, draining: bool) -> str:
    """Why no session should be sent here; empty when all is well. A server that is full is ready: it says so itself."""
    stats = scheduler.stats()
    if draining:
        return "draining"
    if not stats.running:
        return "the device thread has stopped"
    edge = scheduler.clock.edge(scheduler.clock.now())
    if stats.ticking and scheduler.clock.now() - scheduler.clock.due(stats.edge) > STUCK_SECONDS and stats.edge < edge:
        return "the device thread is stuck"
    return ""


def make_admin(scheduler: Scheduler, metrics: Metrics, draining: Callable[[], bool]) -> web.Application:
    """`/livez`, `/readyz`, `/metrics`."""

    async def livez(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(request: web.Request) -> web.Response:
        why = unready(scheduler, draining())
        return web.Response(text=f"{why or 'ok'}\n", status=503 if why else 200)

    async def numbers(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/livez", livez), web.get("/readyz", readyz), web.get("/metrics", numbers)])
    return app

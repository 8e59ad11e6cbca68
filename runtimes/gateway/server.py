"""The routes of the gateway as an aiohttp application.

| route | what it is |
| --- | --- |
| `GET /v1/live/sessions` | WebSocket, OpenAI's Live dialect |
| `GET /v1/realtime` | WebSocket, OpenAI's Realtime dialect (GA) |
| `GET /v1/models`, `/v1/models/{id}` | what is served |
| `GET /`, `/page/…` | the page |

The same routes answer without `/v1`, for clients that are given another base. A server that is full says so before the
upgrade: HTTP 503 with `Retry-After`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from tmlc.runtimes.gateway.hub import Hub
from tmlc.runtimes.gateway.live import LiveConnection
from tmlc.runtimes.gateway.page import page_routes
from tmlc.runtimes.gateway.realtime import RealtimeConnection
from tmlc.runtimes.gateway.wire import MAX_MESSAGE, Connection


class Connections(set[Connection]):
    """The sockets that are open."""


HUB = web.AppKey("hub", Hub)
CONNECTIONS = web.AppKey("connections", Connections)
HEARTBEAT = 20.0
"""Seconds between pings; who does not answer in half of that is gone."""
RESUME = "tmlc_resume"
LAG_SECONDS = 0.5

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(hub: Hub, middlewares: tuple[Any, ...] = ()) -> web.Application:
    """The application; the caller runs it and closes the hub after it."""
    app = web.Application(middlewares=list(middlewares), client_max_size=1 << 20)
    app[HUB], app[CONNECTIONS] = hub, Connections()
    for base in ("/v1", ""):
        app.router.add_get(f"{base}/live/sessions", _socket(LiveConnection))
        app.router.add_get(f"{base}/realtime", _socket(RealtimeConnection))
        app.router.add_get(f"{base}/models", _models)
        app.router.add_get(f"{base}/models/{{id}}", _model)
    app.add_routes(page_routes())
    app.cleanup_ctx.append(_watch_loop)
    app.on_shutdown.append(_close_sockets)
    return app


def refusal(status: int, message: str, code: str, kind: str, retry_after: float | None = None) -> web.Response:
    """An HTTP error in OpenAI's form."""
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return web.json_response(body, status=status, headers=headers)


def _socket(dialect: type[LiveConnection] | type[RealtimeConnection]) -> Handler:
    async def serve(request: web.Request) -> web.StreamResponse:
        hub, token = request.app[HUB], request.query.get(RESUME)
        if token is None and (wait := hub.sessions.scheduler.admit()) is not None:
            hub.observer.refused("capacity")
            message = f"the server is full: try again in {wait:.0f} s"
            return refusal(503, message, "server_overloaded", "server_error", wait)
        if not web.WebSocketResponse().can_prepare(request):
            return refusal(426, "this is a WebSocket endpoint", "upgrade_required", "invalid_request_error")
        model = request.query.get("model")
        if dialect is RealtimeConnection and model is not None and model not in (hub.model, *hub.aliases):
            return refusal(
                404, f"the model {model[:64]!r} does not exist here", "model_not_found", "invalid_request_error"
            )
        socket = web.WebSocketResponse(
            heartbeat=HEARTBEAT, max_msg_size=MAX_MESSAGE, protocols=("realtime",), compress=False, autoclose=False
        )
        await socket.prepare(request)
        connection = dialect(request, socket, hub, token)
        request.app[CONNECTIONS].add(connection)
        try:
            await connection.run()
        finally:
            request.app[CONNECTIONS].discard(connection)
        return socket

    return serve


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": request.app[HUB].models()})


async def _model(request: web.Request) -> web.Response:
    for model in request.app[HUB].models():
        if model["id"] == request.match_info["id"]:
            return web.json_response(model)
    return refusal(404, "no such model", "model_not_found", "invalid_request_error")


async def _watch_loop(app: web.Application) -> Any:
    """Starts the worker of pictures; measures how late the event loop comes."""

    async def watch() -> None:
        while True:
            due = time.monotonic() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            app[HUB].observer.loop_lag(max(0.0, time.monotonic() - due))

    tasks = [asyncio.create_task(watch()), asyncio.create_task(app[HUB].warm())]
    yield
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _close_sockets(app: web.Application) -> None:
    """What a session's end still has to say is sent first; sessions were ended before."""
    connections = app[CONNECTIONS]
    for connection in tuple(connections):
        connection.close_when_sent()
    if connections:
        await asyncio.sleep(0.2)
    for connection in tuple(connections):
        connection.close(1012)

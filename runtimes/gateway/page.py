"""The page at `/`: microphone, camera, captions and a strip of ticks in a browser, as static files without a build.

A fixed table of files, read when the server starts: no path of a request ever names a file on disk.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from aiohttp import web

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
NAMES = ("index.html", "page.css", "main.js", "client.js", "audio.js", "strip.js", "turn.js", "worklet.js")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self), camera=(self), geolocation=()",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing is loaded from elsewhere, nobody frames the page, and only the page itself asks for microphone and camera."""


def page_routes() -> list[web.RouteDef]:
    """`GET /` and `GET /page/NAME` of each file of the page."""
    folder = files(__package__).joinpath("web")
    routes = []
    for name in NAMES:
        body = folder.joinpath(name).read_bytes()
        routes.append(web.get("/" if name == "index.html" else f"/page/{name}", _handler(body, name)))
    return routes


def _handler(body: bytes, name: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    kind = TYPES[name.rpartition(".")[2]]

    async def serve(request: web.Request) -> web.Response:
        return web.Response(body=body, headers={**HEADERS, "Content-Type": kind})

    return serve

"""Who may connect: bearer keys, short-lived secrets for browsers, the origin of pages, the host that was asked for.

A key is never kept: only its SHA-256 is, and it is compared in constant time. Browsers cannot set headers on a
WebSocket, so a key or a secret may also come as the subprotocol `openai-insecure-api-key.KEY`, as OpenAI's own
clients send it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from aiohttp import web

from tmlc.errors import UsageError
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.server import refusal
from tmlc.runtimes.gateway.settings import is_loopback

SUBPROTOCOL = "openai-insecure-api-key."
MIN_KEY, MAX_KEYS = 16, 10_000
SECRET_SECONDS, MIN_SECRET_SECONDS, MAX_SECRET_SECONDS = 600, 10, 7200
MAX_SECRETS = 10_000
OPEN_PATHS = ("/", "/page/")
"""What needs no key: the page, which asks for one."""
KEY_NAME = web.RequestKey("key_name", str)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


class Keys:
    """The keys of a file: one a line, `key` or `name key`; empty lines and lines with # are passed over.

    Raises (when made) UsageError: unreadable, readable by others, no key, a key that is too short, a name twice.
    """

    def __init__(self, path: Path) -> None:
        try:
            mode = os.stat(path).st_mode
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the keys cannot be read: {error}", where=str(path)) from None
        if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError("others can read the keys", where=str(path), fix=f"chmod 600 {path}")
        self._digests: dict[str, bytes] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            name, key = (words[0], words[1]) if len(words) == 2 else (f"key{number}", words[0])
            if len(words) > 2 or len(key) < MIN_KEY:
                what = f"line {number} is not a key of at least {MIN_KEY} characters, or a name and a key"
                raise UsageError(what, where=str(path), fix="make keys with: openssl rand -hex 32")
            if name in self._digests or len(self._digests) >= MAX_KEYS:
                raise UsageError(f"line {number}: the name is there already, or there are too many", where=str(path))
            self._digests[name] = _digest(key)
        if not self._digests:
            raise UsageError("the file has no key", where=str(path), fix="make one with: openssl rand -hex 32")

    def name_of(self, key: str) -> str | None:
        """Whose key this is. Takes as long for every key."""
        found, asked = None, _digest(key)
        for name, digest in self._digests.items():
            if hmac.compare_digest(digest, asked):
                found = name
        return found


@dataclass(frozen=True, slots=True)
class _Secret:
    name: str
    expires: float


class ClientSecrets:
    """Short-lived secrets that a server with a key makes for its browsers. In memory; at most `MAX_SECRETS`, the oldest
    goes first."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Secret] = {}

    def make(self, name: str, seconds: int) -> tuple[str, float]:
        """A secret of the key `name`, and when it expires (seconds since the epoch)."""
        secret, now = "ek_" + secrets.token_urlsafe(32), time.time()
        self._known = {digest: one for digest, one in self._known.items() if one.expires > now}
        while len(self._known) >= MAX_SECRETS:
            del self._known[next(iter(self._known))]
        self._known[_digest(secret)] = _Secret(name, now + seconds)
        return secret, now + seconds

    def name_of(self, secret: str) -> str | None:
        """Whose secret this is, while it lives."""
        found = self._known.get(_digest(secret))
        return found.name if found is not None and found.expires > time.time() else None


class Guard:
    """Lets requests in, or refuses them with OpenAI's codes.

    Args:
        keys: None lets everybody in (a server on loopback).
        origins: of foreign pages that may connect.
        loopback: is the server bound to this machine only? Then it must also have been asked for by such a name: a page
            whose name was bent to 127.0.0.1 (DNS rebinding) is refused.
    """

    def __init__(self, keys: Keys | None, origins: tuple[str, ...], loopback: bool, observer: Observer) -> None:
        self.keys, self.secrets, self.observer = keys, ClientSecrets(), observer
        self._origins = {origin.rstrip("/").lower() for origin in origins}
        self._loopback = loopback

    def middleware(self) -> Any:
        """For `make_app`."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            refused = self._refused(request)
            return refused if refused is not None else await handler(request)

        return check

    def routes(self) -> list[web.RouteDef]:
        """`POST /v1/realtime/client_secrets` and its twin for Live."""
        paths = ("/realtime/client_secrets", "/live/client_secrets")
        return [web.post(base + path, self._make_secret) for base in ("/v1", "") for path in paths]

    def _refused(self, request: web.Request) -> web.Response | None:
        if self._loopback and not is_loopback(_host_name(request.host)):
            self.observer.refused("host")
            return refusal(
                403, "this server is asked for by a strange name", "host_not_allowed", "invalid_request_error"
            )
        if not self._own_origin(request):
            self.observer.refused("origin")
            return refusal(403, "pages of this origin may not connect", "origin_not_allowed", "invalid_request_error")
        if request.path == "/" or request.path.startswith("/page/"):
            return None
        if self.keys is None:
            request[KEY_NAME] = ""
            return None
        given = credential(request)
        name = None if given is None else (self.keys.name_of(given) or self.secrets.name_of(given))
        if name is None:
            self.observer.refused("key")
            what = "you did not give an API key" if given is None else "the API key is wrong or has expired"
            return refusal(401, f"{what}: send it as Authorization: Bearer", "invalid_api_key", "invalid_request_error")
        request[KEY_NAME] = name
        return None

    def _own_origin(self, request: web.Request) -> bool:
        """A browser says where its page is from; everything else sends no Origin."""
        origin = request.headers.get("Origin")
        if origin is None:
            return True
        return origin.lower() in self._origins or _split(origin).netloc.lower() == request.host.lower()

    async def _make_secret(self, request: web.Request) -> web.Response:
        if self.keys is None:
            return refusal(404, "this server needs no keys", "not_supported", "invalid_request_error")
        if self.keys.name_of(credential(request) or "") is None:  # a secret makes no further ones
            return refusal(403, "a client secret cannot make others", "forbidden", "invalid_request_error")
        try:
            body = await request.json() if request.can_read_body else {}
            after = (body.get("expires_after") or {}) if isinstance(body, dict) else None
            seconds = after.get("seconds", SECRET_SECONDS) if isinstance(after, dict) else None
            if type(seconds) is not int or not MIN_SECRET_SECONDS <= seconds <= MAX_SECRET_SECONDS:
                raise ValueError
        except (ValueError, RecursionError):
            limits = f"{MIN_SECRET_SECONDS} to {MAX_SECRET_SECONDS}"
            return refusal(400, f"expires_after.seconds must be {limits}", "invalid_value", "invalid_request_error")
        secret, expires = self.secrets.make(request[KEY_NAME], seconds)
        return web.json_response({"value": secret, "expires_at": int(expires), "session": body.get("session")})


def _host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    return _split(f"//{host}").hostname or ""


def _split(url: str) -> SplitResult:
    """The parts of what a stranger calls a URL; all empty when it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return SplitResult("", "", "", "", "")


def credential(request: web.Request) -> str | None:
    """The key or secret of a request."""
    kind, _, key = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    for offered in request.headers.get("Sec-WebSocket-Protocol", "").split(","):
        if offered.strip().startswith(SUBPROTOCOL):
            return offered.strip().removeprefix(SUBPROTOCOL)
    return None

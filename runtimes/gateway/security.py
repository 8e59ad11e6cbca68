"""Who may connect: bearer keys, short-lived secrets for browsers, the origin of pages, the host that was asked for.

A key is never kept: only its SHA-256 is, and it is compared in constant time. Browsers cannot set headers on a
WebSocket, so a key or a secret may also come as the subprotocol `openai-insecure-api-key.KEY`, as OpenAI's own
clients send it.
"""

from __future__ import annotations

import hashlib
import heapq
import hmac
import os
import secrets
import stat
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from aiohttp import web

from tmlc.errors import UsageError, reason
from tmlc.runtimes.gateway.caps import ANYBODY, PASS, Pass
from tmlc.runtimes.gateway.fields import WireError
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.server import refusal
from tmlc.runtimes.gateway.settings import is_loopback

SUBPROTOCOL = "openai-insecure-api-key."
MIN_KEY, MAX_KEYS = 16, 10_000
SECRET_SECONDS, MIN_SECRET_SECONDS, MAX_SECRET_SECONDS = 600, 10, 7200
MAX_SECRETS, MIN_SECRETS = 100_000, 16
"""Client secrets that live at a time: all keys together, each having the same part of them, and the least of a key."""
OPEN_PATHS = ("/", "/page/")
"""What needs no key: the page, which asks for one, and the files below the second."""

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
            fix = "give a file with a key a line; make keys with: openssl rand -hex 32"
            raise UsageError(f"the keys cannot be read: {reason(error)}", where=str(path), fix=fix) from None
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
                what = f"line {number}: the name is there already, or there are more than {MAX_KEYS}"
                raise UsageError(what, where=str(path), fix="give each key a name of its own")
            self._digests[name] = _digest(key)
        if not self._digests:
            raise UsageError("the file has no key", where=str(path), fix="make one with: openssl rand -hex 32")

    def __len__(self) -> int:
        return len(self._digests)

    def name_of(self, key: str) -> str | None:
        """Whose key this is. Takes as long for every key."""
        found, asked = None, _digest(key)
        for name, digest in self._digests.items():
            if hmac.compare_digest(digest, asked):
                found = name
        return found


@dataclass(frozen=True, slots=True)
class _Secret:
    came: Pass
    expires: float


class ClientSecrets:
    """Short-lived secrets that the holder of a key makes for browsers. In memory of this process only.

    Args:
        most: that live at a time of one key. No key can push out another's.
    """

    def __init__(self, most: int = MAX_SECRETS) -> None:
        self._most = most
        self._known: dict[bytes, _Secret] = {}
        self._living = Counter[str]()
        self._ends: list[tuple[float, bytes]] = []  # a heap: who expires first is first

    def make(self, name: str, seconds: int, model: str | None = None) -> tuple[str, float] | None:
        """A secret of the key `name`, good for `model` (None: for any), and when it expires, in seconds since the
        epoch. None: the key has as many as it may."""
        secret, now = "ek_" + secrets.token_urlsafe(32), time.time()
        while self._ends and self._ends[0][0] <= now:
            gone = self._known.pop(heapq.heappop(self._ends)[1]).came.name
            self._living[gone] -= 1
            if not self._living[gone]:
                del self._living[gone]
        if self._living[name] >= self._most:
            return None
        digest, expires = _digest(secret), now + seconds
        self._known[digest] = _Secret(Pass(name, model), expires)
        self._living[name] += 1
        heapq.heappush(self._ends, (expires, digest))
        return secret, expires

    def find(self, secret: str) -> Pass | None:
        """What a secret lets its bearer do, while it lives."""
        found = self._known.get(_digest(secret))
        return found.came if found is not None and found.expires > time.time() else None


class Guard:
    """Lets requests in, or refuses them with OpenAI's codes.

    Args:
        keys: None lets everybody in (a server on loopback).
        origins: of foreign pages that may connect.
        loopback: is the server bound to this machine only? Then it must also have been asked for by such a name: a page
            whose name was bent to 127.0.0.1 (DNS rebinding) is refused.
        models: names that a client secret can be for.
    """

    def __init__(
        self, keys: Keys | None, origins: tuple[str, ...], loopback: bool, observer: Observer,
        models: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.keys, self.observer, self._models = keys, observer, models
        self.secrets = ClientSecrets(max(MIN_SECRETS, MAX_SECRETS // len(keys)) if keys is not None else 0)
        self._origins = {origin.rstrip("/").lower() for origin in origins}
        self._loopback = loopback

    def middleware(self) -> Any:
        """For `make_app`."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            came = self._check(request)
            if isinstance(came, web.Response):
                return came
            before = PASS.set(came)
            try:
                return await handler(request)
            finally:
                PASS.reset(before)

        return check

    def routes(self) -> list[web.RouteDef]:
        """`POST /v1/realtime/client_secrets` and its twin for Live."""
        paths = ("/realtime/client_secrets", "/live/client_secrets")
        return [web.post(base + path, self._make_secret) for base in ("/v1", "") for path in paths]

    def _check(self, request: web.Request) -> Pass | web.Response:
        """What the request is let in with, or why it is not."""
        if self._loopback and not is_loopback(_host_name(request.host)):
            self.observer.refused("host")
            return refusal(
                403, "this server is asked for by a strange name", "host_not_allowed", "invalid_request_error"
            )
        if not self._own_origin(request):
            self.observer.refused("origin")
            return refusal(403, "pages of this origin may not connect", "origin_not_allowed", "invalid_request_error")
        if self.keys is None or request.path == OPEN_PATHS[0] or request.path.startswith(OPEN_PATHS[1]):
            return ANYBODY
        given = credential(request)
        found = None
        if given is not None:
            name = self.keys.name_of(given)
            found = Pass(name) if name is not None else self.secrets.find(given)
        if found is None:
            self.observer.refused("key")
            what = "you did not give an API key" if given is None else "the API key is wrong or has expired"
            return refusal(401, f"{what}: send it as Authorization: Bearer", "invalid_api_key", "invalid_request_error")
        return found

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
            seconds, model = self._wanted(await request.json() if request.can_read_body else {})
        except WireError as error:
            return refusal(400, error.message, error.code, error.kind)
        except (ValueError, LookupError, RecursionError):  # LookupError: a charset that is none
            return refusal(400, "the body is not JSON", "invalid_json", "invalid_request_error")
        made = self.secrets.make(PASS.get().name, seconds, model)
        if made is None:
            self.observer.refused("secrets_per_key")
            message = "this key has made as many client secrets as may live at a time"
            return refusal(429, message, "rate_limit_exceeded", "rate_limit_error", MIN_SECRET_SECONDS)
        session = {"type": "realtime", "model": model} if model is not None else None
        return web.json_response({"value": made[0], "expires_at": int(made[1]), "session": session})

    def _wanted(self, body: Any) -> tuple[int, str | None]:
        """For how many seconds, and for which model, a secret is asked for. Raises WireError."""
        after = body.get("expires_after") if isinstance(body, dict) else None
        session = body.get("session") if isinstance(body, dict) else None
        if not isinstance(body, dict) or not isinstance(after or {}, dict) or not isinstance(session or {}, dict):
            raise WireError("the body, its expires_after and its session are objects", "invalid_type")
        seconds = (after or {}).get("seconds", SECRET_SECONDS)
        if type(seconds) is not int or not MIN_SECRET_SECONDS <= seconds <= MAX_SECRET_SECONDS:
            limits = f"{MIN_SECRET_SECONDS} to {MAX_SECRET_SECONDS}"
            raise WireError(f"expires_after.seconds must be {limits}", "invalid_value")
        if (after or {}).get("anchor", "created_at") != "created_at":
            raise WireError("expires_after.anchor must be created_at", "invalid_value")
        if session is None:
            return seconds, None
        others = sorted(str(name)[:64] for name in session if name not in ("type", "model"))
        if others:  # a secret that promised more than it holds would be worse than none
            what = f"a client secret holds the model only: send session.{others[0]} in session.update or session.start"
            raise WireError(what, "not_supported")
        model = session.get("model")
        if model is not None and model not in self._models:
            raise WireError(f"the model {str(model)[:64]!r} does not exist here", "model_not_found")
        return seconds, model


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

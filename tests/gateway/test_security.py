"""Who gets in: keys and their file, origins, names, and headers that are none."""

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tmlc.errors import UsageError
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.security import ClientSecrets, Guard, Keys

KEY = "k" * 32


def keys_of(folder, text: str, mode: int = 0o600) -> Keys:
    path = folder / "keys.txt"
    path.write_text(text)
    path.chmod(mode)
    return Keys(path)


def status_of(guard: Guard, *headers: str, own_host: bool = True) -> int:
    """The HTTP status of `GET /x` with these headers, as bytes on the wire."""

    async def ask() -> int:
        async def fine(request: web.Request) -> web.Response:
            return web.Response(text="ok")

        app = web.Application(middlewares=[guard.middleware()])
        app.router.add_get("/x", fine)
        async with TestServer(app) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            host = [f"Host: 127.0.0.1:{server.port}"] if own_host else []
            writer.write("\r\n".join(["GET /x HTTP/1.1", *host, *headers, "Connection: close", "", ""]).encode())
            status = int((await reader.readline()).split()[1])
            writer.close()
            return status

    return asyncio.run(ask())


def test_a_file_that_others_can_read_is_refused(tmp_path):
    with pytest.raises(UsageError, match="others can read"):
        keys_of(tmp_path, KEY, 0o644)


@pytest.mark.parametrize("text", ["", "# none\n", "short\n", f"a {KEY} more\n", f"a {KEY}\na {KEY}\n"])
def test_a_file_without_good_keys_is_refused_without_saying_one(tmp_path, text):
    with pytest.raises(UsageError) as error:
        keys_of(tmp_path, text)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Authorization: Bearer {KEY}", 200),
        (f"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.{KEY}", 200),
        (f"Authorization: Bearer {KEY}x", 401),
        (f"Authorization: Basic {KEY}", 401),
        ("X-Nothing: 1", 401),
    ],
)
def test_only_a_key_opens_a_server_that_has_keys(tmp_path, header, status):
    assert status_of(Guard(keys_of(tmp_path, f"me {KEY}\n"), (), True, Observer()), header) == status


def test_a_client_secret_opens_until_it_expires(monkeypatch):
    secrets, now = ClientSecrets(), [1000.0]
    monkeypatch.setattr("tmlc.runtimes.gateway.security.time.time", lambda: now[0])
    secret, expires = secrets.make("me", 60)
    assert secret.startswith("ek_") and expires == 1060
    assert secrets.name_of(secret) == "me"
    now[0] = 1060.0
    assert secrets.name_of(secret) is None


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Origin: https://app.example", 200),
        ("Origin: https://app.example.evil.example", 403),
        ("Origin: null", 403),
        ("Origin: http://[", 403),
    ],
)
def test_only_pages_of_the_list_and_our_own_may_connect(header, status):
    assert status_of(Guard(None, ("https://app.example",), True, Observer()), header) == status


@pytest.mark.parametrize("host", ["evil.example", "[", "127.0.0.1.evil.example", ""])
def test_a_server_on_loopback_is_asked_for_by_its_name_only(host):
    assert status_of(Guard(None, (), True, Observer()), f"Host: {host}", own_host=False) == 403

"""Who gets in: keys and their file, origins, names, and headers that are none."""

import asyncio
import time

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from tmlc.errors import UsageError
from tmlc.runtimes.gateway.caps import Pass
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
    secret, expires = secrets.make("me", 60, "m")
    assert secret.startswith("ek_") and expires == 1060
    assert secrets.find(secret) == Pass("me", "m")
    now[0] = 1060.0
    assert secrets.find(secret) is None


def test_one_key_cannot_push_out_the_secrets_of_another(monkeypatch):
    secrets, now = ClientSecrets(most=2), [1000.0]
    monkeypatch.setattr("tmlc.runtimes.gateway.security.time.time", lambda: now[0])
    theirs, _ = secrets.make("they", 7200)
    assert all(secrets.make("me", seconds) for seconds in (600, 10))
    assert secrets.make("me", 600) is None
    assert secrets.find(theirs) == Pass("they")
    now[0] += 10  # one of mine has expired, whichever was made first
    assert secrets.make("me", 600) and secrets.make("me", 600) is None


def post(folder, bearer: str | None, body: bytes, **headers: str) -> tuple[int, dict]:
    """`POST /v1/realtime/client_secrets`: status and answer. "SECRET" stands for a client secret made before."""

    async def ask() -> tuple[int, dict]:
        keys = keys_of(folder, f"me {KEY}\n") if bearer != "no keys" else None
        guard = Guard(keys, (), True, Observer(), ("m",))
        app = web.Application(middlewares=[guard.middleware()])
        app.add_routes(guard.routes())
        async with TestClient(TestServer(app)) as client:
            if bearer == "SECRET":
                given = guard.secrets.make("me", 60)[0]
            else:
                given = bearer
            headers.update({"Authorization": f"Bearer {given}"} if given else {})
            answer = await client.post("/v1/realtime/client_secrets", data=body, headers=headers)
            return answer.status, await answer.json()

    return asyncio.run(ask())


def test_a_key_makes_a_secret_for_a_model(tmp_path):
    body = b'{"expires_after": {"anchor": "created_at", "seconds": 30}, "session": {"type": "realtime", "model": "m"}}'
    status, answer = post(tmp_path, KEY, body)
    assert status == 200 and answer["value"].startswith("ek_")
    assert answer["session"] == {"type": "realtime", "model": "m"}
    assert 0 < answer["expires_at"] - time.time() <= 31


def test_a_key_alone_is_enough(tmp_path):
    status, answer = post(tmp_path, KEY, b"")
    assert status == 200 and answer["session"] is None


@pytest.mark.parametrize(
    ("bearer", "status", "code"),
    [
        (None, 401, "invalid_api_key"),
        ("x" * 32, 401, "invalid_api_key"),
        ("SECRET", 403, "forbidden"),
        ("no keys", 404, "not_supported"),
    ],
)
def test_only_a_key_makes_secrets(tmp_path, bearer, status, code):
    found, answer = post(tmp_path, bearer, b"{}")
    assert (found, answer["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"[]", "invalid_type"),
        (b'{"session": "m"}', "invalid_type"),
        (b'{"expires_after": 60}', "invalid_type"),
        (b'{"expires_after": {"seconds": 9}}', "invalid_value"),
        (b'{"expires_after": {"seconds": 7201}}', "invalid_value"),
        (b'{"expires_after": {"seconds": true}}', "invalid_value"),
        (b'{"expires_after": {"seconds": 60.5}}', "invalid_value"),
        (b'{"expires_after": {"anchor": "never"}}', "invalid_value"),
        (b'{"session": {"model": "other"}}', "model_not_found"),
        (b'{"session": {"model": ["m"]}}', "model_not_found"),
        (b'{"session": {"model": "m", "instructions": "be kind"}}', "not_supported"),
    ],
)
def test_a_body_that_makes_no_sense_makes_no_secret(tmp_path, body, code):
    status, answer = post(tmp_path, KEY, body)
    assert (status, answer["error"]["code"]) == (400, code)


def test_a_body_in_no_known_alphabet_is_refused(tmp_path):
    status, answer = post(tmp_path, KEY, b"{}", **{"Content-Type": "application/json; charset=klingon"})
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


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

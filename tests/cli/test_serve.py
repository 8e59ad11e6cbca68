"""`tmlc serve` as a process: it says where it listens, is alive and ready, drains with a snapshot when told to end,
and what it kept goes on in another process. Its logs tell nothing that was said.
"""

import asyncio
import base64
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest

from tmlc.cli.main import cli

ROOT = Path(__file__).parents[2]
START = {"type": "session.start", "session": {"model": "tiny", "tmlc": {"events": True}}}
KEY = "k3y" * 12


@pytest.fixture
def serve(package):
    """Starts a server on free ports; all are killed at the end of the test."""
    running = []

    def start(*options):
        words = ["serve", str(package), "--port", "0", "--admin-port", "0", "--sessions", "2", "--threads", "1"]
        process = subprocess.Popen(
            [sys.executable, "-m", "tmlc.cli.main", *words, *map(str, options), "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        line = process.stdout.readline()
        assert line, process.stderr.read()
        where = json.loads(line)
        return SimpleNamespace(process=process, api=where["url"], admin=where["admin"], model=where["model"])

    yield start
    for process in running:
        process.kill()
        process.communicate()


def ended(server) -> list[dict]:
    """The log of a server that has been told to end, and did so without an error."""
    _, errors = server.process.communicate(timeout=60)
    assert server.process.returncode == 0, errors
    return [json.loads(line) for line in errors.splitlines()]


def run(test) -> None:
    async def limited():
        async with aiohttp.ClientSession() as http:
            await asyncio.wait_for(test(http), 60)

    asyncio.run(limited())


async def until(socket, kind):
    async for message in socket:
        event = json.loads(message.data)
        if event["type"] == kind:
            return event
    raise AssertionError(f"the socket was closed with {socket.close_code} before {kind}")


async def open_live(http, server, **more):
    """A Live session that has ticked: its socket and what it began with."""
    socket = await http.ws_connect(f"{server.api}/live/sessions", **more)
    await socket.send_json({**START, "session": {**START["session"], "model": server.model}})
    started = await until(socket, "session.started")
    await until(socket, "tmlc.tick")
    return socket, started


async def text_at(http, url):
    async with http.get(url) as answer:
        return answer.status, await answer.text()


async def readyz_says(http, server, word):
    while word not in (await text_at(http, f"{server.admin}/readyz"))[1]:
        await asyncio.sleep(0.05)


def test_a_session_goes_on_in_another_process(serve, tmp_path):
    folder = tmp_path / "snapshots"
    first = serve("--snapshots", folder, "--drain", "0")
    found = {}

    async def talk(http):
        for path, word in (("livez", "ok"), ("readyz", "ok"), ("metrics", "tmlc_slots 2.0")):
            status, text = await text_at(http, f"{first.admin}/{path}")
            assert status == 200 and word in text
        socket, started = await open_live(http, first)
        found["token"], found["id"] = started["tmlc"]["resume_token"], started["session"]["id"]
        for _ in range(3):
            last = await until(socket, "tmlc.tick")
        first.process.send_signal(signal.SIGTERM)
        async for message in socket:  # until the server closes it
            event = json.loads(message.data)
            last = event if event["type"] == "tmlc.tick" else last
            found["closed"] = event if event["type"] == "session.closed" else found.get("closed")
        found["tick"] = last["tick"]

    run(talk)
    assert found["closed"]["tmlc"]["reason"] == "shutdown"
    assert any(line["message"] == "draining" for line in ended(first))
    (kept,) = folder.iterdir()
    assert (kept.suffix, kept.stat().st_mode & 0o777) == (".session", 0o600)
    second = serve("--snapshots", folder, "--drain", "0")

    async def go_on(http):
        socket = await http.ws_connect(f"{second.api}/live/sessions?tmlc_resume={found['token']}")
        started = await until(socket, "session.started")
        assert started["tmlc"]["resumed"] and started["tmlc"]["resume_token"] != found["token"]
        ticks = [(await until(socket, "tmlc.tick"))["tick"] for _ in range(3)]
        assert ticks == [found["tick"] + 1 + step for step in range(3)]
        again = await http.ws_connect(f"{second.api}/live/sessions?tmlc_resume={found['token']}")
        assert (await until(again, "error"))["error"]["code"] == "session_not_found"

    run(go_on)
    second.process.send_signal(signal.SIGINT)  # Ctrl-C drains, too
    assert any(line["message"] == "draining" for line in ended(second))
    assert [path.suffix for path in folder.iterdir()] == [".session"]


@pytest.mark.parametrize("first", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_second_signal_does_not_wait_for_the_sessions(serve, tmp_path, first):
    folder = tmp_path / "snapshots"
    server = serve("--drain", "3600", "--snapshots", folder)

    async def talk(http):
        socket, _ = await open_live(http, server)
        server.process.send_signal(first)
        await readyz_says(http, server, "draining")
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await http.ws_connect(f"{server.api}/live/sessions")
        assert refused.value.status == 503
        await until(socket, "tmlc.tick")  # the session that was there goes on
        server.process.send_signal(signal.SIGTERM)
        assert (await until(socket, "session.closed"))["tmlc"]["reason"] == "shutdown"

    run(talk)
    ended(server)
    assert [path.suffix for path in folder.iterdir()] == [".session"]


def test_the_log_holds_nothing_that_was_said_no_key_and_no_token(serve, tmp_path):
    keys, logs = tmp_path / "keys", tmp_path / "ticks"
    keys.write_text(f"somebody {KEY}\n")
    keys.chmod(0o600)
    server = serve("--keys", keys, "--record", logs, "--drain", "0")
    said = ["my sister's name is Xanthippe", "Xanthippe", "plover-42", KEY]
    bearer = {"headers": {"Authorization": f"Bearer {KEY}"}}

    async def talk(http):
        async with http.post(f"{server.api}/realtime/client_secrets", **bearer) as answer:
            said.append((await answer.json())["value"])
        socket, started = await open_live(http, server, headers={"Authorization": f"Bearer {said[-1]}"})
        said.extend([started["tmlc"]["resume_token"], started["session"]["id"]])
        sound = base64.b64encode(bytes(range(1, 200)) * 48).decode()
        said.append(sound[:40])
        await socket.send_json({"type": "session.input_audio.append", "audio": sound})
        await socket.send_json({"type": "tmlc.input_text.append", "text": said[0]})
        await socket.send_json({"type": "session.thinking.append", "content": "plover-42"})
        await socket.send_json({"type": "plover-42", "Xanthippe": KEY})
        await socket.send_str("plover-42 is no JSON")
        for _ in range(4):
            await until(socket, "tmlc.tick")
        await socket.close()
        again = await http.ws_connect(f"{server.api}/live/sessions?tmlc_resume={said[5]}", **bearer)
        said.append((await until(again, "session.started"))["tmlc"]["resume_token"])
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await http.ws_connect(f"{server.api}/live/sessions", headers={"Authorization": "Bearer plover-42"})

    run(talk)
    server.process.send_signal(signal.SIGTERM)
    lines = ended(server)
    messages = {line["message"] for line in lines}
    assert {"session opened", "session resumed", "session ended", "refused", "draining"} <= messages
    everything = json.dumps(lines)
    for secret in said:
        assert secret not in everything
    assert [path.stat().st_mode & 0o777 for path in logs.iterdir()] == [0o600]


def test_an_open_bind_without_keys_is_refused(package, tmlc_cli):
    found = tmlc_cli("serve", package, "--host", "0.0.0.0", "--port", "0", code=2)
    assert "without keys" in found.stderr
    found = tmlc_cli("serve", package, "--admin-host", "0.0.0.0", "--port", "0", code=2)
    assert "admin_open" in found.stderr


def commands(help_text: str) -> list[list[str]]:
    """The words of every `tmlc serve …` that somebody could copy out of the README, the docs and --help."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [help_text, *(path.read_text(encoding="utf-8") for path in pages)]
    found = {line for text in texts for line in re.findall(r"(?:^ *|`)tmlc (serve [^`#\n|]+)", text, re.MULTILINE)}
    return [shlex.split(line) for line in sorted(found)]


def test_every_command_of_the_docs_and_the_help_can_be_typed(tmlc_cli):
    typed = commands(tmlc_cli("serve", "--help").stdout)
    assert ["serve", "nano.tmlc"] in typed and len(typed) >= 4
    for words in typed:
        name, command, rest = cli.resolve_command(cli.make_context("tmlc", ["serve"]), words)
        context = command.make_context(name, rest)  # raises for an option that is not there, or a value that is wrong
        assert str(context.params["package"]).endswith(".tmlc")

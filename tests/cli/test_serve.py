"""`tmlc serve` as a process: it says where it listens, is alive and ready, and drains with a snapshot on SIGTERM."""

import asyncio
import json
import signal
import subprocess
import sys

import aiohttp
import pytest


@pytest.fixture
def served(package, tmp_path):
    """A server on free ports: its process, what it printed, and its folder of snapshots."""
    folder = tmp_path / "snapshots"
    options = ["--port", "0", "--admin-port", "0", "--sessions", "2", "--threads", "1", "--drain", "0"]
    words = ["serve", str(package), *options, "--snapshots", str(folder), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tmlc.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line), folder
    finally:
        process.kill()
        process.communicate()


def test_sigterm_during_a_conversation_ends_cleanly_and_keeps_it(served):
    process, where, folder = served

    async def talk():
        async with aiohttp.ClientSession() as http:
            for path, word in (("livez", "ok"), ("readyz", "ok"), ("metrics", "tmlc_slots 2.0")):
                async with http.get(f"{where['admin']}/{path}") as answer:
                    assert answer.status == 200 and word in await answer.text()
            async with http.ws_connect(f"{where['url']}/realtime") as socket:
                assert (await socket.receive_json())["type"] == "session.created"
                while "tmlc_ticks_total 0.0" in (text := await _metrics(http, where)):
                    await asyncio.sleep(0.1)
                assert 'tmlc_sessions{state="ticking"} 1.0' in text
                process.send_signal(signal.SIGTERM)
                async for _ in socket:  # until the server closes it
                    pass
                assert socket.close_code is not None

    asyncio.run(asyncio.wait_for(talk(), 60))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert [path.suffix for path in folder.iterdir()] == [".session"]
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert any(line["message"] == "draining" for line in lines)


async def _metrics(http, where):
    async with http.get(f"{where['admin']}/metrics") as answer:
        return await answer.text()


def test_an_open_bind_without_keys_is_refused(package, tmlc_cli):
    found = tmlc_cli("serve", package, "--host", "0.0.0.0", "--port", "0", code=2)
    assert "without keys" in found.stderr

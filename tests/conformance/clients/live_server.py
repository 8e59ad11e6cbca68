"""A server with nano on a free loopback port, for clients that run in environments of their own (`make clients`)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import tmlc
from tmlc.runtimes.background.callable import CallableModel
from tmlc.runtimes.background.rules import Rule
from tmlc.runtimes.background.session import Background
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.gateway.hub import Hub
from tmlc.runtimes.gateway.observer import Observer
from tmlc.runtimes.gateway.server import make_app
from tmlc.runtimes.gateway.sessions import Sessions
from tmlc.runtimes.gateway.snapshots import SnapshotStore

HERE = Path(__file__).parent
CLIENTS = HERE.parents[2] / "build/clients"
SPEAKS = range(3, 8)
"""Of every 25 ticks, those in which nano may say what it likes; in the others it is silent, so that there are gaps."""


@dataclass
class Served:
    """A running server. `url` is what clients take as their base URL."""

    url: str
    scheduler: Scheduler
    hub: Hub


def _with_gaps(engine: Any) -> None:
    """A model with random weights never stops talking: it gets silences, at fixed ticks."""
    choose, layout = engine.model.next_token, engine.layout

    def next_token(asked: Any) -> Iterator[tuple[int, int]]:
        speaking = [one for one in asked if one[1][1] % 25 in SPEAKS]
        said = dict(choose(speaking)) if speaking else {}
        for session, (_, _, output), _ in asked:
            quiet = layout.silence_token_id if output == 0 else layout.end_of_tick_token_id
            token = said.get(session, quiet)
            # Of what it likes, it says letters: a special token would end the tick or delegate.
            yield session, 97 + token % 26 if session in said else token

    engine.model.next_token = next_token


@contextmanager
def serve(
    package: Path, sessions: int = 4, rules: tuple[Rule, ...] = (), answer: Any = None, folder: Path | None = None
) -> Iterator[Served]:
    """A server on a thread of its own, with real ticks.

    Args:
        sessions: that it has slots for. rules: of its background. answer: a callable that is its background model.
        folder: of snapshots.
    """
    ready: dict[str, Any] = {}
    started, stop = threading.Event(), asyncio.Event()

    async def main(engine: Any) -> None:
        scheduler = Scheduler(engine, resume_window=20.0)
        background = Background(CallableModel(answer) if answer else None, rules=rules)
        store = SnapshotStore(folder) if folder else None
        hub = Hub(Sessions(scheduler, background, Observer(), store), Observer(), "nano")
        runner = web.AppRunner(make_app(hub))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        scheduler.start()
        port = runner.addresses[0][1]
        ready.update(loop=asyncio.get_running_loop(), served=Served(f"http://127.0.0.1:{port}/v1", scheduler, hub))
        started.set()
        await stop.wait()
        await asyncio.to_thread(scheduler.close)
        await runner.cleanup()
        await hub.close()

    def work() -> None:
        try:
            with tmlc.load(package, threads=1, sessions=sessions) as engine:
                _with_gaps(engine)
                asyncio.run(main(engine))
        except BaseException as error:
            ready["error"] = error
            started.set()
            raise

    thread = threading.Thread(target=work, name="server", daemon=True)
    thread.start()
    started.wait(60)
    if "error" in ready:
        raise ready["error"]
    try:
        yield ready["served"]
    finally:
        ready["loop"].call_soon_threadsafe(stop.set)
        thread.join(30)
    assert not thread.is_alive()


def start_client(client: str, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a script of this folder with the packages of `build/clients/<client>`; skips when they are not there."""
    packages = CLIENTS / client
    if not packages.is_dir():
        pytest.skip(f"needs {client} in build/clients: run `make clients`")
    environment = {**os.environ, "PYTHONPATH": str(packages), "PYTHONNOUSERSITE": "1"}
    command = [sys.executable, "-S", str(HERE / script), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer_of(process: subprocess.Popen[str], seconds: float = 90.0) -> dict[str, Any]:
    """What a client printed: one JSON object."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, err[-4000:]
    answer: dict[str, Any] = json.loads(out)
    return answer

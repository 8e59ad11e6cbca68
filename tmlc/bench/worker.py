"""One process of the load generator: `python -m tmlc.bench.worker` reads its part of the plan as JSON from stdin, holds
its sessions, and writes what they saw as JSON to stdout.

It shares nothing with the server but the network and the machine's clock.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tmlc.bench.client import Client, Histogram
from tmlc.bench.dialects import DIALECTS
from tmlc.bench.dialogues import Dialogue, made_up, read_folder
from tmlc.bench.plan import Visit

PROBE_SECONDS = 0.02


def load_dialogues(folder: str | None, count: int, rate: int, seed: int) -> list[Dialogue]:
    """The dialogues of a bench: every process makes or reads the same."""
    return made_up(count, rate, seed) if folder is None else read_folder(Path(folder), rate)


async def work(plan: dict[str, Any]) -> dict[str, Any]:
    """Holds all sessions of this part. Raises what is wrong with the plan, never what a server does."""
    kind = DIALECTS[plan["dialect"]]
    dialogues = load_dialogues(plan["folder"], plan["count"], kind.rate, plan["seed"])
    late, blocked, lag = Histogram(), Histogram(), Histogram()
    dialect = kind(plan["url"], plan["key"], plan["model"])
    visits = [Visit(**visit) for visit in plan["visits"]]
    clients = [
        Client(dialect, dialogues[visit.dialogue], visit, plan["zero"], plan["piece"], late, blocked)
        for visit in visits
    ]
    probing = asyncio.create_task(_probe(lag))
    gc.collect()
    gc.freeze()  # the collector would look at the dialogues and the client's modules again and again
    cpu = time.process_time()
    visited = await asyncio.gather(*(client.run() for client in clients))
    probing.cancel()
    return {
        "visits": [asdict(seen) for seen in visited],
        "late": late.to_json(), "blocked": blocked.to_json(), "lag": lag.to_json(),
        "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip


async def _probe(lag: Histogram) -> None:
    """How late this process's event loop wakes somebody who sleeps: what arrives is seen that late, too."""
    while True:
        due = time.monotonic() + PROBE_SECONDS
        await asyncio.sleep(PROBE_SECONDS)
        lag.add(time.monotonic() - due)


def main() -> None:
    """Reads the plan, works, writes the answer."""
    answer = asyncio.run(work(json.load(sys.stdin)))
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()

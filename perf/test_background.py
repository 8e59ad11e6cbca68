"""What the background of a session costs the device thread at an edge: rules, a queue, an edge full of tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tmlc.package.manifest import TickLayout
from tmlc.runtimes.background.injections import MAX_TOKENS, MAX_WAITING
from tmlc.runtimes.background.policies import Policy
from tmlc.runtimes.background.rules import Rule
from tmlc.runtimes.background.session import Background
from tmlc.runtimes.core.live import Moment
from tmlc.runtimes.core.text import ByteTokenizer

EDGES = 5_000
LAYOUT = TickLayout(duration_ms=200, text_in=2, text_out=2)
MARKS = {"<injection>": 300, "<end_of_injection>": 301}


def moment(tick: int) -> Moment:
    return Moment(tick, tick * 0.2, user_speaking=True, model_speaking=False, quiet=0.0, say_room=2)


def edges(rules: list[Rule], fill: Callable[[Any], None]) -> np.ndarray:
    """Microseconds of `take` at each of many edges, with `fill(session)` before each."""

    async def run() -> np.ndarray:
        tokenizer = ByteTokenizer({b: b for b in range(256)}, MARKS)
        session = Background(rules=rules).open(tokenizer, LAYOUT)
        taken = np.empty(EDGES)
        for tick in range(EDGES):
            fill(session)
            now = moment(tick)
            begun = time.perf_counter_ns()
            session.take(now)
            taken[tick] = (time.perf_counter_ns() - begun) / 1000
        session.close()
        return taken

    return asyncio.run(run())


def test_what_an_edge_costs(benchmark: Any, figure: Callable[..., None]) -> None:
    """`take` of one session: nothing waits; a full edge of 64 positions; 64 injections wait and 64 rules watch."""
    rules = [Rule.model_validate({"every": f"{n + 1} h", "inject": "x"}) for n in range(64)]

    def full(session: Any) -> None:
        if session.queue.waiting < 2:
            session.inject("x" * MAX_TOKENS, policy=Policy.SILENT)

    def waiting(session: Any) -> None:
        while session.queue.waiting < MAX_WAITING:
            session.inject("x", spoken=True, policy=Policy.NEXT_GAP)

    cases = [
        ("nothing waits", [], lambda session: None, 50.0),
        ("64 positions enter", [], full, 200.0),
        ("64 wait, 64 rules", rules, waiting, 500.0),
    ]
    for name, watched, fill, target in cases:
        taken = edges(watched, fill)
        figure(f"background at an edge, {name}, p99", float(np.percentile(taken, 99)), "us", target=target)
    benchmark.pedantic(lambda: edges([], lambda session: None), rounds=1)

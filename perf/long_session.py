"""`python perf/long_session.py PACKAGE`: 10,000 ticks of one session in a fresh process; its memory, as JSON.

A process of its own, because whatever else has run in a process leaves freed memory behind that would hide growth.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import tmlc
from tmlc.cli.inputs import tick_shape
from tmlc.report.profile.inputs import synthetic_recording
from tmlc.report.profile.measure import resident_bytes

EARLY, TICKS = 1000, 10_000


def busy_ticks(engine: Any, count: int) -> Iterator[Any]:
    """`count` ticks that keep every part busy: audio in each, video as often as the model takes it, typed text."""
    shape = tick_shape(engine.manifest)
    part = round(30 / shape.seconds)
    recordings = (synthetic_recording(shape, 30.0, True, seed=seed) for seed in range(-(-count // part)))
    return islice(chain.from_iterable(r.ticks(part) for r in recordings), count)


def main(package: str) -> None:
    with tmlc.load(package, threads=1, sessions=1) as engine:
        session = engine.session(seed=0)
        early: int | None = None
        for index, given in enumerate(busy_ticks(engine, TICKS), start=1):
            session.tick(given)
            if index == EARLY:
                early = resident_bytes()
        print(json.dumps({"early": early, "end": resident_bytes()}))


if __name__ == "__main__":
    main(sys.argv[1])

"""A sitting of an engine that was made slower on purpose: takes the place of `python -m tmlc.report.profile.sittings`.

    python perf/altered_sitting.py pad INDEX TIMES     decode makes its call INDEX so many times more
    python perf/altered_sitting.py sleep EVERY MS      one tick in EVERY sleeps
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from tmlc.package.reader import Package
from tmlc.report.profile.sittings import sit
from tmlc.runtimes.core.session import Session


def padded(index: int, times: int) -> Callable[[Package, str], Any]:
    """What `Package.json` is to be: a plan calls a kernel of decode again, which writes what it wrote before."""
    plain = Package.json

    def read(opened: Package, name: str) -> Any:
        value = plain(opened, name)
        if name.endswith("plan.json"):
            code = next(m["code"] for m in value["methods"] if m["name"] == "decode")
            code[index:index] = [code[index]] * times
        return value

    return read


def sleepy(every: int, ms: int) -> Callable[[Session, Any], Any]:
    """What `Session.tick` is to be: one tick in `every` sleeps."""
    plain, ticks = Session.tick, 0

    def tick(session: Session, given: Any) -> Any:
        nonlocal ticks
        ticks += 1
        if ticks % every == 7:
            time.sleep(ms / 1000)
        return plain(session, given)

    return tick


if __name__ == "__main__":
    kind, first, second = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if kind == "pad":
        Package.json = padded(first, second)
    else:
        Session.tick = sleepy(first, second)
    print(json.dumps(sit(json.load(sys.stdin))))

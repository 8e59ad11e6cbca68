"""Start-up of an engine in a fresh process: `python -m tmlc.report.startup PACKAGE [THREADS]` prints one JSON
line.

The child imports, loads and answers one tick with nothing warmed up but the system's file cache; the parent's
clock gives the whole life of the process.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tmlc.errors import KernelError
from tmlc.processes import python_module


def peak_rss_bytes() -> int:
    """The most memory this process has had resident so far.

    Linux keeps getrusage's figure across exec, so a child would report its parent's: there the kernel is asked for
    the figure of this program alone.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_startup(package: Path, threads: int | None, runs: int) -> dict[str, Any]:
    """`runs` fresh processes, the medians of their times in ms, the largest load + first tick, and the peak
    memory.

    Raises:
        KernelError: the child failed; its last line is in the message.
    """
    results = []
    for _ in range(runs):
        started = time.perf_counter()
        done = subprocess.run(
            python_module("tmlc.report.startup", package, threads or 0),
            capture_output=True,
            text=True,
            check=False,
        )
        wall = (time.perf_counter() - started) * 1000
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise KernelError(
                f"a fresh process could not load the engine: {last}",
                where=str(package),
                fix="run `tmlc verify` on the package",
            )
        results.append({**json.loads(done.stdout), "process_ms": wall})
    medians = {
        key: statistics.median(r[key] for r in results)
        for key in ("import_ms", "load_ms", "first_tick_ms", "load_and_first_tick_ms", "process_ms")
    }
    return {
        "runs": runs,
        **medians,
        "load_and_first_tick_max_ms": max(r["load_and_first_tick_ms"] for r in results),
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in results),
    }


def _child(package: str, threads: int) -> None:
    start = time.perf_counter()
    import tmlc

    load, tick_input = tmlc.load, tmlc.TickInput
    imported = time.perf_counter()
    engine = load(package, threads=threads or None)
    loaded = time.perf_counter()
    engine.session(seed=0).tick(tick_input(tokens=[0]))
    ticked = time.perf_counter()
    print(
        json.dumps(
            {
                "import_ms": (imported - start) * 1000,
                "load_ms": (loaded - imported) * 1000,
                "first_tick_ms": (ticked - loaded) * 1000,
                "load_and_first_tick_ms": (ticked - imported) * 1000,
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
    )


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)

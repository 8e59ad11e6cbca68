"""What the machine can do at best with as many threads: `python -m tmlc.report.profile.ceilings BYTES THREADS` prints
one line of JSON. A process of its own, so that the memory that is read counts in no figure of the engine.

As many bytes are read as the weights have (512 MiB at most): where the last cache holds them, its rate is the ceiling.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

from tmlc.errors import KernelError
from tmlc.processes import python_module

KINDS = ("fp32", "bf16", "int8")


class Ceilings:
    """Measured right before the session and right after it.

    Args:
        working_set: bytes that are read. threads: of the engine.
    """

    def __init__(self, working_set: float, threads: int) -> None:
        self._working_set, self._threads = working_set, threads
        self._found: list[dict[str, Any]] = []
        self._seconds = 0.0

    def measure(self) -> None:
        """One measurement, in a fresh process. Raises KernelError when that failed."""
        started = time.perf_counter()
        command = python_module("tmlc.report.profile.ceilings", self._working_set, self._threads)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise KernelError(f"the machine's ceilings could not be measured: {last}", fix="profile with --no-kernels")
        self._found.append(json.loads(done.stdout))
        self._seconds += time.perf_counter() - started

    def to_json(self) -> dict[str, Any]:
        """The part `ceilings` of a profile: medians of what was measured."""

        def middle(values: list[float]) -> float:
            return statistics.median(values) / 1e9

        return {
            "threads": self._threads,
            "read_gb_s": middle([found["bandwidth"] for found in self._found]),
            "multiply": {kind: middle([found["rates"][kind] for found in self._found]) for kind in KINDS},
            "measured_ms": self._seconds * 1000,
        }


def _child(working_set: float, threads: int) -> None:
    from tmlc.report.plan.hardware import measure_here

    here = measure_here(working_set, threads)
    print(json.dumps({"bandwidth": here.bandwidth, "rates": here.rates}))


if __name__ == "__main__":
    _child(float(sys.argv[1]), int(sys.argv[2]))

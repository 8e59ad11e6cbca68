"""What it costs to begin: compiling nano, and loading it in a fresh process up to the first tick."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tmlc.report.startup import measure_startup

RUNS = 10


def test_load_and_first_tick(nano: Path, benchmark: Any, figure: Callable[..., None]) -> None:
    """`tmlc.load` and one tick in fresh processes on one thread, files in the system's cache."""
    result = benchmark.pedantic(lambda: measure_startup(nano, 1, RUNS), rounds=1)
    benchmark.extra_info.update(result)
    median, slowest = result["load_and_first_tick_ms"], result["load_and_first_tick_max_ms"]
    figure("nano load + first tick, fresh process, median", median, "ms", target=300.0)
    figure("nano load + first tick, fresh process, slowest", slowest, "ms", target=300.0)
    figure("nano whole process, start to exit, median", result["process_ms"], "ms")
    figure("peak resident memory after the first tick", result["peak_rss_bytes"] / 1e6, "MB")


def test_import(benchmark: Any, figure: Callable[..., None]) -> None:
    """`import tmlc` in a fresh interpreter, as the interpreter itself measures it."""
    code = "import time; t = time.perf_counter(); import tmlc; print((time.perf_counter() - t) * 1000)"

    def run() -> float:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return float(done.stdout)

    times = [run() for _ in range(RUNS)]
    benchmark.pedantic(run, rounds=1)
    figure("import tmlc, slowest of ten", max(times), "ms", target=100.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compile(checkpoint: Path, tmp_path: Path, benchmark: Any, figure: Callable[..., None], precision: str) -> None:
    """The whole `tmlc compile` in a fresh process, the import of PyTorch included."""
    command = [sys.executable, "-m", "tmlc.cli.main", "compile", str(checkpoint), "--precision", precision]
    command += ["-o", str(tmp_path / "nano.tmlc"), "--no-cache", "--json"]
    started = time.perf_counter()
    benchmark.pedantic(lambda: subprocess.run(command, capture_output=True, check=True), rounds=1)
    figure(f"tmlc compile nano, {precision}, whole process", time.perf_counter() - started, "s", target=30.0)

"""What a compilation costs: memory of a large one, time of an unchanged second one, and both for the kernels and the
plan of a model that no machine here holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tmlc.report.compile_memory import create_wide_checkpoint, measure_compile

CHECKPOINT_BYTES = 8_000_000_000


def test_memory(tmp_path: Path, benchmark: Any, figure: Callable[..., None]) -> None:
    """Peak resident memory of compiling 8 GB of bfloat16 shards, above that of the interpreter with PyTorch in it."""
    checkpoint = create_wide_checkpoint(tmp_path / "wide", CHECKPOINT_BYTES)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    measured = benchmark.pedantic(
        lambda: measure_compile(checkpoint, tmp_path / "wide.tmlc", "bf16"), rounds=1, iterations=1
    )
    benchmark.extra_info.update(measured)
    figure("checkpoint compiled", size / 1e9, "GB")
    figure("compile, peak resident above the interpreter", measured["above_bytes"] / 1e9, "GB", target=1.5)
    figure("compile", measured["seconds"], "s")


def test_unchanged(checkpoint: Path, tmp_path: Path, benchmark: Any, figure: Callable[..., None]) -> None:
    """`tmlc compile` of nano, the second time, as a person waits for it: a fresh process, from the cache."""
    environment = {**os.environ, "TMLC_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tmlc.cli.main", "compile", str(checkpoint), "-o", str(tmp_path / "x.tmlc")]

    def compile() -> float:
        started = time.perf_counter()
        subprocess.run([*command, "--force", "--json"], check=True, capture_output=True, env=environment)
        return time.perf_counter() - started

    first = compile()
    second = benchmark.pedantic(compile, rounds=1, iterations=1)
    figure("nano compile, nothing in the cache", first, "s")
    figure("nano compile, unchanged", second, "s", target=2.0)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_large_gpu_plan(precision: str, benchmark: Any, figure: Callable[..., None]) -> None:
    """Kernels and plan of tml-small-276b for triton:sm90 on two processes, nothing from a cache, weights on meta."""
    pytest.importorskip("triton", reason="needs Triton (pip install 'tmlc[triton]')")
    command = [sys.executable, "-m", "tmlc.report.gpu_plan", "tml-small-276b", "--precision", precision, "--jobs", "2"]

    def plan() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return found

    view = benchmark.pedantic(plan, rounds=1, iterations=1)
    benchmark.extra_info.update({key: view[key] for key in ("seconds", "launches", "variants", "spills")})
    name = f"tml-small-276b {precision}, triton:sm90"
    figure(f"{name}: kernels and plan", view["total_seconds"], "s", target=300.0)
    figure(f"{name}: memory of all processes at their peaks", view["peak_bytes_of_all"] / 1e9, "GB", target=4.0)
    figure(f"{name}: variants that spill", len(view["spills"]), "", target=0.0)

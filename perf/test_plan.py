"""What `tmlc plan --on here` predicts beside what the engine takes: ratios that should be within 25 % of one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tmlc_cli

import tmlc

PEERS = Path(__file__).parent / "peers"
ROUNDS, WARM = 9, 2
AGREEMENT = 1.25


def off_by(predicted: float, measured: float) -> float:
    """How many times one is of the other, the larger over the smaller."""
    return max(predicted / measured, measured / predicted)


def predictor(package: Path, threads: int, context: int, spread: float = 1.0) -> Any:
    from tmlc.report.plan.hardware import find
    from tmlc.report.plan.predict import Predictor
    from tmlc.report.plan.source import load_planned
    from tmlc.report.plan.work import method_work, weight_bytes

    program, precision = load_planned(str(package), None, None)
    here = find("here", weight_bytes(method_work(program, precision), program, precision), threads)
    return Predictor(program, precision, here, 1, context, spread=spread)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_tick_of_nano(nano: Path, threads: int, figure: Callable[..., None]) -> None:
    random = np.random.default_rng(0)
    with tmlc.load(nano, threads=threads, sessions=1) as engine:
        session, steps = engine.session(seed=1), []
        for _ in range(300):
            given = tmlc.TickInput((0.1 * random.standard_normal(3200)).astype(np.float32), tokens=[65, 66])
            started = time.perf_counter()
            out = session.tick(given)
            if not out.stats["silent"]:
                steps.append(time.perf_counter() - started)
    predicted = predictor(nano, threads, 1024).step(1, video=False).seconds
    figure(f"plan: nano, {threads} thread(s), predicted step", 1000 * predicted, "ms")
    figure(f"plan: nano, {threads} thread(s), off by", off_by(predicted, float(np.median(steps))), "x", AGREEMENT)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `make peers`, with its routing counted."""
    folder = tmp_path_factory.mktemp("qwen")
    subprocess.run([sys.executable, str(PEERS / "checkpoint.py"), str(folder)], check=True)
    return folder


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_a_micro_turn(qwen: Path, tmp_path: Path, precision: str, figure: Callable[..., None]) -> None:
    """Append 16 positions to a cache of 2,000, then decode one, on two threads."""
    from tmlc.report.plan.work import MethodCall, OpWork

    package = tmp_path / "qwen.tmlc"
    tmlc_cli("compile", qwen / "checkpoint", "-o", package, "--precision", precision, "--context", 4096)
    random, cached = np.random.default_rng(0), 2000
    times: dict[int, list[float]] = {16: [], 1: []}
    with tmlc.load(package, threads=2, sessions=2) as engine:
        base = engine.session()
        base.append(random.integers(0, 8192, cached).tolist(), logits="none")
        for turn in range(WARM + ROUNDS):
            with base.fork() as session:
                for count, taken in times.items():
                    tokens = random.integers(0, 8192, count).tolist()
                    started = time.perf_counter()
                    session.append(tokens, logits="last")
                    if turn >= WARM:  # pages of a new package are touched for the first time before
                        taken.append(time.perf_counter() - started)
    routing = json.loads((qwen / "routing.json").read_text(encoding="utf-8"))
    # The share of the experts in use with which a lottery touches as many as the routing did.
    op = OpWork("moe", experts=int(routing["experts"]), chosen=4)
    spread = min((s / 100 for s in range(10, 101)), key=lambda s: abs(op.touched(16, s) - routing["append"]))
    guess = predictor(package, 2, cached, spread)
    for count, taken in times.items():
        calls = [MethodCall("embed_text", count), MethodCall("decode", count), MethodCall("unembed", 1)]
        seconds = guess.calls(calls, 1).seconds
        name = f"plan: qwen3-moe {precision}, " + ("append of 16" if count > 1 else "decode")
        figure(f"{name}, predicted", 1000 * seconds, "ms")
        figure(f"{name}, off by", off_by(seconds, float(np.median(taken))), "x", AGREEMENT)

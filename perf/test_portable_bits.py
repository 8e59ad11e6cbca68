"""What portable bits cost: a tick of nano in each precision with them against without, on every variant that runs here.

Two sessions take turns, tick by tick, with the same inputs, on one thread whose processor time is read, so that what
else the machine does counts as little as can be; the figure is the ratio of their best ticks. The last figures tell how
far the outputs of two variants are apart without them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import long_session
import numpy as np
import pytest

import tmlc
from tmlc.kernels.cpu import available_isas

TICKS, WARM = 60, 10


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8", "int4"])
def package(request: Any, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("engines") / f"{request.param}.tmlc"
    tmlc.compile(checkpoint, path, precision=request.param)
    return request.param, path


@pytest.mark.parametrize("isa", available_isas())
def test_cost_of_a_tick(package: tuple[str, Path], isa: str, figure: Callable[..., None]) -> None:
    precision, path = package
    with (
        tmlc.load(path, threads=1, isa=isa) as plain,
        tmlc.load(path, threads=1, isa=isa, portable_bits=True) as portable,
    ):
        sessions = [plain.session(seed=0), portable.session(seed=0)]
        times: list[list[float]] = [[], []]
        for index, given in enumerate(long_session.busy_ticks(plain, TICKS + WARM)):
            for which in (0, 1) if index % 2 else (1, 0):
                started = time.thread_time()
                sessions[which].tick(given)
                times[which].append(time.thread_time() - started)
    ratio = min(times[1][WARM:]) / min(times[0][WARM:])
    figure(f"tick with portable bits / without, {precision}, {isa}", ratio, "x")


def test_difference_between_variants(package: tuple[str, Path], figure: Callable[..., None]) -> None:
    precision, path = package
    tokens = np.random.default_rng(0).integers(0, 200, 300).tolist()
    logits = {}
    for isa in available_isas():
        with tmlc.load(path, threads=1, isa=isa) as engine, engine.session() as session:
            logits[isa] = np.concatenate([session.append(tokens=tokens[at : at + 50]) for at in range(0, 300, 50)])
    best = logits.pop(available_isas()[0])
    for isa, other in logits.items():
        apart = float(np.abs(other - best).max() / np.abs(best).max())
        figure(f"logits of {isa} against {available_isas()[0]}, {precision}", apart, "of max")

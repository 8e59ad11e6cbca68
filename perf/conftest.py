"""Shared by the performance suites: the engines they measure, and the figures they record beside their targets.

`make perf` runs everything, prints the figures, and writes perf/results/<machine>.json. A missed target fails a case
only with --enforce: on a busy machine a figure is a fact about the machine.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tmlc.report.machine import machine, slug

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One measured value; `target` is an upper bound in the same unit, None where the figure stands for itself."""

    name: str
    value: float
    unit: str
    target: float | None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.value <= self.target


FIGURES: list[Figure] = []
FACTS: dict[str, Any] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--enforce", action="store_true", help="fail a case whose figure misses its target")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Records a figure: figure(name, value, unit, target=None)."""

    def record(name: str, value: float, unit: str, target: float | None = None) -> None:
        made = Figure(name, float(value), unit, target)
        FIGURES.append(made)
        if request.config.getoption("--enforce") and made.met is False:
            pytest.fail(f"{name}: {made.value:.4g} {unit}, the target is {target:g} {unit}")

    return record


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano checkpoint, seed 0."""
    from tmlc.model_zoo.interaction.checkpoint import create_checkpoint

    folder = tmp_path_factory.mktemp("zoo") / "nano"
    create_checkpoint("nano", 0, folder)
    return folder


@pytest.fixture(scope="session")
def nano(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano checkpoint compiled for the CPU in float32."""
    import tmlc

    path = tmp_path_factory.mktemp("engines") / "nano.tmlc"
    tmlc.compile(checkpoint, path, target="cpu", precision="fp32")
    return path


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not FIGURES:
        return
    terminalreporter.section("figures")
    for f in FIGURES:
        verdict = "met" if f.met else "MISSED"
        target = "" if f.target is None else f"  target ≤ {f.target:g} {f.unit}: {verdict}"
        terminalreporter.write_line(f"{f.name:<52} {f.value:>10.4g} {f.unit:<6}{target}")
    terminalreporter.write_line(f"load average {os.getloadavg()[0]:.1f} on {machine()['cores']} cores")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not FIGURES:
        return
    RESULTS.mkdir(exist_ok=True)
    body = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        **FACTS,
        "figures": [{**asdict(f), "met": f.met} for f in FIGURES],
    }
    (RESULTS / f"{slug()}.json").write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")

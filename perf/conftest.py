"""Shared by the performance suites: the engines they measure, and the figures they record beside their targets.

`make perf` runs everything, prints the figures, and writes perf/results/<machine>.json. A missed target fails a case
only with --enforce: on a busy machine a figure is a fact about the machine.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tmlc.report.machine import machine, slug

PERF = Path(__file__).parent
RESULTS = PERF / "results"
sys.path.insert(0, str(PERF))  # the suites share long_session.py, which is a script too


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
    parser.addoption("--record", action="store_true", help="write perf/results/<machine>.json")
    parser.addoption("--minutes", type=float, default=2.0, help="length of each run of perf/test_serve.py")
    parser.addoption("--length", type=float, default=1.0, help="of perf/test_experiments.py, times the usual")
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


@pytest.fixture
def facts() -> dict[str, Any]:
    """What goes into the results beside the figures."""
    return FACTS


def tmlc_cli(*args: object) -> None:
    """Run the command line in a process of its own, so that this one never imports PyTorch; what compiles, compiles."""
    environment = os.environ | {"TMLC_CACHE": "off"}
    command = [sys.executable, "-m", "tmlc.cli.main", *map(str, args)]
    subprocess.run(command, check=True, capture_output=True, env=environment)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano checkpoint, seed 0."""
    folder = tmp_path_factory.mktemp("zoo") / "nano"
    tmlc_cli("zoo", "create", "nano", "--seed", 0, "-o", folder)
    return folder


@pytest.fixture(scope="session")
def nano(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano checkpoint compiled for the CPU in float32."""
    path = tmp_path_factory.mktemp("engines") / "nano.tmlc"
    tmlc_cli("compile", checkpoint, "-o", path, "--precision", "fp32")
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
    if not FIGURES or not session.config.getoption("--record"):
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
    (RESULTS / f"{slug()}.md").write_text(_markdown(body), encoding="utf-8")


def _markdown(body: dict[str, Any]) -> str:
    """The figures as a table, for a page."""
    box = body["machine"]
    lines = [
        f"`make perf` on {box['cpu']}, {box['cores']} cores, {body['date']}; load average {body['load_average']:.1f}.",
        "", "| figure | value | target | |", "| --- | ---: | ---: | --- |",
    ]  # fmt: skip
    for f in body["figures"]:
        target = "" if f["target"] is None else f"≤ {f['target']:g} {f['unit']}"
        met = {None: "", True: "met", False: "missed"}[f["met"]]
        lines.append(f"| {f['name']} | {f['value']:.4g} {f['unit']} | {target} | {met} |")
    return "\n".join(lines) + "\n"

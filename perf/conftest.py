"""Shared by the performance suites: the engines they measure, and the figures they record beside their targets.

`make perf` runs everything, prints the figures, and records them in perf/results/<machine>.json; `pytest --record
perf/test_tick.py` renews the figures of the tests that it runs (record.py). A missed target fails a case only with
--enforce: on a busy machine a figure is a fact about the machine.
"""

from __future__ import annotations

import datetime
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
USUAL = {"minutes": 2.0, "length": 1.0}
"""Options that change what a figure means; with others than these it is recorded with them."""


@dataclass(frozen=True)
class Figure:
    """One measured value; `target` is an upper bound in the same unit, None where the figure stands for itself. `test`
    measured it.
    """

    name: str
    value: float
    unit: str
    target: float | None
    test: str

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.value <= self.target


FIGURES: list[Figure] = []
FACTS: dict[str, Any] = {}
PASSED: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="renew these figures in perf/results/<machine>.json")
    parser.addoption("--minutes", type=float, default=USUAL["minutes"], help="length of each run of perf/test_serve.py")
    parser.addoption("--length", type=float, default=USUAL["length"], help="of perf/test_experiments.py: a factor")
    parser.addoption("--package", type=Path, help="plays perf/cases with this package (a trained one), not with nano")
    parser.addoption("--enforce", action="store_true", help="fail a case whose figure misses its target")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Records a figure: figure(name, value, unit, target=None)."""

    def record(name: str, value: float, unit: str, target: float | None = None) -> None:
        made = Figure(name, float(value), unit, target, request.node.nodeid)
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


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        PASSED.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    import record

    if not FIGURES or not session.config.getoption("--record"):
        return
    now = {"date": datetime.date.today().isoformat(), "machine": machine()}
    other = {name: session.config.getoption(f"--{name}") for name, usual in USUAL.items()}
    said = " ".join(f"--{name} {value:g}" for name, value in other.items() if value != USUAL[name])
    each = {"date": now["date"], "load_average": os.getloadavg()[0], **({"options": said} if said else {})}
    figures = [{**asdict(f), "met": f.met, **each} for f in FIGURES]
    path = RESULTS / f"{slug()}.json"
    record.write(path, record.merged(record.read(path), {**now, **FACTS}, figures, PASSED))

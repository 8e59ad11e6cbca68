"""The report of a session that a real engine ran, in headless Chromium, wide and narrow, light and dark."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

from look import a_browser, a_look, needs_browser  # noqa: F401 (fixtures)

pytestmark = needs_browser


@pytest.fixture(scope="module")
def real(tmlc_cli, package, tmp_path_factory) -> str:
    """A report with kernels, ceilings and memory."""
    folder = tmp_path_factory.mktemp("real")
    tmlc_cli("profile", package, "--seconds", "4", "--startup-runs", "0", "--sittings", "2", "--kernels-every", "4",
             "--budget", "60s", "-o", folder / "report")  # fmt: skip
    view = json.loads((folder / "report.json").read_text())
    assert view["kernels"]["calls"] and view["ceilings"] and view["memory_map"]
    return (folder / "report.html").read_text()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_report_of_a_real_session_reads(
    look: Callable[..., list[str]], real: str, width: int, scheme: str
) -> None:
    assert look(real, width, scheme) == []


def found_in(faults: list[str], what: str) -> bool:
    return any(what in fault for fault in faults)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("</text>", '</text><text x="100" y="100">on</text><text x="104" y="102">top</text>', "texts overlap"),
        (".pairs td {", ".none td {", "table cut off: Machine and settings"),
    ],
)
def test_a_broken_report_of_a_real_session_is_found(
    look: Callable[..., list[str]], real: str, old: str, new: str, found: str
) -> None:
    assert old in real
    faults = look(real.replace(old, new), 400, "light")
    assert found_in(faults, found), faults

"""The sittings of a profile: which are played again, what is kept of them, and what a failed one says."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tmlc.errors import KernelError
from tmlc.report.profile import sittings
from tmlc.report.profile.sittings import Busy, Sittings
from tmlc.report.scenario.case import Case
from tmlc.runtimes.media.recording import TickShape

SHAPE = TickShape(200, 16000, 0, 0, 0, 1)
FAKE = """
import json, pathlib, sys
job, log = json.load(sys.stdin), pathlib.Path(sys.argv[1])
played = log.read_text().splitlines() if log.exists() else []
log.write_text("\\n".join([*played, json.dumps(job)]))
k = len(played)
busy = float(sys.argv[2].split(",")[k])
print(json.dumps({"ticks": 100, "busy": busy, "figures": {"step": float(k), f"only {k}": 1.0}}))
"""


def played(tmp_path: Path, busy: str, count: int = 3, **case: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The part of a profile whose sittings were as busy as that, one after the other, and the jobs that were given."""
    log = tmp_path / "log"
    command = (sys.executable, "-c", FAKE, str(log), busy)
    found = Sittings(Path("x.tmlc"), {"threads": 1}, Case(name="x", **case), SHAPE, 7, 3, count, command)
    while found.left:
        found.measure()
    return found.to_json(), [json.loads(line) for line in log.read_text().splitlines()]


def test_a_sitting_beside_which_others_were_at_work_is_played_again(tmp_path: Path) -> None:
    part, jobs = played(tmp_path, "0.01,0.5,0.3,0.02,0.0")
    assert part == {"ticks": 100, "figures": {"step": [0.0, 3.0, 4.0]}, "busy": [0.01, 0.02, 0.0]}
    assert len(jobs) == 5 and all(job == jobs[0] for job in jobs)
    assert jobs[0]["settings"] == {"threads": 1, "sessions": 1} and jobs[0]["seed"] == 7


def test_on_a_machine_that_is_never_quiet_what_is_disturbed_counts_after_a_while(tmp_path: Path) -> None:
    part, jobs = played(tmp_path, ",".join(["0.5"] * 9))
    assert part["busy"] == [0.5] * 3 and len(jobs) == 3 + 2 * 3


def test_what_a_case_puts_beside_its_sessions_is_no_disturbance(tmp_path: Path) -> None:
    part, jobs = played(tmp_path, "0.5,0.5,0.5", load=[{"kind": "busy"}])
    assert part["busy"] == [0.5] * 3 and len(jobs) == 3


def test_a_sitting_is_the_beginning_of_its_case(tmp_path: Path) -> None:
    _, (long,) = played(tmp_path, "0", 1, seconds=600.0, repetitions=4, warm_up=5)
    assert long["case"]["seconds"] == pytest.approx(24.0)
    assert long["case"]["repetitions"] == 1 and long["case"]["warm_up"] == 20
    (tmp_path / "log").unlink()
    _, (short,) = played(tmp_path, "0", 1, seconds=2.0)
    assert short["case"]["seconds"] == 2.0 and short["case"]["warm_up"] == 2


def test_a_sitting_that_fails_says_why(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such kernel')")
    found = Sittings(Path("x.tmlc"), {}, Case(name="x"), SHAPE, 0, None, 1, command)
    with pytest.raises(KernelError, match="a sitting failed: no such kernel"):
        found.measure()


def test_other_programs_are_those_that_are_not_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(sittings, "STAT", stat)
    assert Busy().share() is None
    hertz = sittings.os.sysconf("SC_CLK_TCK")
    stat.write_text(f"cpu  {100 * hertz} 0 0 {100 * hertz} 0 0 0 0 0 0\ncpu0 1\n")
    busy = Busy()
    own, until = time.process_time(), time.process_time() + 0.05
    while time.process_time() < until:
        pass
    used = time.process_time() - own
    stat.write_text(f"cpu  {101 * hertz} 0 0 {103 * hertz} 0 0 0 0 0 0\ncpu0 1\n")
    assert busy.share() == pytest.approx((1 - used) / 4, abs=0.02)
    stat.write_text("cpu of another form\n")
    assert busy.share() is None

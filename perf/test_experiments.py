"""What two profiles of one package agree on, whether slowdowns that are put in are found, and the cases of perf/cases.

The slowdowns are real: a call put into a plan again so that `decode` takes more than a twentieth longer, and a sleep in
one tick of fifty. `--length` makes all sessions so much longer or shorter.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tmlc
from tmlc.cli.inputs import tick_shape
from tmlc.report.compare import compare, slower
from tmlc.report.interleave import against, interleave
from tmlc.report.latency import Budget
from tmlc.report.profile.measure import profile_engine
from tmlc.report.profile.sittings import SELF, Sittings
from tmlc.report.scenario.case import read_case
from tmlc.report.scenario.inputs import busy_case
from tmlc.report.scenario.load import background_load
from tmlc.report.scenario.show import Show

CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
ALTERED = Path(__file__).parent / "altered_sitting.py"
PAIRS, PROFILE_SECONDS, TURN_SECONDS = 10, 130.0, 400.0
SLEEP_MS, SLEEP_EVERY = 30, 50
EVERY, SITTINGS = 3, 10


def profile(engine: Any, package: Path, case: Any, every: int | None = None, sat: Sittings | None = None) -> Any:
    """A profile as `tmlc profile` takes it, through JSON as from its file."""
    with background_load(case.load, package):
        view = profile_engine(
            engine, Show(engine, case, tick_shape(engine.manifest)), Budget(), package=package,
            inputs={"what": case.what(), "clock": case.clock, "seed": 0}, settings={"threads": 1}, startup_runs=0,
            kernels_every=every, sittings=sat, report=lambda *_: None,
        )  # fmt: skip
    return json.loads(json.dumps(view))


def with_sittings(package: Path, length: float, *altered: object) -> Any:
    """A profile with as many sittings as are usual, each in a process of its own; `altered`: what makes it slower."""
    command = (sys.executable, str(ALTERED), *map(str, altered)) if altered else SELF
    with tmlc.load(package, threads=1) as engine:
        shape = tick_shape(engine.manifest)
        case = busy_case(engine, shape, PROFILE_SECONDS * length)
        sat = Sittings(package, {"threads": 1}, case, shape, 0, EVERY, SITTINGS, command)
        return profile(engine, package, case, sat=sat)


def called_different(found: dict[str, Any]) -> list[str]:
    return [f["name"] for f in found["figures"] if f["verdict"] in ("slower", "faster")]


def in_turns(a: Any, b: Any, seconds: float) -> dict[str, Any]:
    shape = tick_shape(a.manifest)
    found = interleave(a, b, busy_case(a, shape, seconds), shape, 0, lambda *_: None)
    return against({"package": "a", "digest": a.digest}, {"package": "b", "digest": b.digest}, found)


@pytest.fixture
def length(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--length"))


def test_ten_pairs_of_profiles_of_one_package_agree(nano: Path, figure: Callable[..., None], length: float) -> None:
    """A pair agrees when no figure of it is called different."""
    agreed, busy, noisy, names, moved = 0, 0, 0, [], dict.fromkeys(("step", "kernel"), 0.0)
    began = time.perf_counter()
    for _ in range(PAIRS):
        found = compare(with_sittings(nano, length), with_sittings(nano, length))
        different = called_different(found)
        agreed += not different
        busy += any("at work" in text for text in found["warnings"])
        noisy += any("too noisy" in text for text in found["warnings"])
        names += different
        for f in found["figures"]:
            kind = f["name"].partition(" ")[0]
            if kind in moved and not f["name"].startswith("step p"):
                moved[kind] = max(moved[kind], abs(f["change"]))
    figure("pairs of profiles of one package that differ", PAIRS - agreed, f"of {PAIRS}", target=1)
    figure("pairs with a warning that other programs were at work", busy, f"of {PAIRS}")
    figure("pairs with a warning that the machine was too noisy", noisy, f"of {PAIRS}")
    figure("figures that were called different", len(names), f"of {PAIRS * len(found['figures'])}")
    figure("largest change of the step between two profiles", 100 * moved["step"], "%")
    figure("largest change of a kernel between two profiles", 100 * moved["kernel"], "%")
    figure("a pair of profiles takes", (time.perf_counter() - began) / PAIRS, "s", target=40)


def padding(package: Path, figure: Callable[..., None]) -> tuple[int, int]:
    """The call of `decode` that is made again, and how often, so that it takes more than a twentieth longer."""
    from test_kernel_times import PAD, measured, repeatable

    with tmlc.load(package, threads=1) as engine:
        table, plan = measured([engine])[0]
    chosen = repeatable(table, plan)
    whole = sum(call["ms"] for call in table["calls"] if call["method"] == "decode")
    again = max(1, round(PAD * whole / chosen["ms"] + 0.5))
    figure("padded kernel: runs added to each decode", again, "")
    return chosen["index"], again


def test_a_padded_kernel_is_found_and_an_equal_package_is_not(
    nano: Path, figure: Callable[..., None], monkeypatch: pytest.MonkeyPatch, length: float
) -> None:
    """In turns, and by profiles one after the other."""
    from test_kernel_times import load_padded

    index, again = padding(nano, figure)
    with tmlc.load(nano, threads=1) as plain, tmlc.load(nano, threads=1) as same:
        equal = in_turns(plain, same, TURN_SECONDS * length)
        with load_padded(nano, index, again, monkeypatch) as longer:
            found = in_turns(plain, longer, TURN_SECONDS * length)
    figure("in turns, equal packages: figures called different", len(called_different(equal)), "", target=0)
    by_name = {f["name"]: f for f in found["figures"]}
    decode = max((f for f in by_name.values() if f["name"].startswith("decode")), key=lambda f: f["a"])
    figure(f"in turns, padded kernel: {decode['name']} takes more", 100 * decode["change"], "%")
    figure("in turns, padded kernel: the step takes more", 100 * by_name["step p50"]["change"], "%")
    missed = not any(name.startswith("decode") for name in called_different(found))
    figure("in turns, padded kernel: missed", missed, "", target=0)
    figure("in turns, padded kernel: missed by --fail-over 0%", not slower(found, 0.0), "", target=0)
    assert found["outputs"]["tokens_from"] is None and found["outputs"]["audio_from"] is None

    before, rounds = with_sittings(nano, length), 5
    compared = [compare(before, with_sittings(nano, length, "pad", index, again)) for _ in range(rounds)]
    by_itself = [any(name.startswith("kernel decode/") for name in called_different(one)) for one in compared]
    stages = [any(name.startswith(("decode", "append")) for name in called_different(one)) for one in compared]
    figure("padded kernel: missed by --compare", rounds - sum(map(bool, map(called_different, compared))),
           f"of {rounds}", target=0)  # fmt: skip
    figure("padded kernel: not named by --compare as a kernel", rounds - sum(by_itself), f"of {rounds}", target=0)
    figure("padded kernel: not seen by --compare in a decode stage", rounds - sum(stages), f"of {rounds}")
    figure("padded kernel: missed by --compare --fail-over 3%", sum(not slower(one, 0.03) for one in compared),
           f"of {rounds}", target=0)  # fmt: skip
    steps = [next(f["change"] for f in one["figures"] if f["name"] == "step") for one in compared]
    figure("padded kernel, --compare: the step takes more", 100 * float(np.median(steps)), "%")


def test_a_sleep_in_one_tick_of_fifty_is_found(nano: Path, figure: Callable[..., None], length: float) -> None:
    """By `--compare`, of two profiles one after the other."""
    found = compare(with_sittings(nano, length), with_sittings(nano, length, "sleep", SLEEP_EVERY, SLEEP_MS))
    tails = [name for name in called_different(found) if name.startswith(("step p", "slowest"))]
    figure("a sleep in one tick of fifty: missed by --compare", not tails, "", target=0)
    figure("a sleep in one tick of fifty: missed by --fail-over 3%", not slower(found, 0.03), "", target=0)
    slow = next(f for f in found["figures"] if f["name"].startswith("slowest"))
    figure("a sleep in one tick of fifty: slowest 5 % take more", slow["b"] - slow["a"], "ms")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_case(
    path: Path, request: pytest.FixtureRequest, figure: Callable[..., None], length: float
) -> None:
    """At its length, with `nano` of random weights, or with the package of `--package`."""
    given = request.config.getoption("--package")
    package: Path = given or request.getfixturevalue("nano")
    case = read_case(path)
    with tmlc.load(package, threads=1, sessions=case.sessions) as engine:
        least = (case.warm_up + 5) * tick_shape(engine.manifest).seconds
        case = case.model_copy(update={"seconds": max(least, case.seconds * length)})
        view = profile(engine, package, case)
    name = f"case {case.name}" + (f", {given.name}" if given else "")
    figure(f"{name}: step p50", view["step_ms"]["p50"], "ms")
    figure(f"{name}: step p99", view["step_ms"]["p99"], "ms", target=view["turn_latency"]["step_budget_ms"])
    figure(f"{name}: missed deadlines", view["missed_deadlines"], f"of {view['ticks']}")
    waits, stop = view["hesitation"], view["stop_latency"]
    if waits is not None and stop is not None:
        figure(f"{name}: ends of speech that it answered", waits["count"], f"of {waits['ends']}")
        figure(f"{name}: ends of speech while it spoke", waits["already_speaking"], f"of {waits['ends']}")
        figure(f"{name}: times that it stopped when cut in on", stop["stopped"], f"of {stop['trials']}")
        if waits["count"]:
            figure(f"{name}: median hesitation of the model", waits["p50"], "ms")
        if stop["stopped"]:
            figure(f"{name}: median stop latency", stop["p50_ms"], "ms")

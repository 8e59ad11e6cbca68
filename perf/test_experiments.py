"""What two profiles of one package agree on, whether slowdowns that are put in are found, and the cases of perf/cases.

The slowdowns are real: a call put into a plan again so that `decode` takes more than a twentieth longer, and a sleep in
one tick of fifty. `--length` makes all sessions so much longer or shorter.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tmlc
from tmlc.cli.inputs import tick_shape
from tmlc.report.compare import compare, slower
from tmlc.report.interleave import against, interleave
from tmlc.report.latency import Budget
from tmlc.report.profile.measure import profile_engine
from tmlc.report.scenario.case import read_case
from tmlc.report.scenario.inputs import busy_case
from tmlc.report.scenario.load import background_load
from tmlc.report.scenario.show import Show
from tmlc.runtimes.core.session import Session

CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
PAIRS, PROFILE_SECONDS, TURN_SECONDS = 10, 200.0, 400.0
SLEEP_MS, SLEEP_EVERY = 30.0, 50


def profile(engine: Any, package: Path, case: Any, every: int | None = None) -> dict[str, Any]:
    """A profile as `tmlc profile` takes it, through JSON as from its file."""
    with background_load(case.load, package):
        view = profile_engine(
            engine, Show(engine, case, tick_shape(engine.manifest)), Budget(), package=package,
            inputs={"what": case.what(), "clock": case.clock, "seed": 0}, settings={"threads": 1}, startup_runs=0,
            kernels_every=every, report=lambda *_: None,
        )  # fmt: skip
    read: dict[str, Any] = json.loads(json.dumps(view))
    return read


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
    agreed, noisy, names, moved = 0, 0, [], 0.0
    for _ in range(PAIRS):
        views = []
        for _ in range(2):
            with tmlc.load(nano, threads=1) as engine:
                case = busy_case(engine, tick_shape(engine.manifest), PROFILE_SECONDS * length)
                views.append(profile(engine, nano, case))
        found = compare(*views)
        different = called_different(found)
        agreed += not different
        disturbed = any(view["noise"]["too_noisy"] for view in views)
        noisy += disturbed
        if not disturbed:
            medians = [abs(f["change"]) for f in found["figures"] if f["name"].endswith("p50") and f["gated"]]
            moved = max(moved, *medians)
        names += different
    figure("pairs of profiles of one package that differ", PAIRS - agreed, f"of {PAIRS}", target=1)
    figure("pairs of which a profile said that the machine was too noisy", noisy, f"of {PAIRS}")
    figure("figures that were called different", len(names), "")
    figure("largest change of a median, in pairs without noise", 100 * moved, "%")


def padded_plan(package: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[..., None]) -> Any:
    """An engine whose `decode` calls a kernel again that writes what it wrote before."""
    from test_kernel_times import PAD, load_padded, repeatable

    with tmlc.load(package, threads=1) as engine:
        table = profile(engine, package, busy_case(engine, tick_shape(engine.manifest), 12.0), every=3)["kernels"]
        plan = engine._package.json(engine.manifest.targets["cpu"].plan)
    chosen = repeatable(table, plan)
    whole = sum(call["ms"] for call in table["calls"] if call["method"] == "decode")
    again = max(1, round(PAD * whole / chosen["ms"] + 0.5))
    figure("padded kernel: runs added to each decode", again, "")
    return load_padded(package, chosen["index"], again, monkeypatch)


def test_a_padded_kernel_is_found_and_an_equal_package_is_not(
    nano: Path, figure: Callable[..., None], monkeypatch: pytest.MonkeyPatch, length: float
) -> None:
    with tmlc.load(nano, threads=1) as plain, tmlc.load(nano, threads=1) as same:
        equal = in_turns(plain, same, TURN_SECONDS * length)
        case = busy_case(plain, tick_shape(plain.manifest), PROFILE_SECONDS * length)
        before = profile(plain, nano, case)
        with padded_plan(nano, monkeypatch, figure) as longer:
            found = in_turns(plain, longer, TURN_SECONDS * length)
            compared = compare(before, profile(longer, nano, case))
    figure("in turns, equal packages: figures called different", len(called_different(equal)), "", target=0)
    by_name = {f["name"]: f for f in found["figures"]}
    decode = max((f for f in by_name.values() if f["name"].startswith("decode")), key=lambda f: f["a"])
    figure(f"in turns, padded kernel: {decode['name']} takes more", 100 * decode["change"], "%")
    figure("in turns, padded kernel: the step takes more", 100 * by_name["step p50"]["change"], "%")
    missed = not any(name.startswith("decode") for name in called_different(found))
    figure("in turns, padded kernel: missed", missed, "", target=0)
    figure("in turns, padded kernel: missed by --fail-over 0%", not slower(found, 0.0), "", target=0)
    missed = not any(name.startswith("decode") for name in called_different(compared))
    figure("padded kernel: missed by --compare", missed, "", target=0)
    figure("padded kernel: missed by --compare --fail-over 0%", not slower(compared, 0.0), "", target=0)
    assert found["outputs"]["tokens_from"] is None and found["outputs"]["audio_from"] is None


def test_a_sleep_in_one_tick_of_fifty_is_found(
    nano: Path, figure: Callable[..., None], monkeypatch: pytest.MonkeyPatch, length: float
) -> None:
    """By `--compare`, of two profiles one after the other."""
    plain, ticks = Session.tick, 0

    def sleepy(session: Session, given: Any) -> Any:
        nonlocal ticks
        ticks += 1
        if ticks % SLEEP_EVERY == 7:
            time.sleep(SLEEP_MS / 1000)
        return plain(session, given)

    with tmlc.load(nano, threads=1) as engine:
        case = busy_case(engine, tick_shape(engine.manifest), PROFILE_SECONDS * length)
        before = profile(engine, nano, case)
        monkeypatch.setattr(Session, "tick", sleepy)
        after = profile(engine, nano, case)
    found = compare(before, after)
    tails = [name for name in called_different(found) if name != "step p50"]
    figure("a sleep in one tick of fifty: missed by --compare", not tails, "", target=0)
    figure("a sleep in one tick of fifty: missed by --fail-over 3%", not slower(found, 0.03), "", target=0)
    slow = next(f for f in found["figures"] if f["name"].startswith("slowest"))
    figure("a sleep in one tick of fifty: slowest 5 % take more", slow["b"] - slow["a"], "ms")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_case(path: Path, nano: Path, figure: Callable[..., None], length: float) -> None:
    case = read_case(path)
    with tmlc.load(nano, threads=1, sessions=case.sessions) as engine:
        least = (case.warm_up + 5) * tick_shape(engine.manifest).seconds
        case = case.model_copy(update={"seconds": max(least, case.seconds * length)})
        view = profile(engine, nano, case)
    allowed = view["turn_latency"]["step_budget_ms"]
    figure(f"case {case.name}: step p50", view["step_ms"]["p50"], "ms")
    figure(f"case {case.name}: step p99", view["step_ms"]["p99"], "ms", target=allowed)
    figure(f"case {case.name}: missed deadlines", view["missed_deadlines"], "")
    if view["hesitation"] is not None and view["hesitation"]["p50"] is not None:
        figure(f"case {case.name}: median hesitation of the model", view["hesitation"]["p50"], "ms")

"""`tmlc profile` of single kernels: what timing costs, whether stages add up, whether a padded kernel is seen."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tmlc
from tmlc.package.reader import Package
from tmlc.report.latency import Budget
from tmlc.report.profile.inputs import synthetic_recording
from tmlc.report.profile.kernels import kernel_part
from tmlc.report.profile.measure import profile_engine
from tmlc.report.scenario.inputs import busy_case
from tmlc.report.scenario.show import Show
from tmlc.runtimes.core.session import Session
from tmlc.runtimes.media.recording import TickShape

SECONDS = 130.0
PAD = 0.05
TURNS, WARM, LEAST = 400, 10, 40


def shape_of(engine: Any) -> TickShape:
    from tmlc.cli.inputs import tick_shape

    return tick_shape(engine.manifest)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_timing_kernels_costs_and_what_the_stages_leave(
    nano: Path, threads: int, figure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile of the usual length. The stages of every tick, what is between them and the wait are held against a
    clock around `session.tick` that is not the profile's."""
    walls: list[float] = []
    plain = Session.tick

    def timed(session: Session, given: Any) -> Any:
        started = time.perf_counter()
        out = plain(session, given)
        walls.append(1000 * (time.perf_counter() - started))
        return out

    monkeypatch.setattr(Session, "tick", timed)
    with tmlc.load(nano, threads=threads) as engine:
        shape = shape_of(engine)
        view = profile_engine(
            engine, Show(engine, busy_case(engine, shape, SECONDS), shape), Budget(), package=nano,
            inputs={"seed": 0}, settings={"threads": threads}, startup_runs=0, kernels_every=3, report=lambda *_: None,
        )  # fmt: skip
    name = f"nano, {threads} thread(s)"
    cost = view["profiling_cost"]
    low, high = cost["interval"]
    figure(f"{name}: timing kernels changes a step by", 100 * (cost["ratio"] - 1), "%", target=1.0)
    figure(f"{name}: interval of that, low end", 100 * (low - 1), "%")
    figure(f"{name}: interval of that, high end", 100 * (high - 1), "%")
    parts = [view["between_calls_ms"], view["wait_ms"], *view["stages_ms"].values()]
    found = sum(part["mean"] * part["count"] for part in parts)
    figure(f"{name}: stages and what is between them miss the wall by", 100 * abs(found / sum(walls[1:]) - 1), "%", 3.0)
    kernels = view["kernels"]
    timed_ticks = sum(call["runs"] * call["ms"] for call in kernels["calls"]) / kernels["ticks"]
    figure(f"{name}: kernels of a timed tick", timed_ticks, "ms")
    figure(f"{name}: median step with timers", cost["p50_with_ms"], "ms")


def test_a_kernel_padded_by_a_twentieth_is_seen_in_the_table(
    nano: Path, figure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call of `decode` that only writes what it wrote before is put into the plan a second time: the one that takes
    nearest to a twentieth of the method. Ticks of both engines take turns."""
    with tmlc.load(nano, threads=1) as engine:
        table, plan = measured([engine])[0]
    chosen = repeatable(table, plan)
    with tmlc.load(nano, threads=1) as plain, load_padded(nano, chosen["index"], 1, monkeypatch) as longer:
        (a, _), (b, _) = measured([plain, longer])
    one, two = ({c["index"]: c["ms"] for c in part["calls"] if c["method"] == "decode"} for part in (a, b))
    share = chosen["ms"] / sum(call["ms"] for call in table["calls"] if call["method"] == "decode")
    added = two[chosen["index"]] / sum(one.values())
    figure(f"padded kernel: {chosen['op']} put in again, its share of decode before", 100 * share, "%")
    figure("padded kernel: its row in the table, of decode before", 100 * added, "%")
    figure("padded kernel: decode's kernels take more", 100 * (sum(two.values()) / sum(one.values()) - 1), "%")
    rest = [(two[k + (k >= chosen["index"])] / ms - 1) for k, ms in one.items() if ms > 0.002]
    figure("padded kernel: median change of the other calls", 100 * float(np.median(rest)), "%")
    assert len(two) == len(one) + 1


def measured(engines: list[Any]) -> list[tuple[dict[str, Any], Any]]:
    """The kernel tables of these engines over ticks in turns, and the plan of each."""
    sessions = [engine.session(seed=1) for engine in engines]
    timers = [engine.backend.kernel_timer() for engine in engines]
    recording = synthetic_recording(shape_of(engines[0]), 0.2 * TURNS, engines[0].model.hears)
    counted = dict.fromkeys(range(len(engines)), 0)
    for index, given in enumerate(recording.ticks(TURNS)):
        for k in counted if index % 2 else reversed(counted):
            timers[k].start()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
            sessions[k].tick(given)
            alone = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == before
            timers[k].stop(disturbed=not alone or index < WARM)
            counted[k] += alone and index >= WARM
    if min(counted.values()) < LEAST:
        pytest.skip(f"needs {LEAST} ticks in which the system takes no core away, this machine gave {counted}")
    found = []
    for k, (engine, timer, session) in enumerate(zip(engines, timers, sessions, strict=True)):
        with_plan = engine._package.json(engine.manifest.targets["cpu"].plan)
        found.append((kernel_part(timer.calls(disturbed=False), None, None, 1, counted[k], 0), with_plan))
        session.close()
    return found


def load_padded(package: Path, index: int, again: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine on one thread whose `decode` makes its call `index` so many times more."""
    from altered_sitting import padded

    with monkeypatch.context() as patch:
        patch.setattr(Package, "json", padded(index, again))
        return tmlc.load(package, threads=1)


def repeatable(table: dict[str, Any], plan: Any) -> dict[str, Any]:
    """The call of decode nearest to PAD of it, of those that touch no state and do not work in place."""
    tensors = plan["tensors"]
    code = next(m["code"] for m in plan["methods"] if m["name"] == "decode")
    calls = [call for call in table["calls"] if call["method"] == "decode"]
    whole = sum(call["ms"] for call in calls)

    def harmless(call: dict[str, Any]) -> bool:
        operands = code[call["index"]]["t"]
        states = any(tensors[t]["space"] == "slot" for t in operands)
        return not states and operands[0] not in operands[1:]

    return min(filter(harmless, calls), key=lambda call: abs(call["ms"] / whole - PAD))

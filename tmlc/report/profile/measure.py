"""Plays a session, times every step and holds the figures against the budget."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmlc.errors import UsageError
from tmlc.package.reader import open_package
from tmlc.report.latency import Budget, Spread, as_dict, spread, turn_latency
from tmlc.report.machine import machine
from tmlc.report.profile.ceilings import Ceilings
from tmlc.report.profile.kernels import KernelTicks, fill
from tmlc.report.profile.memory import memory_map
from tmlc.report.profile.meters import Meters
from tmlc.report.profile.parts import SCHEMA, Parts
from tmlc.report.profile.quality import pass_records, quality
from tmlc.report.profile.samples import Samples, ran
from tmlc.report.profile.sittings import Sittings, preemptions
from tmlc.report.profile.stages import MethodCall, in_order
from tmlc.report.scenario.show import Show
from tmlc.report.startup import measure_startup, peak_rss_bytes

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine

ON_PROCESSOR = ("cpu", "onnx")
"""Families of targets whose kernels run on this machine's cores."""


def resident_bytes() -> int | None:
    """Memory resident in this process now; None where the system does not say (only Linux does)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()


def profile_engine(
    engine: Engine,
    shown: Show,
    budget: Budget,
    *,
    package: Path,
    inputs: dict[str, Any],
    settings: dict[str, Any],
    startup_runs: int,
    kernels_every: int | None = None,
    sittings: Sittings | None = None,
    report: Callable[[str, int, int], None],
    evaluated: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Play at least 2 ticks and measure. The first tick is told apart: it touches memory for the first time.

    Args:
        shown: what is played.
        evaluated: scores of `tmlc eval` (`quality.read_scores`).
        inputs: what is played, in words, its clock and seed; `settings`: how the engine was loaded.
        kernels_every: every how many ticks single kernel calls are timed; None times none.
        sittings: the first half of them is played before the session, the rest behind it; None plays none.
    """
    manifest, backend = engine.manifest, engine.model.backend
    parts, samples = Parts(), Samples()
    _sit(sittings, 2, report)
    ticks, ceilings = _timing(engine, kernels_every, parts)
    meters, count = Meters(), shown.count
    calls: list[MethodCall] = []
    missed, late, spoke = 0, 0.0, 0
    resident_first: int | None = None
    mark = min(count - 1, max(1, count // 10))
    preempted = before = 0

    def ready(index: int) -> None:
        nonlocal before
        calls.clear()
        if ticks is not None:
            ticks.before(index)
        meters.before()
        before = preemptions()

    meters.start()
    engine.model.watch = lambda *call: calls.append(MethodCall(*call))
    for played in shown.ticks(ready):
        taken = preemptions() - before
        meters.after()
        if ticks is not None:
            ticks.after(taken > 0)
        preempted += taken
        samples.add(played, calls)
        missed += played.late_ms + played.step_ms > budget.step_ms
        late = max(late, played.late_ms)
        spoke += not played.output.stats.get("silent", 0)
        if played.index == mark:
            resident_first = resident_bytes()
        report("playing", played.index + 1, count)
    resident_last, peak = resident_bytes(), peak_rss_bytes()
    engine.model.watch = None
    meters.fill(parts, samples.step, preempted)
    shown.fill(parts)
    _sit(sittings, 1, report)
    if sittings is not None:
        parts.measured("sittings", sittings.to_json())
    else:
        parts.missing("sittings", "none were asked for: profile without --sittings 0")
    _of_the_package(parts, manifest.pipeline, evaluated)
    _finish_timing(engine, parts, ticks, ceilings, samples, package)
    report("starting fresh processes", 0, startup_runs)
    startup = measure_startup(package, settings["threads"], startup_runs) if startup_runs else None
    report("starting fresh processes", startup_runs, startup_runs)
    measured = spread(samples.step[1:])
    audio = ran(samples.first_audio)
    stages = {name: values for name in in_order(samples.stages) if (values := ran(samples.stages[name]))}
    return {
        "schema": SCHEMA,
        "package": str(package),
        "digest": engine.digest,
        "model": manifest.model.name,
        "machine": {**machine(), "isa": backend.isa, "threads": backend.threads},
        "inputs": inputs,
        "settings": {"target": engine.target, "precision": manifest.targets[engine.target].precision, **settings},
        "ticks": count,
        "seconds": count * budget.tick_ms / 1000,
        "ticks_with_output": spoke,
        "first_tick_ms": samples.step[0],
        "step_ms": as_dict(measured),
        "first_audio_ms": as_dict(spread(audio)) if audio else None,
        "stages_ms": {name: _shared(spread(values), measured) for name, values in stages.items()},
        "wait_ms": _shared(spread(samples.wait[1:]), measured),
        "between_calls_ms": _shared(spread(samples.between_calls[1:]), measured),
        "turn_latency": turn_latency(measured, budget),
        "missed_deadlines": missed,
        "preempted": preempted,
        "latest_start_ms": late,
        "growth": shown.growth(samples.step),
        "bytes": {
            "weights": manifest.memory.weight_bytes,
            "arena": manifest.memory.arena_bytes,
            "scratch": manifest.memory.scratch_bytes,
            "slot": manifest.session_bytes,
        },
        "memory": {
            "peak_rss_bytes": peak,
            "resident_early_bytes": resident_first,
            "resident_end_bytes": resident_last,
        },
        "startup": startup,
        **parts.to_json(),
        "samples": samples.to_json(),
    }


def _sit(sittings: Sittings | None, part: int, report: Callable[[str, int, int], None]) -> None:
    """Plays one `part`-th of the sittings that are left."""
    if sittings is not None:
        for _ in range(sittings.left // part):
            sittings.measure()
            report("playing in fresh processes", sittings.count - sittings.left, sittings.count)


def _of_the_package(parts: Parts, pipeline: Sequence[Mapping[str, Any]], evaluated: Mapping[str, Any] | None) -> None:
    """What the package's own record says: its passes, and what they cost in quality."""
    parts.measured("passes", pass_records(pipeline))
    found = quality(pipeline, evaluated)
    if isinstance(found, str):
        parts.missing("quality", found)
    else:
        parts.measured("quality", found)


def _timing(engine: Engine, every: int | None, parts: Parts) -> tuple[KernelTicks | None, Ceilings | None]:
    """The timers of kernels and the machine's ceilings, as far as this target has them; reasons in `parts`."""
    why = "left out: profile without --no-kernels" if every is None else ""
    timer = None
    if not why:
        try:
            timer = engine.backend.kernel_timer()
        except UsageError as error:
            why = error.what
    if timer is None or every is None:
        for part in ("kernels", "profiling_cost", "ceilings"):
            parts.missing(part, why)
        return None, None
    if engine.target.partition(":")[0] not in ON_PROCESSOR:
        parts.missing("ceilings", "what a GPU can do at best is not measured here; tmlc plan has its maker's figures")
        return KernelTicks(timer, every), None
    ceilings = Ceilings(engine.manifest.memory.weight_bytes, engine.backend.threads)
    ceilings.measure()
    return KernelTicks(timer, every), ceilings


def _finish_timing(
    engine: Engine, parts: Parts, ticks: KernelTicks | None, ceilings: Ceilings | None, samples: Samples, path: Path
) -> None:
    """The parts about kernels and memory, once the session is over."""
    best = None
    if ceilings is not None:
        ceilings.measure()
        best = ceilings.to_json()
        parts.measured("ceilings", best)
    with open_package(path, verify=False) as package:
        parts.measured("memory_map", memory_map(package))
        if ticks is not None:
            plan = package.json(package.manifest.targets["cpu"].plan) if engine.target == "cpu" else None
            fill(parts, ticks, samples.step, plan, best)


def _shared(part: Spread, step: Spread) -> dict[str, Any]:
    """A part of the steps, and its share of all their time: the shares of all parts add up to 1."""
    return {**as_dict(part), "share": part.mean * part.count / (step.mean * step.count)}

"""The profile of an engine: a session is played, every step is timed, and the figures are held against the
budget.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.report.latency import Budget, Spread, as_dict, growth, spread, turn_latency
from tmlc.report.machine import machine
from tmlc.report.samples import Samples, ran
from tmlc.report.startup import measure_startup, peak_rss_bytes
from tmlc.report.tables import grid, megabytes, milliseconds, table
from tmlc.runtimes.core.clock import Clock
from tmlc.runtimes.media.player import play
from tmlc.runtimes.media.recording import Recording, TickShape
from tmlc.runtimes.media.timed_text import TimedText

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tmlc.runtimes.core.engine import Engine

TYPED_EVERY_SECONDS = 2.0
SCHEMA = 1
"""Version of the JSON form, described by profile.schema.json. It changes when a reader of the last would be wrong."""


class SyntheticVideo:
    """Camera frames of uniform noise, one new clip whenever it is asked: every pixel differs, as in a real
    picture.
    """

    def __init__(self, shape: TickShape, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._size = (shape.height, shape.width, 3)

    def at(self, seconds: float) -> np.ndarray:
        return self._random.integers(0, 256, self._size, np.uint8)


def synthetic_recording(shape: TickShape, seconds: float, hears: bool, reads: bool = True, seed: int = 0) -> Recording:
    """Inputs that make the model do all its work in every tick.

    Noise with the loudness of speech that comes and goes (`hears`), camera frames (when the model sees), a word typed
    every two seconds (`reads`: it has a tokenizer), and for a model that does not hear a token in every tick.
    """
    random = np.random.default_rng(seed)
    audio = None
    if hears:
        t = np.arange(int(seconds * shape.sample_rate)) / shape.sample_rate
        loudness = 0.002 + 0.1 * np.clip(np.sin(2 * np.pi * 0.4 * t), 0, 1) * np.abs(np.sin(2 * np.pi * 2.3 * t))
        audio = (random.standard_normal(t.size) * loudness).astype(np.float32)
    typed = [TimedText(float(at), "hello") for at in np.arange(0.0, seconds if reads else 0.0, TYPED_EVERY_SECONDS)]
    video = SyntheticVideo(shape, seed) if shape.frames else None
    return Recording(shape, audio=audio, video=video, text=typed, tokens=() if hears else (0,))


def resident_bytes() -> int | None:
    """Memory resident in this process now; None where the system does not say (only Linux does)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()


def _preempted() -> int:
    """How often the system took a core away from this process so far (involuntary context switches)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def profile_engine(
    engine: Engine,
    recording: Recording,
    count: int,
    clock: Clock,
    budget: Budget,
    *,
    package: Path,
    inputs: dict[str, Any],
    settings: dict[str, Any],
    startup_runs: int,
    report: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Play `count` ≥ 2 ticks and measure. The first tick is told apart: it touches memory for the first
    time.

    Args:
        inputs: what is played, in words, its clock and seed; `settings`: how the engine was loaded.
    """
    manifest, backend = engine.manifest, engine.model.backend
    session = engine.session(seed=inputs["seed"])
    samples = Samples()
    missed, late, spoke = 0, 0.0, 0
    resident_first: int | None = None
    mark = min(count - 1, max(1, count // 10))
    before = _preempted()
    for played in play(session, recording, count, clock):
        samples.add(played)
        missed += played.late_ms + played.step_ms > budget.step_ms
        late = max(late, played.late_ms)
        spoke += not played.output.stats.get("silent", 0)
        if played.index == mark:
            resident_first = resident_bytes()
        report("playing", played.index + 1, count)
    preempted = _preempted() - before
    resident_last, peak = resident_bytes(), peak_rss_bytes()
    session.close()
    report("starting fresh processes", 0, startup_runs)
    startup = measure_startup(package, settings["threads"], startup_runs) if startup_runs else None
    report("starting fresh processes", startup_runs, startup_runs)
    measured = spread(samples.step[1:])
    audio = ran(samples.first_audio)
    stages = {name: values for name, column in samples.stages.items() if (values := ran(column))}
    return {
        "schema": SCHEMA,
        "package": str(package),
        "digest": engine.digest,
        "model": manifest.model.name,
        "machine": {**machine(), "isa": backend.isa, "threads": backend.threads},
        "inputs": inputs,
        "settings": {"target": engine.target, **settings},
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
        "growth": growth(samples.step, budget.tick_ms),
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
        "samples": samples.to_json(),
    }


def _shared(part: Spread, step: Spread) -> dict[str, Any]:
    """A part of the steps, and its share of all their time: the shares of all parts add up to 1."""
    return {**as_dict(part), "share": part.mean * part.count / (step.mean * step.count)}


def profile_tables(view: dict[str, Any]) -> list[RenderableType]:
    """The report for a person."""
    box, turn, steps = view["machine"], view["turn_latency"], view["step_ms"]
    head = grid(
        [
            ("engine", f"{view['model']} ({view['package']})"),
            (
                "machine",
                f"{box['cpu']}, {box['cores']} cores; {box['threads']} thread(s), kernels {box['isa']}",
            ),
            (
                "played",
                f"{view['ticks']} ticks ({view['seconds']:.1f} s): {view['inputs']['what']}, "
                f"clock {view['inputs']['clock']}; {view['ticks_with_output']} ticks with output",
            ),
        ]
    )
    timing = table("a tick", "what", "p50", "p95", "p99", "max", "jitter", "share")
    rows = [("step (all of it)", steps)]
    rows += [(f"  {name}", values) for name, values in view["stages_ms"].items()]
    rows += [("  between calls", view["between_calls_ms"]), ("  wait for the device", view["wait_ms"])]
    if view["first_audio_ms"] is not None:
        rows.append(("start to first audio", view["first_audio_ms"]))
    for name, values in rows:
        share = f"{values['share']:.1%}" if "share" in values else ""
        timing.add_row(name, *(milliseconds(values[k]) for k in ("p50", "p95", "p99", "max", "jitter")), share)
    latency = table(f"turn latency against {turn['budget_ms']:g} ms", "part", "typical", "worst", "")
    assumptions = turn["assumptions"]
    for label, key, remark in (
        ("tick wait", "tick_wait_ms", "half a tick, a whole tick"),
        ("decode input", "decode_ms", "assumed"),
        ("step", "step_ms", "p50, p99"),
        ("encode and send", "send_ms", "assumed"),
        ("turn", "total_ms", ""),
    ):
        latency.add_row(label, milliseconds(turn["typical"][key]), milliseconds(turn["worst"][key]), remark)
    verdict = "within" if turn["within_budget"] else "OVER"
    grown = view["growth"]
    if grown["ratio"] is None:
        growth_line = "too few ticks to tell"
    else:
        growth_line = (
            f"median of the last {grown['window_seconds']:.0f} s is {grown['ratio']:.3f} × that of the first "
            f"({milliseconds(grown['first_ms'])} → {milliseconds(grown['last_ms'])})"
        )
    memory = view["memory"]
    early, end = memory["resident_early_bytes"], memory["resident_end_bytes"]
    resident = f"; {megabytes(early)} early, {megabytes(end)} at the end" if early and end else ""
    late = f"latest start {milliseconds(view['latest_start_ms'])}"
    allowed = f"{turn['step_budget_ms']:g} ms that the budget leaves"
    rest = [
        ("step p99", f"{milliseconds(steps['p99'])}, {verdict} the {allowed}"),
        ("missed deadlines", f"{view['missed_deadlines']} of {view['ticks']} ticks ({late})"),
        ("interrupted", f"{view['preempted']} times, for other programs"),
        ("growth", growth_line),
        ("bytes", ", ".join(f"{name} {megabytes(count)}" for name, count in view["bytes"].items())),
        ("resident", f"peak {megabytes(memory['peak_rss_bytes'])}{resident}"),
        ("first tick", milliseconds(view["first_tick_ms"])),
    ]
    start = view["startup"]
    if start is not None:
        times = (("load", "load_ms"), ("first tick", "first_tick_ms"), ("together", "load_and_first_tick_ms"))
        parts = ", ".join(f"{label} {milliseconds(start[key])}" for label, key in times)
        peak = megabytes(start["peak_rss_bytes"])
        rest.append(("fresh process", f"{parts} (median of {start['runs']}); peak {peak}"))
    rest += [("assumed", assumptions["decode_ms"]), ("", assumptions["send_ms"])]
    rest += [("not counted", assumptions["hesitation"])]
    return [head, timing, latency, grid(rest)]

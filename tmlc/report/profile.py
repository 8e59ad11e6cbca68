"""The profile of an engine: a session is played, every step is timed, and the figures are held against the
budget.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.report.latency import Budget, as_dict, growth, spread, turn_latency
from tmlc.report.machine import machine
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
NOT_STAGES = ("first_audio", "total", "wait")  # timings of a tick that are not the time of one method


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
    import resource

    return pages * resource.getpagesize()


def profile_engine(
    engine: Engine,
    recording: Recording,
    count: int,
    clock: Clock,
    budget: Budget,
    *,
    package: Path,
    inputs: dict[str, Any],
    threads: int | None,
    seed: int,
    startup_runs: int,
    report: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Play `count` ≥ 2 ticks and measure. The first tick is told apart: it touches memory for the first
    time.
    """
    manifest, backend = engine.manifest, engine.model.backend
    session = engine.session(seed=seed)
    steps: list[float] = []
    stages: dict[str, list[float]] = {}
    missed, late, spoke = 0, 0.0, 0
    resident_first: int | None = None
    mark = min(count - 1, max(1, count // 10))
    for played in play(session, recording, count, clock):
        steps.append(played.step_ms)
        missed += played.late_ms + played.step_ms > budget.step_ms
        late = max(late, played.late_ms)
        spoke += not played.output.stats.get("silent", 0)
        if played.index:
            for name, ms in played.output.timings.items():
                stages.setdefault(name, []).append(float(ms))
        if played.index == mark:
            resident_first = resident_bytes()
        report("playing", played.index + 1, count)
    resident_last, peak = resident_bytes(), peak_rss_bytes()
    session.close()
    report("starting fresh processes", 0, startup_runs)
    startup = measure_startup(package, threads, startup_runs) if startup_runs else None
    report("starting fresh processes", startup_runs, startup_runs)
    measured = spread(steps[1:])
    return {
        "package": str(package),
        "digest": engine.digest,
        "model": manifest.model.name,
        "machine": {**machine(), "isa": backend.isa, "threads": backend.threads},
        "inputs": inputs,
        "ticks": count,
        "seconds": count * budget.tick_ms / 1000,
        "ticks_with_output": spoke,
        "first_tick_ms": steps[0],
        "step_ms": as_dict(measured),
        "stages_ms": {name: as_dict(spread(values)) for name, values in stages.items()},
        "turn_latency": turn_latency(measured, budget),
        "missed_deadlines": missed,
        "latest_start_ms": late,
        "growth": growth(steps, budget.tick_ms),
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
    }


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
    timing = table("a tick", "what", "p50", "p95", "p99", "max", "jitter")
    stages = {name: values for name, values in view["stages_ms"].items() if name not in NOT_STAGES}
    rows = [("step (all of it)", steps), *((f"  {name}", values) for name, values in stages.items())]
    if "first_audio" in view["stages_ms"]:
        rows.append(("start to first audio", view["stages_ms"]["first_audio"]))
    for name, values in rows:
        timing.add_row(name, *(milliseconds(values[k]) for k in ("p50", "p95", "p99", "max", "jitter")))
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

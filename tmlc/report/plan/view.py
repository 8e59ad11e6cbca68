"""A plan as data and as tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tmlc.errors import UsageError
from tmlc.report.latency import Budget
from tmlc.report.plan.hardware import HERE, Hardware, find
from tmlc.report.plan.predict import JITTER, MEMORY_SHARE, PARTS, Predictor
from tmlc.report.plan.source import compiler_for, engine_of, load_planned
from tmlc.report.plan.work import method_work, weight_bytes
from tmlc.report.tables import grid, megabytes, milliseconds, table

if TYPE_CHECKING:
    from rich.console import RenderableType

BATCHES = (1, 2, 4, 8, 16, 32, 64)


def make_plan(
    source: str,
    hardware: str,
    devices: tuple[int, ...],
    precision: str | None,
    context: int | None,
    split: str,
    spread: float,
    budget: Budget,
    threads: int | None = None,
) -> dict[str, Any]:
    """The plan of `tmlc plan`: one row for each number of devices.

    Args:
        source, precision, context: `load_planned`.
        hardware: a name of `hardware.yaml`, or `here`.
        devices: how many of them.
        split, spread: `Predictor`.

    Raises UsageError, CheckpointError, PackageError: what was asked for makes no sense, or is damaged.
    """
    if hardware == HERE and devices != (1,):
        raise UsageError("this machine is one device", where="--devices", fix="leave the option out with --on here")
    named = None if hardware == HERE else find(hardware, 0.0, None)
    target, why = ("cpu", "") if named is None else compiler_for(named)
    program, stored = load_planned(source, precision, context, target)
    device = named or find(HERE, weight_bytes(method_work(program, stored), program, stored), threads)
    engine = engine_of(program, stored, device.target, why)
    limit = int(program.meta["context"]["limit"])
    predictors = [Predictor(program, stored, device, count, limit, split, spread, engine) for count in devices]
    rows = [_row(predictor, budget) for predictor in predictors]
    first = predictors[0]
    return {
        "model": program.meta["name"],
        "precision": stored,
        "context": limit,
        "tick_ms": program.meta["tick"]["duration_ms"],
        "weight_bytes": first.weights,
        "session_bytes": first.session,
        "hardware": asdict(device),
        "split": split,
        "spread": spread,
        "budget": {"turn_ms": budget.total_ms, "step_ms": budget.step_ms},
        "assumptions": assumptions(device),
        "counted": engine.launches,
        "devices": rows,
    }


def _row(predictor: Predictor, budget: Budget) -> dict[str, Any]:
    plain, seen = predictor.step(1, video=False), predictor.step(1, video=True)
    most = predictor.most_sessions(budget.step_ms / 1000)
    fits = predictor.fits(1)
    steps = {}
    for sessions in BATCHES:
        if predictor.fits(sessions):
            steps[str(sessions)] = 1000 * predictor.step(sessions, video=False).seconds
    why = "" if most else ("the p99 step is over the budget" if fits else "the weights and one session do not fit")
    return {
        "devices": predictor.devices,
        "memory_bytes": predictor.memory(1),
        "fits": fits,
        "step_ms": 1000 * plain.seconds,
        "step_with_clip_ms": 1000 * seen.seconds,
        "p99_ms": 1000 * predictor.p99(1),
        "parts_ms": {name: 1000 * value for name, value in plain.parts.items()},
        "methods_ms": {name: 1000 * value for name, value in plain.methods.items()},
        "tick_bytes": plain.bytes,
        "tick_operations": plain.operations,
        "launches": plain.launches,
        "waits": plain.waits,
        "batch_ms": steps,
        "sessions": most,
        "why_none": why,
    }


def assumptions(device: Hardware) -> list[str]:
    """What the figures rest on, beside docs/cost-model.md."""
    reach = device.reach
    return [
        f"an engine reaches {reach['bytes']:.0%} of the bandwidth and {reach['products']:.0%} of the rate of products",
        f"p99 is {JITTER[device.measured]:g} times the step of a tick in which every session brings a clip",
        f"weights and states may take {MEMORY_SHARE:.0%} of the memory",
        "every expert is as likely as any other, unless --spread says otherwise",
        "nothing of this was measured" if not device.measured else "bandwidth and rates were measured just now",
    ]


def plan_tables(plan: dict[str, Any]) -> list[RenderableType]:
    """The plan for a person."""
    device, budget = plan["hardware"], plan["budget"]
    shown = next((row["devices"] for row in plan["devices"] if row["sessions"]), plan["devices"][-1]["devices"])
    best = next(row for row in plan["devices"] if row["devices"] == shown)
    head = [
        ("model", f"{plan['model']} in {plan['precision']}, {plan['context']} positions a session"),
        ("weights", megabytes(plan["weight_bytes"])),
        ("a session", megabytes(plan["session_bytes"])),
        ("hardware", f"{device['title']}: {megabytes(device['memory'])}, {device['bandwidth'] / 1e9:.0f} GB/s"),
        ("figures from", device["source"]),
        ("a tick", f"{best['launches']} launches, {best['waits']} waits of the host; {plan['counted']}"),
        ("tables below", f"for {shown} device(s)"),
        ("budget", f"{budget['turn_ms']:g} ms a turn leaves {budget['step_ms']:g} ms for a step"),
    ]
    rows = table(
        "predicted", "devices", "memory of each", "step", "with a clip", "p99", *PARTS, "sessions",
    )  # fmt: skip
    for row in plan["devices"]:
        parts = row["parts_ms"]
        rows.add_row(
            str(row["devices"]),
            megabytes(row["memory_bytes"]),
            *(milliseconds(row[name]) for name in ("step_ms", "step_with_clip_ms", "p99_ms")),
            *(milliseconds(parts[name]) for name in PARTS),
            str(row["sessions"]),
        )
    refused: dict[str, list[str]] = {}
    for row in plan["devices"]:
        if not row["sessions"]:
            refused.setdefault(row["why_none"], []).append(str(row["devices"]))
    whys = [(f"0 sessions, devices {', '.join(counts)}", why) for why, counts in refused.items()]
    stages = table("one tick by method", "method", "time", "part")
    for name, value in sorted(best["methods_ms"].items(), key=lambda item: -item[1]):
        stages.add_row(name, milliseconds(value), f"{value / best['step_ms']:.0%}")
    batches = table("sessions together", "sessions", "step", "a session")
    for count, value in best["batch_ms"].items():
        batches.add_row(count, milliseconds(value), milliseconds(value / int(count)))
    rests = [("assumed" if not index else "", text) for index, text in enumerate(plan["assumptions"])]
    return [grid(head), rows, *([grid(whys)] if whys else []), stages, batches, grid(rests)]

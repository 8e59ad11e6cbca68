"""The report of a bench as tables for a person, and its verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tmlc.report.tables import grid, milliseconds, table

if TYPE_CHECKING:
    from rich.console import RenderableType

ROWS = (
    ("turn latency", "turn_latency_ms"),
    ("answering tick", "answering_tick_ms"),
    ("age of a tick", "tick_age_ms"),
    ("jitter of ticks", "tick_jitter_ms"),
    ("stop at interruption", "stop_latency_ms"),
)
SHOWN = 24
"""Counters of the server that the table shows."""


def judge(view: dict[str, Any], max_p99: float | None, max_misses: float | None) -> list[str]:
    """What was asked for and not kept, a line each. A figure that could not be measured was not kept."""
    broken = []
    if max_p99 is not None:
        found = view["turn_latency_ms"]
        if found is None:
            broken.append("no turn was answered: there is no turn latency")
        elif found["p99"] > max_p99:
            broken.append(f"the turn latency's p99 is {found['p99']:.0f} ms, {max_p99:g} ms were allowed")
    if max_misses is not None:
        found = view["misses"]
        if found is None:
            broken.append("no tick came: there is nothing to count misses of")
        elif found > max_misses:
            broken.append(f"{found:.3%} of the ticks were missed, {max_misses:.3%} were allowed")
    if broken and view["generator"]["bottleneck"]:
        broken.append("the load generator itself was late: this says nothing about the server")
    return broken


def tables(view: dict[str, Any]) -> list[RenderableType]:
    """The report for a person."""
    load, attempts, ticks, turns = view["load"], view["attempts"], view["ticks"], view["turns"]
    stops, grown, generator = view["interruptions"], view["growth"], view["generator"]
    errors = ", ".join(f"{code} × {count}" for code, count in view["errors"].items()) or "none"
    details = "; ".join(f"{detail} × {count}" for detail, count in view["details"].items()) or "–"
    head = grid(
        [
            ("server", f"{view['server']['url']} ({view['server']['dialect']})"),
            (
                "load",
                f"{load['sessions']} sessions, {load['arrivals']}, {load['seconds']:g} s, pieces of {load['piece']} ms",
            ),
            ("attempts", ", ".join(f"{attempts[name]} {name}" for name in ("held", "refused", "failed", "cut"))),
            ("what was said", details),
            ("errors", errors),
        ]
    )
    times = table("latency", "", "count", "p50", "p95", "p99", "max")
    for title, key in ROWS:
        found = view[key]
        if found is None:
            times.add_row(title, "0", *["–"] * 4)
        else:
            times.add_row(
                title, str(found["count"]), *(milliseconds(found[part]) for part in ("p50", "p95", "p99", "max"))
            )
    of = f"(medians of {grown['window_seconds']:.0f} s)"
    ratios = ["–" if one["ratio"] is None else f"{one['ratio']:.3f} ×" for one in (grown, view["latency_growth"])]
    misses = "–" if view["misses"] is None else f"{view['misses']:.3%} of {ticks['arrived'] + ticks['lost']} ticks"
    counts = grid(
        [
            ("misses", f"{misses}: {ticks['late']} late, {ticks['lost']} lost"),
            ("turns", f"{turns['all']}, {turns['voiced']} answered with voice, {turns['unanswered']} not taken in"),
            ("interruptions", f"{stops['all']}: {stops['stopped']} stopped the model, {stops['went_on']} did not"),
            ("growth", f"age of a tick {ratios[0]}, answering tick {ratios[1]} {of}"),
            ("server's memory", _memory(view["server_memory"])),
            ("load generator", _generator(generator)),
        ]
    )
    parts: list[RenderableType] = [head, times, counts]
    if view["server_metrics"] is not None:
        changed = table("the server's own counters, after against before", "", "change")
        moved = {name: value for name, value in view["server_metrics"].items() if name.startswith("tmlc_")}
        for name, value in sorted(moved.items())[:SHOWN]:
            changed.add_row(name, f"{value:g}")
        parts.append(changed)
    return parts


def _memory(found: dict[str, float] | None) -> str:
    if found is None:
        return "–"
    warm, per_minute = found["warm_seconds"], round(found["mb_per_minute"], 3) + 0.0  # no -0.000
    return (
        f"{found['start_mb']:.1f} MB, {found['warm_mb']:.1f} after {warm:.0f} s, {found['end_mb']:.1f} at the end: "
        f"{per_minute:+.3f} MB a minute"
    )


def _generator(generator: dict[str, Any]) -> str:
    late, lag = generator["send_late_ms"], generator["loop_lag_ms"]
    cpu = generator["cpu_seconds"]
    text = f"pieces late by {late['p99']:.1f} ms (p99), loop by {lag['p99']:.1f} ms, {cpu:.1f} s of CPU"
    return text + ("; IT was the bottleneck, not the server" if generator["bottleneck"] else "")

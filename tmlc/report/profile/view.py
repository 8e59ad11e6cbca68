"""A profile as tables for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tmlc.report.profile.experiments_view import experiment_tables
from tmlc.report.profile.kernels_view import kernel_tables
from tmlc.report.profile.sittings import told
from tmlc.report.tables import grid, megabytes, milliseconds, table

if TYPE_CHECKING:
    from rich.console import RenderableType


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
    kernels = kernel_tables(view)
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
    if view["sittings"] is not None:
        rest.append(("sittings", told(view["sittings"])))
    start = view["startup"]
    if start is not None:
        times = (("load", "load_ms"), ("first tick", "first_tick_ms"), ("together", "load_and_first_tick_ms"))
        parts = ", ".join(f"{label} {milliseconds(start[key])}" for label, key in times)
        peak = megabytes(start["peak_rss_bytes"])
        rest.append(("fresh process", f"{parts} (median of {start['runs']}); peak {peak}"))
    rest += [("assumed", assumptions["decode_ms"]), ("", assumptions["send_ms"])]
    rest += [("not counted", assumptions["hesitation"])]
    return [head, timing, latency, *kernels, *experiment_tables(view), grid(rest)]

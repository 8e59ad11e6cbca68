"""The parts of a profile about conversations, sessions, passes, meters and quality, as tables for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tmlc.report.tables import grid, milliseconds, table

if TYPE_CHECKING:
    from rich.console import RenderableType


def experiment_tables(view: dict[str, Any]) -> list[RenderableType]:
    """What was measured of them; what was not is left out here, and said in `not_measured`."""
    made: list[RenderableType] = []
    if view["sessions_held"] is not None:
        held = view["sessions_held"]
        rows = table(f"sessions held: {held['held']} ({held['limit']})", "sessions", "ticks", "step p99", "")
        for one in held["tried"]:
            fits = "fits" if one["fits"] else "over"
            rows.add_row(str(one["sessions"]), str(one["ticks"]), milliseconds(one["step_p99_ms"]), fits)
        made.append(rows)
    if view["ablation"] is not None:
        rows = table("what each pass bought", "pass", "with", "without", "change", "interval", "verdict", "outputs")
        for row in view["ablation"]:
            low, high = row["interval"] or (None, None)
            rows.add_row(
                row["pass"], milliseconds(row["p50_with_ms"]), milliseconds(row["p50_without_ms"]),
                "–" if row["change"] is None else f"{row['change']:+.1%}",
                "–" if low is None or high is None else f"{low:+.1%} … {high:+.1%}", row["verdict"], row["note"],
            )  # fmt: skip
        made.append(rows)
    lines = [*_conversations(view), *_meters(view)]
    return [*made, grid(lines)] if lines else made


def _conversations(view: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    stop, waits = view["stop_latency"], view["hesitation"]
    if stop is not None:
        told = f"{stop['stopped']} of {stop['trials']} times that it was cut in on"
        if stop["stopped"]:
            told += f"; p50 {milliseconds(stop['p50_ms'])}, p95 {milliseconds(stop['p95_ms'])}"
        elif stop["trials"]:
            told += ": this model does not stop"
        else:
            told = "it never spoke when somebody began to"
        lines.append(("stopped", told))
    if waits is not None:
        told = f"{waits['count']} of {waits['ends']} ends of speech answered"
        if waits["count"]:
            told += f", after p50 {milliseconds(waits['p50'])}, p95 {milliseconds(waits['p95'])} of silence"
        told += f"; {waits['already_speaking']} while it spoke already, {waits['unanswered']} not"
        lines.append(("hesitation", told))
    return lines


def _meters(view: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    energy, counted, quality = view["energy"], view["instructions"], view["quality"]
    if energy is not None:
        idle = "" if energy["idle_watts"] is None else f", {energy['idle_watts']:.1f} W idle"
        lines.append(("energy", f"{energy['joules_per_tick']:.3g} J a tick, {energy['watts']:.1f} W{idle}"))
    if counted is not None:
        lines.append(("instructions", f"{counted['per_tick_p50'] / 1e6:.2f} million a tick (median)"))
    if quality is not None:
        kl = "" if quality["kl"] is None else f"KL {quality['kl']:.2e} nats; "
        scores = ", ".join(f"{task} {found['score']:.3g}" for task, found in (quality["scores"] or {}).items())
        lines.append(("quality", f"{kl}{scores}{'; ' if scores else ''}{quality['against']}"))
    return lines + [("noise", why) for why in view["noise"]["why"]]

"""The sections of the report that are not about kernels, in words, tables and figures around their plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmlc.report.html.changes import ablation_plot, sessions_plot
from tmlc.report.html.histogram import histogram
from tmlc.report.html.memory import KINDS, TITLES, memory_map
from tmlc.report.html.parts import Cell, facts, legend, paragraph, percent, section, table
from tmlc.report.html.stages import Part, base
from tmlc.report.html.svg import both, escape, figure
from tmlc.report.html.timeline import timeline
from tmlc.report.html.waterfall import step_apart, waterfall
from tmlc.report.profile.sittings import told
from tmlc.report.tables import megabytes, milliseconds

SPREAD = ("p50", "p95", "p99", "max", "jitter")
Pair = tuple[str, str] | tuple[str, str, str]


def key_figures(view: Mapping[str, Any]) -> str:
    """The figures that everybody asks for first."""
    turn, steps, grown = view["turn_latency"], view["step_ms"], view["growth"]
    pairs: list[Pair] = [
        ("typical turn", milliseconds(turn["typical"]["total_ms"])),
        ("worst turn", milliseconds(turn["worst"]["total_ms"]), f"of {turn['budget_ms']:g} ms"),
        ("step p50", milliseconds(steps["p50"])),
        ("step p99", milliseconds(steps["p99"]), f"of {turn['step_budget_ms']:g} ms"),
        ("step max", milliseconds(steps["max"])),
        ("jitter", milliseconds(steps["jitter"])),
        ("missed deadlines", f"{view['missed_deadlines']:,}", f"of {view['ticks']:,}"),
        ("growth", "–" if grown["ratio"] is None else f"{grown['ratio']:.2f} ×"),
    ]
    if view["first_audio_ms"]:
        pairs.append(("start to first audio", milliseconds(view["first_audio_ms"]["p50"]), "p50"))
    if view["startup"]:
        pairs.append(("load and first tick", milliseconds(view["startup"]["load_and_first_tick_ms"]), "fresh process"))
    pairs.append(("peak memory", megabytes(view["memory"]["peak_rss_bytes"])))
    held, stop, energy = view["sessions_held"], view["stop_latency"], view["energy"]
    if held:
        pairs.append(("sessions held", f"{held['held']:,}", "at the budget"))
    if stop and stop["p50_ms"] is not None:
        pairs.append(("stop latency", milliseconds(stop["p50_ms"]), f"p50, {stop['stopped']} of {stop['trials']}"))
    if energy and energy.get("joules_per_tick") is not None:
        pairs.append(("energy", f"{energy['joules_per_tick']:.2f} J", "a tick"))
    return facts(pairs)


def budget_section(view: Mapping[str, Any], parts: list[Part]) -> str:
    assumed = view["turn_latency"]["assumptions"]
    lead = (
        "From the end of a person's speech to the first sample of the answer. "
        f"{assumed['decode_ms'].capitalize()}; {assumed['send_ms']}."
    )
    return section(
        "budget",
        "Budget",
        lead,
        both(lambda size: waterfall(view, parts, size)),
        legend((p.look, p.name) for p in parts),
    )


def step_section(view: Mapping[str, Any], parts: list[Part]) -> str:
    lead = "What a step is made of: the broad bar at p50, the narrow one at p99; then p50 · p99 · share of all time."
    rows: list[list[Cell | str]] = []
    looks = {part.name: part.look for part in parts}
    entries = [("step", view["step_ms"]), *view["stages_ms"].items(), ("between calls", view["between_calls_ms"]),
               ("wait for the device", view["wait_ms"])]  # fmt: skip
    if view["first_audio_ms"]:
        entries.append(("start to first audio", view["first_audio_ms"]))
    for name, spread in entries:
        row: list[Cell | str] = [Cell(name, chip=looks.get(base(name), ""))]
        row += [Cell(milliseconds(spread[key]), spread[key]) for key in SPREAD]
        row.append(Cell(f"{spread['count']:,}", spread["count"]))
        row.append(percent(spread["share"]) if "share" in spread else Cell("", -1.0))
        rows.append(row)
    head = ("part", "p50", "p95", "p99", "max", "jitter", "ticks", "share")
    plot = both(lambda size: step_apart(parts, size))
    return section("step", "Where the time of a step goes", lead, plot, table(head, rows, "Parts of a step", True))


def timeline_section(view: Mapping[str, Any], parts: list[Part]) -> str:
    over = sum(ms > view["turn_latency"]["step_budget_ms"] for ms in view["samples"]["step_ms"])
    every = view["samples"]["every"]
    lead = "Every step of the session but the first, its stages stacked" + (
        f"; one tick in {every} is kept" if every > 1 else ""
    )
    lead += f". Triangles mark the {over:,} steps over their budget. " if over else ". No step was over its budget. "
    lead += "The strong lines are the medians that growth is told from."
    shown = both(lambda size: timeline(view, parts, size))
    return section("timeline", "Tick by tick", lead, shown, legend((p.look, p.name) for p in parts))


def histogram_section(view: Mapping[str, Any]) -> str:
    lead = "Above, every step on the scale of its budget; below, where they lie, counted."
    return section("histogram", "How steps are spread", lead, both(lambda size: histogram(view, size)))


def advice_section(view: Mapping[str, Any]) -> str:
    """Advice with its gain, in the order of the JSON."""
    if view["advice"] is None:
        return ""
    lines = "".join(f"<li>{_gain(a['gain'])}<span>{escape(a['says'])}</span></li>" for a in view["advice"])
    lead = "Derived from the figures of this report. A gain is a part of the median step; gains do not add up."
    body = f'<ol class="advice">{lines}</ol>' if lines else paragraph("No rule found anything to say.")
    return section("advice", "What would make it faster", lead, body)


def _gain(gain: float | None) -> str:
    return '<b class="none">–</b>' if gain is None else f"<b>−{gain:.0%}</b>"


def memory_section(view: Mapping[str, Any]) -> str:
    entries = [e for e in view["memory_map"] or [] if e["bytes"]]
    memory = view["memory"]
    pairs: list[Pair] = [
        (TITLES[what], megabytes(view["bytes"]["slot" if what == "states" else what])) for what in KINDS
    ]
    pairs.append(("peak resident", megabytes(memory["peak_rss_bytes"])))
    early, end = memory["resident_early_bytes"], memory["resident_end_bytes"]
    if early and end:
        pairs.append(("resident, early → end", f"{megabytes(early)} → {megabytes(end)}"))
    body = [facts(pairs)]
    if entries:
        body.append(both(lambda size: memory_map(entries, size)))
        body.append(legend((KINDS[what], TITLES[what]) for what in KINDS))
    lead = "As the package plans it, each tensor in proportion, and as the system counted it. Weights are shared."
    return section("memory", "Memory", lead, *body)


def passes_section(view: Mapping[str, Any]) -> str:
    body = []
    ablation = view["ablation"]
    if ablation:
        if any(r["change"] is not None for r in ablation):
            body.append(both(lambda size: ablation_plot(ablation, size)))
        head = ("left out", "p50 with", "p50 without", "change", "interval", "verdict", "")
        body.append(table(head, [_ablated(r) for r in ablation], "What each pass bought", True))
    if view["passes"]:
        rows = [
            [
                Cell(str(r.get("pass"))),
                Cell(f"{r['matches']:,}", r["matches"]) if isinstance(r.get("matches"), int) else "–",
                Cell(f"{r.get('ops_before')} → {r.get('ops_after')}"),
                Cell(_settings(r.get("config")), long=True),
            ]
            for r in view["passes"]
        ]
        record = table(("pass", "matches", "ops", "settings"), rows, "Passes of the compilation")
        body.append(f"<h3>As the package records them</h3>{record}" if body else record)
    lead = "Each pass was left out, and the step measured again in turns." if ablation else "What the compilation did."
    lead += " How long a pass took stands in the report of tmlc compile: a package keeps no times."
    return section("passes", "Passes, and what each one bought" if ablation else "Passes", lead, *body)


def _ablated(row: Mapping[str, Any]) -> list[Cell | str]:
    change, interval = row["change"], row["interval"]
    return [
        row["pass"],
        Cell(milliseconds(row["p50_with_ms"]), row["p50_with_ms"] or 0.0),
        Cell(milliseconds(row["p50_without_ms"]), row["p50_without_ms"] or 0.0),
        Cell("–" if change is None else f"{change:+.1%}", change if change is not None else -1.0),
        "–" if not interval else f"{interval[0]:+.1%} … {interval[1]:+.1%}",
        str(row["verdict"] or ""),
        Cell(str(row["note"] or ""), long=True),
    ]


def _settings(config: object) -> str:
    if not isinstance(config, Mapping):
        return ""
    return ", ".join(f"{key} {value}" for key, value in config.items() if value is not None)


def conversation_section(view: Mapping[str, Any]) -> str:
    """Sessions, stop latency, the model's hesitation and energy: what the engine does in use."""
    body = []
    held, budget = view["sessions_held"], view["turn_latency"]["step_budget_ms"]
    if held:
        body.append("<h3>Sessions held</h3>")
        body.append(
            paragraph(
                f"{held['held']:,} sessions together stay within the budget; the search ended by: {held['limit']}."
            )
        )
        if held["tried"]:
            body.append(both(lambda size: sessions_plot(held, budget, size)))
    stop = view["stop_latency"]
    if stop:
        body.append("<h3>Stop latency on barge-in</h3>")
        body.append(facts([
            ("fell silent", f"{stop['stopped']:,}", f"of {stop['trials']:,}"),
            *((name, milliseconds(stop[f"{name}_ms"])) for name in ("p50", "p95", "max")),
        ]))  # fmt: skip
    hesitation = view["hesitation"]
    if hesitation:
        body.append("<h3>The model's own hesitation</h3>")
        body.append(facts(_plain(hesitation, ("p50", "p95", "p99", "max", "mean", "jitter"))))
    energy = view["energy"]
    if energy:
        units = {"joules": "J", "watts": "W", "joules_per_tick": "J", "idle_watts": "W"}
        pairs: list[Pair] = [
            (key.replace("_", " "), f"{energy[key]:.3g} {unit}")
            for key, unit in units.items()
            if energy.get(key) is not None
        ]
        body += ["<h3>Energy</h3>", facts([*pairs, ("source", str(energy["source"]))])]
    return section("use", "In use", "", *body)


def _plain(values: Mapping[str, Any], times: tuple[str, ...]) -> list[Pair]:
    """A flat record as figures: the keys of `times` in ms, numbers as they are, all in the record's order."""
    pairs: list[Pair] = []
    for key, value in values.items():
        name = key.removesuffix("_ms").replace("_", " ")
        if value is None:
            pairs.append((name, "–"))
        elif key in times or key.endswith("_ms"):
            pairs.append((name, milliseconds(value)))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            pairs.append((name, f"{value:,}" if isinstance(value, int) else figure(value)))
        else:
            pairs.append((name, str(value)))
    return pairs


def quality_section(view: Mapping[str, Any]) -> str:
    """What the compile cost in quality, beside what it takes."""
    quality = view["quality"]
    if not quality:
        return ""
    kl = quality["kl"]
    pairs: list[Pair] = [
        ("KL to the reference", "–" if kl is None else f"{kl:.2g}", "nats" if kl is not None else ""),
        ("against", str(quality["against"])),
        ("step p50", milliseconds(view["step_ms"]["p50"])),
        ("weights", megabytes(view["bytes"]["weights"])),
    ]
    rows = [
        [task, Cell(figure(s["score"]), s["score"]), _interval(s.get("interval"))]
        for task, s in (quality["scores"] or {}).items()
    ]
    scores = table(("task", "score", "interval"), rows, "Scores of tasks", True) if rows else ""
    return section(
        "quality", "Quality beside speed", "A faster engine that answers worse is not faster.", facts(pairs), scores
    )


def _interval(interval: Any) -> str:
    return "–" if not interval else f"{figure(interval[0])} … {figure(interval[1])}"


def setting_section(view: Mapping[str, Any]) -> str:
    """What was measured, where and how; how quiet it was."""
    rows: list[list[Cell | str]] = [
        ["package", Cell(view["package"], long=True)],
        ["digest", Cell(view["digest"], long=True)],
    ]
    for title in ("machine", "settings", "inputs"):
        for key, value in view[title].items():
            shown = megabytes(value) if key.endswith("_bytes") and value else str(value)
            rows.append([f"{title}: {key.removesuffix('_bytes').replace('_', ' ')}", Cell(shown, long=True)])
    rows.append(["interrupted by other programs", f"{view['preempted']:,} times in {view['ticks']:,} ticks"])
    if view["sittings"]:
        rows.append(["sittings", Cell(told(view["sittings"]), long=True)])
    for key, name in (
        ("noise", "noise"),
        ("instructions", "instructions"),
        ("ceilings", "ceilings"),
        ("scenario", "case"),
    ):
        record = view[key]
        if isinstance(record, Mapping):
            rows += [[f"{name}: {k.replace('_', ' ')}", Cell(_brief(v), long=True)] for k, v in record.items()]
    return section("setting", "Machine and settings", "", table(("what", "value"), rows, "Machine and settings"))


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return figure(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_brief(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_brief(v) for v in value) or "–"
    return "–" if value is None else str(value)


def missing_section(view: Mapping[str, Any]) -> str:
    """What was not measured, and why."""
    rows: list[list[Cell | str]] = [
        [name.replace("_", " "), Cell(why, long=True)] for name, why in view["not_measured"].items()
    ]
    if view["startup"] is None:
        rows.append(["start-up", "no fresh processes were started (--startup-runs 0)"])
    rows.append(["hesitation in a turn", Cell(view["turn_latency"]["assumptions"]["hesitation"], long=True)])
    return section("missing", "What was not measured", "", table(("what", "why"), rows, "What was not measured"))

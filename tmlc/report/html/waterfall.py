"""The budget waterfall: how a turn's latency adds up, typical and worst, against the line of the budget; and the step
taken apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmlc.report.html.stages import Part
from tmlc.report.html.svg import Canvas, Scale, Size, figure, shorten, text_width

ROWS = (
    ("tick_wait_ms", "tick wait"),
    ("decode_ms", "decode input"),
    ("step_ms", "step"),
    ("send_ms", "encode and send"),
)
HEADS = (("typical", "Typical turn"), ("worst", "Worst turn (full tick, step at p99)"))


def waterfall(view: Mapping[str, Any], parts: list[Part], size: Size) -> str:
    """Both turns, part after part; the step's bar is made of its stages."""
    turn = view["turn_latency"]
    budget = float(turn["budget_ms"])
    totals = [float(turn[which]["total_ms"]) for which, _ in HEADS]
    font, wide = size.font, size.wide
    row, head, gap = (24.0, 24.0, 12.0) if wide else (35.0, 24.0, 14.0)
    left = 130.0 if wide else 0.0
    top = font + 12
    bottom = top + 2 * (head + 5 * row) + gap
    made = Canvas(
        size,
        bottom + font + 12,
        f"Budget waterfall: a typical turn takes {figure(totals[0])} ms and the worst {figure(totals[1])} ms "
        f"of {figure(budget)} ms",
    )
    right = size.width - (72.0 if wide else 62.0)
    scale = Scale(0.0, max(budget, *totals) * 1.02, left, right)
    made.frame(left, top, right, bottom)
    made.ticks_below(scale, top, bottom, 8 if wide else 4, "ms")
    y = top
    for which, title in HEADS:
        y += head
        made.text(left + (6 if wide else 0), y - 7, title, "strong")
        at = 0.0
        for key, label in ROWS:
            value = float(turn[which][key])
            _row(made, y, label, scale, at, value, parts if key == "step_ms" else [], which)
            at += value
            y += row
        over = at > budget
        _row(made, y, "turn", scale, 0.0, at, [], which, "total-over" if over else "total")
        y += row + gap
    x = scale(budget)
    made.line(x, top - 4, x, bottom, "limit")
    label = f"budget {figure(budget)} ms"
    half = text_width(label, font, bold=True) / 2
    made.text(min(max(x, half), size.width - half), font, label, "limit-text", "middle")
    return made.svg()


def _row(
    made: Canvas,
    y: float,
    label: str,
    scale: Scale,
    at: float,
    value: float,
    parts: list[Part],
    which: str,
    look: str = "c-fixed",
) -> None:
    font, wide = made.size.font, made.size.wide
    bar, tall = (y + 4, 16.0) if wide else (y + font + 3, 14.0)
    middle = bar + tall / 2 + font * 0.35
    if wide:
        made.text(scale.start - 8, middle, label, "strong" if look != "c-fixed" else "", "end")
        made.text(scale(at + value) + 6, middle, f"{figure(value)} ms", "strong halo" if look != "c-fixed" else "halo")
    else:
        made.text(0, y + font - 1, label, "strong halo" if look != "c-fixed" else "halo")
        told = f"{figure(value)} ms"
        made.text(made.width, middle, told, "strong" if look != "c-fixed" else "", "end")
    if not parts:
        made.rect(scale(at), bar, scale(at + value) - scale(at), tall, f"mark {look}", f"{label}: {figure(value)} ms")
        return
    for part in parts:
        ms = part.typical if which == "typical" else part.worst
        width = scale(at + ms) - scale(at)
        made.rect(scale(at), bar, width, tall, f"mark {part.look}", f"{part.name}: {figure(ms)} ms")
        at += ms


def step_apart(parts: list[Part], size: Size) -> str:
    """The step at p50 and at p99 as one bar each, with a row for every part: where the time goes."""
    font, wide = size.font, size.wide
    row = 26.0 if wide else 42.0
    left = 150.0 if wide else 0.0
    told_of = {p.name: f"{figure(p.typical)} · {figure(p.worst)} ms · {p.share:.0%}" for p in parts}
    room = max(text_width(told, font) for told in told_of.values())
    right = size.width - (room + 12 if wide else 4.0)
    top, bottom = 4.0, 4.0 + row * len(parts)
    most = max(max(part.typical, part.worst) for part in parts)
    made = Canvas(size, bottom + font + 12, "Parts of a step in ms, at p50 and at p99")
    scale = Scale(0.0, max(most * 1.02, 1e-6), left, right)
    made.frame(left, top, right, bottom)
    made.ticks_below(scale, top, bottom, 8 if wide else 4, "ms")
    y = top
    for part in parts:
        told = told_of[part.name]
        label = shorten(part.name, font, 140.0 if wide else size.width - text_width(told, font) - 10)
        if wide:
            made.text(left - 8, y + row / 2 + font * 0.35, label, "", "end")
            made.text(right + 8, y + row / 2 + font * 0.35, told, "halo")
            bar = y + 4
        else:
            made.text(0, y + font + 1, label, "halo")
            made.text(size.width, y + font + 1, told, "halo", "end")
            bar = y + font + 6
        made.rect(scale(0), bar, scale(part.typical) - scale(0), 10, f"mark {part.look}", f"{part.name} at p50")
        made.rect(scale(0), bar + 11, scale(part.worst) - scale(0), 7, f"mark faint {part.look}", f"{part.name} at p99")
        y += row
    return made.svg()

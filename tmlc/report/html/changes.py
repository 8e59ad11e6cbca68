"""Two small plots: what leaving a pass out changes, and the steps of as many sessions as were tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmlc.report.html.svg import Canvas, Scale, Size, figure, shorten, text_width


def ablation_plot(rows: list[Mapping[str, Any]], size: Size) -> str:
    """For each pass the change of the median step without it, with its interval; 0 is no change."""
    font, wide = size.font, size.wide
    measured = [r for r in rows if r["change"] is not None]
    row = 26.0 if wide else 42.0
    left, right = (220.0 if wide else 8.0), size.width - (90.0 if wide else 8.0)
    top, bottom = 4.0, 4.0 + row * len(measured)
    made = Canvas(size, bottom + 2 * font + 14, "What each pass bought: change of the median step without it")
    ends = [0.0] + [v for r in measured for v in (r["change"], *(r["interval"] or ()))]
    pad = 0.06 * max(max(ends) - min(ends), 0.01)
    scale = Scale(100 * (min(ends) - pad), 100 * (max(ends) + pad), left, right)
    made.frame(left, top, right, bottom)
    made.ticks_below(scale, top, bottom, 6 if wide else 4, "%")
    made.line(scale(0), top, scale(0), bottom, "zero")
    y = top
    for r in sorted(measured, key=lambda r: -r["change"]):
        change, told = 100 * r["change"], f"{r['change']:+.1%}"
        if wide:
            made.text(left - 8, y + row / 2 + font * 0.35, shorten(r["pass"], font, left - 10), "", "end")
            made.text(right + 8, y + row / 2 + font * 0.35, told)
            middle = y + row / 2
        else:
            made.text(0, y + font + 1, shorten(r["pass"], font, size.width - text_width(told, font) - 10), "halo")
            made.text(size.width, y + font + 1, told, "halo", "end")
            middle = y + font + 14
        look = "better" if r["interval"] and r["interval"][0] > 0 else "worse" if _below(r) else "unsure"
        if r["interval"]:
            low, high = (scale(100 * v) for v in r["interval"])
            made.line(low, middle, high, middle, f"whisker mark {look}", f"interval {_interval(r)}")
        made.circle(scale(change), middle, 4.5, f"mark point {look}", f"{r['pass']}: {told} without it")
        y += row
    label = "change of the median step without the pass"
    made.text((left + right) / 2, bottom + 2 * font + 10, label, "soft", "middle")
    return made.svg()


def _below(row: Mapping[str, Any]) -> bool:
    return bool(row["interval"]) and row["interval"][1] < 0


def _interval(row: Mapping[str, Any]) -> str:
    return "{:+.1%} … {:+.1%}".format(*row["interval"]) if row["interval"] else "–"


def sessions_plot(held: Mapping[str, Any], budget_ms: float, size: Size) -> str:
    """The step's p99 of every number of sessions that was tried, and the budget."""
    font, wide = size.font, size.wide
    tried = sorted(held["tried"], key=lambda t: t["sessions"])
    left, right = (56.0 if wide else 38.0), size.width - (24.0 if wide else 12.0)
    top = 2 * font + 14
    bottom = top + (200.0 if wide else 170.0)
    made = Canvas(size, bottom + 2 * font + 14, f"Sessions: {held['held']} held within {figure(budget_ms)} ms a step")
    across = Scale(0.0, max(t["sessions"] for t in tried) * 1.05, left, right)
    up = Scale(0.0, max(budget_ms, *(t["step_p99_ms"] for t in tried)) * 1.1, bottom, top)
    made.frame(left, top, right, bottom)
    made.ticks_left(up, left, right, 4)
    made.ticks_below(across, bottom, bottom + 4, 8 if wide else 5)
    made.line(left, up(budget_ms), right, up(budget_ms), "limit")
    made.text(right, font, f"step's budget {figure(budget_ms)} ms", "limit-text", "end")
    made.text(0, 2 * font + 4, "step p99, ms", "soft")
    for t in tried:
        x, y = across(t["sessions"]), up(t["step_p99_ms"])
        title = f"{t['sessions']} sessions: {figure(t['step_p99_ms'])} ms, {'fits' if t['fits'] else 'does not fit'}"
        if t["fits"]:
            made.circle(x, y, 5, "mark point better", title)
        else:
            made.rect(x - 4.5, y - 4.5, 9, 9, "mark point worse", title)
    made.text((left + right) / 2, bottom + 2 * font + 10, "sessions together", "soft", "middle")
    return made.svg()

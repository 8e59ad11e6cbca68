"""The latency histogram: all steps against the step's budget, and near-by with p50, p95 and p99."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tmlc.report.html.svg import Canvas, Scale, Size, figure, number, text_width

PERCENTILES = ("p50", "p95", "p99")


def histogram(view: Mapping[str, Any], size: Size) -> str:
    """Above, a strip from 0 to the budget with a mark a step; below, the part of it where the steps lie, counted."""
    font, wide = size.font, size.wide
    step = np.array(view["samples"]["step_ms"], np.float64)
    steps, budget = view["step_ms"], float(view["turn_latency"]["step_budget_ms"])
    left, right = (56.0 if wide else 38.0), size.width - (16.0 if wide else 8.0)
    strip, tall = font + 10, 22.0
    room = 3 * (font + 6) + 8
    top = strip + tall + font + 34
    bottom = top + room + (200.0 if wide else 150.0)
    made = Canvas(
        size,
        bottom + 2 * font + 14,
        f"Latency histogram of {step.size} steps: p50 {figure(steps['p50'])}, p95 {figure(steps['p95'])}, "
        f"p99 {figure(steps['p99'])} ms; budget {figure(budget)} ms",
    )
    low, high = _range(step, steps)
    whole = Scale(0.0, max(budget, float(np.max(step))) * 1.04, left, right)
    made.rect(left, strip, right - left, tall, "frame")
    for value in sorted({round(whole(float(ms)), 0) for ms in step}):
        made.line(value, strip + 4, value, strip + tall - 4, "rug mark")
    x = whole(budget)
    made.line(x, strip - 4, x, strip + tall + 4, "limit")
    label = f"step's budget {figure(budget)} ms"
    half = text_width(label, font, bold=True) / 2
    made.text(min(max(x, half), size.width - half), font, label, "limit-text", "middle")
    made.ticks_below(whole, strip + tall, strip + tall + 4, 8 if wide else 4, "ms")
    # What of the strip is drawn large below it.
    near = Scale(low, high, left, right)
    waist = strip + tall + font + 12
    corners = [(whole(low), waist), (left, top), (right, top), (whole(high), waist)]
    made.path("M" + "L".join(f"{number(a)} {number(b)}" for a, b in corners) + "Z", "zoom")
    made.frame(left, top, right, bottom)
    bins = np.linspace(low, high, (60 if wide else 30) + 1)
    counts, _ = np.histogram(step[(step >= low) & (step <= high)], bins)
    up = Scale(0.0, max(1, int(np.max(counts))) * 1.02, bottom, top + room)
    made.ticks_left(up, left, right, 4)
    for count, begin, end in zip(counts.tolist(), bins, bins[1:], strict=False):
        if count:
            title = f"{figure(begin)} to {figure(end)} ms: {count} ticks"
            made.rect(near(begin) + 0.5, up(count), near(end) - near(begin) - 1, bottom - up(count), "bar mark", title)
    for k, name in enumerate(PERCENTILES):
        _percentile(made, name, float(steps[name]), near, top + 4 + k * (font + 6), bottom)
    if low <= budget <= high:
        made.line(near(budget), top, near(budget), bottom, "limit")
    made.ticks_below(near, bottom, bottom + 4, 8 if wide else 4, "ms")
    beyond = int((step > high).sum())
    axis = "step" + (f"; slower ones, {beyond}, are in the strip above" if beyond and wide else "")
    axis += f"; {beyond} slower: strip above" if beyond and not wide else ""
    made.text((left + right) / 2, bottom + 2 * font + 10, axis, "soft", "middle")
    return made.svg()


def _range(step: np.ndarray, steps: Mapping[str, Any]) -> tuple[float, float]:
    """Where the steps lie but for the slowest hundredth of them, with some room."""
    low, p99 = float(step.min()), float(steps["p99"])
    high = min(float(np.max(step)), p99 + 0.5 * max(p99 - low, 0.02 * p99))
    pad = 0.04 * max(high - low, 0.02 * max(high, 1e-6))
    return max(0.0, low - pad), high + pad


def _percentile(made: Canvas, name: str, value: float, near: Scale, y: float, bottom: float) -> None:
    """A line with its name on a row of its own, so that no two names ever meet."""
    font, x = made.size.font, near(value)
    label = f"{name} {figure(value)} ms"
    made.line(x, y, x, bottom, "percentile")
    room = near.end - x > text_width(label, font, bold=True) + 8
    made.text(x + 5 if room else x - 5, y + font, label, "strong halo", "start" if room else "end")

"""The tick timeline: the step of every tick over the session, its stages stacked, ticks over the step's budget marked,
and the medians that growth is told from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tmlc.report.html.stages import Part
from tmlc.report.html.svg import Canvas, Scale, Size, figure, number, text_width

CLIP = 2.5
"""A frame is at most this many times as high as the step's p99: one very slow tick must not press the others flat."""


def timeline(view: Mapping[str, Any], parts: list[Part], size: Size) -> str:
    """Steps in ms over the time of the session. Neighbouring ticks share a column when there are more than columns:
    means of the stages, and the slowest step of the column as a line above them.
    """
    font, wide = size.font, size.wide
    samples, turn = view["samples"], view["turn_latency"]
    step = np.array(samples["step_ms"], np.float64)
    budget = float(turn["step_budget_ms"])
    tick = float(turn["worst"]["tick_wait_ms"]) / 1000 * int(samples["every"])
    left, right = (56.0 if wide else 38.0), size.width - (12.0 if wide else 8.0)
    over = np.flatnonzero(step > budget)
    top = 2 * (font + 8) + 10
    bottom = top + (260.0 if wide else 190.0)
    made = Canvas(
        size,
        bottom + 2 * font + 14,
        f"Tick timeline: {step.size} steps, median {figure(float(np.median(step)))} ms, slowest "
        f"{figure(float(np.max(step)))} ms; {over.size} over {figure(budget)} ms",
    )
    slowest, p99 = float(np.max(step)), float(view["step_ms"]["p99"])
    high = min(slowest * 1.05, CLIP * p99)
    shows_budget = budget <= 1.6 * high
    if shows_budget:
        high = max(high, budget * 1.08)
    high = max(high, 1e-6)
    across = Scale(0.0, step.size * tick, left, right)
    up = Scale(0.0, high, bottom, top)
    made.frame(left, top, right, bottom)
    made.ticks_left(up, left, right, 5)
    made.ticks_below(across, bottom, bottom + 4, 9 if wide else 4, "s")
    groups = np.array_split(np.arange(step.size), min(step.size, int((right - left) / (1.0 if wide else 2.0))))
    edges = [across(float(group[0]) * tick) for group in groups] + [right]
    below = np.zeros(len(groups))
    layers: list[tuple[str, str, np.ndarray]] = []
    for part in reversed(parts):
        below = below + np.array([part.column[group].mean() for group in groups])
        layers.append((part.look, part.name, below))
    for look, name, heights in reversed(layers):  # the tallest first: each next one covers all that lies under it
        made.path(_steps(edges, [up(min(v, high)) for v in heights], bottom), f"mark {look}", name)
    if len(groups) < step.size:
        peaks = [up(min(float(np.max(step[group])), high)) for group in groups]
        made.path(_steps(edges, peaks, None), "mark peak", "slowest step of these ticks")
    if shows_budget:
        y = up(budget)
        made.line(left, y, right, y, "limit")
    told = f"step's budget {figure(budget)} ms"
    if not shows_budget:
        told += f", {figure(budget / high)} × the height of this frame" if wide else f", {budget / high:.1f} × this"
    made.text(right, font, told, "limit-text", "end")
    _misses(made, over, step, across, tick, top)
    _growth(made, view, across, up, tick)
    if slowest > high:
        made.text(
            left if wide else right,
            top - 8 if wide else top + font + 2,
            f"cut off: slowest {figure(slowest)} ms",
            "soft halo",
            "start" if wide else "end",
        )
    made.text(0, top - 8, "ms", "soft")
    made.text((left + right) / 2, bottom + 2 * font + 10, "time in the session", "soft", "middle")
    return made.svg()


def _steps(edges: list[float], tops: list[float], base: float | None) -> str:
    """An outline that goes up and down in steps; closed at `base`, or left open."""
    start = f"M{number(edges[0])} {number(tops[0] if base is None else base)}"
    middle = "".join(f"V{number(y)}H{number(x)}" for x, y in zip(edges[1:], tops, strict=True))
    return start + middle + ("" if base is None else f"V{number(base)}Z")


def _misses(made: Canvas, over: np.ndarray, step: np.ndarray, across: Scale, tick: float, top: float) -> None:
    """A triangle over each tick that took longer than its budget; of those too near to each other, one."""
    last = -10.0
    for index in over:
        x = min(max(across((float(index) + 0.5) * tick), across.start + 4), across.end - 4)
        if x - last >= 4.0:
            title = f"tick {int(index) + 1}: {figure(float(step[index]))} ms, over the budget"
            made.path(f"M{number(x - 4)} {number(top)}h8l-4 7z", "miss mark", title)
            last = x


def _growth(made: Canvas, view: Mapping[str, Any], across: Scale, up: Scale, tick: float) -> None:
    """The medians of the first and the last window, each over its window."""
    grown, font = view["growth"], made.size.font
    if grown["ratio"] is None:
        return
    seconds = float(grown["window_seconds"])
    for key, begin in (("first_ms", 0.0), ("last_ms", max(0.0, across.high - seconds))):
        y = up(min(float(grown[key]), up.high))
        made.line(across(begin), y, across(min(begin + seconds, across.high)), y, "median mark")
    told = f"median {figure(grown['first_ms'])} → {figure(grown['last_ms'])} ms ({grown['ratio']:.2f} ×)"
    x = made.width - 12 if made.size.wide else across.end
    if text_width(told, font, bold=True) < x - 30:
        made.text(x, 2 * font + 8, told, "strong", "end")

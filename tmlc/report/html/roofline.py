"""The roofline plot: what each kernel reaches of the rates that this machine was measured to have.

S. Williams, A. Waterman, D. Patterson, "Roofline: An Insightful Visual Performance Model" (2009): attainable rate is
the lesser of the multiply rate and bandwidth times operations per byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tmlc.report.html.grouping import Group, by_kernel
from tmlc.report.html.stages import Part, look_of
from tmlc.report.html.svg import Canvas, Scale, Size, figure, number, text_width

NAMED = 7
"""Kernels that get their name in the plot, if there is room: those with the most time."""


def roofline(view: Mapping[str, Any], parts: list[Part], size: Size) -> str:
    """A mark for each kernel of each method: its area is its share of the time, its colour the stage's."""
    kernels, ceilings = view["kernels"], view["ceilings"]
    marks = [g for g in by_kernel(kernels["calls"]) if g.operations and g.bytes and g.ms]
    font, wide = size.font, size.wide
    rates: dict[str, float] = {k: v for k, v in ceilings["multiply"].items() if v > 0}
    read = float(ceilings["read_gb_s"])
    top, left, right = font + 8, (64.0 if wide else 46.0), size.width - 12.0
    bottom = top + (380.0 if wide else 300.0)
    made = Canvas(
        size,
        bottom + 2 * font + 14,
        f"Roofline: {len(marks)} kernels under {figure(read)} GB/s of reading and "
        + ", ".join(f"{figure(v)} GFLOP/s in {k}" for k, v in rates.items()),
    )
    intensities = [g.operations / g.bytes for g in marks]
    ridge = max(rates.values(), default=read) / read
    across = _decades(min([*intensities, ridge / 4]), max([*intensities, ridge * 2]), left, right)
    speeds = [g.gflop_s for g in marks]
    up = _decades(min([*speeds, across.low * read]), max([*speeds, *rates.values()]) * 1.1, bottom, top)
    made.frame(left, top, right, bottom)
    made.ticks_left(up, left, right, 6)
    made.ticks_below(across, top, bottom, 6)
    taken: list[tuple[float, float, float, float]] = []
    _roofs(made, across, up, read, rates, taken)
    for g in sorted(marks, key=lambda g: -g.share):
        x, y = across(g.operations / g.bytes), up(g.gflop_s)
        title = (
            f"{g.method}: {g.name}, {g.share:.1%} of kernel time, {figure(g.gb_s)} GB/s, {figure(g.gflop_s)} GFLOP/s"
        )
        r = _radius(g, wide)
        # A mark is drawn whole inside the frame, so that one at the edge is not taken for a smaller one.
        x, y = min(max(x, left + r), right - r), min(max(y, top + r), bottom - r)
        made.circle(x, y, r, f"mark dot {look_of(parts, g.method)}", title)
        taken.append((x - r, y - r, x + r, y + r))
    for g in sorted(marks, key=lambda g: -g.share)[:NAMED]:
        r = _radius(g, wide)
        x = min(max(across(g.operations / g.bytes), left + r), right - r)
        y = min(max(up(g.gflop_s), top + r), bottom - r)
        _name(made, g.name if len({m.method for m in marks}) == 1 else f"{g.method}: {g.name}", x, y, r, taken)
    made.text(left, font, "GFLOP/s", "soft")
    made.text((left + right) / 2, bottom + 2 * font + 10, "operations per byte", "soft", "middle")
    return made.svg()


def _decades(low: float, high: float, start: float, end: float) -> Scale:
    """A logarithmic scale with some room on both sides, over a decade at least."""
    low, high = low / 1.5, high * 1.5
    if high / low < 10:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(10), middle * math.sqrt(10)
    return Scale(low, high, start, end, log=True)


def _radius(g: Group, wide: bool) -> float:
    return 3.0 + (15.0 if wide else 10.0) * math.sqrt(min(1.0, g.share))


def _roofs(
    made: Canvas,
    across: Scale,
    up: Scale,
    read: float,
    rates: Mapping[str, float],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """The slope of the bandwidth and a flat roof for each arithmetic, each with its name."""
    font = made.size.font
    best = max(rates.values(), default=up.high)
    begin = max(across.low, up.low / read)
    end = min(across.high, best / read)
    if begin < end:
        made.path(
            f"M{number(across(begin))} {number(up(begin * read))}L{number(across(end))} {number(up(end * read))}",
            "roof",
        )
        # On the slope, to the left of its middle, above the line.
        at = math.exp(0.72 * math.log(begin) + 0.28 * math.log(end))
        label = f"read {figure(read)} GB/s"
        width = text_width(label, font)
        x = max(across(at) - 8 - width, across.start + 6)
        y = up(at * read) - 8
        _label(made, label, x, y, width, taken)
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        x = across(max(across.low, min(rate / read, across.high)))
        made.line(x, up(rate), across.end, up(rate), "roof")
        label = f"{name} {figure(rate)}"
        width = text_width(label, font)
        for y in (up(rate) - 5, up(rate) + font + 3):
            if _free((across.end - width - 6, y - font, across.end - 6, y + 3), taken) and y - font > up.end - 2:
                _label(made, label, across.end - width - 6, y, width, taken)
                break
        taken.append((x, up(rate) - 1, across.end, up(rate) + 1))


def _label(
    made: Canvas, label: str, x: float, y: float, width: float, taken: list[tuple[float, float, float, float]]
) -> None:
    made.text(x, y, label, "soft halo")
    taken.append((x - 2, y - made.size.font, x + width + 2, y + 3))


def _name(
    made: Canvas, label: str, x: float, y: float, r: float, taken: list[tuple[float, float, float, float]]
) -> None:
    """The kernel's name beside its mark, where nothing else is; nowhere when there is no such place."""
    font = made.size.font
    width = text_width(label, font)
    frame_left = 64.0 if made.size.wide else 46.0
    for dx, dy in (
        (r + 4, font * 0.35),
        (-r - 4 - width, font * 0.35),
        (-width / 2, -r - 5),
        (-width / 2, r + font + 2),
    ):
        box = (x + dx, y + dy - font, x + dx + width, y + dy + 3)
        inside = box[0] >= frame_left and box[2] <= made.width - 12 and box[1] >= font + 8
        if inside and box[3] <= made.height - 2 * font - 14 and _free(box, taken):
            made.text(x + dx, y + dy, label, "halo")
            taken.append(box)
            return


def _free(box: tuple[float, float, float, float], taken: list[tuple[float, float, float, float]]) -> bool:
    return not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)

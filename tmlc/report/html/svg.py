"""What the plots draw with: escaped text, scales with round ticks, and a canvas that writes SVG.

Every plot is drawn for two sizes (`WIDE`, `NARROW`); the style sheet shows the one that fits the window, so text is
never scaled below 11 px. Marks of data carry the class `mark`, and lie inside the rectangle of class `frame`: a test
looks.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A form of every plot: its width and font size in units that are pixels at full size."""

    name: str
    width: float
    font: float

    @property
    def wide(self) -> bool:
        return self is WIDE


WIDE = Size("wide", 960.0, 13.0)
NARROW = Size("narrow", 352.0, 12.0)
_THIN = set("iljtfrI.,:;|!'()[] /-·")
_BROAD = set("mwMWQO%@…×")


def escape(text: object) -> str:
    """Any text as HTML: markup escaped; control characters and those that turn the direction of writing replaced."""
    shown = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") else c for c in str(text))
    return html.escape(shown, quote=True)


def text_width(text: str, font: float, bold: bool = False) -> float:
    """About how wide a text is, on the safe side for the system fonts in use."""
    return (
        font
        * (1.12 if bold else 1.0)
        * sum(0.42 if c in _THIN else 0.92 if c in _BROAD else 0.72 if c.isupper() else 0.63 for c in text)
    )


def shorten(text: str, font: float, room: float) -> str:
    """The text, cut in its middle so that it fits into `room`."""
    if text_width(text, font) <= room:
        return text
    for keep in range(len(text) - 1, 3, -1):
        head = (keep + 1) // 2
        cut = f"{text[:head]}…{text[len(text) - (keep - head) :]}"
        if text_width(cut, font) <= room:
            return cut
    return text[:2] + "…"


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def figure(value: float) -> str:
    """A figure for a person, to three digits: 0.042, 4.2, 42, 4,200."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value)))
    text = f"{value:.{min(max(digits, 0), 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * k for k in (1, 2, 5, 10, 20) if span / (power * k) <= most)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """Data to coordinates: `low` lies at `start`, `high` at `end`; logarithmic or not."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            value = max(value, 1e-300)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round numbers; of a logarithmic scale powers of ten, every second, third … of them when they are too many."""
        if not self.log:
            return round_ticks(self.low, self.high, most)
        first = math.ceil(math.log10(self.low) - 1e-9)
        last = math.floor(math.log10(self.high) + 1e-9)
        every = max(1, -(-(last - first + 1) // most))
        return [10.0**k for k in range(first, last + 1, every)]


class Canvas:
    """An SVG picture of one size. `label` says to a reader who cannot see it what it shows."""

    def __init__(self, size: Size, height: float, label: str) -> None:
        self.size, self.width, self.height, self.label = size, size.width, height, label
        self._parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, look: str, title: str = "") -> None:
        box = f'x="{number(x)}" y="{number(y)}" width="{number(max(width, 0.0))}" height="{number(max(height, 0.0))}"'
        self._add("rect", box, look, title)

    def line(self, x1: float, y1: float, x2: float, y2: float, look: str, title: str = "") -> None:
        ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
        self._add("line", ends, look, title)

    def circle(self, x: float, y: float, radius: float, look: str, title: str = "") -> None:
        self._add("circle", f'cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"', look, title)

    def path(self, commands: str, look: str, title: str = "") -> None:
        self._add("path", f'd="{commands}"', look, title)

    def text(self, x: float, y: float, text: str, look: str = "", anchor: str = "start") -> None:
        """A line of text whose baseline is at `y`; `anchor` is start, middle or end."""
        where = f'x="{number(x)}" y="{number(y)}"' + (f' text-anchor="{anchor}"' if anchor != "start" else "")
        self._parts.append(f"<text {where}{_look(look)}>{escape(text)}</text>")

    def _add(self, shape: str, facts: str, look: str, title: str) -> None:
        inner = f"><title>{escape(title)}</title></{shape}>" if title else "/>"
        self._parts.append(f"<{shape} {facts}{_look(look)}{inner}")

    def frame(self, left: float, top: float, right: float, bottom: float) -> None:
        """The rectangle that the marks of data stay in."""
        self.rect(left, top, right - left, bottom - top, "frame")

    def ticks_below(self, scale: Scale, top: float, bottom: float, most: int, unit: str = "") -> None:
        """Grid lines and numbers of a horizontal axis; the last number carries the unit."""
        values = scale.ticks(most)
        for k, value in enumerate(values):
            x = scale(value)
            self.line(x, top, x, bottom, "grid")
            label = tick_label(value) + (f" {unit}" if unit and k == len(values) - 1 else "")
            half = text_width(label, self.size.font) / 2
            self.text(min(max(x, half), self.width - half), bottom + self.size.font + 4, label, "tick", "middle")

    def ticks_left(self, scale: Scale, left: float, right: float, most: int) -> None:
        """Grid lines and numbers of a vertical axis."""
        for value in scale.ticks(most):
            y = scale(value)
            self.line(left, y, right, y, "grid")
            self.text(left - 6, y + self.size.font * 0.35, tick_label(value), "tick", "end")

    def svg(self) -> str:
        box = f"0 0 {number(self.width)} {number(self.height)}"
        size = f'font-size="{number(self.size.font)}"'
        return (
            f'<svg class="plot" viewBox="{box}" {size} role="img" aria-label="{escape(self.label)}">'
            + "".join(self._parts)
            + "</svg>"
        )


def tick_label(value: float) -> str:
    """The number beside a tick of an axis."""
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:,.10g}"


def _look(look: str) -> str:
    return f' class="{look}"' if look else ""


def both(draw: Callable[[Size], str]) -> str:
    """A plot in both sizes, for the style sheet to choose from."""
    return "".join(f'<div class="{size.name}">{draw(size)}</div>' for size in (WIDE, NARROW))

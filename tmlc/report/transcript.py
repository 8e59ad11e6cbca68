"""The transcript of a run: what was typed and what the model wrote, with times."""

from __future__ import annotations

from collections.abc import Iterable

from tmlc.report.tables import printable


def clock_time(seconds: float) -> str:
    """mm:ss.mmm, hours before it from the first on."""
    total = round(seconds * 1000)
    minutes, rest = divmod(total, 60_000)
    hours, minutes = divmod(minutes, 60)
    head = f"{hours}:{minutes:02d}" if hours else f"{minutes:02d}"
    return f"{head}:{rest // 1000:02d}.{rest % 1000:03d}"


class Transcript:
    """Collects lines. The model's text of neighbouring ticks is one line; a typed line stands before its
    tick's answer.

    Times are the starts of ticks, as in the timeline and in the output audio.
    """

    def __init__(self, tick_seconds: float) -> None:
        self._seconds = tick_seconds
        self._lines: list[tuple[float, str, str]] = []
        self._last_tick = -2

    def add(self, tick: int, typed: str | None, text: str) -> None:
        """What tick `tick` took and gave."""
        at = tick * self._seconds
        if typed:
            self._lines.append((at, "typed", typed))
            self._last_tick = -2
        if text and tick == self._last_tick + 1:
            start, who, before = self._lines[-1]
            self._lines[-1] = (start, who, before + text)
        elif text:
            self._lines.append((at, "model", text))
        if text:
            self._last_tick = tick

    def lines(self) -> Iterable[str]:
        """`[mm:ss.mmm] who: text`, in order."""
        for at, who, text in self._lines:
            yield f"[{clock_time(at)}] {who}: {printable(text)}"

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines())

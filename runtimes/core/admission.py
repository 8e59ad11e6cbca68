"""Who may come in, and what is given up under pressure: measured steps by size of batch, admission, the ladder."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.errors import UsageError
from tmlc.runtimes.core.tick import TickInput, TickOutput

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine
    from tmlc.runtimes.core.session import Session

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
ROUNDS = 24
HEADROOM = 0.8
"""Part of the step budget that admission fills."""
OBSERVED = 256
"""Steps from which the correction of a table is made."""
CORRECTION = (0.75, 4.0)
"""The least and the most that observed steps change a table by."""


class StepTable:
    """Seconds that a step takes by size of batch, at the 99th percentile; linear between the sizes that were measured,
    and beyond them as the last two go on.

    Steps that are observed later correct it: their 99th percentile, each step relative to its prediction, multiplies
    the whole table.

    Args:
        measured: seconds by size.
    """

    def __init__(self, measured: Mapping[int, float]) -> None:
        if not measured or min(measured) < 1 or not all(0 < s < math.inf for s in measured.values()):
            raise UsageError(
                f"a step table needs positive seconds by size of batch, not {dict(measured)!r}",
                fix="let tmlc.runtimes.core.admission.measure(engine) make it, or give seconds such as {1: 0.02}",
            )
        self._sizes = sorted(measured)
        # More sessions never take less time: what says otherwise is noise.
        self._seconds = np.maximum.accumulate([measured[size] for size in self._sizes]).tolist()
        self._observed: deque[float] = deque(maxlen=OBSERVED)
        self._since = 0
        self.correction = 1.0

    def measured(self, size: int) -> float:
        """Seconds that a batch of `size` takes by the table alone."""
        sizes, seconds = self._sizes, self._seconds
        if len(sizes) == 1 or size <= sizes[0]:
            return float(seconds[0] * max(1.0, size / sizes[0]))
        k = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        slope = (seconds[k] - seconds[k - 1]) / (sizes[k] - sizes[k - 1])
        return float(seconds[k - 1] + slope * (size - sizes[k - 1]))

    def predict(self, size: int) -> float:
        """Seconds that a batch of `size` takes, corrected."""
        return self.measured(size) * self.correction

    def largest(self, seconds: float, most: int) -> int:
        """The largest batch, up to `most`, that takes at most so many seconds; at least 1."""
        low, high = 1, max(1, most)
        while low < high:
            middle = (low + high + 1) // 2
            if self.predict(middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def observe(self, size: int, seconds: float) -> None:
        """A batch of `size` took so long."""
        self._observed.append(seconds / self.measured(size))
        self._since += 1
        if len(self._observed) >= 64 and self._since >= 16:
            self._since = 0
            ratios = sorted(self._observed)
            low, high = CORRECTION
            self.correction = min(max(ratios[math.ceil(0.99 * len(ratios)) - 1], low), high)

    def to_json(self) -> dict[str, Any]:
        """Milliseconds by size as measured, and the correction."""
        rows = {str(size): round(1000 * s, 3) for size, s in zip(self._sizes, self._seconds, strict=True)}
        return {"step_ms": rows, "correction": round(self.correction, 3)}


def measure(engine: Engine, sizes: Sequence[int] = SIZES, rounds: int = ROUNDS, long_context: bool = True) -> StepTable:
    """Measures steps of an engine on which no session is open.

    Every tick brings audio, typed text and, as often as the model looks, a frame. Every second one is made to speak, so
    that a model that likes silence is not taken for a fast one. All of it is done with new sessions, and again with
    sessions whose context is used up to what the measurement needs (`long_context`); the slower of the two counts.

    Args:
        sizes: of batches; those beyond the engine's slots are left out, and the number of its slots is added.
        rounds: steps of each size. Of so few, the 99th percentile is the largest.
    """
    slots = engine.capacity().sessions if engine.batched else 1
    wanted = sorted({size for size in sizes if size < slots} | {min(slots, max(sizes))})
    rng = np.random.default_rng(0)
    found: dict[int, float] = {}
    for size in wanted:
        found[size] = _p99(engine, size, rounds, rng, filled=0)
        if long_context:
            found[size] = max(found[size], _p99(engine, size, rounds, rng, filled=_fill(engine, rounds)))
    return StepTable(found)


def _fill(engine: Engine, rounds: int) -> int:
    """Positions that can be appended before `rounds` and two more ticks, within the context."""
    layout = engine.layout
    tick = layout.audio_in + layout.video_positions + layout.text_in + layout.text_out + 2 + layout.audio_out
    return max(0, engine.capacity().context_limit - (rounds + 2) * tick)


def _p99(engine: Engine, size: int, rounds: int, rng: np.random.Generator, filled: int) -> float:
    sessions = [engine.session(seed=0)]
    try:
        if filled:
            tokens = rng.integers(0, 128, filled).tolist()
            sessions[0].append(tokens=[min(t, engine.model.vocab - 1) for t in tokens], logits="none")
        sessions += [sessions[0].fork() for _ in range(size - 1)]
        took = []
        for number in range(rounds + 2):
            inputs = [_busy(engine, rng, sessions[0], number) for _ in sessions]
            begun = time.perf_counter()
            results = engine.tick_batch(sessions, inputs)
            took.append(time.perf_counter() - begun)
            for result in results:
                if not isinstance(result, TickOutput):
                    raise result
    finally:
        for session in sessions:
            session.close()
    return float(np.quantile(took[2:], 0.99, method="higher"))


def _busy(engine: Engine, rng: np.random.Generator, session: Session, number: int) -> TickInput:
    """A tick that brings all that the model takes."""
    layout = engine.layout
    given = TickInput(tokens=[min(65, engine.model.vocab - 1)] * max(1, layout.text_in))
    if engine.kind == "interaction" and not layout.text_in:
        given.tokens = ()
    if layout.audio_in:
        given.audio = rng.normal(0, 0.1, layout.audio_in * layout.hop).astype(np.float32)
    if layout.video_positions and number % max(1, layout.video_every) == 0:
        size = (1, layout.frame_height, layout.frame_width, 3)
        given.video = rng.integers(0, 256, size, dtype=np.uint8)
    if engine.kind == "interaction" and layout.text_out and number % 2:
        usual = {layout.silence_token_id, layout.end_of_tick_token_id}
        given.say = [next(t for t in range(3) if t not in usual)] * layout.text_out
    return given


class Level(IntEnum):
    """What is given up under pressure; each level gives up what those below it do."""

    NORMAL = 0
    NO_ADMISSION = 1
    SLOW_VIDEO = 2  # one frame a second
    NO_TRANSCRIPTS = 3  # transcripts of what is heard pause; they are not made by the model, so the gateway does this
    NO_BACKGROUND = 4  # work of lower priority on this machine is preempted; the background room does this


class Ladder:
    """Climbs and descends by pressure: the part of the last second that steps took, and the ticks by which they began
    late, together. One level a second up; one down after five seconds below the level's own threshold, less 0.1.
    """

    UP = (0.80, 0.90, 1.00, 1.10)
    """Pressure at which level 1, 2, 3 and 4 begin."""
    HYSTERESIS = 0.1
    CALM_SECONDS = 5.0

    def __init__(self, period: float) -> None:
        self._period = period
        self._edges: deque[tuple[float, float]] = deque(maxlen=max(1, round(1.0 / period)))
        self._climbed = -math.inf
        self._calm_since: float | None = None
        self.level = Level.NORMAL
        self.utilisation = self.pressure = 0.0

    def edge(self, now: float, busy: float, late: float) -> bool:
        """One period is over, in which steps took `busy` seconds and the latest one began `late` seconds after its
        edge. Did the level change?"""
        self._edges.append((busy / self._period, late / self._period))
        count = len(self._edges)
        self.utilisation = sum(busy for busy, _ in self._edges) / count
        self.pressure = self.utilisation + sum(late for _, late in self._edges) / count
        level = self.level
        if level < Level.NO_BACKGROUND and self.pressure >= self.UP[level]:
            self._calm_since = None
            if now - self._climbed >= 1.0 - 1e-6:
                self._climbed, self.level = now, Level(level + 1)
        elif level and self.pressure < self.UP[level - 1] - self.HYSTERESIS:
            if self._calm_since is None:
                self._calm_since = now
            elif now - self._calm_since >= self.CALM_SECONDS:
                self._calm_since, self.level = now, Level(level - 1)
        else:
            self._calm_since = None
        return self.level is not level

"""The cushion of a stream of samples: how much of what waits no edge has needed, and where that may be let go.

A piece that comes too late for its edge leaves its delay in the stream: its tick was filled up with silence, and it
waits for the next one. What waits beyond a tick is a cushion against the next late piece, and age for all that is
heard. A jitter buffer like WebRTC's NetEQ keeps a target level, a high quantile of the lateness that it saw, and
accelerates above it. Here the same is read off the stream, without a clock: what is left when an edge has taken its
tick is by how much later the input could have come. The least that was left over the last 20 s is what none of those
100 edges needed (the target is the 99th percentile of the lateness); all of it goes but 10 ms.

It goes where nothing is said: pieces of 10 ms inside a pause, which begins 200 ms after the last sound and ends 50 ms
before the next one. A piece is quiet below -60 dB, or below the level that keeps a voice going (-40 dB) when it is also
no more than 6 dB above the quietest piece of the last 20 s: a steady noise is quiet, a whisper in a silent room is not.
"""

from __future__ import annotations

import numpy as np

from tmlc.runtimes.core.voice import GOES_ON

WINDOW_SECONDS = 20.0
"""So long nobody needed it."""
RESERVE_SECONDS = 0.01
"""What is kept beyond what was needed."""
PIECE_SECONDS = 0.01
PAUSE_SECONDS, GUARD_SECONDS = 0.2, 0.05
"""Quiet that stays before what is let go, as long as the detector of voice hangs over, and behind it."""
NOTHING, ABOVE_NOISE = 0.001, 2.0
"""Root mean square that is quiet anywhere; by how much a piece may be louder than the quietest one."""
PACE = 0.05
"""By what part of real time the input may be faster or slower: a file that is sent ahead of time is no backlog."""


class Cushion:
    """Of one stream. Its owner calls `let_go` before an edge takes its ticks, and `took` after.

    Args:
        rate: samples a second.
        tick: samples of one tick.
    """

    def __init__(self, rate: int, tick: int) -> None:
        self._tick, self._piece = tick, max(1, round(rate * PIECE_SECONDS))
        self._reserve = round(rate * RESERVE_SECONDS)
        self._pause, self._guard = (max(1, round(s / PIECE_SECONDS)) for s in (PAUSE_SECONDS, GUARD_SECONDS))
        edges = max(2, round(rate * WINDOW_SECONDS / tick))
        # Rings, one entry an edge: what was left then, all that had come by then, the power of its quietest piece.
        self._left, self._came = np.zeros(edges, np.int64), np.zeros(edges, np.int64)
        self._powers = np.full(edges, np.inf)
        self._known = self._quiet = 0  # edges since the beginning; quiet pieces in a row, up to what waits

    def clear(self) -> None:
        """What waited is gone; what edges needed is not known any more."""
        self._powers[:] = np.inf
        self._known = self._quiet = 0

    @property
    def spare(self) -> int:
        """Samples, whole pieces, that no edge of the last 20 s needed. 0 while fewer edges than that are known, and for
        input that comes faster or slower than it is heard."""
        edges = self._left.size
        if self._known < edges:
            return 0
        newest, passed = (self._known - 1) % edges, (edges - 1) * self._tick
        if abs(self._came[newest] - self._came[(newest + 1) % edges] - passed) > PACE * passed:
            return 0
        least = int(np.min(self._left)) - self._reserve
        return max(0, least // self._piece * self._piece)

    def let_go(self, waiting: np.ndarray, spare: int) -> np.ndarray:
        """float32 [samples] that wait, without up to `spare` of them that lie in pauses."""
        count = waiting.size // self._piece
        whole = waiting[: count * self._piece]
        quiet = self._power(whole) < self._threshold()
        if not quiet.any():
            return waiting
        loud, at = np.flatnonzero(~quiet), np.arange(count)
        # Quiet pieces before each one, and those known behind it, up to the nearest loud one.
        last, after = np.concatenate([[-1 - self._quiet], loud]), np.append(loud, count)
        place = np.searchsorted(loud, at)
        free = quiet & (at - last[place] > self._pause) & (after[place] - at > self._guard)
        go = np.flatnonzero(free)[: spare // self._piece]
        if not go.size:
            return waiting
        self._left -= go.size * self._piece
        kept = np.delete(whole.reshape(count, -1), go, axis=0).reshape(-1)
        return np.concatenate([kept, waiting[whole.size :]])

    def took(self, ticks: list[np.ndarray | None], whole: bool, left: int, came: int) -> None:
        """The ticks that an edge took in, whether all their samples had come, how many wait now, how many ever came."""
        for tick in ticks:
            entry = self._known % self._left.size
            self._left[entry], self._came[entry], self._powers[entry] = left, came, np.inf
            self._known += 1
            if tick is None or not whole:
                self._quiet = 0
                continue
            power = self._power(tick[: tick.size // self._piece * self._piece])
            self._powers[entry] = power.min()
            loud = np.flatnonzero(power >= self._threshold())
            self._quiet = power.size - 1 - int(loud[-1]) if loud.size else self._quiet + power.size

    def _power(self, samples: np.ndarray) -> np.ndarray:
        """Mean squares of whole pieces."""
        pieces = samples.reshape(-1, self._piece)
        power: np.ndarray = np.einsum("ij,ij->i", pieces, pieces) / self._piece
        return power

    def _threshold(self) -> float:
        """The mean square below which a piece is quiet."""
        return max(NOTHING**2, min(GOES_ON**2, ABOVE_NOISE**2 * float(self._powers.min())))

"""What waits to enter a session: samples, the newest frame, typed tokens. Each is bounded and has one overflow rule.

| stream | bound | overflow |
| --- | --- | --- |
| samples, REALTIME | 400 ms, and the 6 ticks for which the device may not have come | the oldest are dropped |
| samples, BUFFERED | 30 s | the newest are dropped |
| frames | one | the older one is dropped |
| typed tokens | 65,536 | the newest are refused (InputError) |

Any thread may put something in; only the device thread takes out. Nothing here waits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from tmlc.errors import InputError
from tmlc.runtimes.core.cushion import Cushion
from tmlc.runtimes.core.tick import MAX_QUEUED_TOKENS
from tmlc.runtimes.core.voice import HOP_SECONDS, is_silent

MAX_LATE = 5
"""Ticks that a session may be late; what it was sent meanwhile is kept."""
LATE_SECONDS = 0.4
"""Input of a REALTIME stream that is older than this when its tick comes is dropped."""
CUSHION_SECONDS = 0.1
"""Backlog of a REALTIME stream above which silence is left out at once; `cushion.py` says what is too much below."""
BUFFERED_SECONDS = 30.0


class Pace(StrEnum):
    """How samples come.

    REALTIME: as they are recorded. A backlog beyond 400 ms is late: the oldest samples are dropped and counted.
    BUFFERED: faster than they are played (a file). Up to 30 s may lie ahead, the newest are dropped and counted.
    """

    REALTIME = "realtime"
    BUFFERED = "buffered"


@dataclass(slots=True)
class Taken:
    """What left a stream of samples for the ticks of one edge.

    Attributes:
        ticks: float32 [samples of a tick] for each tick, oldest first; None where nothing had come.
        missing: samples of these ticks that had not come.
        late: samples dropped because they were older than 400 ms.
        skipped: silent samples left out, to catch up or because no edge needed that much to wait.
        heard: samples that ever came and wait no more: taken by these ticks or earlier ones, or dropped.
    """

    ticks: list[np.ndarray | None] = field(default_factory=list)
    missing: int = 0
    late: int = 0
    skipped: int = 0
    heard: int = 0


class SampleStream:
    """A first-in first-out queue of float32 samples.

    Args:
        rate: samples a second.
        tick: samples of one tick.
    """

    def __init__(self, rate: int, tick: int, pace: Pace) -> None:
        self.pace, self._tick, self._hop = pace, tick, max(1, round(rate * HOP_SECONDS))
        self._late, self._backlog = round(rate * LATE_SECONDS), round(rate * CUSHION_SECONDS)
        self.bound = (MAX_LATE + 1) * tick + self._late if pace is Pace.REALTIME else round(rate * BUFFERED_SECONDS)
        self._ring = np.zeros(max(1, min(self.bound, 8 * tick)), np.float32)
        self._start = self._size = self._came = 0
        self._lock = threading.Lock()
        self._dropped = 0
        self._flowing = False
        self._cushion = Cushion(rate, tick)

    def __len__(self) -> int:
        return self._size

    def put(self, samples: np.ndarray) -> int:
        """Adds samples; returns how many were dropped for want of room."""
        with self._lock:
            self._came += samples.size
            over = max(0, self._size + samples.size - self.bound)
            if over and self.pace is Pace.REALTIME:
                gone = min(over, self._size)
                self._discard(gone)
                self._cushion.clear()
                samples = samples[over - gone :]
            elif over:
                samples = samples[: samples.size - over]
            self._room(self._size + samples.size)
            end = (self._start + self._size) % self._ring.size
            first = min(samples.size, self._ring.size - end)
            self._ring[end : end + first] = samples[:first]
            self._ring[: samples.size - first] = samples[first:]
            self._size += samples.size
            self._dropped += over
            return over

    def _room(self, size: int) -> None:
        """Makes the ring at least `size` long; it doubles, and ends at the bound."""
        if size <= self._ring.size:
            return
        ring = np.zeros(min(self.bound, max(size, 2 * self._ring.size)), np.float32)
        ring[: self._size] = self._peek(0, self._size)
        self._ring, self._start = ring, 0

    def _peek(self, offset: int, count: int) -> np.ndarray:
        start = (self._start + offset) % self._ring.size
        first = min(count, self._ring.size - start)
        return np.concatenate([self._ring[start : start + first], self._ring[: count - first]])

    def _discard(self, count: int) -> None:
        self._start = (self._start + count) % self._ring.size
        self._size -= count

    def _pop(self, count: int) -> np.ndarray:
        out = self._peek(0, count)
        self._discard(count)
        return out

    def take(self, ticks: int) -> Taken:
        """What the next `ticks` ticks hear (all but the last were missed).

        Of a REALTIME stream, what is older than 400 ms goes first. Then silent hops of 50 ms are left out while more
        waits than these ticks need and 100 ms. Of any stream, what no edge of the last 20 s needed to wait is let go in
        pauses (`cushion.py`). A tick for which too little has come is filled up with silence: before the samples where
        the stream begins, else behind them, so that speech that has begun is not cut in two.
        """
        out, need = Taken(), ticks * self._tick
        with self._lock:
            if self.pace is Pace.REALTIME:
                out.late = max(0, self._size - need - (self._late - self._tick))
                if out.late:
                    self._discard(out.late)
                    self._cushion.clear()
                out.skipped = self._skip(need)
            if (spare := min(self._cushion.spare, self._size - need)) > 0:
                out.skipped += self._keep(self._cushion.let_go(self._peek(0, self._size), spare))
            for _ in range(ticks):
                count = min(self._tick, self._size)
                out.missing += self._tick - count
                out.ticks.append(self._filled(count) if count else None)
                self._flowing = count > 0
            out.heard = self._came - self._size
            self._cushion.took(out.ticks, not out.missing, self._size, self._came)
        return out

    def _keep(self, left: np.ndarray) -> int:
        """Puts what is left of the backlog in its place; returns how many samples are gone."""
        gone = self._size - left.size
        if gone:
            self._start, self._size = 0, left.size
            self._ring[: left.size] = left
        return gone

    def _skip(self, need: int) -> int:
        """Leaves out silent hops of the backlog; returns how many samples that were."""
        over = (self._size - need - self._backlog) // self._hop
        if over <= 0:
            return 0
        waiting = self._peek(0, self._size)
        whole = waiting.size // self._hop * self._hop
        kept, skipped = [], 0
        for hop in waiting[:whole].reshape(-1, self._hop):
            if skipped < over and is_silent(hop):
                skipped += 1
            else:
                kept.append(hop)
        return self._keep(np.concatenate([*kept, waiting[whole:]]))

    def _filled(self, count: int) -> np.ndarray:
        if count == self._tick:
            return self._pop(count)
        out = np.zeros(self._tick, np.float32)
        if self._flowing:
            out[:count] = self._pop(count)
        else:
            out[self._tick - count :] = self._pop(count)
        return out

    def refuse(self, count: int) -> None:
        """So many samples came while nobody wanted them; they count as dropped."""
        with self._lock:
            self._came += count
            self._dropped += count

    def clear(self) -> None:
        """Drops what waits."""
        with self._lock:
            self._dropped += self._size
            self._discard(self._size)
            self._flowing = False
            self._cushion.clear()

    def dropped(self) -> int:
        """Samples that were dropped for want of room, or refused, since the last call."""
        with self._lock:
            count, self._dropped = self._dropped, 0
            return count


class FrameSlot:
    """The newest frame, and how many were replaced before anyone looked."""

    def __init__(self) -> None:
        self._frame: np.ndarray | None = None
        self._dropped = 0
        self._lock = threading.Lock()

    def put(self, frame: np.ndarray) -> None:
        """Replaces what is there."""
        with self._lock:
            self._dropped += self._frame is not None
            self._frame = frame

    def take(self) -> np.ndarray | None:
        """The newest frame, once."""
        with self._lock:
            frame, self._frame = self._frame, None
            return frame

    def dropped(self) -> int:
        """Frames that were replaced since the last call."""
        with self._lock:
            count, self._dropped = self._dropped, 0
            return count


class TokenStream:
    """Typed tokens that wait."""

    def __init__(self) -> None:
        self._tokens: deque[int] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tokens)

    def put(self, tokens: Sequence[int]) -> None:
        """Adds tokens. Raises InputError, and adds none of them, when more than 65,536 would wait."""
        with self._lock:
            if len(self._tokens) + len(tokens) > MAX_QUEUED_TOKENS:
                raise InputError(
                    f"more than {MAX_QUEUED_TOKENS} typed tokens would wait", fix="wait until the model has read some"
                )
            self._tokens.extend(tokens)

    def take(self, most: int) -> list[int]:
        """The oldest tokens, at most so many."""
        with self._lock:
            return [self._tokens.popleft() for _ in range(min(most, len(self._tokens)))]

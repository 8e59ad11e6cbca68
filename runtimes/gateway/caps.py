"""How much a client may send, and how many sessions a key may hold."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from tmlc.runtimes.gateway.settings import Caps


class Bucket:
    """A token bucket: `rate` a second on average, twice as much at once."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._room, self._clock = rate, 2 * rate, clock
        self._level, self._at = self._room, clock()

    def take(self, amount: float = 1.0) -> bool:
        """Is there room for so much? It is taken then."""
        now = self._clock()
        self._level, self._at = min(self._room, self._level + (now - self._at) * self._rate), now
        if self._level < amount:
            return False
        self._level -= amount
        return True


class Meter:
    """What one connection may send."""

    def __init__(self, caps: Caps, clock: Callable[[], float] = time.monotonic) -> None:
        self._messages, self._bytes = Bucket(caps.messages, clock), Bucket(caps.bytes, clock)
        self._frames = Bucket(caps.frames, clock)

    def message(self, size: int) -> str:
        """Why a message of `size` bytes is too much; empty when it is not."""
        if not self._messages.take():
            return "messages a second"
        return "" if self._bytes.take(size) else "bytes a second"

    def frame(self) -> bool:
        """May it send a picture now?"""
        return self._frames.take()


class SessionCaps:
    """How many connections each key has."""

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self._open = Counter[str]()

    def enter(self, name: str) -> bool:
        """One more of this key; False: it has as many as it may."""
        if self._open[name] >= self.caps.sessions:
            return False
        self._open[name] += 1
        return True

    def leave(self, name: str) -> None:
        self._open[name] -= 1
        if self._open[name] <= 0:
            del self._open[name]

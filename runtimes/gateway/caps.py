"""How much a connection may send, and what it may do with the key that it came with."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from tmlc.runtimes.gateway.settings import Caps


@dataclass(frozen=True, slots=True)
class Pass:
    """What a request was let in with.

    Attributes:
        name: of the key; empty on a server without keys.
        model: that its client secret was made for; None: any.
    """

    name: str = ""
    model: str | None = None


ANYBODY = Pass()
PASS: ContextVar[Pass] = ContextVar("tmlc_pass", default=ANYBODY)
"""Of the request in whose task this is asked."""


class Bucket:
    """A token bucket: `rate` a second on average, `burst` at once (twice the rate, and never less than one)."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.burst = max(1.0, 2 * rate)
        self._rate, self._clock = rate, clock
        self._level, self._at = self.burst, clock()

    def take(self, amount: float = 1.0) -> bool:
        """Is there room for so much? It is taken then. There never is for more than `burst`."""
        now = self._clock()
        self._level, self._at = min(self.burst, self._level + (now - self._at) * self._rate), now
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
        """Why a message of `size` bytes is too much; empty when it is not. One that waiting would not help says so."""
        if not self._messages.take():
            return "messages a second"
        if size > self._bytes.burst:
            return f"bytes in one message ({size}, {self._bytes.burst:.0f} at most)"
        return "" if self._bytes.take(size) else "bytes a second"

    def frame(self) -> bool:
        """May it send a picture now?"""
        return self._frames.take()

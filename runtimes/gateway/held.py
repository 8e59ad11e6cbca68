"""The transcript that a client was not told yet: held back under pressure, or under way when its connection was cut.

It outlives connections. Who comes back is sent again the newest ticks that its connection did not write, with their
words; those of earlier ones are told here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from tmlc.runtimes.background.injections import MAX_CHARACTERS

MAX_TOLD = 1024
"""Messages of transcript that may be under way; a connection that has as many others to write is closed."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What the model said at one tick; `number`: of the tick's event."""

    number: int
    tick: int
    text: str


class Held:
    """Of one session. At most 8,192 characters are held back; the oldest are forgotten."""

    def __init__(self) -> None:
        self._waiting: deque[Piece] = deque()
        self._size = 0
        # What was told with an event of that number, while it is not known whether it was written.
        self._told: deque[tuple[int, list[Piece]]] = deque(maxlen=MAX_TOLD)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self._waiting)[-MAX_CHARACTERS:]

    @property
    def ticks(self) -> tuple[int, int]:
        """The tick of the first word, and the one after the last."""
        return self._waiting[0].tick, self._waiting[-1].tick + 1

    def add(self, number: int, tick: int, text: str) -> None:
        """The model said something at a tick, whose event has this number."""
        if not text:
            return
        self._waiting.append(Piece(number, tick, text))
        self._size += len(text)
        while self._size - len(self._waiting[0].text) >= MAX_CHARACTERS:
            self._size -= len(self._waiting.popleft().text)

    def tell(self, number: int, sent: int) -> str:
        """All that waits, which goes out with event `number`; the client has what came up to event `sent`."""
        text = self.text
        while self._told and self._told[0][0] <= sent:
            self._told.popleft()
        if self._waiting:
            self._told.append((number, list(self._waiting)))
        self._waiting.clear()
        self._size = 0
        return text

    def resume(self, after: int, again: Collection[int]) -> None:
        """A client comes back that has what came up to event `after`, and is sent the events `again`: what was told
        with later ones waits again, unless it comes with its tick."""
        pieces = [piece for number, told in self._told if number > after for piece in told]
        pieces += self._waiting
        self._told.clear()
        self._waiting.clear()
        self._size = 0
        for piece in pieces:
            if piece.number not in again:
                self.add(piece.number, piece.tick, piece.text)

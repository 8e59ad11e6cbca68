"""What a session's background remembers of the conversation, to give it along with a delegation. Bounded.

Text of one speaker with less than `GAP_MS` between its pieces is one line. The newest `MAX_LINES` lines and
`MAX_CHARACTERS` characters are kept, and `MAX_FRAMES` pictures at least `FRAME_MS` apart.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from tmlc.runtimes.background.model import Context, Frame, Line

GAP_MS = 2_000
MAX_LINES = 200
MAX_CHARACTERS = 16_000
MAX_LINE = 2_000
MAX_FRAMES = 4
FRAME_MS = 1_000
MAX_FRAME_BYTES = 1 << 22
"""A larger picture is not kept: the model's own frames are far smaller."""


class Transcript:
    """The conversation so far; used by one thread."""

    def __init__(self) -> None:
        self._lines: deque[Line] = deque()
        self._frames: deque[Frame] = deque(maxlen=MAX_FRAMES)
        self._characters = 0
        self.cut = 0

    def add(self, speaker: str, text: str, start_ms: int, end_ms: int) -> None:
        """Adds what `speaker` said or typed."""
        text = text[-MAX_LINE:]
        if not text:
            return
        last = self._lines[-1] if self._lines else None
        joins = last is not None and last.speaker == speaker and start_ms - last.end_ms < GAP_MS
        if last is not None and joins and len(last.text) + len(text) <= MAX_LINE:
            self._lines[-1] = Line(speaker, last.text + text, last.start_ms, max(end_ms, last.end_ms))
        else:
            self._lines.append(Line(speaker, text, start_ms, end_ms))
        self._characters += len(text)
        while len(self._lines) > MAX_LINES or self._characters > MAX_CHARACTERS:
            self._characters -= len(self._lines.popleft().text)
            self.cut += 1

    def see(self, pixels: np.ndarray, at_ms: int) -> None:
        """Keeps a copy of a picture, uint8 [height, width, 3]; one that comes too soon replaces the last."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.nbytes > MAX_FRAME_BYTES:
            return
        frame = pixels.copy()
        frame.flags.writeable = False
        if len(self._frames) > 1 and at_ms - self._frames[-2].at_ms < FRAME_MS:
            self._frames.pop()
        self._frames.append(Frame(frame, at_ms))

    def context(self, instructions: str = "") -> Context:
        """The conversation as it is now."""
        return Context(tuple(self._lines), tuple(self._frames), instructions, self.cut)

"""Is there voice in these samples? By energy, in hops of 50 ms, with hysteresis.

Not a classifier: a fan above the threshold counts as voice. It is enough to know when nobody speaks, which is what
injections wait for (`Moment.quiet`), and to see an interruption.
"""

from __future__ import annotations

import numpy as np

HOP_SECONDS = 0.05
BEGINS = 0.02
"""Root mean square of a hop (full scale is 1: -34 dB) at which voice begins."""
GOES_ON = 0.01
"""A hop above this (-40 dB) keeps a voice going that has begun."""
HANGOVER = 4
"""Hops in a row that must lie below `GOES_ON` for a voice to end: 200 ms, so that a pause between words is not an
end."""


class VoiceDetector:
    """Follows one stream; `heard` takes it piece by piece.

    Attributes:
        speaking: is a voice going on at the end of what was heard?
    """

    def __init__(self) -> None:
        self.speaking = False
        self._below = 0

    def heard(self, audio: np.ndarray | None, hops: int) -> bool:
        """Is there voice anywhere in `audio`, float32 mono, `hops` equal hops long (None: all silence)?"""
        if audio is None or not audio.size:
            levels = [0.0] * hops
        elif audio.size % hops == 0:
            cut = audio.reshape(hops, -1)
            levels = (np.einsum("ij,ij->i", cut, cut) / cut.shape[1]).tolist()
        else:
            levels = [float(cut @ cut) / max(cut.size, 1) for cut in np.array_split(audio, hops)]
        any_voice = False
        for level in levels:
            if level >= BEGINS**2 or (self.speaking and level >= GOES_ON**2):
                self.speaking, self._below = True, 0
            elif self.speaking:
                self._below += 1
                self.speaking = self._below < HANGOVER
            any_voice |= self.speaking
        return any_voice


def hops_of(seconds: float) -> int:
    """Hops in a piece of so many seconds."""
    return max(1, round(seconds / HOP_SECONDS))


def is_silent(audio: np.ndarray) -> bool:
    """Does a hop lie below the level that keeps a voice going?"""
    return float(audio @ audio) < GOES_ON**2 * audio.size

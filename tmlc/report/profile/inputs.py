"""Made-up input of a profile: it keeps every part of the model busy in every tick."""

from __future__ import annotations

import numpy as np

from tmlc.runtimes.media.recording import Recording, TickShape
from tmlc.runtimes.media.timed_text import TimedText

TYPED_EVERY_SECONDS = 2.0


class SyntheticVideo:
    """Camera frames of uniform noise, one new clip whenever it is asked: every pixel differs, as in a real
    picture.
    """

    def __init__(self, shape: TickShape, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._size = (shape.height, shape.width, 3)

    def at(self, seconds: float) -> np.ndarray:
        return self._random.integers(0, 256, self._size, np.uint8)


def synthetic_recording(shape: TickShape, seconds: float, hears: bool, reads: bool = True, seed: int = 0) -> Recording:
    """Inputs that make the model do all its work in every tick.

    Noise with the loudness of speech that comes and goes (`hears`), camera frames (when the model sees), a word typed
    every two seconds (`reads`: it has a tokenizer), and for a model that does not hear a token in every tick.
    """
    random = np.random.default_rng(seed)
    audio = None
    if hears:
        t = np.arange(int(seconds * shape.sample_rate)) / shape.sample_rate
        loudness = 0.002 + 0.1 * np.clip(np.sin(2 * np.pi * 0.4 * t), 0, 1) * np.abs(np.sin(2 * np.pi * 2.3 * t))
        audio = (random.standard_normal(t.size) * loudness).astype(np.float32)
    typed = [TimedText(float(at), "hello") for at in np.arange(0.0, seconds if reads else 0.0, TYPED_EVERY_SECONDS)]
    video = SyntheticVideo(shape, seed) if shape.frames else None
    return Recording(shape, audio=audio, video=video, text=typed, tokens=() if hears else (0,))

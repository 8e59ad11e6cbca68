"""A recorded conversation cut into ticks: audio, camera frames and typed text, each handed out when its tick
has passed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tmlc.runtimes.core.tick import TickInput
from tmlc.runtimes.media.timed_text import TimedText


@dataclass(frozen=True)
class TickShape:
    """What one tick of a model takes: the facts of the manifest's tick layout that cutting needs.

    `frames` is how many camera frames make one clip (0: the model sees nothing), `video_every` how many ticks
    lie between clips.
    """

    duration_ms: int
    sample_rate: int
    frames: int = 0
    height: int = 0
    width: int = 0
    video_every: int = 1

    @property
    def samples(self) -> int:
        """Audio samples of one tick."""
        return self.sample_rate * self.duration_ms // 1000

    @property
    def seconds(self) -> float:
        return self.duration_ms / 1000


class Camera(Protocol):
    """What shows frames: `VideoSource`, or anything made up that does the same."""

    def at(self, seconds: float) -> np.ndarray | None:
        """The frame on show, uint8 [height, width, 3], or None. Times never decrease."""


@dataclass
class Recording:
    """Inputs of one conversation. Tick k carries what was heard, typed and seen in [k, k+1) x the tick's length.

    `tokens` come with every tick, after its text.
    """

    shape: TickShape
    audio: np.ndarray | None = None
    video: Camera | None = None
    text: list[TimedText] | None = None
    tokens: tuple[int, ...] = ()

    def duration(self) -> float:
        """Seconds up to the end of the audio and of the last typed text; video alone has no length of its
        own.
        """
        heard = 0.0 if self.audio is None else self.audio.size / self.shape.sample_rate
        typed = (self._tick_of(self.text[-1].at) + 1) * self.shape.seconds if self.text else 0.0
        return max(heard, typed)

    def count(self, seconds: float | None = None) -> int:
        """Ticks that cover `seconds` (default: the whole recording)."""
        length = self.duration() if seconds is None else seconds
        return math.ceil(round(length / self.shape.seconds, 6))

    def _tick_of(self, seconds: float) -> int:
        return math.floor(round(seconds / self.shape.seconds, 6))  # 0.6 s is in tick 3, whatever 0.6 / 0.2 rounds to

    def ticks(self, count: int) -> Iterator[TickInput]:
        """The first `count` ticks, in order. After the end of the audio they carry none, which the engine
        takes as silence.
        """
        shape, pending = self.shape, list(self.text or [])
        for index in range(count):
            audio = None if self.audio is None else self.audio[index * shape.samples : (index + 1) * shape.samples]
            if audio is not None and audio.size == 0:
                audio = None
            typed = []
            while pending and self._tick_of(pending[0].at) <= index:
                typed.append(pending.pop(0).text)
            yield TickInput(audio=audio, video=self._clip(index), text=" ".join(typed) or None, tokens=self.tokens)

    def _clip(self, index: int) -> np.ndarray | None:
        """The clip of tick `index`: frames spread evenly over the tick, or None between clips and outside the
        video.
        """
        if self.video is None or self.shape.frames == 0 or index % self.shape.video_every:
            return None
        times = [(index + (i + 0.5) / self.shape.frames) * self.shape.seconds for i in range(self.shape.frames)]
        seen = [self.video.at(t) for t in times]
        frames = [frame for frame in seen if frame is not None]
        if not frames:
            return None
        frames += [frames[-1]] * (self.shape.frames - len(frames))
        return np.stack(frames)

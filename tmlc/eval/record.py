"""What a model did in an episode, and what is heard in it: the input of every rule of scoring."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tmlc.eval.clicks import Jumps, jumps
from tmlc.eval.recogniser import Recogniser, Word
from tmlc.eval.voice import segments
from tmlc.model_zoo.interaction.tasks.episode import TICK_SAMPLES


@dataclass
class Record:
    """The output of an episode, tick by tick.

    Attributes:
        audio: float32 [ticks * 3200], what the model spoke.
        text: what it wrote in each tick, without delegations.
        asked: (tick, task) of each delegation that it wrote.
        entered: tick → the text that the background model injected.
        error: why the session ended early; what is missing is silence.
    """

    audio: np.ndarray
    text: list[str]
    asked: list[tuple[int, str]] = field(default_factory=list)
    entered: dict[int, str] = field(default_factory=dict)
    error: str = ""


@dataclass
class Heard:
    """A record, listened to.

    Times are **played**: samples of the user's time line. Output sample i sounds at i + 3200, since the output of a
    tick is handed out when its input is over. The time that a step takes is not in it; docs/latency.md is about that.

    Attributes:
        record: what was listened to.
        recogniser: tells the words.
    """

    record: Record
    recogniser: Recogniser

    @cached_property
    def voice(self) -> list[tuple[int, int]]:
        """(start, end) of each stretch in which the model is heard, played."""
        return [(a + TICK_SAMPLES, b + TICK_SAMPLES) for a, b in segments(self.record.audio)]

    @cached_property
    def words(self) -> list[Word]:
        """What the recogniser hears, played; "?" is voice that is none of the words."""
        found = self.recogniser.words(self.record.audio)
        return [Word(w.word, w.start + TICK_SAMPLES, w.end + TICK_SAMPLES, w.cost) for w in found]

    @cached_property
    def jumps(self) -> Jumps:
        """How it bends at the edges of ticks."""
        return jumps(self.record.audio, TICK_SAMPLES)

    def onsets(self, start: int, end: int) -> list[int]:
        """When the model begins to speak, from `start` on and before `end`."""
        return [a for a, _ in self.voice if start <= a < end]

    def speaks(self, start: int, end: int) -> bool:
        """Is it heard anywhere in between?"""
        return any(a < end and b > start for a, b in self.voice)

    def silent_from(self, start: int, quiet: int, limit: int) -> int | None:
        """The first sample from `start` on with which a silence of `quiet` samples begins; None when there is none
        before `limit`."""
        at = start
        for a, b in self.voice:
            if b <= at:
                continue
            if a - at >= quiet:
                break
            at = b
        return at if at < limit else None


def out_tick(played: int) -> int:
    """The tick whose output sounds at a played sample."""
    return played // TICK_SAMPLES - 1

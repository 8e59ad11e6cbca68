"""A case as it is measured: played as often as it asks for, its warm-up left out, its conversations remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tmlc.report.latency import growth
from tmlc.report.profile.parts import Parts
from tmlc.report.scenario.case import Case
from tmlc.report.scenario.inputs import Part, parts
from tmlc.report.scenario.play import Together, open_sessions, play_together, words_to_say
from tmlc.report.scenario.turns import Talk, Voice, hesitation, stop_latency
from tmlc.runtimes.core.clock import make_clock
from tmlc.runtimes.media.recording import Recording, TickShape

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine


class Show:
    """What a profile plays: the sessions of a case, or one recording.

    Args:
        case: sizes, clock, words and context.
        recording: plays this one instead of what the case says goes in.
        seed: of the first session; the others count on.

    Attributes:
        length: ticks of each repetition, the warm-up with them.
        count: ticks that `ticks` hands out: the very first one, and those behind the warm-up of each repetition.
    """

    def __init__(
        self, engine: Engine, case: Case, shape: TickShape, seed: int = 0, recording: Recording | None = None
    ) -> None:
        self.engine, self.case, self.shape, self.seed = engine, case, shape, seed
        self._recording = recording
        self.length = Recording(shape).count(case.seconds)
        self._counted = max(0, self.length - case.warm_up)
        self.count = 1 + self._counted * case.repetitions
        self._talks: list[Talk] = []

    def ticks(self, ready: Callable[[int], None] = lambda index: None) -> Iterator[Together]:
        """The ticks that count, numbered from 0. `ready` is called with the number right before each of them."""
        case, number = self.case, 0
        say = words_to_say(self.engine, case)
        for repetition in range(case.repetitions):
            feeds = self._feeds()
            voices = [Voice(self.shape.seconds * 1000) for _ in feeds]
            sessions = open_sessions(self.engine, case, self.seed, self.length)
            try:
                clock = make_clock(case.clock, self.shape.seconds)

                def tell(index: int, first: bool = repetition == 0, ahead: int = number) -> None:
                    if index >= case.warm_up or (first and index == 0):
                        ready(ahead + (index - case.warm_up + first if index else 0))

                recordings = [feed.recording for feed in feeds]
                for played in play_together(self.engine, sessions, recordings, self.length, clock, say, tell):
                    for voice, output in zip(voices, played.outputs, strict=True):
                        voice.add(output.audio, played.step_ms, played.late_ms)
                    if played.index >= case.warm_up or (repetition == 0 and played.index == 0):
                        yield replace(played, index=number)
                        number += 1
            finally:
                for session in sessions:
                    session.close()
            self._talks += [
                Talk(feed.utterances, voice)
                for feed, voice in zip(feeds, voices, strict=True)
                if feed.utterances is not None
            ]

    def _feeds(self) -> list[Part]:
        if self._recording is not None:
            return [Part(self._recording)]
        return parts(self.case, self.engine, self.shape)

    def growth(self, steps: list[float]) -> dict[str, Any]:
        """The growth of a session; of several repetitions that of their median, tick by tick."""
        first, rest = steps[:1], np.reshape(steps[1:], (self.case.repetitions, -1))
        return growth([*first, *np.median(rest, axis=0)], self.shape.duration_ms)

    def fill(self, into: Parts) -> None:
        """The parts of a profile about what was played, and about its conversations."""
        into.measured("scenario", self.case.to_json())
        if self.case.speak == "always" or not self._talks:
            why = (
                "the case gives the model words to say, so it does not choose when to speak"
                if self.case.speak == "always"
                else "nothing says when somebody speaks: play a case with `audio: {kind: dialogue}`"
            )
            into.missing("stop_latency", why)
            into.missing("hesitation", why)
            return
        into.measured("stop_latency", stop_latency(self._talks))
        into.measured("hesitation", hesitation(self._talks))

"""An episode: 10 to 25 seconds of what a user does, and what the ideal model does, tick by tick.

Two time lines, both in ticks of 200 ms. What the user does in tick k is in `audio[k*3200:(k+1)*3200]`, `video[k]`,
`text[k]`, `inject[k]`. What the model gives in tick k (`target_audio`, `target_text`) answers all input up to the end
of tick k, so it is **played one tick later**: output sample i sounds while the user's sample i + 3200 is recorded.
Latencies that the evaluation reports are between what is recorded and what is played.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .bank import SpeechBank, Split
from .words import MODEL_WORDS, USER_WORDS

if TYPE_CHECKING:
    from .stage import Stage

TICK_SAMPLES = 3200
VIDEO_EVERY = 5
TEXT_IN = 2
TEXT_OUT = 2
CLIP_FRAMES = 2
FRAME_SIZE = 64

EVENTS = (*MODEL_WORDS, *USER_WORDS, "somebody", "beep", "hum", "rest", "jump", "move", "flash")
"""Names of what can be heard and seen."""

DELEGATION, END_OF_DELEGATION = 0x0E, 0x0F
"""Bytes of `target_text` that stand for the special tokens <delegation> and <end_of_delegation>."""


@dataclass(frozen=True)
class TokenIds:
    """The ids of the special tokens of a checkpoint (`special_tokens` of tokenizer.py names them)."""

    silence: int
    end_of_tick: int
    delegation: int
    end_of_delegation: int
    injection: int
    end_of_injection: int


@dataclass(frozen=True)
class Utterance:
    """A word of the model: samples `start_sample` to `end_sample` of its output. One that was cut short ends early."""

    word: str
    start_sample: int
    end_sample: int


@dataclass(frozen=True)
class Event:
    """Something in what the model hears or sees, for training to point at (`EVENTS` has the names).

    Attributes:
        name: a user's word, "somebody" for one of a person in the background, "beep", "hum", or what a clip shows.
        sample: of `Episode.audio`, at which it is over and can be known; for a clip, the start of its tick.
        seen: in the picture and not in the sound.
    """

    name: str
    sample: int
    seen: bool = False


@dataclass
class Episode:
    """What happens, and what should.

    Attributes:
        ticks: how many; every list below has so many entries.
        audio: float32 [ticks * 3200], the user's microphone, 16 kHz.
        video: tick → uint8 [2, 64, 64, 3]; on every fifth tick, or none at all.
        text: what the user types, at most two bytes a tick.
        inject: tick → what the background model says; enters between <injection> and <end_of_injection>.
        say: the words of the ideal model, in order.
        target_audio: float32 [ticks * 3200], the ideal model's voice.
        target_text: at most two bytes a tick: the words as they are spoken, each with a space before it, and
            delegations (`DELEGATION`, the task, `END_OF_DELEGATION`). A word that is cut short is cut here too.
        speaks: bool [ticks]; where False, the ideal model chooses <silence>.
        labels: what a score needs. Times of the user are samples of `audio`; names with `tick` are ticks.
        events: what is to be heard and seen, in no order; no score looks at them.
    """

    task: str
    seed: int
    split: Split
    ticks: int
    audio: np.ndarray
    video: dict[int, np.ndarray]
    text: list[str]
    inject: dict[int, str]
    say: list[Utterance]
    target_audio: np.ndarray
    target_text: list[bytes]
    speaks: np.ndarray
    labels: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def output_tokens(self, tick: int, ids: TokenIds) -> list[int]:
        """What the ideal model chooses in a tick: <silence>; or its text, ended by <end_of_tick> where there is
        room."""
        if not self.speaks[tick]:
            return [ids.silence]
        marks = {DELEGATION: ids.delegation, END_OF_DELEGATION: ids.end_of_delegation}
        chosen = [marks.get(byte, byte) for byte in self.target_text[tick]]
        return chosen if len(chosen) == TEXT_OUT else [*chosen, ids.end_of_tick]

    def injected_tokens(self, tick: int, ids: TokenIds) -> list[int]:
        """What enters before everything else of a tick; mostly nothing."""
        if tick not in self.inject:
            return []
        return [ids.injection, *self.inject[tick].encode(), ids.end_of_injection]


@dataclass(frozen=True)
class Task:
    """A task: its name, one line about it, and what happens in an episode of it."""

    name: str
    about: str
    play: Callable[[Stage], None]

    def episode(self, seed: int, split: Split, bank: SpeechBank) -> Episode:
        """The episode of a seed: the same for the same seed, split and bank, on every machine to within the rounding
        of its floats. Episodes of "train" and "test" share no random numbers and no voices."""
        from .stage import Stage

        stage = Stage(self.name, seed, split, bank)
        self.play(stage)
        return stage.episode()

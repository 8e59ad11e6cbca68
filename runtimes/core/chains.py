"""Parts of an interaction model's tick that a target runs without the host in between: **chains** of methods.

A target that has them (`Backend.chains`) is driven by `chained.py`, others method by method; no bit depends on which.
What stays with the host is what a chosen token decides: whether a session goes on writing, speaks or is silent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tmlc.runtimes.core.slots import Slot

Key = tuple[int, int, int]
"""Of a random number: (seed, tick, index of the output in its tick)."""


@dataclass(frozen=True, slots=True)
class Listening:
    """One session's input of a tick: `before` (injected tokens), the sound, float32 [audio_in, hop], then `typed`
    tokens. With `key` the first token is chosen; without it none is."""

    slot: Slot
    pcm: np.ndarray
    before: Sequence[int]
    typed: Sequence[int]
    key: Key | None
    temperature: float


@dataclass(frozen=True, slots=True)
class Writing:
    """One session's token, which is appended, and what chooses the next."""

    slot: Slot
    token: int
    key: Key
    temperature: float


@dataclass(frozen=True, slots=True)
class Answering:
    """The end of one session's tick: `tail`, the tokens that end its text, then `audio_out` positions of what it hears
    of itself, float32 [hop] `heard` before them. `keys` are those of its speech; silent without them."""

    slot: Slot
    tail: Sequence[int]
    heard: np.ndarray
    keys: Sequence[Key]


class Chains(ABC):
    """What a tick asks of a target, for several sessions at once, none twice. Each session gets the bits that the
    methods of the package give it one after the other.

    Methods raise what `Backend.call` does. With `error.part` set, nothing was run for any session.

    Attributes:
        typed: the most tokens, injected and typed together, that `listen` takes.
        ready: False while ticks are to run method by method (their kernels are timed).
    """

    typed: int
    ready: bool = True

    @abstractmethod
    def listen(self, asked: Sequence[Listening]) -> list[int | None]:
        """Appends what came in; the first token of each session that gave a key."""

    @abstractmethod
    def write(self, asked: Sequence[Writing]) -> list[int]:
        """Appends the last token; the next one of each session."""

    @abstractmethod
    def answer(self, asked: Sequence[Answering]) -> list[np.ndarray]:
        """Appends the tail and what the session hears of itself; its samples, float32 [audio_out, hop], as the vocoder
        gives them. Views, valid until the next call."""

"""Tasks in which somebody speaks and the model is not meant: to another person, or in the background."""

from __future__ import annotations

from collections.abc import Callable

from .episode import Task
from .spoken import ASKED, ask_for_a_word, played, start_counting
from .stage import Stage

ASIDE = {"gain": 0.4, "dull": 0.5}
"""Somebody who turns away from the microphone: quieter, and with less treble."""


def to_other(stage: Stage, at: int) -> int:
    """The user turns to Anna: "anna say WORD" or "anna wait". Returns where it ends."""
    words = ["anna", "say", stage.pick(ASKED)] if stage.rng.random() < 0.7 else ["anna", "wait"]
    return stage.speech(words, at, **ASIDE)


def in_background(stage: Stage, at: int) -> int:
    """Somebody far away says something that the model would answer if it was meant. Returns where it ends."""
    kinds = (["say", stage.pick(ASKED)], ["please", "say", stage.pick(ASKED)], ["stop"], ["wait"], ["count"])
    return stage.background(kinds[int(stage.rng.integers(len(kinds)))], at)


def ignored(what: Callable[[Stage, int], int]) -> Callable[[Stage], None]:
    """Half of the episodes: while the model counts, and it goes on. Otherwise between two turns, and only these are
    answered."""

    def play(stage: Stage) -> None:
        at = stage.between(0.4, 1.2)
        if stage.rng.random() < 0.5:
            begin = start_counting(stage, at)
            start = played(begin) + stage.between(0.6, 2.6)
            stage.labels |= {"ignore": [[start, what(stage, start)]], "turns": []}
            return
        turns = [ask_for_a_word(stage, at)] if stage.rng.random() < 0.5 else []
        start = played(stage.free) + stage.between(0.6, 1.2) if turns else at
        end = what(stage, start)
        turns.append(ask_for_a_word(stage, end + stage.between(1.4, 2.4)))
        stage.labels |= {"ignore": [[start, end]], "turns": turns}

    return play


TASKS = (
    Task("talking_to_other", "stays out of it when the user talks to somebody else", ignored(to_other)),
    Task("background_speech", "ignores a voice in the background", ignored(in_background)),
)

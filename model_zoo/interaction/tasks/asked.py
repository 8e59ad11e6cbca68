"""Tasks that are asked for in writing: to speak at certain times, at a cue, to count, to tell a start and an end."""

from __future__ import annotations

from .episode import TICK_SAMPLES, Task
from .spoken import ASKED
from .stage import Stage

TICKS_A_SECOND = 5


def time_speak(stage: Stage) -> None:
    """ "WORD every Ns" or "WORD in Ns"; time runs from the tick in which the last letter was typed."""
    word, seconds = stage.pick(ASKED), int(stage.rng.integers(2, 5))
    again = stage.rng.random() < 0.7
    begin = stage.type(f"{word} {'every' if again else 'in'} {seconds}s", int(stage.rng.integers(1, 6)))
    due = [begin + seconds * TICKS_A_SECOND * n for n in range(1, 5 if again else 2)]
    due = [tick for tick in due if tick <= begin + 12 * TICKS_A_SECOND]
    for tick in due:
        stage.say(word, tick)
    # Until shortly before it would be due once more; a word that is said once must not be said again.
    last = due[-1] + seconds * TICKS_A_SECOND - 3 if again else due[-1] + 5 * TICKS_A_SECOND
    stage.lasts(last * TICK_SAMPLES)
    stage.labels |= {"word": word, "due_ticks": due, "asked_tick": begin, "seconds": seconds, "again": again}


TASKS = (Task("time_speak", "says a word at the times that it was asked for", time_speak),)

"""The task that needs the background model: to ask it, to talk on, and to say what it answers."""

from __future__ import annotations

from .episode import DELEGATION, END_OF_DELEGATION, TICK_SAMPLES, Task
from .spoken import ASKED, ask_for_a_word, played
from .stage import Stage, after


def delegate(stage: Stage) -> None:
    """The user says "ask WORD". The model says okay and delegates WORD; the user asks for another word meanwhile; the
    answer comes, before that turn or in the middle of it, and is said when the user is not speaking and has been
    answered."""
    task, answer = (str(word) for word in stage.rng.permutation(ASKED)[:2])
    asked = stage.between(0.4, 1.2)
    end = stage.speech(["ask", task], asked, gap=(0.03, 0.1))
    stage.say("okay", after(end))
    written = stage.write(bytes([DELEGATION, *task.encode(), END_OF_DELEGATION]), stage.free)
    turn = ask_for_a_word(stage, played(written) + stage.between(0.3, 0.8))
    if stage.rng.random() < 0.5:
        result = turn["start"] // TICK_SAMPLES + int(stage.rng.integers(1, 5))  # while the user asks
    else:
        result = stage.free + int(stage.rng.integers(4, 12))
    stage.inject(answer, result)
    stage.say(answer, result)
    stage.lasts((stage.free + 6) * TICK_SAMPLES)
    stage.labels |= {
        "ask": [asked, end], "task": task, "answer": answer, "turns": [turn],
        "delegated_tick": written - 1, "result_tick": result, "delay_ticks": result - (written - 1),
    }  # fmt: skip


TASKS = (Task("delegate", "asks the background model, talks on, and says what it answers", delegate),)

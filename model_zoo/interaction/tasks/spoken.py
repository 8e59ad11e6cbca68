"""Tasks of a conversation between two: turns and pauses, interruptions, and listeners who say mhm."""

from __future__ import annotations

from typing import Any

from .episode import TICK_SAMPLES, Task
from .stage import Stage, after, react
from .words import ANSWERS, NUMBERS, STORY

ASKED = (*ANSWERS, *NUMBERS)
"""Words that a user asks the model to say."""


def played(tick: int) -> int:
    """The sample of the user's time at which the output of a tick begins to sound."""
    return (tick + 1) * TICK_SAMPLES


def ask_for_a_word(stage: Stage, at: int, pausing: float = 0.0) -> dict[str, Any]:
    """The user says "[please] say WORD", with a pause in each gap with probability `pausing`; the model answers.

    Returns:
        The turn: start and end of it, the pauses in it, the word, and the tick of the ideal answer.
    """
    word = stage.pick(ASKED)
    words = ["please", "say", word] if stage.rng.random() < 0.5 else ["say", word]
    pauses, end = [], stage.user(words[0], at)
    for following in words[1:]:
        gap = stage.between(0.03, 0.1)
        if stage.rng.random() < pausing:
            gap = stage.between(0.5, 1.1)
            pauses.append([end, end + gap])
        end = stage.user(following, end + gap)
    answer = max(after(end), stage.free)
    stage.say(word, answer)
    return {"start": at, "pauses": pauses, "end": end, "word": word, "answer_tick": answer}


def start_counting(stage: Stage, at: int) -> int:
    """The user says "count", the model counts to ten; returns the tick in which it begins."""
    begin = after(stage.user("count", at))
    for number in NUMBERS:
        stage.say(number, begin)
    stage.labels["counting_tick"] = begin
    return begin


def turn_taking(stage: Stage) -> None:
    turns = []
    at = stage.between(0.4, 1.2)
    for _ in range(int(stage.rng.integers(2, 5))):
        turns.append(ask_for_a_word(stage, at, pausing=0.5))
        at = played(stage.free) + stage.between(0.4, 1.4)
    stage.labels["turns"] = turns
    stage.lasts(at)


def barge_in(stage: Stage) -> None:
    begin = start_counting(stage, stage.between(0.4, 1.2))
    cut_in = played(begin) + stage.between(0.8, 3.4)
    stage.cut(react(cut_in))
    kind = stage.pick(("stop", "wait", "say"))
    if kind == "say":
        turn = ask_for_a_word(stage, cut_in)
        stage.labels |= {"turns": [turn]}
        end = turn["end"]
    else:
        end = stage.user(kind, cut_in)
    stage.labels |= {"cut_in": cut_in, "kind": kind, "cut_in_end": end}
    # Silence after "stop" is part of the task; then the user speaks to it again, so that a dead model is told from a
    # polite one.
    at = max(end, played(stage.free)) + stage.between(1.4, 2.2)
    if kind != "say":
        stage.labels["turns"] = [ask_for_a_word(stage, at)]
    stage.lasts(max(at, played(stage.free)))


def backchannel(stage: Stage) -> None:
    """Half of the episodes: the user says mhm while the model counts. Otherwise the user tells a story, and the model
    says mhm in its long pauses."""
    at = stage.between(0.4, 1.2)
    if stage.rng.random() < 0.5:
        start_counting(stage, at)
        heard = []
        at = played(stage.labels["counting_tick"]) + stage.between(0.5, 1.5)
        for _ in range(int(stage.rng.integers(1, 3))):
            end = stage.user(stage.pick(("mhm", "uhhuh")), at, gain=0.8)
            heard.append([at, end])
            at = end + stage.between(0.9, 1.6)
        stage.labels |= {"heard": heard, "pauses": [], "turns": []}
        return
    pauses = []
    for _ in range(int(stage.rng.integers(1, 3))):
        end = stage.speech(story(stage), at, gap=(0.02, 0.12))
        stage.say("mhm", after(end))
        at = end + stage.between(1.0, 1.5)
        pauses.append([end, at])
    end = stage.speech(story(stage), at, gap=(0.02, 0.12))
    turn = ask_for_a_word(stage, end + stage.between(0.05, 0.15))
    stage.labels |= {"heard": [], "pauses": pauses, "turns": [turn]}


def story(stage: Stage) -> list[str]:
    """Some words of a story; it begins with "so"."""
    return ["so", *(stage.pick(STORY[1:]) for _ in range(int(stage.rng.integers(3, 6))))]


TASKS = (
    Task("turn_taking", "answers when the user's turn is over, and not in a pause", turn_taking),
    Task("barge_in", "falls silent when the user cuts in", barge_in),
    Task("backchannel", "talks on through the user's mhm, and says mhm in a story", backchannel),
)

"""The bank and the recogniser, made once, and how a made-up player scores."""

from collections.abc import Callable

import pytest

from tmlc.eval.recogniser import Recogniser
from tmlc.eval.record import Heard, Record
from tmlc.eval.rules import RULES, Verdict
from tmlc.model_zoo.interaction.tasks import TASKS, Episode, SpeechBank


@pytest.fixture(scope="session")
def bank() -> SpeechBank:
    return SpeechBank.load()


@pytest.fixture(scope="session")
def recogniser(bank) -> Recogniser:
    return Recogniser(bank)


@pytest.fixture(scope="session")
def judge(recogniser) -> Callable[[Episode, Record], Verdict]:
    return lambda episode, record: RULES[episode.task](episode, Heard(record, recogniser))


@pytest.fixture(scope="session")
def find(bank) -> Callable[..., Episode]:
    """The first episode of a task whose labels fit."""

    def search(task: str, fits: Callable[[dict], bool] = lambda labels: True) -> Episode:
        episodes = (TASKS[task].episode(seed, "test", bank) for seed in range(40))
        return next(episode for episode in episodes if fits(episode.labels))

    return search

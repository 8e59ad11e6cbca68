"""The recorded words that episodes are made of (`make_bank.py` made them; `bank.json` says where each lies)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import numpy as np

from tmlc.errors import MediaError
from tmlc.runtimes.media import require

from .words import SAMPLE_RATE, TEST_VOICES, TRAINING_VOICES

Split = Literal["train", "test"]
FIX = "install tmlc again; `python -m tmlc.model_zoo.interaction.tasks.make_bank` makes these files"


@dataclass(frozen=True)
class SpeechBank:
    """Words in many voices. Clips are float32 mono at 16 kHz, read-only, trimmed to where they sound, all equally loud.

    Attributes:
        users: (voice, word) → its clips, slowest first.
        model: word → the model's clips; the first is the one that the model says.
        synthesiser: name and version of what spoke.
    """

    users: dict[tuple[str, str], list[np.ndarray]]
    model: dict[str, list[np.ndarray]]
    synthesiser: str

    @classmethod
    def load(cls) -> SpeechBank:
        """The bank that is part of tmlc; read once in a process.

        Raises:
            MissingDependencyError: soundfile, which reads the recordings, is not installed.
            MediaError: its files are damaged.
        """
        return _load()

    def voices(self, split: Split) -> tuple[str, ...]:
        """Users' voices; those of "test" are none of those of "train"."""
        return TEST_VOICES if split == "test" else TRAINING_VOICES

    def user(self, voice: str, word: str, speed: int = 0) -> np.ndarray:
        """What `voice` says for `word`; `speed` 0 is slow, 1 fast."""
        return self.users[voice, word][speed]

    def says(self, word: str) -> np.ndarray:
        """What the model says for `word`."""
        return self.model[word][0]


@lru_cache(maxsize=1)
def _load() -> SpeechBank:
    folder = resources.files(__package__)
    index: dict[str, Any] = json.loads(folder.joinpath("bank.json").read_text(encoding="utf-8"))
    users: dict[tuple[str, str], list[np.ndarray]] = {}
    for (voice, word), clip in _clips("users.ogg", index["users"]):
        users.setdefault((voice, word), []).append(clip)
    model: dict[str, list[np.ndarray]] = {}
    for (_, word), clip in _clips("model.flac", index["model"]):
        model.setdefault(word, []).append(clip)
    return SpeechBank(users, model, index["synthesiser"])


def _clips(name: str, rows: list[list[Any]]) -> list[tuple[tuple[str, str], np.ndarray]]:
    soundfile = require("soundfile", "reading the speech bank")
    with resources.as_file(resources.files(__package__).joinpath(name)) as path:
        try:
            samples, rate = soundfile.read(path, dtype="float32")
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise MediaError(f"the speech bank cannot be decoded: {error}", where=name, fix=FIX) from error
    if rate != SAMPLE_RATE or samples.ndim != 1 or max(at + length for *_, at, length in rows) > len(samples):
        raise MediaError("the speech bank is not the one that its index describes", where=name, fix=FIX)
    samples.setflags(write=False)
    return [((voice, word), samples[at : at + length]) for voice, word, _, at, length in rows]

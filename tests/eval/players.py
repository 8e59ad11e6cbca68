"""Models that are no models: the silent one, the random one, the one that always talks, and the ideal one with its
near misses. What each of them must score proves the generator of episodes and the rules against each other."""

from __future__ import annotations

import numpy as np

from tmlc.eval.record import Record
from tmlc.model_zoo.interaction.tasks import Episode, SpeechBank
from tmlc.model_zoo.interaction.tasks.episode import TICK_SAMPLES
from tmlc.model_zoo.interaction.tasks.words import MODEL_WORDS


def _record(episode: Episode, audio: np.ndarray) -> Record:
    return Record(audio.astype(np.float32), [""] * episode.ticks)


def silent(episode: Episode) -> Record:
    return _record(episode, np.zeros(episode.ticks * TICK_SAMPLES))


def always(episode: Episode) -> Record:
    """Speaks without a pause, whatever happens: a long vowel of some voice."""
    t = np.arange(episode.ticks * TICK_SAMPLES) / 16000
    return _record(episode, sum(np.sin(2 * np.pi * 170 * k * t) / k for k in range(1, 20)) * 0.06)


def chatterbox(episode: Episode, bank: SpeechBank) -> Record:
    """Says words one after another, without a pause: always talks, in words that are recognised."""
    rng = np.random.default_rng(episode.seed)
    parts, length = [], 0
    while length < episode.ticks * TICK_SAMPLES:
        parts.append(bank.says(str(rng.choice(MODEL_WORDS))))
        length += len(parts[-1])
    return _record(episode, np.concatenate(parts)[: episode.ticks * TICK_SAMPLES])


def at_random(episode: Episode, bank: SpeechBank) -> Record:
    """Says random words at random times, about as often as is right."""
    rng = np.random.default_rng(episode.seed + 1)
    audio = np.zeros(episode.ticks * TICK_SAMPLES)
    tick = int(rng.integers(8))
    while tick < episode.ticks - 4:
        word = bank.says(str(rng.choice(MODEL_WORDS)))
        audio[tick * TICK_SAMPLES :][: len(word)] += word
        tick += 3 + int(rng.integers(16))
    return _record(episode, audio)


def ideal(episode: Episode, late: int = 0, from_word: int = 0, audio: np.ndarray | None = None) -> Record:
    """Plays what it should, `late` ticks later from the word of that number on."""
    target = episode.target_audio if audio is None else audio
    edge = (episode.say[from_word].start_sample // TICK_SAMPLES) * TICK_SAMPLES
    shift = late * TICK_SAMPLES
    played = np.concatenate([target[:edge], np.zeros(max(0, shift)), target[edge:]]) if shift >= 0 else target[-shift:]
    played = np.resize(played, len(target)) if len(played) >= len(target) else np.pad(played, (0, -shift))
    text = [data.decode("latin1") for data in episode.target_text]
    record = Record(played.astype(np.float32), text)
    if episode.task == "delegate":
        labels = episode.labels
        record.asked = [(labels["delegated_tick"], labels["task"])]
        record.entered = {labels["result_tick"]: labels["answer"]}
    return record


def saying(episode: Episode, bank: SpeechBank, words: list[tuple[str, int]]) -> Record:
    """Says these words, each from the start of its tick."""
    audio = np.zeros(episode.ticks * TICK_SAMPLES)
    for word, tick in words:
        clip = bank.says(word)
        audio[tick * TICK_SAMPLES :][: len(clip)] += clip[: max(0, len(audio) - tick * TICK_SAMPLES)]
    return _record(episode, audio)

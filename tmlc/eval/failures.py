"""Episodes that did not get the full score, to listen to: a stereo WAV (left the user, right the model, as they sound
together) and a page of what happened, tick by tick."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np

from tmlc.eval.record import Heard, out_tick
from tmlc.eval.summary import Result
from tmlc.eval.voice import RATE
from tmlc.model_zoo.interaction.tasks import Episode
from tmlc.model_zoo.interaction.tasks.episode import TICK_SAMPLES

MOST = 8
"""Failures that are written of each task; the rest sound like them."""


class Failures:
    """Writes `TASK-SEED.wav` and `TASK-SEED.txt` into a folder.

    Args:
        folder: is made when the first failure comes. Files of the same name are replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[str, int] = {}

    def note(self, result: Result, heard: Heard) -> None:
        """Writes the episode unless it got the full score, or `MOST` of its task are written."""
        episode = result.episode
        count = self._written.get(episode.task, 0)
        if result.verdict.score >= 1.0 or count >= MOST:
            return
        self._written[episode.task] = count + 1
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = self.folder / f"{episode.task}-{episode.seed}"
        _write_wav(stem.with_suffix(".wav"), episode.audio, heard.record.audio)
        stem.with_suffix(".txt").write_text(transcript(result, heard), encoding="utf-8")


def _write_wav(path: Path, user: np.ndarray, model: np.ndarray) -> None:
    """Two channels, the model's one tick later than it is numbered, as it is played."""
    both = np.zeros((len(user) + TICK_SAMPLES, 2))
    both[: len(user), 0] = user
    both[TICK_SAMPLES:, 1] = model
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(both, -1, 1) * 32767).astype("<i2").tobytes())


def transcript(result: Result, heard: Heard) -> str:
    """What went wrong, the labels, and each tick in which something was typed, shown, written, injected or said."""
    episode, record = result.episode, heard.record
    lines = [f"{episode.task}, seed {episode.seed}: score {result.verdict.score:.2f}"]
    lines += [f"  {why}" for why in result.verdict.why] or ["  no reason was found"]
    lines += ["", *(f"{name}: {value}" for name, value in episode.labels.items()), "", "tick  at (s)"]
    said: dict[int, list[str]] = {}
    for word in heard.words:
        said.setdefault(out_tick(word.start), []).append(word.word)
    wanted: dict[int, list[str]] = {}
    for utterance in episode.say:
        wanted.setdefault(utterance.start_sample // TICK_SAMPLES, []).append(utterance.word)
    asked = dict(record.asked)
    for tick in range(episode.ticks):
        parts: list[tuple[str, Any]] = [
            ("typed", episode.text[tick]), ("video", _moves(episode, tick)), ("injected", record.entered.get(tick)),
            ("should say", " ".join(wanted.get(tick, []))), ("wrote", record.text[tick]),
            ("delegated", asked.get(tick)), ("is heard to say", " ".join(said.get(tick, []))),
        ]  # fmt: skip
        shown = "  ".join(f"{name} {value!r}" for name, value in parts if value)
        if shown:
            lines.append(f"{tick:4d}  {tick * TICK_SAMPLES / RATE:6.1f}  {shown}")
    return "\n".join(lines) + "\n"


def _moves(episode: Episode, tick: int) -> str:
    """Does something happen in this tick's clip? Two frames that differ by more than the camera's noise, or light."""
    clip = episode.video.get(tick)
    if clip is None:
        return ""
    if clip.min() >= 200:
        return "flash"
    moved = np.abs(clip[0].astype(int) - clip[1]).max() > 40
    return "moves" if moved else ""

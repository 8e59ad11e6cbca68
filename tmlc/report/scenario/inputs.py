"""From a case to what its sessions hear, see and read, tick by tick. Session k of a case gets inputs of its own, the
same ones whenever the case is played.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tmlc.bench.dialogues import Dialogue, Utterance, made_up, read_folder
from tmlc.errors import UsageError
from tmlc.report.profile.inputs import SyntheticVideo, noise_like_speech
from tmlc.report.scenario.case import Case
from tmlc.runtimes.media.recording import Camera, Recording, TickShape
from tmlc.runtimes.media.timed_text import TimedText, read_timed_text

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine

DIALOGUES = 8
"""Made-up dialogues that are made; more sessions than that hear them again."""


@dataclass(frozen=True)
class Part:
    """One session of a case: what it gets, and when somebody speaks in it (None: nobody labelled that)."""

    recording: Recording
    utterances: tuple[Utterance, ...] | None = None


def parts(case: Case, engine: Engine, shape: TickShape) -> list[Part]:
    """The sessions of a case on this engine.

    Raises:
        UsageError: the model takes no such input, or looks less often than the case shows something.
        MediaError: a file is missing or does not decode.
    """
    _check(case, engine, shape)
    seen = shape if case.video.every is None else replace(shape, video_every=case.video.every)
    dialogues = _dialogues(case, shape)
    audio = _file(case, shape)
    typed = _text(case)
    out = []
    for k in range(case.sessions):
        heard, utterances = audio, None
        if case.audio.kind == "made-up":
            heard = noise_like_speech(shape, case.seconds, k)
        elif dialogues:
            dialogue = dialogues[k % len(dialogues)]
            heard = dialogue.piece(0, math.ceil(case.seconds * shape.sample_rate))
            utterances = tuple(dialogue.until(case.seconds))
        tokens = () if engine.model.hears else (0,)
        out.append(Part(Recording(seen, heard, _video(case, seen, k), typed, tokens), utterances))
    return out


def busy_case(engine: Engine, shape: TickShape, seconds: float, loop: str = "closed") -> Case:
    """One session whose inputs keep every part of this model busy."""
    wanted = {
        "audio": "made-up" if engine.model.hears else "silence",
        "video": "made-up" if shape.frames else "none",
        "text": "made-up" if engine.tokenizer is not None else "none",
    }
    parts = {part: {"kind": kind} for part, kind in wanted.items()}
    return Case.model_validate({"name": "made-up input", "seconds": seconds, "loop": loop, **parts})


def _check(case: Case, engine: Engine, shape: TickShape) -> None:
    """UsageError for what the model does not take."""
    takes = {
        "audio": (case.audio.kind != "silence", engine.model.hears),
        "video": (case.video.kind != "none", shape.frames > 0),
        "text": (case.text.kind != "none", engine.tokenizer is not None),
    }
    for name, (asked, able) in takes.items():
        if asked and not able:
            raise UsageError(
                f"the model {engine.manifest.model.name} takes no {name}",
                where=f"case {case.name}: {name}",
                fix="leave it out of the case; `tmlc inspect` shows what a model takes",
            )
    if case.video.every is not None and case.video.every < shape.video_every:
        raise UsageError(
            f"a clip every {case.video.every} ticks, and the model looks every {shape.video_every}",
            where=f"case {case.name}: video.every",
            fix=f"write {shape.video_every} or more, or leave `every` out",
        )
    if case.speak == "always" and not (engine.kind == "interaction" and engine.layout.text_out):
        raise UsageError(
            f"the model {engine.manifest.model.name} cannot be given words to say",
            where=f"case {case.name}: speak",
            fix="write `speak: free`",
        )


def _dialogues(case: Case, shape: TickShape) -> list[Dialogue]:
    if case.audio.kind != "dialogue":
        return []
    if case.audio.path is not None:
        return read_folder(Path(case.audio.path), shape.sample_rate)
    return made_up(min(case.sessions, DIALOGUES), shape.sample_rate, seed=0, seconds=min(60.0, case.seconds))


def _file(case: Case, shape: TickShape) -> np.ndarray | None:
    if case.audio.kind != "file" or case.audio.path is None:
        return None
    from tmlc.runtimes.media.audio import read_audio

    return read_audio(Path(case.audio.path), shape.sample_rate)


def _video(case: Case, shape: TickShape, seed: int) -> Camera | None:
    if case.video.kind == "made-up":
        return SyntheticVideo(shape, seed)
    if case.video.kind == "file" and case.video.path is not None:
        from tmlc.runtimes.media.video import VideoSource

        return VideoSource(Path(case.video.path), shape.height, shape.width, case.video.fps)
    return None


def _text(case: Case) -> list[TimedText] | None:
    if case.text.kind == "file" and case.text.path is not None:
        return read_timed_text(Path(case.text.path))
    if case.text.kind == "made-up":
        times = np.arange(0.0, case.seconds, case.text.every_seconds)
        return [TimedText(float(at), case.text.words) for at in times]
    return None

"""Makes the recordings of the demo: three short conversations of the suite's held-out split, as files.

Run `python examples/demo/make_demo.py` (needs tmlc with the extra media) to make the files beside this script again.
For each scene, `NAME.wav` is the user's microphone, `NAME.yaml` what is typed and `NAME.mp4` what the camera sees;
`scenes.yaml` says what the user says and shows, for people to read along. The voice is one that the model never heard
in training; its words are eSpeak NG's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml

from tmlc.model_zoo.interaction.tasks import TASKS, Episode, SpeechBank
from tmlc.model_zoo.interaction.tasks.episode import TICK_SAMPLES
from tmlc.model_zoo.interaction.tasks.stage import Stage
from tmlc.model_zoo.interaction.tasks.words import SAMPLE_RATE
from tmlc.runtimes.media.audio import write_wav

ENLARGED = 4
"""A picture of the camera is so many times as wide as what the model sees, for people to look at."""
FPS = 10
"""Two pictures a tick: those that make a clip."""


@dataclass(frozen=True)
class Scene:
    """A scene is the first episode of a task's split "test" whose labels fit."""

    name: str
    task: str
    fits: Callable[[dict[str, Any]], bool]


SCENES = (
    Scene("talk", "barge_in", lambda labels: labels["kind"] == "stop"),
    Scene("time", "time_speak", lambda of: (of["word"], of["way"], of["seconds"]) == ("hello", "every", 3)),
    Scene("see", "rep_count", lambda labels: labels["seen"] and labels["count"] == 4),
)


class Noting(Stage):
    """A stage that notes what the user says."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.notes: list[tuple[int, str]] = []

    def user(self, word: str, at: int, *rest: Any, **how: Any) -> int:
        self.notes.append((at, word))
        return super().user(word, at, *rest, **how)


def play(scene: Scene, bank: SpeechBank) -> tuple[Episode, list[dict[str, Any]]]:
    """The episode, and what the user says and shows in it: `{at: seconds, says | shows: …}`."""
    for seed in range(1000):
        stage = Noting(scene.task, seed, "test", bank)
        TASKS[scene.task].play(stage)
        if scene.fits(stage.labels):
            break
    else:
        raise SystemExit(f"no episode of {scene.task} fits the scene {scene.name}")
    episode = stage.episode()
    notes = [{"at": round(at / SAMPLE_RATE, 2), "says": word} for at, word in sorted(stage.notes)]
    if episode.labels.get("seen"):
        notes += [{"at": round(at / SAMPLE_RATE, 2), "shows": "a jump"} for at in episode.labels["events"]]
    return episode, notes


def typed(episode: Episode) -> list[dict[str, Any]]:
    """`{at: seconds, text: …}`: what is typed in ticks that follow each other is one text."""
    found: list[dict[str, Any]] = []
    last = -2
    for tick, text in enumerate(episode.text):
        if text and tick == last + 1:
            found[-1]["text"] += text
        elif text:
            found.append({"at": round(tick * TICK_SAMPLES / SAMPLE_RATE, 3), "text": text})
        last = tick if text else last
    return found


def write_video(path: Path, episode: Episode) -> None:
    """The clips as they are shown; between them, the last picture."""
    picture = episode.video[0][0]
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("mpeg4", rate=FPS)
        stream.height, stream.width = (side * ENLARGED for side in picture.shape[:2])
        stream.pix_fmt, stream.bit_rate = "yuv420p", 400_000
        for tick in range(episode.ticks):
            clip = episode.video.get(tick)
            for number in range(2):
                picture = picture if clip is None else clip[number]
                large = picture.repeat(ENLARGED, 0).repeat(ENLARGED, 1)
                sink.mux(stream.encode(av.VideoFrame.from_ndarray(large, format="rgb24")))
        sink.mux(stream.encode())


def main(folder: Path) -> None:
    """Writes every scene."""
    bank, notes = SpeechBank.load(), {}
    for scene in SCENES:
        episode, notes[scene.name] = play(scene, bank)
        write_wav(folder / f"{scene.name}.wav", episode.audio.astype(np.float64), SAMPLE_RATE)
        if texts := typed(episode):
            (folder / f"{scene.name}.yaml").write_text(yaml.safe_dump(texts, sort_keys=False), encoding="utf-8")
        if episode.video:
            write_video(folder / f"{scene.name}.mp4", episode)
    (folder / "scenes.yaml").write_text(yaml.safe_dump(notes, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="make the recordings of the demo again")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    main(parser.parse_args().folder)

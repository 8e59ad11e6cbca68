"""Episodes as recordings with labels, for `tmlc bench --dialogues` and for cases of `tmlc profile`:
`python -m tmlc.model_zoo.interaction.tasks.dialogues OUT`.

Each NAME.wav is the user's side of an episode in a voice that no training has heard, NAME.yaml where its utterances
begin and end: turns that want an answer, and where the user cuts in. A second of silence follows, so that a
recording can be repeated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import yaml

from tmlc.errors import TmlcError
from tmlc.runtimes.media.audio import write_wav

from ..folders import require_unused
from .bank import SpeechBank
from .episode import TICK_SAMPLES, Episode
from .spoken import TASKS
from .words import SAMPLE_RATE

SPOKEN = {task.name: task for task in TASKS}


def utterances(episode: Episode) -> list[dict[str, float]]:
    """{start, end} in seconds of what the user says to the model and is labelled: turns, and where the user cuts in."""
    spans = [(turn["start"], turn["end"]) for turn in episode.labels["turns"]]
    if "cut_in" in episode.labels:
        spans.append((episode.labels["cut_in"], episode.labels["cut_in_end"]))
    return [{"start": a / SAMPLE_RATE, "end": b / SAMPLE_RATE} for a, b in sorted(set(spans))]


def write(out: Path, episodes: int, seed: int = 0) -> list[Path]:
    """Writes so many episodes of `turn_taking` and of `barge_in`.

    Raises:
        UsageError: `out` holds something.
    """
    require_unused(out)
    out.mkdir(parents=True, exist_ok=True)
    bank, written = SpeechBank.load(), []
    for name in ("turn_taking", "barge_in"):
        for number in range(episodes):
            episode = SPOKEN[name].episode(seed + number, "test", bank)
            path = out / f"{name}-{seed + number}.wav"
            write_wav(path, np.append(episode.audio, np.zeros(5 * TICK_SAMPLES, np.float32)), SAMPLE_RATE)
            path.with_suffix(".yaml").write_text(yaml.safe_dump(utterances(episode)), encoding="utf-8")
            written.append(path)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tmlc.model_zoo.interaction.tasks.dialogues", description=__doc__)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--episodes", type=int, default=6, help="of each of the two tasks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        print(f"{len(write(options.out, options.episodes, options.seed))} dialogues in {options.out}")
    except TmlcError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

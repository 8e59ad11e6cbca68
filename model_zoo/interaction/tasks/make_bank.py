"""Makes the files of the speech bank with eSpeak NG: `python -m tmlc.model_zoo.interaction.tasks.make_bank`.

Needs `espeak-ng` (Debian's package was used) and the `media` extra. What it wrote is in the repository beside it, so
that training and evaluation need no synthesiser and hear the same audio everywhere:

- `users.ogg` (Opus, about 24 kbit/s): every word in every user's voice at two speeds, 40 ms of silence between;
- `model.flac`: the model's words in the model's voice at several speeds;
- `bank.json`: where each clip lies, the voices and the version of the synthesiser.

eSpeak NG is under GPL-3.0-or-later; that licence covers the program and its data, not the sounds that it is made to
speak. The recordings here are our own use of it and are under this repository's licence.
"""

from __future__ import annotations

import io
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .words import MODEL_VOICE, MODEL_WORDS, SAMPLE_RATE, TEST_VOICES, TRAINING_VOICES, USER_WORDS

GAP = SAMPLE_RATE // 25
LEVEL = 0.08
"""Root mean square of every clip, so that loudness comes from the tasks and not from the voice."""

SPELLED = {"mhm": "[[mh'm]]", "uhhuh": "uh huh"}


@dataclass(frozen=True)
class Speaker:
    """A voice of eSpeak NG: name with variant, pitch (0 to 99), and words a minute, the first being the usual one."""

    voice: str
    pitch: int
    speeds: tuple[int, ...]


SPEAKERS = {
    MODEL_VOICE: Speaker("en-us+f2", 55, (185, 165, 205)),
    "adam": Speaker("en-us+m3", 45, (165, 195)),
    "bela": Speaker("en-gb+f4", 60, (160, 190)),
    "carl": Speaker("en-gb-scotland+m7", 35, (165, 190)),
    "dora": Speaker("en-us+f5", 70, (170, 200)),
    "emil": Speaker("en-gb-x-rp+m1", 60, (160, 185)),
    "faye": Speaker("en-us-nyc+f3", 45, (160, 190)),
    "gus": Speaker("en-029+m5", 30, (170, 195)),
    "hana": Speaker("en-gb-x-gbclan+f4", 75, (165, 190)),
    "ivan": Speaker("en-us+m8", 70, (155, 185)),
    "june": Speaker("en-gb-scotland+f2", 80, (165, 195)),
    "kira": Speaker("en-us+Annie", 40, (170, 200)),
    "liam": Speaker("en-gb+m3", 40, (160, 190)),
    "mona": Speaker("en-029+f3", 55, (165, 195)),
    "nils": Speaker("en-us-nyc+m4", 50, (160, 185)),
    "olga": Speaker("en-gb-x-rp+f5", 50, (165, 190)),
    "paul": Speaker("en-us+m7", 55, (170, 195)),
    "rosa": Speaker("en-us+f3", 65, (160, 190)),
    "sven": Speaker("en-gb+Alex", 45, (165, 195)),
    "tina": Speaker("en-gb-x-rp+f4", 60, (160, 185)),
    "udo": Speaker("en-gb-scotland+m1", 50, (165, 190)),
    "vera": Speaker("en-us+Linda", 35, (170, 195)),
    "will": Speaker("en-us+Mike", 50, (160, 190)),
    "karl": Speaker("en-gb-x-gbcwmd+m2", 50, (165, 190)),
    "lena": Speaker("en-us+f1", 50, (165, 190)),
}


def synthesise(speaker: Speaker, word: str, speed: int) -> np.ndarray:
    """One word, trimmed to where it sounds and brought to `LEVEL`: float32 mono at 16 kHz."""
    import soundfile
    import soxr

    command = ["espeak-ng", "-v", speaker.voice, "-p", str(speaker.pitch), "-s", str(speed), "-z", "--stdout"]
    wav = subprocess.run([*command, SPELLED.get(word, word)], capture_output=True, check=True).stdout
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    pcm = soxr.resample(samples, rate, SAMPLE_RATE)
    power = np.convolve(np.square(pcm), np.ones(160) / 160, "same")
    sounding = np.flatnonzero(power > power.max() * 10**-3.5)
    pcm = pcm[sounding[0] : sounding[-1] + 1]
    edge = np.linspace(0.0, 1.0, 80, dtype=np.float32)
    pcm[:80] *= edge
    pcm[-80:] *= edge[::-1]
    pcm *= LEVEL / np.sqrt(np.mean(np.square(pcm)))
    return np.clip(pcm, -0.9, 0.9).astype(np.float32)


def string_of(voices: tuple[str, ...], words: tuple[str, ...]) -> tuple[np.ndarray, list[list[Any]]]:
    """All clips one after another, and [voice, word, speed, first sample, samples] of each."""
    parts: list[np.ndarray] = [np.zeros(GAP, np.float32)]
    rows: list[list[Any]] = []
    at = GAP
    for voice in voices:
        for speed in SPEAKERS[voice].speeds:
            for word in words:
                pcm = synthesise(SPEAKERS[voice], word, speed)
                rows.append([voice, word, speed, at, len(pcm)])
                parts += [pcm, np.zeros(GAP, np.float32)]
                at += len(pcm) + GAP
    return np.concatenate(parts), rows


def main() -> None:
    """Writes the three files beside this module."""
    import soundfile

    folder = Path(__file__).parent
    users, user_rows = string_of((*TRAINING_VOICES, *TEST_VOICES), (*MODEL_WORDS, *USER_WORDS))
    model, model_rows = string_of((MODEL_VOICE,), MODEL_WORDS)
    soundfile.write(folder / "users.ogg", users, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.93)
    soundfile.write(folder / "model.flac", model, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    version = subprocess.run(["espeak-ng", "--version"], capture_output=True, check=True, text=True).stdout
    index = {
        "synthesiser": version.split("  ")[0].strip(),
        "speakers": {name: [who.voice, who.pitch, list(who.speeds)] for name, who in SPEAKERS.items()},
        "users": user_rows,
        "model": model_rows,
    }
    (folder / "bank.json").write_text(json.dumps(index).replace("], [", "],\n[") + "\n", encoding="utf-8")
    for name in ("users.ogg", "model.flac", "bank.json"):
        print(f"{name}: {(folder / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()

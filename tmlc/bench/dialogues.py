"""What the bench says to a server: recorded dialogues whose starts and ends of speech are labelled.

The built-in ones are synthesised from a seed: syllables of a voiced sound under moving formants, in utterances of 1 to
4 s with pauses between them, so that the labels are exact and nothing has to be shipped. Recordings of the user's own
are WAV files, each with a YAML file of its labels beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tmlc.errors import MediaError, reason
from tmlc.yaml_text import YamlFault, parse_yaml

FIX = "write a list of entries like `- {start: 0.8, end: 2.35}`, in the order of time"
SHORTEST, LONGEST = 1.0, 4.0
PAUSES = (1.2, 3.0)
"""Seconds of an utterance, and of the silence after one."""
FORMANTS = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))
"""Hz, of the vowels a, e, i, o, u, after the usual charts of adult voices."""


@dataclass(frozen=True)
class Utterance:
    """Seconds from the start of its dialogue to the first and the last sound of one utterance."""

    start: float
    end: float


@dataclass(frozen=True)
class Dialogue:
    """One side of a conversation; it is repeated when a session outlasts it.

    Attributes:
        samples: float32 mono at the rate that it was asked for.
        utterances: when somebody speaks in it, in order, not overlapping.
    """

    name: str
    rate: int
    samples: np.ndarray
    utterances: tuple[Utterance, ...]

    @property
    def seconds(self) -> float:
        return self.samples.size / self.rate

    def until(self, seconds: float) -> list[Utterance]:
        """The utterances of the repeated dialogue that end before `seconds`, in time of the session."""
        found = []
        for turn in range(int(seconds / self.seconds) + 1):
            at = turn * self.seconds
            found += [Utterance(at + u.start, at + u.end) for u in self.utterances if at + u.end < seconds]
        return found

    def piece(self, start: int, count: int) -> np.ndarray:
        """`count` samples of the repeated dialogue from sample `start` of the session on."""
        return np.take(self.samples, range(start, start + count), mode="wrap")


def made_up(count: int, rate: int, seed: int, seconds: float = 60.0) -> list[Dialogue]:
    """`count` synthesised dialogues of about `seconds` each; the same for the same seed."""
    return [
        _dialogue(f"made-up {number}", rate, np.random.default_rng((seed, number)), seconds) for number in range(count)
    ]


def _dialogue(name: str, rate: int, chance: np.random.Generator, seconds: float) -> Dialogue:
    parts, utterances, at = [], [], 0
    pitch = chance.uniform(95, 210)
    while at < seconds * rate:
        pause = _floor(round(chance.uniform(*PAUSES) * rate), chance)
        spoken = _utterance(rate, chance.uniform(SHORTEST, LONGEST), pitch, chance)
        begin = at + pause.size
        at = begin + spoken.size
        utterances.append(Utterance(begin / rate, at / rate))
        parts += [pause, spoken]
    parts.append(_floor(round(PAUSES[0] * rate), chance))
    return Dialogue(name, rate, np.concatenate(parts).astype(np.float32), tuple(utterances))


def _floor(count: int, chance: np.random.Generator) -> np.ndarray:
    """The noise of a quiet room, near -60 dB."""
    return chance.standard_normal(count) * 0.001


def _utterance(rate: int, seconds: float, pitch: float, chance: np.random.Generator) -> np.ndarray:
    """Voiced syllables of about a fifth of a second, joined without gaps; it begins and ends with a sound, not with a
    fade that would blur the label. Pitch and formants move in steps of 5 ms."""
    step = rate // 200
    frames = round(seconds * 200)
    t = np.arange(frames) / 200
    syllables = max(2, round(seconds / chance.uniform(0.17, 0.23)))
    place = t / seconds * syllables % syllables
    vowels = np.array(FORMANTS, float)[chance.integers(0, len(FORMANTS), syllables + 1)]
    index, glide = place.astype(int), np.clip((place % 1.0) / 0.3, 0, 1)[:, None]
    formants = vowels[index] * (1 - glide) + vowels[index + 1] * glide
    f0 = pitch * (1.06 - 0.18 * t / seconds + 0.02 * np.sin(2 * np.pi * 5 * t))
    turning = np.exp(2j * np.pi * np.cumsum(np.repeat(f0, step)) / rate).astype(np.complex64).reshape(frames, step)
    sound, harmonic = np.zeros((frames, step), np.float32), turning.copy()
    loud = 0.25 + 0.75 * np.sin(np.pi * (place % 1.0)) ** 0.5
    for number in range(1, int(3500 / pitch) + 1):
        gain = (np.array([1.0, 0.5, 0.25]) / (1 + ((number * f0[:, None] - formants) / [70, 100, 140]) ** 2)).sum(1)
        sound += (loud * gain / np.sqrt(number)).astype(np.float32)[:, None] * harmonic.imag
        harmonic *= turning
    out = sound.ravel()
    out[:step] *= np.linspace(0, 1, step, dtype=np.float32)
    out[-step:] *= np.linspace(1, 0, step, dtype=np.float32)
    return out * np.float32(0.35 / np.abs(out).max())


def read_folder(folder: Path, rate: int) -> list[Dialogue]:
    """The dialogues of a folder: every `NAME.wav` with its `NAME.yaml`, in the order of their names, at `rate` Hz.

    Raises:
        MediaError: no folder, no dialogue in it, a file without its labels, audio that does not decode, labels that
            are malformed, overlap, go back, or lie outside the recording.
    """
    if not folder.is_dir():
        raise MediaError("no such folder of dialogues", where=str(folder), fix="check the path")
    found = []
    for sound in sorted(folder.glob("*.wav")):
        labels = sound.with_suffix(".yaml")
        if not labels.is_file():
            raise MediaError(f"{sound.name} has no labels", where=str(folder), fix=f"write {labels.name}: {FIX}")
        from tmlc.runtimes.media.audio import read_audio

        samples = read_audio(sound, rate)
        found.append(Dialogue(sound.stem, rate, samples, _labels(labels, samples.size / rate)))
    if not found:
        raise MediaError("the folder holds no dialogue", where=str(folder), fix="put NAME.wav and NAME.yaml into it")
    return found


def _labels(path: Path, seconds: float) -> tuple[Utterance, ...]:
    try:
        entries = parse_yaml(path.read_bytes())
    except (OSError, YamlFault) as error:
        what = f"the labels cannot be read: {reason(error)}"
        raise MediaError(what, where=str(path), fix=FIX) from error
    if not isinstance(entries, list) or not entries:
        raise MediaError("the labels are not a list with an entry for each utterance", where=str(path), fix=FIX)
    found: list[Utterance] = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict) or set(entry) != {"start", "end"}:
            raise MediaError("an entry needs the keys start and end, and no other", where=where, fix=FIX)
        times = [entry["start"], entry["end"]]
        if not all(isinstance(at, int | float) and not isinstance(at, bool) for at in times):
            raise MediaError("a time is not a number of seconds", where=where, fix=FIX)
        after = found[-1].end if found else 0.0
        if not after <= times[0] < times[1] <= seconds:
            raise MediaError(
                f"{times[0]:g} to {times[1]:g} s is not after {after:g} s and within the recording's {seconds:g} s",
                where=where, fix=FIX,
            )  # fmt: skip
        found.append(Utterance(float(times[0]), float(times[1])))
    return tuple(found)

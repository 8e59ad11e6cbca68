"""Where an episode is put together: users speak, sounds and pictures come, the ideal model answers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import episode as ep
from .bank import SpeechBank, Split
from .episode import TICK_SAMPLES, Episode, Event, Utterance
from .words import SAMPLE_RATE

HEARD = SAMPLE_RATE * 12 // 100
"""The model is asked to react in the tick in which an event came when it has heard so many samples of it."""
TAIL = 600
"""Samples over which a word that is cut off fades: what a vocoder frame reaches into the next tick."""
DISTANCE = 0.16
"""How much quieter somebody is who speaks in the background."""


def react(sample: int) -> int:
    """The tick in which the ideal model answers what begins at `sample`."""
    tick, offset = divmod(sample, TICK_SAMPLES)
    return tick if TICK_SAMPLES - offset >= HEARD else tick + 1


def after(sample: int) -> int:
    """The tick in which the ideal model answers speech that ends at `sample`: the one after, when it has heard a
    pause."""
    return sample // TICK_SAMPLES + 1


class Stage:
    """Collects what happens; `episode()` mixes it.

    Attributes:
        rng: of this episode; every choice is drawn from it.
        voice: who the user is. `other` is somebody else.
        labels: of the episode.
        free: first tick in which the model says nothing yet.
    """

    def __init__(self, task: str, seed: int, split: Split, bank: SpeechBank) -> None:
        self.task, self.seed, self.split, self.bank = task, seed, split, bank
        self.rng = np.random.default_rng([zlib.crc32(task.encode()), seed, split == "test"])
        self.voice, self.other = (str(v) for v in self.rng.permutation(bank.voices(split))[:2])
        self.labels: dict[str, Any] = {}
        self.free = 0
        self._speed = int(self.rng.integers(2))
        # Wider in training: twenty-two voices are few to learn from, and a stretch moves pitch and formants.
        self._stretch = float(self.rng.uniform(0.94, 1.06) if split == "test" else self.rng.uniform(0.86, 1.16))
        self._gain = float(10 ** (self.rng.uniform(-4, 4) / 20))
        self._noise_db = float(self.rng.uniform(-62, -46))
        self._tilt = float(self.rng.uniform(0.0, 0.95))
        self._heard: list[tuple[int, np.ndarray]] = []
        self._said: list[Utterance] = []
        self._text: dict[int, str] = {}
        self._inject: dict[int, str] = {}
        self._written: dict[int, bytes] = {}
        self._video: dict[int, np.ndarray] = {}
        self._events: list[Event] = []
        self._end = 0

    def pick(self, items: Sequence[str]) -> str:
        return str(items[int(self.rng.integers(len(items)))])

    def between(self, low: float, high: float) -> int:
        """A random time between so many seconds, in samples."""
        return int(self.rng.uniform(low, high) * SAMPLE_RATE)

    # What the user does

    def user(self, word: str, at: int, voice: str | None = None, gain: float = 1.0, dull: float = 0.0) -> int:
        """`word` from sample `at` on; `dull` (0 to 1) takes away the treble. Returns the sample at which it ends."""
        clip = self.bank.user(voice or self.voice, word, self._speed)
        where = np.arange(int(len(clip) / self._stretch)) * self._stretch
        pcm = np.interp(where, np.arange(len(clip)), clip).astype(np.float32)
        if dull:
            pcm = _lowpass(pcm, dull)
        self.sound(pcm * np.float32(gain * self._gain), at)
        self.notice(word if voice is None else "somebody", at + len(pcm))
        return at + len(pcm)

    def speech(self, words: Sequence[str], at: int, gap: tuple[float, float] = (0.02, 0.1), **how: Any) -> int:
        """Words one after another with gaps of random seconds; returns where the last ends."""
        end = at
        for n, word in enumerate(words):
            end = self.user(word, at if n == 0 else end + self.between(*gap), **how)
        return end

    def background(self, words: Sequence[str], at: int) -> int:
        """Somebody else, far away: quiet, dull, with an echo of the room."""
        before = len(self._heard)
        end = self.speech(words, at, voice=self.other, gain=DISTANCE, dull=0.6)
        for start, pcm in self._heard[before:]:
            for delay, part in ((700, 0.5), (1500, 0.3), (2700, 0.15)):
                self._heard.append((start + delay, pcm * np.float32(part)))
        return end + 2700

    def sound(self, pcm: np.ndarray, at: int) -> None:
        self._heard.append((at, pcm))
        self.lasts(at + len(pcm))

    def notice(self, name: str, sample: int, seen: bool = False) -> None:
        """Something that can be known from `sample` on (`Episode.events`)."""
        self._events.append(Event(name, sample, seen))

    def tone(self, hertz: float, at: int, samples: int, level: float = 0.2, overtones: int = 0) -> None:
        """A tone with soft edges; with overtones it hums."""
        t = np.arange(samples) / SAMPLE_RATE
        pcm = sum(np.sin(2 * np.pi * hertz * (n + 1) * t) / (n + 1) for n in range(overtones + 1))
        edge = np.minimum(1.0, np.minimum(np.arange(samples), np.arange(samples)[::-1]) / 80)
        self.sound((np.asarray(pcm) * edge * level).astype(np.float32), at)

    def type(self, text: str, tick: int) -> int:
        """The user types; returns the tick at whose start all of it is there to be read."""
        for n in range(0, len(text), ep.TEXT_IN):
            self._text[tick] = text[n : n + ep.TEXT_IN]
            tick += 1
        self.lasts(tick * TICK_SAMPLES)
        return tick - 1

    def inject(self, text: str, tick: int) -> None:
        self._inject[tick] = text
        self.lasts((tick + 1) * TICK_SAMPLES)

    def show(self, tick: int, name: str, clip: np.ndarray) -> None:
        """A clip, and what it shows (one of `EVENTS`)."""
        self._video[tick] = clip
        self.notice(name, tick * TICK_SAMPLES, seen=True)
        self.lasts((tick + 1) * TICK_SAMPLES)

    def lasts(self, sample: int) -> None:
        """The episode lasts until `sample` at least."""
        self._end = max(self._end, sample)

    # What the ideal model does

    def span(self, word: str) -> int:
        """Ticks that a word takes: until it has sounded, and until a space and its letters are written."""
        letters = -(-(len(word) + 1) // ep.TEXT_OUT)
        return max(letters, -(-len(self.bank.says(word)) // TICK_SAMPLES))

    def say(self, word: str, tick: int) -> int:
        """The model says `word` from the start of a tick (or when it has finished what it says); returns the first tick
        after it."""
        tick = max(tick, self.free)
        start = tick * TICK_SAMPLES
        self._said.append(Utterance(word, start, start + len(self.bank.says(word))))
        letters = f" {word}".encode()
        for n in range(self.span(word)):
            self._written[tick + n] = letters[n * ep.TEXT_OUT : (n + 1) * ep.TEXT_OUT]
        self.free = tick + self.span(word)
        self.lasts(self.free * TICK_SAMPLES)
        return self.free

    def write(self, data: bytes, tick: int) -> int:
        """The model writes without a sound; returns the first tick after it."""
        tick = max(tick, self.free)
        for n in range(0, len(data), ep.TEXT_OUT):
            self._written[tick] = data[n : n + ep.TEXT_OUT]
            tick += 1
        self.free = tick
        self.lasts(tick * TICK_SAMPLES)
        return tick

    def cut(self, tick: int) -> None:
        """From this tick on the model is silent: what it was going to say is not said."""
        edge = tick * TICK_SAMPLES
        self._said = [
            Utterance(said.word, said.start_sample, min(said.end_sample, edge))
            for said in self._said
            if said.start_sample < edge
        ]
        self._written = {t: data for t, data in self._written.items() if t < tick}
        self.free = min(self.free, tick)

    # The whole

    def episode(self) -> Episode:
        """What was put together, with noise, and half a second of quiet at the end."""
        ticks = -(-(self._end + SAMPLE_RATE // 2) // TICK_SAMPLES)
        audio = self._noise(ticks * TICK_SAMPLES)
        for at, pcm in self._heard:
            audio[at : at + len(pcm)] += pcm[: len(audio) - at]
        target = np.zeros(ticks * TICK_SAMPLES, np.float32)
        for said in self._said:
            clip = self.bank.says(said.word)
            length = said.end_sample - said.start_sample
            clip = clip[: length + TAIL].copy()
            fade = np.linspace(1.0, 0.0, len(clip) - length, dtype=np.float32)
            clip[length:] *= fade
            target[said.start_sample : said.start_sample + len(clip)] += clip
        text = [self._text.get(t, "") for t in range(ticks)]
        written = [self._written.get(t, b"") for t in range(ticks)]
        speaks = np.array([t in self._written for t in range(ticks)])
        video = self._whole_video(ticks)
        return Episode(
            self.task, self.seed, self.split, ticks, np.clip(audio, -1, 1), video, text, dict(self._inject),
            list(self._said), target, written, speaks, self.labels, self._events,
        )  # fmt: skip

    def _noise(self, samples: int) -> np.ndarray:
        """Noise of the episode's level and colour, float32 [samples]."""
        white = self.rng.standard_normal(samples)
        coloured = _lowpass(white.astype(np.float32), self._tilt)
        return coloured * np.float32(10 ** (self._noise_db / 20) / (np.std(coloured) + 1e-9))

    def _whole_video(self, ticks: int) -> dict[int, np.ndarray]:
        """The clips that were shown; the last one again where none was, so that a video never stops before its end."""
        if not self._video:
            return {}
        whole, last = {}, self._video[min(self._video)]
        for tick in range(0, ticks, ep.VIDEO_EVERY):
            last = self._video.get(tick, last)
            whole[tick] = last
        return whole


def _lowpass(pcm: np.ndarray, strength: float) -> np.ndarray:
    """A gentle low-pass whose response at half the sample rate falls with `strength` from 1 towards 0; zero phase."""
    spectrum = np.fft.rfft(pcm)
    hertz = np.fft.rfftfreq(len(pcm), 1 / SAMPLE_RATE)
    corner = 8000.0 * (1.0 - strength) + 300.0
    spectrum /= np.sqrt(1.0 + (hertz / corner) ** 4 * min(1.0, 4 * strength))
    return np.fft.irfft(spectrum, len(pcm)).astype(np.float32)

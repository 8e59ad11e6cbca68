"""Which of its words the model spoke: connected words by dynamic time warping against the synthesiser's own audio.

The templates are the model's voice as eSpeak NG made it, at several speeds; no output of any model is used. So the
recogniser is independent of what it judges. Method: one-pass search over all templates at once (Ney, "The use of a
one-stage dynamic programming algorithm for connected word recognition", 1984) on mel cepstra, with two more states:
silence, and a filler that costs the same for every frame, so that what is like no word is called no word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tmlc.eval.voice import FRAME, RATE, sounding
from tmlc.model_zoo.interaction.features import hann_window, mel_filters
from tmlc.model_zoo.interaction.tasks import SpeechBank

HOP, WINDOW, FFT = 160, 400, 512
MELS, CEPSTRA = 26, 13
FILLER = 1.0
"""Cost of a frame that belongs to no word. The distance of a word's frames to its template is around 0.5."""
ENTRY = 4.0
"""Cost of beginning a word: without it, one word could be read as two short ones."""


@dataclass(frozen=True)
class Word:
    """A word that was heard, or "?" for a voice that is no word; samples of the output, and the mean cost of a
    frame."""

    word: str
    start: int
    end: int
    cost: float


def cepstra(audio: np.ndarray) -> np.ndarray:
    """float32 [frames, 2 * CEPSTRA]: mel cepstra and their slopes, a frame each 10 ms; frame k is centred on k *
    HOP."""
    padded = np.concatenate([np.zeros(WINDOW // 2), audio.astype(np.float64), np.zeros(WINDOW)])
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][: len(audio) // HOP + 1]
    power = np.abs(np.fft.rfft(frames * hann_window(WINDOW), FFT, axis=1)) ** 2
    filters = mel_filters(MELS, FFT, RATE).astype(np.float64)
    # The floor keeps what is far below the voice from counting: codecs and vocoders differ there.
    mel = np.log(power @ filters.T + 1e-4)
    n = np.arange(MELS) + 0.5
    cosines = np.cos(np.pi * np.outer(np.arange(CEPSTRA), n) / MELS) * np.sqrt(2 / MELS)
    c = mel @ cosines.T
    around = np.pad(c, ((2, 2), (0, 0)), mode="edge")
    slope = (2 * (around[4:] - around[:-4]) + around[3:-1] - around[1:-3]) / 10
    return np.concatenate([c, 2 * slope], axis=1).astype(np.float32)


class Recogniser:
    """Made once from the bank; `words` is pure.

    Args:
        bank: whose `model` clips, three speeds of each word, are the templates.
    """

    def __init__(self, bank: SpeechBank) -> None:
        made: list[tuple[str, np.ndarray]] = []
        for word, clips in bank.model.items():
            for clip in clips:
                made.append((word, cepstra(clip)[:-1]))
        whole = np.concatenate([features for _, features in made])
        self._centre, self._scale = whole.mean(axis=0), whole.std(axis=0) * np.sqrt(whole.shape[1])
        self._labels = [word for word, _ in made]
        lengths = np.array([len(features) for _, features in made])
        self._last = np.cumsum(lengths) - 1
        self._first = self._last - lengths + 1
        self._templates = (whole - self._centre) / self._scale
        self._owner = np.repeat(np.arange(len(made)), lengths)
        self._second = self._first + 1
        self._norms = np.square(self._templates).sum(axis=1)

    def words(self, audio: np.ndarray) -> list[Word]:
        """The words of a model's output (float32 mono, 16 kHz), in order. Stretches of voice that fit none are "?"."""
        heard = sounding(audio)
        if not heard.any():
            return []
        features = (cepstra(audio) - self._centre) / self._scale
        frames = len(features)
        loud = np.repeat(heard, FRAME)
        active = np.array([loud[max(0, k * HOP - HOP // 2) : k * HOP + HOP // 2 + 1].any() for k in range(frames)])
        near = np.convolve(active, np.ones(15), "same") > 0
        cross = features @ self._templates.T
        cost = np.sqrt(np.maximum(np.square(features).sum(axis=1)[:, None] - 2 * cross + self._norms[None], 0.0))
        return self._search(cost, active, near)

    def _search(self, cost: np.ndarray, active: np.ndarray, near: np.ndarray) -> list[Word]:
        """One pass over the frames. `begun[s]` is the frame at which the path that ends in template state s entered its
        word; `idle` is the best cost of a path that is between words, `trail` how it came there."""
        frames, states = cost.shape
        total = np.full(states, np.inf, np.float32)
        begun = np.zeros(states, np.int32)
        far = np.full(2, np.inf, np.float32)
        idle = 0.0
        trail: list[tuple[int, int] | None] = []  # of each frame: which word ended here and where it began, or None
        for k in range(frames):
            rest = idle + (FILLER if active[k] else 0.0)
            if not near[k]:
                total.fill(np.inf)
                trail.append(None)
                idle = rest
                continue
            before, before_begun = total, begun
            stay = before
            step = np.concatenate([far[:1], before[:-1]])
            skip = np.concatenate([far, before[:-2]])
            step[self._first] = idle + ENTRY
            skip[self._first] = np.inf
            skip[self._second[self._second <= self._last]] = np.inf
            came_step = np.concatenate([[0], before_begun[:-1]])
            came_step[self._first] = k
            came_skip = np.concatenate([[0, 0], before_begun[:-2]])
            # Staying costs a little, so that a template is not stretched over what it is not.
            options = np.stack([stay + 0.1, step, skip + 0.1])
            choice = options.argmin(axis=0)
            total = options.min(axis=0) + cost[k]
            begun = np.choose(choice, [before_begun, came_step, came_skip]).astype(np.int32)
            ended = int(total[self._last].argmin())
            best = float(total[self._last[ended]])
            if best < rest:
                trail.append((ended, int(begun[self._last[ended]])))
                idle = best
            else:
                trail.append(None)
                idle = rest
        return self._read(trail, active, cost)

    def _read(self, trail: list[tuple[int, int] | None], active: np.ndarray, cost: np.ndarray) -> list[Word]:
        """Follows the best path back, and calls what lies between its words and sounds long enough "?"."""
        found: list[tuple[int, int, str]] = []
        k = len(trail) - 1
        while k >= 0:
            ended = trail[k]
            if ended is None:
                k -= 1
            else:
                found.append((ended[1], k + 1, self._labels[ended[0]]))
                k = ended[1] - 1
        found.reverse()
        words: list[Word] = []
        edge = 0
        for start, end, word in [*found, (len(trail), len(trail), "")]:
            words += _unknown(active, edge, start)
            if word:
                words.append(Word(word, start * HOP, end * HOP, float(cost[start:end].min(axis=1).mean())))
            edge = end
        return words


def _unknown(active: np.ndarray, start: int, end: int) -> list[Word]:
    """Stretches of at least 100 ms of voice between two frames."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], active[start:end].astype(np.int8), [0]]))).reshape(-1, 2)
    return [Word("?", (start + int(a)) * HOP, (start + int(b)) * HOP, FILLER) for a, b in edges if b - a >= 10]

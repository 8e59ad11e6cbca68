"""Where a model's output sounds, and whether it clicks at the edges of ticks.

The voice detector is one of energy: the output of an engine is clean synthetic speech, so that no model of noise is
needed. Full-Duplex-Bench uses Silero VAD for the same purpose (stop and response latency).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RATE = 16000
FRAME = 80
"""Samples of one decision of the voice detector: 5 ms."""
LEVEL = 10 ** (-38 / 20)
"""Root mean square over 20 ms from which on something is heard; the model's words have -22 dB on average."""
JOIN = RATE * 12 // 100
"""Gaps shorter than this lie within a word: before the last sound of "eight", say."""
SHORTEST = RATE * 4 // 100


def sounding(audio: np.ndarray) -> np.ndarray:
    """bool [samples / FRAME, rounded up]: is something heard? float32 mono in."""
    frames = np.zeros(-(-len(audio) // FRAME) * FRAME)
    frames[: len(audio)] = audio
    power = np.square(frames).reshape(-1, FRAME).mean(axis=1)
    wide = np.convolve(power, np.ones(4) / 4)[: len(power)]
    # A frame counts where its own part of the 20 ms is loud enough too, so that a sound does not trail behind.
    return (wide >= LEVEL**2) & (power >= LEVEL**2 / 10)


def segments(audio: np.ndarray, join: int = JOIN) -> list[tuple[int, int]]:
    """(first sample, sample after the last) of each stretch of voice; gaps below `join` samples are bridged."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sounding(audio).astype(np.int8), [0]])))
    found: list[list[int]] = []
    for start, end in (edges.reshape(-1, 2) * FRAME).tolist():
        if found and start - found[-1][1] < join:
            found[-1][1] = end
        else:
            found.append([start, end])
    return [(start, min(end, len(audio))) for start, end in found if end - start >= SHORTEST]


@dataclass(frozen=True)
class Jumps:
    """How sharply the signal bends at the edges of ticks, beside everywhere else.

    Attributes:
        edges: how many edges there were at which the output sounds.
        inside: 99.9th percentile of the sharpness inside ticks, where the output sounds.
        worst: the largest sharpness at an edge.
        clicks: edges that are more than twice as sharp as `inside`.
    """

    edges: int
    inside: float
    worst: float
    clicks: int


def jumps(audio: np.ndarray, tick: int = 3200) -> Jumps:
    """Compares the sharpness at edges of ticks with that inside of them.

    The sharpness of a sample is the bend |x[i-2] - 3 x[i-1] + 3 x[i] - x[i+1]|, to which a step of height h adds up to
    3 h, divided by the mean bend of the 10 ms around it: an "s" bends everywhere, a click in one place.
    """
    x = audio.astype(np.float64)
    bend = np.zeros(len(x))
    bend[2:-1] = np.abs(x[:-3] - 3 * x[1:-2] + 3 * x[2:-1] - x[3:])
    sums = np.concatenate([[0.0], np.cumsum(np.pad(bend, (80, 81)))])
    sharp = bend / ((sums[161 : 161 + len(x)] - sums[: len(x)]) / 161 + 1e-3)
    heard = np.repeat(sounding(audio), FRAME)[: len(x)]
    at = np.arange(tick, len(x) - 1, tick)
    edge = np.zeros(len(x), bool)
    for offset in (-1, 0, 1):
        edge[at + offset] = True
    inner = sharp[heard & ~edge]
    usual = float(np.quantile(inner, 0.999)) if inner.size else 0.0
    live = at[heard[at] | heard[at - 1]]
    here = np.maximum.reduce([sharp[live + offset] for offset in (-1, 0, 1)]) if live.size else np.zeros(0)
    return Jumps(len(live), usual, float(here.max(initial=0.0)), int((here > 2 * usual).sum()))

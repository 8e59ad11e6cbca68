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
    """How the signal bends at the edges of ticks, beside everywhere else.

    Attributes:
        edges: how many edges there were at which the output sounds.
        inside: 99.9th percentile of the bend inside ticks, where the output sounds.
        worst: the largest bend at an edge.
        clicks: edges with a bend above three times `inside`.
    """

    edges: int
    inside: float
    worst: float
    clicks: int


def jumps(audio: np.ndarray, tick: int = 3200) -> Jumps:
    """Compares the bend |x[i-2] - 3 x[i-1] + 3 x[i] - x[i+1]| at edges of ticks with the same inside of them.

    A step of height h at an edge adds up to 3 h there; speech, which has little above 4 kHz, bends slowly.
    """
    bend = np.zeros(len(audio))
    x = audio.astype(np.float64)
    bend[2:-1] = np.abs(x[:-3] - 3 * x[1:-2] + 3 * x[2:-1] - x[3:])
    heard = np.repeat(sounding(audio), FRAME)[: len(audio)]
    near = np.zeros(len(audio), bool)
    at = np.arange(tick, len(audio) - 1, tick)
    for offset in (-1, 0, 1):
        near[at + offset] = True
    inner = bend[heard & ~near]
    usual = float(np.quantile(inner, 0.999)) if inner.size else 0.0
    live = at[heard[at] | heard[at - 1]]
    at_edges = np.maximum.reduce([bend[live + offset] for offset in (-1, 0, 1)]) if live.size else np.zeros(0)
    floor = max(3 * usual, 1e-3)
    return Jumps(len(live), usual, float(at_edges.max(initial=0.0)), int((at_edges > floor).sum()))

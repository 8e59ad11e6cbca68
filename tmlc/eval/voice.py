"""Where a model's output sounds.

The voice detector is one of energy: the output of an engine is clean synthetic speech, so that no model of noise is
needed. Full-Duplex-Bench uses Silero VAD for the same purpose (stop and response latency).
"""

from __future__ import annotations

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

"""Whether a model's output clicks at the edges of ticks: edge by edge, and over all edges together.

A click is a step or a kink that the signal around it does not have. One that is loud is seen by itself (`jumps`). One
that hides in the noise of an "s" is seen when all edges are looked at: what linear prediction does not foresee at an
edge is ranked among the 10 ms on both sides, and such ranks are no higher on average at edges than at places between
the vocoder's frames, unless something happens at edges (`stand_out`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tmlc.eval.voice import FRAME, sounding

SHIFTS = tuple(range(100, 3200, 200))
"""Samples from an edge at which a grid of the same spacing lies in the middle between two frames of the vocoder."""
REACH = 160
"""An edge is ranked among so many samples on both sides: 10 ms."""
GUARD = 16
"""What lies so near an edge is not taken for its surroundings."""
ORDER = 16
PIECE, WINDOW = 160, 480
"""Samples that are predicted with the same coefficients, and those that these are found from."""
FEWEST = 50
"""Edges that must have been ranked for something to be said of all of them."""
FAR = 4.0
"""Standard deviations over `SHIFTS` by which edges stand out."""


@dataclass(frozen=True)
class Jumps:
    """How sharply the signal bends at the edges of ticks, beside everywhere else.

    Attributes:
        edges: how many edges there were at which the output sounds.
        inside: 99.9th percentile of the sharpness inside ticks, where the output sounds.
        worst: the largest sharpness at an edge.
        clicks: edges that are more than twice as sharp as `inside`.
        ranks: of the edges, and of each of `SHIFTS`: the sum of `surprise_ranks`, float64 [1 + len(SHIFTS)].
        ranked: how many there are of each, int64 of the same shape.
    """

    edges: int
    inside: float
    worst: float
    clicks: int
    ranks: np.ndarray
    ranked: np.ndarray


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
    here = np.max([sharp[live + offset] for offset in (-1, 0, 1)], axis=0) if live.size else np.zeros(0)
    ranks, ranked = surprise_ranks(x, heard, tick)
    return Jumps(len(live), usual, float(np.max(here, initial=0.0)), int((here > 2 * usual).sum()), ranks, ranked)


def surprise_ranks(x: np.ndarray, heard: np.ndarray, tick: int) -> tuple[np.ndarray, np.ndarray]:
    """(sums of ranks, how many) at the edges of ticks and at the same places moved by each of `SHIFTS`.

    The rank of a place is the part of the samples around it that linear prediction foresaw better, 0 to 1; one half on
    average where nothing is special about the place. Only places with voice within 20 ms before and behind have one.

    Args:
        x: float64 [samples]. heard: bool of the same shape. tick: samples.
    """
    surprise = np.abs(prediction_error(x))
    surprise = np.maximum(surprise, np.append(surprise[1:], 0.0))  # a step may first be seen one sample later
    sums = np.concatenate([[0], np.cumsum(heard)])
    around = np.concatenate([np.arange(-REACH, -GUARD), np.arange(GUARD + 1, REACH + 1)])
    ranks, ranked = np.zeros(1 + len(SHIFTS)), np.zeros(1 + len(SHIFTS), np.int64)
    for grid, shift in enumerate((0, *SHIFTS)):
        at = np.arange(shift or tick, len(x) - REACH - 1, tick)
        at = at[at >= REACH]
        earlier, later = np.maximum(at - 2 * REACH, 0), np.minimum(at + 2 * REACH, len(x))
        at = at[(sums[at] > sums[earlier]) & (sums[later] > sums[at])]
        if at.size:
            there, here = surprise[at[:, None] + around], surprise[at][:, None]
            ranks[grid] = ((there < here).mean(axis=1) + 0.5 * (there == here).mean(axis=1)).sum()
            ranked[grid] = at.size
    return ranks, ranked


def prediction_error(x: np.ndarray) -> np.ndarray:
    """float64 of x's shape: each sample less what the `ORDER` samples before it foretell.

    Autocorrelation method (Makhoul, "Linear prediction: a tutorial review", 1975) over Hann windows of `WINDOW`, each
    for the `PIECE` samples in its middle; middles change between edges of ticks and not at them.
    """
    count = -(-len(x) // PIECE) + 1
    side = (WINDOW - PIECE) // 2
    # Piece k begins at sample k * PIECE - PIECE / 2.
    padded = np.zeros(ORDER + PIECE // 2 + side + count * PIECE + side)
    begin = ORDER + PIECE // 2 + side
    padded[begin : begin + len(x)] = x
    windows = np.lib.stride_tricks.sliding_window_view(padded[ORDER:], WINDOW)[::PIECE][:count]
    spectrum = np.fft.rfft(windows * np.hanning(WINDOW), 1024, axis=1)
    correlation = np.fft.irfft(np.square(np.abs(spectrum)), axis=1)[:, : ORDER + 1]
    correlation[:, 0] = correlation[:, 0] * (1 + 1e-5) + 1e-9
    live = np.flatnonzero(correlation[:, 0] > 1e-6)  # most of an output is silence
    correlation = correlation[live]
    lag = np.abs(np.subtract.outer(np.arange(ORDER), np.arange(ORDER)))
    coefficients = np.linalg.solve(correlation[:, lag], correlation[:, 1:, None])[:, :, 0]
    history = np.lib.stride_tricks.sliding_window_view(padded, PIECE + ORDER)[side:][::PIECE][live]
    before = np.lib.stride_tricks.sliding_window_view(history, ORDER, axis=1)[:, :PIECE, ::-1]
    error = np.zeros((count, PIECE))
    error[live] = history[:, ORDER:] - np.einsum("kpo,ko->kp", before, coefficients)
    return error.reshape(-1)[PIECE // 2 : PIECE // 2 + len(x)]


def all_edges(found: Sequence[Jumps]) -> dict[str, Any]:
    """Clicks over many outputs: how many edges sounded, how many clicked, the worst of them, and whether they stand out
    when all are looked at together. `rank` is their mean rank, `elsewhere` that of the other grids, `spread` the
    standard deviation of those; None where fewer than `FEWEST` edges lie inside voice."""
    ranks = np.sum([one.ranks for one in found], axis=0)
    ranked = np.sum([one.ranked for one in found], axis=0)
    bends = [one.worst / one.inside for one in found if one.edges and one.inside > 0]
    view: dict[str, Any] = {
        "edges": sum(one.edges for one in found),
        "clicks": sum(one.clicks for one in found),
        "worst": float(max(bends)) if bends else None,
        "rank": None,
        "elsewhere": None,
        "spread": None,
        "stand_out": None,
    }
    if np.min(ranked, initial=FEWEST) < FEWEST or not len(found):
        return view
    rank, *others = (ranks / ranked).tolist()
    mean, spread = float(np.mean(others)), float(np.std(others, ddof=1))
    out = rank > max(others) and rank - mean > FAR * spread
    return view | {"rank": rank, "elsewhere": mean, "spread": spread, "stand_out": bool(out)}

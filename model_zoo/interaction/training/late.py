"""Episodes in which the model was a tick late: so that it has seen what to do when it was.

An ideal model always begins at the first tick at which it can, so one that is trained on it alone never learns what
follows a tick in which it should have begun and did not: speaking freely, a hesitation of one tick would become silence
for good. Here some utterances begin one tick later, and the tick in which they should have begun is not counted.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..tasks import Episode
from ..tasks.episode import TICK_SAMPLES


def runs(speaks: np.ndarray, gap: int = 1) -> list[tuple[int, int]]:
    """[start, stop) of the runs of ticks that speak; runs that are less than `gap` ticks apart are one."""
    spans: list[tuple[int, int]] = []
    for tick in np.flatnonzero(speaks).tolist():
        if spans and tick - spans[-1][1] < gap:
            spans[-1] = (spans[-1][0], tick + 1)
        else:
            spans.append((tick, tick + 1))
    return spans


def late(episode: Episode, part: float, rng: np.random.Generator) -> tuple[Episode, frozenset[int]]:
    """The episode with `part` of its runs of speech a tick later, and the ticks in which these should have begun.

    A run that the user cut short stays (when it ends is the user's doing), and so does one with no room behind it.
    """
    audio, text, speaks = episode.target_audio.copy(), list(episode.target_text), episode.speaks.copy()
    moved: list[int] = []
    for start, stop in runs(episode.speaks):
        drawn = rng.random() < part
        if drawn and stop + 2 <= episode.ticks and not speaks[stop : stop + 2].any() and not _cut(episode, start, stop):
            here, there = (slice((t + start) * TICK_SAMPLES, (t + stop + 1) * TICK_SAMPLES) for t in (0, 1))
            # With the tick behind it, which holds the tail of the last word.
            kept = audio[here].copy()
            audio[here] = 0.0
            audio[there] += kept[: audio[there].size]
            text[start : stop + 1] = [b"", *text[start:stop]]
            speaks[start : stop + 1] = [False, *speaks[start:stop]]
            moved.append(start)
    return replace(episode, target_audio=audio, target_text=text, speaks=speaks), frozenset(moved)


def _cut(episode: Episode, start: int, stop: int) -> bool:
    """Did the user cut in while this run was spoken, or in the tick after?"""
    return start * TICK_SAMPLES <= episode.labels.get("cut_in", -1) < (stop + 1) * TICK_SAMPLES

"""Was the machine quiet enough for a profile to say something? One place for the thresholds and for the words: a
profile and a comparison of two warn by the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tmlc.report.bootstrap import independent, interval, quantile_draws

RESOLUTION = 0.03
"""An interval of the median that is wider to either side, or a median that moves as much within a profile, is noise."""
PREEMPTED = 0.05
"""Involuntary context switches a tick: with more, other programs wanted the cores."""
WINDOWS = 8
"""Parts of a session whose medians are compared."""
ERROR = 0.01


def windows(values: np.ndarray) -> np.ndarray | None:
    """The medians of WINDOWS parts of a session, none 0; None when that leaves too few ticks in each."""
    if values.size < 10 * WINDOWS:
        return None
    return np.maximum([float(np.median(part)) for part in np.array_split(values, WINDOWS)], 1e-9)


def too_few(*counts: int) -> str:
    """Why nothing is concluded from so many ticks."""
    return f"too few ticks to conclude: {' and '.join(map(str, counts))}; profile longer sessions"


def wide(known_to: float) -> list[str]:
    """Why nothing is concluded from a median that is known to ± this part of itself; empty when it may be."""
    if known_to <= RESOLUTION:
        return []
    return [f"the machine was too noisy to conclude: a step's median is known to ±{known_to:.1%} only"]


def wandering(by: float | None, what: str = "the step") -> list[str]:
    """Why nothing is concluded from medians that wander by this within a session; empty when it may be."""
    if by is None or by <= RESOLUTION:
        return []
    return [f"the machine was too noisy to conclude: {what} wandered by ±{by:.1%}"]


def interrupted(times: int, ticks: int, whose: str = "the process") -> list[str]:
    """Whether the cores were taken away too often."""
    if times <= PREEMPTED * ticks:
        return []
    return [f"other programs wanted the cores: {whose} was interrupted {times} times"]


def noise(steps: Sequence[float], preempted: int, ticks: int) -> dict[str, Any]:
    """The record `noise` of a profile.

    `median_known_to`: half the width of the 99 % interval of the median step, as a part of it. `wanders_by`: standard
    deviation of the medians of WINDOWS parts around the straight line through them, as a part of it: growth is no
    noise. Both are None when there are too few ticks.
    """
    values = np.asarray(steps, np.float64)
    medians = windows(values)
    known_to = by = None
    why: list[str] = []
    if medians is None:
        why.append(too_few(values.size))
    else:
        at = np.arange(WINDOWS)
        # A session that became much faster would take the line through zero.
        line = np.maximum(np.polyval(np.polyfit(at, medians, 1), at), medians.min())
        by = float(np.std(medians / line))
        level = np.interp((np.arange(values.size) + 0.5) / values.size, (at + 0.5) / WINDOWS, line)
        m = independent(values, level, 0.5)
        low, high = interval(quantile_draws(values / level, m, 0.5, np.random.default_rng(0)), ERROR)
        known_to = (high - low) / 2
        why += [*wide(known_to), *wandering(by)]
    why += interrupted(preempted, ticks)
    return {
        "preempted_per_tick": preempted / max(ticks, 1),
        "median_known_to": known_to,
        "wanders_by": by,
        "too_noisy": bool(why),
        "why": why,
    }

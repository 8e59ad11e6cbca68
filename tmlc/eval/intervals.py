"""95 % intervals of scores. Wilson's for episodes that are passed or not, the bootstrap for scores in between.

Wilson, "Probable inference, the law of succession, and statistical inference" (1927); Efron, "Bootstrap methods"
(1979), percentiles of means of 2,000 resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Z = 1.959964
RESAMPLES = 2000


def wilson(passed: int, of: int) -> tuple[float, float]:
    """The interval of a proportion; (0, 1) of nothing."""
    if not of:
        return 0.0, 1.0
    p = passed / of
    middle = p + Z**2 / (2 * of)
    half = Z * np.sqrt(p * (1 - p) / of + Z**2 / (4 * of**2))
    low, high = (middle - half) / (1 + Z**2 / of), (middle + half) / (1 + Z**2 / of)
    # At the ends the interval reaches the end itself, but for rounding.
    return (0.0 if not passed else float(low)), (1.0 if passed == of else float(high))


def bootstrap(scores: Sequence[float]) -> tuple[float, float]:
    """The interval of a mean; the same for the same scores."""
    values = np.asarray(scores, np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """Wilson's when every score is 0 or 1, else the bootstrap's. Where all are the same number in between, no resample
    differs, and Wilson's at the nearest count says how little a few episodes show."""
    if not scores:
        return 0.0, 1.0
    if all(score in (0.0, 1.0) for score in scores):
        return wilson(int(sum(scores)), len(scores))
    return bootstrap(scores)

"""How far two lists of values lie apart, whatever their distribution: the interval that belongs to the rank test of
Mann and Whitney, after Hodges and Lehmann (Estimates of location based on rank tests, 1963).

Of all differences between a value of B and one of A, the median is the estimate, and the k-th smallest and k-th largest
are the ends of the interval. It is exact when the values of A and of B are draws from one distribution that may be
moved: one value that is far off moves an end by one place and not by its size.
"""

from __future__ import annotations

import functools

import numpy as np


@functools.cache
def place(m: int, n: int, error: float) -> int:
    """The k for which the interval from m and n values is wrong in at most the part `error` of all cases; 0: no k is.

    The smallest k - 1 differences lie below what is true in as many of the (m + n choose m) orders of all values as
    there are partitions of at most k - 1 into at most m parts of at most n: coefficients of a Gaussian binomial.
    """
    counts = [1]
    for i in range(1, m + 1):
        grown = counts + [0] * (n + i)
        for at in range(len(grown) - 1, n + i - 1, -1):
            grown[at] -= grown[at - n - i] if at - n - i < len(counts) else 0
        for at in range(i, len(grown)):
            grown[at] += grown[at - i]
        counts = grown[: i * n + 1]
    allowed, seen = error / 2 * sum(counts), 0
    for k, count in enumerate(counts):
        seen += count
        if seen > allowed:
            return k
    return 0


def shift(a: np.ndarray, b: np.ndarray, error: float) -> tuple[float, float | None, float | None]:
    """How far B lies from A, and the interval of that; None for its ends where the values are too few for `error`."""
    differences = np.sort(np.subtract.outer(b, a).ravel())
    k = place(a.size, b.size, error)
    ends = (float(differences[k - 1]), float(differences[-k])) if k else (None, None)
    return float(np.median(differences)), *ends

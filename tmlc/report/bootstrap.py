"""How well a statistic of ticks is known: bootstrap intervals for ticks that follow one another.

Resampling n ticks and taking the k-th smallest is the same as drawing U from Beta(k, n - k + 1) and taking the value at
rank ceil(n·U), so a quantile needs no resampled lists (the distribution of order statistics; here k is q·(m + 1), which
need not be whole). Ticks that follow one another are alike, so only m of n are drawn, where m is the number of
independent ticks that would tell as much: n / (1 + 2·Σρ), with the autocorrelation ρ of "is this tick above the
quantile?", summed as C. Geyer proposes (Practical Markov Chain Monte Carlo, 1992): pairs of lags while they are
positive.
"""

from __future__ import annotations

import numpy as np

DRAWS = 20_000
TAIL = 0.05


def independent(values: np.ndarray, level: np.ndarray, quantile: float) -> int:
    """How many independent ticks tell as much about a quantile as these n that follow one another; 1 to n.

    `level`: of each tick, what is no noise (a step that grows with the conversation); it is divided out.
    """
    relative = values / np.maximum(level, 1e-9)
    above = (relative > np.quantile(relative, quantile)).astype(np.float64)
    above -= above.mean()
    n = values.size
    variance = float(above @ above) / n
    if variance == 0:
        return n
    spectrum = np.fft.rfft(above, 2 * n)
    rho = np.fft.irfft(spectrum * spectrum.conj())[:n] / n / variance
    total = 0.0
    for lag in range(1, n - 1, 2):
        pair = float(rho[lag] + rho[lag + 1])
        if pair <= 0:
            break
        total += pair
    return max(1, min(n, round(n / (1 + 2 * total))))


def quantile_draws(values: np.ndarray, m: int, quantile: float, random: np.random.Generator) -> np.ndarray:
    """The quantile of DRAWS resamplings of m ticks."""
    uniform = random.beta(quantile * (m + 1), (1 - quantile) * (m + 1), DRAWS)
    return _at(values, uniform)


def tails(values: np.ndarray, m: int, random: np.random.Generator) -> np.ndarray:
    """The mean of the slowest TAIL of DRAWS resamplings of m ticks: the largest order statistics of m uniform
    numbers.
    """
    slow = round(TAIL * m)
    steps = random.random((DRAWS, slow)) ** (1.0 / (m - np.arange(slow)))
    return _at(values, np.cumprod(steps, axis=1)).mean(axis=1)


def _at(values: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The observed values at these places between the smallest (0) and the largest (1)."""
    return np.sort(values)[np.minimum((uniform * values.size).astype(np.int64), values.size - 1)]


def tail_mean(values: np.ndarray) -> float:
    """Mean of the slowest TAIL of the ticks, at least one."""
    return float(np.sort(values)[-max(1, round(TAIL * values.size)) :].mean())


def interval(draws: np.ndarray, error: float) -> tuple[float, float]:
    """Where all but the outermost `error` of the draws lie."""
    low, high = np.quantile(draws, (error / 2, 1 - error / 2))
    return float(low), float(high)

"""The interval of a shift between two lists: against tables, and against the truth on distributions of all kinds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tmlc.report.ranks import place, shift


@pytest.mark.parametrize(
    ("m", "n", "error", "critical"), [(10, 10, 0.05, 23), (8, 8, 0.05, 13), (5, 7, 0.05, 5), (20, 20, 0.05, 127)]
)
def test_places_are_those_of_published_tables(m: int, n: int, error: float, critical: int) -> None:
    """Critical values of U, two-sided, as in the usual tables of Mann and Whitney's test."""
    assert place(m, n, error) == place(n, m, error) == critical + 1


def test_too_few_values_have_no_interval() -> None:
    assert place(5, 5, 0.005) == 0 and place(5, 5, 0.01) == 1
    assert shift(np.arange(3.0), np.arange(3.0) + 9, 0.01) == (9.0, None, None)


def test_a_shift_is_found_and_one_wild_value_moves_it_little() -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(0, 0.01, 10), random.normal(0.05, 0.01, 10)
    moved, low, high = shift(a, b, 0.001)
    assert low is not None and high is not None and 0 < low < 0.05 < high and moved == pytest.approx(0.05, abs=0.01)
    b[3] = 5.0
    wild, low, _ = shift(a, b, 0.001)
    assert low is not None and low > 0 and wild == pytest.approx(moved, abs=0.005)


DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda random, n: random.normal(0, 0.01, n),
    "one placement in three is slow": lambda random, n: 0.1 * (random.random(n) < 0.3) + random.normal(0, 0.005, n),
    "rarely far off": lambda random, n: random.normal(0, 0.01, n) + 0.5 * (random.random(n) < 0.1),
    "skewed": lambda random, n: random.exponential(0.02, n),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_the_interval_covers_what_is_true_as_often_as_it_says(kind: str) -> None:
    """What differs between sittings need not be normal: placements are of a few kinds, and neighbours come and go."""
    random, wrong, trials = np.random.default_rng(7), 0, 2000
    for _ in range(trials):
        _, low, high = shift(DRAWS[kind](random, 10), DRAWS[kind](random, 10) + 0.03, 0.05)
        assert low is not None and high is not None
        wrong += not low <= 0.03 <= high
    assert 0.025 < wrong / trials < 0.06

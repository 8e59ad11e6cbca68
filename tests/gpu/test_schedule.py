"""Calls cut into buckets: every position once and in order, one run wherever one bucket holds all."""

import random
from collections import namedtuple

import pytest

from tmlc.runtimes.cuda.schedule import schedule

Shape = namedtuple("Shape", "batch n")
SHAPES = [Shape(b, n) for b in (1, 2, 4, 8) for n in (1, 4, 16) if b * n <= 32]


def covered(counts, runs):
    at = [0] * len(counts)
    for shape, pieces in runs:
        assert 1 <= len(pieces) <= shape.batch and len({k for k, *_ in pieces}) == len(pieces)
        for k, first, n in pieces:
            assert first == at[k] and 1 <= n <= shape.n
            at[k] += n
    return at


@pytest.mark.parametrize("seed", range(40))
def test_every_position_runs_once_and_in_order(seed):
    draw = random.Random(seed)
    counts = [draw.randint(1, draw.choice([1, 3, 40])) for _ in range(draw.randint(1, 13))]
    assert covered(counts, schedule(counts, SHAPES)) == counts


@pytest.mark.parametrize(
    ("counts", "shape"),
    [([1], (1, 1)), ([3], (1, 4)), ([5, 1], (2, 16)), ([1, 1, 1], (4, 1)), ([4] * 5, (8, 4)), ([16, 2], (2, 16))],
)
def test_one_run_in_the_smallest_bucket_that_holds_all(counts, shape):
    ((found, pieces),) = schedule(counts, SHAPES)
    assert found == shape and [n for *_, n in pieces] == counts


def test_what_no_bucket_holds_takes_few_runs():
    assert len(schedule([64], SHAPES)) == 4
    assert len(schedule([1] * 20, SHAPES)) == 3
    assert [shape for shape, _ in schedule([17, 1], SHAPES)] == [(2, 16), (1, 1)]

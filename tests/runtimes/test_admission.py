"""Step tables, what they admit, and the ladder under pressure."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmlc.errors import UsageError
from tmlc.runtimes.core.admission import Ladder, Level, StepTable, measure

seconds = st.floats(1e-4, 1.0)
tables = st.dictionaries(st.integers(1, 64), seconds, min_size=1, max_size=6)


def test_a_table_is_linear_between_and_beyond_what_was_measured():
    table = StepTable({2: 0.02, 4: 0.06})
    assert [table.predict(size) for size in (1, 2, 3, 4, 6)] == pytest.approx([0.02, 0.02, 0.04, 0.06, 0.10])
    assert StepTable({2: 0.02}).predict(6) == pytest.approx(0.06), "of one size: in proportion"


@given(measured=tables, budget=seconds)
def test_more_sessions_never_take_less_and_the_largest_batch_is_the_largest(measured, budget):
    table = StepTable(measured)
    predicted = [table.predict(size) for size in range(1, 80)]
    assert all(b >= a - 1e-9 for a, b in pairwise(predicted))
    largest = table.largest(budget, 79)
    assert largest == 1 or predicted[largest - 1] <= budget
    assert largest == 79 or predicted[largest] > budget - 1e-9


@pytest.mark.parametrize("measured", [{}, {0: 0.1}, {1: 0.0}, {1: float("nan")}, {1: float("inf")}])
def test_a_table_that_makes_no_sense_is_refused(measured):
    with pytest.raises(UsageError, match=r"step table .*\n  let tmlc\.runtimes\.core\.admission\.measure\(engine\)"):
        StepTable(measured)


def test_observed_steps_correct_the_table_within_bounds():
    table = StepTable({1: 0.01, 10: 0.1})
    for _ in range(63):
        table.observe(10, 0.2)
    assert table.correction == 1.0, "too few to say"
    table.observe(1, 0.02)
    assert table.predict(4) == pytest.approx(0.08)
    for _ in range(256):
        table.observe(10, 10.0)
    assert table.correction == 4.0
    for _ in range(300):
        table.observe(10, 0.001)
    assert table.correction == 0.75 and table.to_json() == {"step_ms": {"1": 10.0, "10": 100.0}, "correction": 0.75}


def test_one_slow_step_in_a_hundred_does_not_decide():
    table = StepTable({1: 0.01})
    for number in range(256):
        table.observe(1, 0.5 if number in (50, 150) else 0.01)
    assert table.correction == 1.0


def climb(ladder, busy, late, count, start=0.0):
    """The level after each of `count` periods."""
    out = []
    for number in range(count):
        ladder.edge(start + 0.2 * number, busy, late)
        out.append(ladder.level)
    return out


def test_the_ladder_climbs_a_level_a_second_as_far_as_the_pressure_goes():
    levels = climb(Ladder(0.2), busy=0.19, late=0.0, count=30)
    assert levels[0] == Level.NO_ADMISSION and levels[-1] == Level.SLOW_VIDEO
    assert [levels.index(level) for level in (1, 2)] == [0, 5]
    assert climb(Ladder(0.2), busy=0.2, late=0.1, count=30)[-1] == Level.NO_BACKGROUND
    assert climb(Ladder(0.2), busy=0.15, late=0.0, count=30)[-1] == Level.NORMAL


def test_the_ladder_descends_after_five_calm_seconds_only():
    ladder = Ladder(0.2)
    climb(ladder, 0.19, 0.0, 10)
    assert ladder.level == 2
    assert climb(ladder, 0.165, 0.0, 60, start=2.0)[-1] == 2, "within the hysteresis it stays"
    levels = climb(ladder, 0.05, 0.0, 70, start=14.0)
    assert levels[-1] == 0 and levels[20] == 2
    down = [levels.index(Level.NO_ADMISSION), levels.index(Level.NORMAL)]
    assert down[0] >= 25 and down[1] - down[0] >= 25


@pytest.mark.parametrize("kind", ["interaction", "tokens"])
def test_measuring_an_engine_leaves_it_as_it_was(make_engine, kind):
    engine = make_engine(kind=kind, sessions=3, max_append=64)
    table = measure(engine, rounds=2)
    assert set(table.to_json()["step_ms"]) == {"1", "2", "3"} and engine.capacity().free == 3


def test_an_engine_that_takes_one_session_at_a_time_is_measured_so(make_engine, backend):
    backend.unbatched = "decode: its rows belong to no position"
    table = measure(make_engine(backend), rounds=2, long_context=False)
    assert set(table.to_json()["step_ms"]) == {"1"}

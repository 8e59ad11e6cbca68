"""What happens to sessions that are late: run now, collapse, end; on a clock that only the test moves."""

import numpy as np
import pytest


def test_a_tick_late_runs_now_and_more_collapses(world):
    here = world()
    guest = here.guest()
    here.scheduler.step()
    guest.hear(0.1)
    here.clock.advance(0.4)  # the first tick is due at 0.2
    here.scheduler.step()
    assert guest.outs[-1].collapsed == 0 and round(guest.outs[-1].late, 6) == 0.2
    here.scheduler.step()
    assert (guest.outs[-1].collapsed, guest.outs[-1].late) == (0, 0)
    for level in (0.2, 0.3, 0.4):
        guest.hear(level)
    here.clock.advance(0.6)
    here.scheduler.step()
    last = guest.outs[-1]
    assert (last.collapsed, last.output.index, last.output.stats["collapsed"]) == (2, 4, 2)
    assert round(last.due, 6) == 1.0 and last.missing == 0
    assert [record["missed"] for record in guest.noted("collapse")] == [2]
    assert here.scheduler.step() == [], "back on the grid"
    counters = guest.seat.counters()
    assert (counters.ticks, counters.collapses, counters.collapsed, counters.late) == (5, 1, 2, 2)


def test_what_was_heard_while_the_device_was_away_is_all_taken_in(world):
    here = world(max_append=64)
    guest = here.guest()
    here.scheduler.step()
    levels = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    for level in levels:
        guest.hear(level)
    here.clock.advance(1.2)
    here.scheduler.step()
    heard = [value for kind, value in here.engine.backend.said if kind == "audio"]
    assert heard == pytest.approx(np.repeat(levels, 2) * 8)
    assert guest.outs[0].collapsed == 5 and guest.seat.counters().missing == 0


def test_more_than_five_ticks_late_ends_alone_and_can_be_resumed(world):
    here = world()
    guest = here.guest()
    here.edges(2)
    other = here.guest()
    here.clock.advance(1.4)
    here.scheduler.step()
    assert guest.end.reason == "behind" and "6.0 ticks late" in guest.end.detail and other.end is None
    again = here.guest(snapshot=guest.end.snapshot)
    here.scheduler.step()
    here.clock.advance(0.2)
    here.scheduler.step()
    assert again.outs[0].output.index == 1


def test_a_stall_inside_a_step_is_caught_up_with_and_nothing_heard_is_lost(world):
    here = world(max_append=64)
    guests = [here.guest(seed=k) for k in range(3)]
    here.edges(2)
    stall = iter([1.0])
    here.engine.backend.on_call = lambda method: here.clock.advance(next(stall, 0.0))
    for number in range(8):
        for guest in guests:
            for _ in range(6 if number == 1 else 1):
                guest.hear(0.1)
        here.edges()
    for guest in guests:
        assert [out.collapsed for out in guest.outs] == [0, 0, 5, 0, 0, 0, 0, 0, 0] and guest.end is None
        counters = guest.seat.counters()
        assert (counters.dropped_late, counters.dropped_overflow, counters.over_budget) == (0, 0, 1)
    assert len({guest.outs[-1].due for guest in guests}) == 1


def test_the_third_collapse_in_ten_seconds_ends_the_session(world):
    here = world()
    guest = here.guest()
    here.scheduler.step()
    for _ in range(2):
        here.clock.advance(0.6)
        here.scheduler.step()
    here.clock.advance(0.6)
    here.scheduler.step()
    assert guest.end.reason == "behind" and "3 collapses in 10 s" in guest.end.detail and guest.end.snapshot
    assert [out.collapsed for out in guest.outs] == [2, 2]


def test_collapses_far_apart_end_nobody(world):
    here = world()
    guest = here.guest()
    here.scheduler.step()
    for _ in range(6):
        here.clock.advance(0.6)
        here.scheduler.step()
        here.edges(30)
    assert guest.end is None and guest.seat.counters().collapses == 6


def test_when_all_collapse_too_often_they_end_one_by_one_the_newest_first(world):
    here = world(sessions=4)
    guests = [here.guest() for _ in range(4)]
    here.scheduler.step()
    for _ in range(3):
        here.clock.advance(0.6)
        here.scheduler.step()
    assert [guest.end is not None for guest in guests] == [False, False, False, True]
    here.clock.advance(0.6)
    here.scheduler.step()
    assert [guest.end is not None for guest in guests] == [False, False, True, True]

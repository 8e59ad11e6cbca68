"""Many sessions on a virtual clock: the grid under capacity, under overload, after a stall, and under whatever
comes."""

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmlc.errors import CapacityError, SessionError, UsageError
from tmlc.runtimes.core.admission import StepTable
from tmlc.runtimes.core.clock import VirtualClock
from tmlc.runtimes.core.live import Ended, Published
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.synthetic import SILENCE, StepTime, SyntheticEngine
from tmlc.runtimes.core.tick import TickInput
from tmlc.runtimes.core.ticklog import replay

VOICE = np.full(3200, 0.1, np.float32)


class World:
    """A server of synthetic sessions: every client sends 200 ms of voice in each period."""

    def __init__(self, sessions, step, table=None, voice=VOICE):
        self.clock = VirtualClock()
        self.engine = SyntheticEngine(self.clock, step, sessions=sessions)
        self.scheduler = Scheduler(self.engine, clock=self.clock, table=table)
        self.voice, self.seats, self.ends = voice, [], {}
        self.ticks, self.collapsed, self.latest = {}, 0, []
        self._sent = 0

    def open(self, count=1):
        for _ in range(count):
            seat = self.scheduler.open(self._sink)
            self.seats.append(seat)
            self.ticks[seat.id] = 0

    def _sink(self, event):
        if isinstance(event, Ended):
            assert event.seat not in self.ends
            self.ends[event.seat] = event
        else:
            assert event.seat not in self.ends and event.output.index == self.ticks[event.seat] + event.collapsed
            self.ticks[event.seat] = event.output.index + 1
            self.collapsed += event.collapsed
            self.latest.append((self.clock.now(), event.late))

    def run(self, seconds):
        """So many seconds of serving. A step that is over the next edge is followed by the next one at once."""
        end, behind = self.clock.now() + seconds, False
        while self.clock.now() < end:
            if not behind:
                self.clock.wait(self.scheduler.next_edge)
            edge = self.clock.edge(self.clock.now())
            for _ in range(edge - self._sent):
                for seat in self.seats:
                    seat.hear(self.voice)
            self._sent = edge
            self.scheduler.step()
            behind = self.clock.edge(self.clock.now()) > edge


def check_thousand(seconds):
    """1,000 sessions that join over four seconds, at 120 ms a step for all of them."""
    world = World(1000, StepTime(0.02, 0.0001), table=StepTable({1: 0.0201, 1000: 0.12}))
    for _ in range(20):
        world.open(50)
        world.run(0.2)
    with pytest.raises(CapacityError):
        world.open()
    world.run(1.0)
    world.latest.clear()
    objects, before = len(gc.get_objects()), world.scheduler.stats()
    world.run(seconds)
    world.latest.clear()
    grown, stats = len(gc.get_objects()) - objects, world.scheduler.stats()
    assert (stats.late, stats.over_budget, stats.collapses, world.ends) == (0, 0, 0, {})
    assert stats.ticking == 1000 and stats.ticks - before.ticks == 1000 * (stats.edge - before.edge)
    assert grown < 1000, "an object a session at most, whatever time passes"
    for seat in world.seats:
        seat.close()
    world.run(0.4)
    assert world.engine.capacity().free == 1000 and len(world.ends) == 1000


def test_a_thousand_sessions_keep_the_grid():
    check_thousand(4.0)


@pytest.mark.slow
def test_a_thousand_sessions_keep_the_grid_for_minutes():
    check_thousand(180.0)


def test_under_overload_the_newest_end_and_the_others_go_on():
    world = World(100, StepTime(0.03, 0.002, 0.0006))
    world.open(70)
    world.run(4.0)
    assert world.scheduler.stats().late == 0
    world.open(100 - 70 if world.scheduler.admit() is None else 0)
    assert len(world.seats) == 70, "at 0.85 of the time the ladder admits nobody"
    world = World(100, StepTime(0.03, 0.002, 0.0006))
    world.open(100)
    world.run(30.0)
    ended = [number for number, seat in enumerate(world.seats) if seat.id in world.ends]
    assert ended == list(range(100 - len(ended), 100)) and 10 <= len(ended) <= 20
    assert {end.reason for end in world.ends.values()} == {"behind"}
    assert all(world.engine.restore(end.snapshot).ticks for end in list(world.ends.values())[:1])
    survivors = [world.ticks[seat.id] for seat in world.seats[: 100 - len(ended)]]
    assert max(survivors) - min(survivors) <= 1 and min(survivors) >= 30 / 0.2 - 3


def test_a_stall_of_a_second_is_recovered_from_within_two_at_086_of_the_time():
    world = World(100, StepTime(0.012, 0.0016, 0.0004))
    world.open(100)
    world.run(5.0)
    assert world.scheduler.stats().utilisation == pytest.approx(0.86, abs=0.01)
    world.engine.stall(1.0)
    world.run(0.2)
    over = world.clock.now()
    world.latest.clear()
    world.run(10.0)
    last = max(at for at, late in world.latest if late > 0.02)
    assert last - over <= 2.0 and not world.ends and world.collapsed >= 400
    stats = world.scheduler.stats()
    assert (stats.missing, stats.dropped_late, stats.dropped_overflow) == (0, 0, 0)
    heard = {seat.session.memory.heard for seat in world.seats}
    assert heard == {3200 * seat.engine_session_tick for seat in world.seats[:1]}, "all that was said was taken in"


def test_stalls_of_a_device_that_is_fast_enough_end_one_session_at_a_time():
    world = World(20, StepTime(0.01, 0.002, 0.0004))
    world.open(20)
    for _ in range(3):
        world.run(2.0)
        world.engine.stall(1.0)
    world.run(2.0)
    assert list(world.ends) == [world.seats[-1].id]


def test_jitter_of_steps_costs_nobody_a_session():
    world = World(50, StepTime(0.02, 0.0016, 0.0004, jitter=0.25))
    world.open(50)
    world.run(60.0)
    assert not world.ends and world.scheduler.stats().late < 0.05 * world.scheduler.stats().ticks


actions = st.one_of(
    st.tuples(st.just("open"), st.just(0)), st.tuples(st.just("run"), st.floats(0.01, 3.0)),
    st.tuples(st.just("stall"), st.floats(0.0, 2.5)), st.tuples(st.just("hear"), st.integers(0, 9000)),
    st.tuples(st.sampled_from(["close", "detach", "attach", "snapshot"]), st.integers(0, 9)),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(plan=st.lists(actions, max_size=25), each=st.floats(0.001, 0.06))
def test_whatever_comes_slots_ticks_and_ends_add_up(plan, each):
    clock = VirtualClock()
    engine = SyntheticEngine(clock, StepTime(0.01, each, 0.2 * each), sessions=5)
    scheduler = Scheduler(engine, clock=clock, resume_window=1.0)
    seats, events, logs, futures = [], {}, {}, []
    for what, value in plan:
        seat = seats[int(value) % len(seats)] if seats else None
        if what == "open":
            if scheduler.admit() is None:
                mine, log = [], []
                seats.append(scheduler.open(mine.append, log=log.append))
                events[seats[-1].id], logs[seats[-1].id] = mine, log
            else:
                with pytest.raises(CapacityError):
                    scheduler.open(print)
        elif what == "run":
            clock.advance(value)
            for _ in range(10):
                scheduler.step()
        elif what == "stall":
            engine.stall(value)
        elif seat is not None and what == "hear":
            seat.hear(np.full(value, 0.1, np.float32))
        elif seat is not None and what == "close":
            seat.close()
        elif seat is not None:
            try:
                if what == "snapshot":
                    futures.append(seat.snapshot())
                elif what == "detach":
                    seat.detach()
                else:
                    seat.attach(events[seat.id].append)
            except SessionError:
                assert seat.state == "ended"
    stats = scheduler.stats()
    assert stats.joining + stats.ticking + stats.detached == sum(seat.state != "ended" for seat in seats)
    scheduler.close()
    assert engine.capacity().free == 5 and all(future.done() for future in futures)
    for seat in seats:
        mine = events[seat.id]
        assert [isinstance(event, Ended) for event in mine] == [False] * (len(mine) - 1) + [True]
        index = -1
        for out in mine[:-1]:
            assert isinstance(out, Published) and 0 <= out.collapsed <= 5
            assert out.output.index == index + 1 + out.collapsed and out.started >= out.due - 1e-9
            assert out.late <= 0.2 + 1e-6
            assert abs(out.due / 0.2 - round(out.due / 0.2)) < 1e-6
            index = out.output.index
        if logs[seat.id]:
            assert replay(SyntheticEngine(VirtualClock()), logs[seat.id]) == index + 1
            assert logs[seat.id][-1]["event"] == "end" and logs[seat.id][-1]["reason"] == mine[-1].reason


def test_a_session_answers_when_a_voice_ends():
    engine = SyntheticEngine(VirtualClock(), reply_ticks=2)
    session = engine.session(seed=1)
    outs = [session.run(TickInput(audio), (), 1, 0.0) for audio in (None, VOICE, VOICE, None, None, None)]
    assert [out.stats["silent"] for out in outs] == [1, 1, 1, 0, 0, 1]
    assert [bool(np.abs(out.audio).max() > 0.1) for out in outs] == [False] * 3 + [True] * 2 + [False]
    assert outs[0].tokens == [SILENCE] and outs[3].text


def test_a_snapshot_of_a_synthetic_session_goes_on():
    engine = SyntheticEngine(VirtualClock())
    one = engine.session(seed=3)
    one.run(TickInput(VOICE), (), 1, 0.0)
    two = engine.restore(one.snapshot())
    assert two.run(TickInput(), (), 1, 0.0).tokens == one.run(TickInput(), (), 1, 0.0).tokens
    with pytest.raises(SessionError, match=r"(?s)synthetic.*\n  take it again with session\.snapshot\(\)"):
        engine.restore(b"{}")
    with pytest.raises(UsageError, match=r"of 0 sessions .*\n  give sessions of 1 or more"):
        SyntheticEngine(VirtualClock(), sessions=0)
    two.detach()
    with pytest.raises(SessionError, match=r"detached\n  attach\(\) it first"):
        two.run(TickInput(), (), 1, 0.0)

"""The grid, batches, lateness and the life of a seat, on a clock that only the test moves."""

import threading

import numpy as np
import pytest

from tmlc.errors import CapacityError, InputError, SessionError, UsageError
from tmlc.runtimes.core.admission import StepTable
from tmlc.runtimes.core.clock import ManualClock, WallClock
from tmlc.runtimes.core.live import NOTHING, Delivery, Ended, Published
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.streams import Pace
from tmlc.runtimes.core.ticklog import replay

TICK = 16  # samples


def audio(level: float, samples: int = TICK) -> np.ndarray:
    return np.full(samples, level, np.float32)


class Guest:
    """A client: keeps what its sink gets."""

    def __init__(self, scheduler, **options):
        self.events = []
        self.log = []
        self.seat = scheduler.open(self.events.append, log=self.log.append, **options)

    @property
    def outs(self):
        return [event for event in self.events if isinstance(event, Published)]

    @property
    def end(self):
        assert len([e for e in self.events if isinstance(e, Ended)]) <= 1
        return self.events[-1] if self.events and isinstance(self.events[-1], Ended) else None

    def noted(self, event):
        return [record for record in self.log if record["event"] == event]


class Box:
    """An inbox that hands out what it holds, one delivery an edge."""

    def __init__(self, *deliveries):
        self.deliveries, self.moments, self.done = list(deliveries), [], []

    def take(self, moment):
        self.moments.append(moment)
        return self.deliveries.pop(0) if self.deliveries else NOTHING

    def published(self, out):
        self.done.append(out)


@pytest.fixture
def world(make_engine):
    """make(**options of the engine) -> (engine, clock, scheduler)."""

    def make(table=None, resume_window=30.0, **options):
        engine, clock = make_engine(**options), ManualClock()
        return engine, clock, Scheduler(engine, clock=clock, table=table, resume_window=resume_window)

    return make


def edges(clock, scheduler, count=1):
    for _ in range(count):
        clock.advance(0.2)
        scheduler.step()


def test_a_session_ticks_at_each_edge_from_the_next_one_on(world):
    _, clock, scheduler = world()
    clock.advance(0.13)
    guest = Guest(scheduler)
    assert scheduler.step() == []
    guest.seat.hear(audio(0.5))
    clock.advance(0.07)
    assert scheduler.step() == guest.outs and len(guest.outs) == 1
    edges(clock, scheduler, 3)
    assert [round(out.due, 6) for out in guest.outs] == [0.2, 0.4, 0.6, 0.8]
    assert [out.output.index for out in guest.outs] == [0, 1, 2, 3]
    assert [out.missing for out in guest.outs] == [0, TICK, TICK, TICK]
    assert guest.seat.engine_session_tick == 4 and guest.outs[0].seat == guest.seat.id


def test_nothing_runs_before_its_edge_and_nothing_twice(world):
    _, clock, scheduler = world()
    guest = Guest(scheduler)
    for _ in range(40):
        clock.advance(0.05)
        scheduler.step()
        scheduler.step()
    assert len(guest.outs) == 10


def test_sessions_that_join_at_different_times_share_their_edges_and_batches(world):
    _, clock, scheduler = world()
    first = Guest(scheduler)
    edges(clock, scheduler, 2)
    clock.advance(0.1)
    second = Guest(scheduler)
    scheduler.step()
    clock.advance(0.1)
    scheduler.step()
    assert [out.output.stats["batch"] for out in first.outs] == [1, 2]
    assert first.outs[-1].due == second.outs[0].due and second.outs[0].output.index == 0


def test_a_tick_late_runs_now_and_more_collapses(world):
    _, clock, scheduler = world()
    guest = Guest(scheduler)
    scheduler.step()
    guest.seat.hear(audio(0.1))
    clock.advance(0.4)  # the first tick is due at 0.2
    scheduler.step()
    assert guest.outs[-1].collapsed == 0 and round(guest.outs[-1].late, 6) == 0.2
    scheduler.step()
    assert (guest.outs[-1].collapsed, guest.outs[-1].late) == (0, 0)
    for level in (0.2, 0.3, 0.4):
        guest.seat.hear(audio(level))
    clock.advance(0.6)
    scheduler.step()
    last = guest.outs[-1]
    assert (last.collapsed, last.output.index, last.output.stats["collapsed"]) == (2, 4, 2)
    assert round(last.due, 6) == 1.0 and last.missing == 0
    assert [record["missed"] for record in guest.noted("collapse")] == [2]
    assert scheduler.step() == [], "back on the grid"
    counters = guest.seat.counters()
    assert (counters.ticks, counters.collapses, counters.collapsed, counters.late) == (5, 1, 2, 2)


def test_what_was_heard_while_the_device_was_away_is_all_taken_in(world):
    engine, clock, scheduler = world(max_append=64)
    guest = Guest(scheduler)
    scheduler.step()
    levels = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    for level in levels:
        guest.seat.hear(audio(level))
    clock.advance(1.2)
    scheduler.step()
    heard = [value for kind, value in engine.backend.said if kind == "audio"]
    assert heard == pytest.approx(np.repeat(levels, 2) * 8)
    assert guest.outs[0].collapsed == 5 and guest.seat.counters().missing == 0


def test_more_than_five_ticks_late_ends_alone_and_can_be_resumed(world):
    _, clock, scheduler = world()
    guest = Guest(scheduler)
    edges(clock, scheduler, 2)
    other = Guest(scheduler)
    clock.advance(1.4)
    scheduler.step()
    assert guest.end.reason == "behind" and "6.0 ticks late" in guest.end.detail and other.end is None
    again = Guest(scheduler, snapshot=guest.end.snapshot)
    scheduler.step()
    clock.advance(0.2)
    scheduler.step()
    assert again.outs[0].output.index == 1


def test_a_stall_inside_a_step_is_caught_up_with_and_nothing_heard_is_lost(world):
    engine, clock, scheduler = world(max_append=64)
    guests = [Guest(scheduler, seed=k) for k in range(3)]
    edges(clock, scheduler, 2)
    stall = iter([1.0])
    engine.backend.on_call = lambda method: clock.advance(next(stall, 0.0))
    for number in range(8):
        for guest in guests:
            for _ in range(6 if number == 1 else 1):
                guest.seat.hear(audio(0.1))
        edges(clock, scheduler)
    for guest in guests:
        assert [out.collapsed for out in guest.outs] == [0, 0, 5, 0, 0, 0, 0, 0, 0] and guest.end is None
        counters = guest.seat.counters()
        assert (counters.dropped_late, counters.dropped_overflow, counters.over_budget) == (0, 0, 1)
    assert len({guest.outs[-1].due for guest in guests}) == 1


def test_the_third_collapse_in_ten_seconds_ends_the_session(world):
    _, clock, scheduler = world()
    guest = Guest(scheduler)
    scheduler.step()
    for _ in range(2):
        clock.advance(0.6)
        scheduler.step()
    clock.advance(0.6)
    scheduler.step()
    assert guest.end.reason == "behind" and "3 collapses in 10 s" in guest.end.detail and guest.end.snapshot
    assert [out.collapsed for out in guest.outs] == [2, 2]


def test_collapses_far_apart_end_nobody(world):
    _, clock, scheduler = world()
    guest = Guest(scheduler)
    scheduler.step()
    for _ in range(6):
        clock.advance(0.6)
        scheduler.step()
        edges(clock, scheduler, 30)
    assert guest.end is None and guest.seat.counters().collapses == 6


def test_when_all_collapse_too_often_they_end_one_by_one_the_newest_first(world):
    _, clock, scheduler = world(sessions=4)
    guests = [Guest(scheduler) for _ in range(4)]
    scheduler.step()
    for _ in range(3):
        clock.advance(0.6)
        scheduler.step()
    assert [guest.end is not None for guest in guests] == [False, False, False, True]
    clock.advance(0.6)
    scheduler.step()
    assert [guest.end is not None for guest in guests] == [False, False, True, True]


def test_who_comes_back_between_two_batches_waits_for_the_next_edge(world):
    _, clock, scheduler = world(sessions=3)
    first, second = Guest(scheduler), Guest(scheduler)
    edges(clock, scheduler, 2)
    scheduler.table = StepTable({1: 0.1, 2: 0.3})  # one at a time

    def sink(event):
        first.events.append(event)
        second.seat.detach()
        scheduler._serve()
        second.seat.attach(second.events.append)

    first.seat.sink = sink
    edges(clock, scheduler)
    assert [len(guest.outs) for guest in (first, second)] == [2, 1]
    first.seat.sink = first.events.append
    edges(clock, scheduler)
    assert [len(guest.outs) for guest in (first, second)] == [3, 2] and second.outs[-1].due == first.outs[-1].due


def test_a_batch_that_would_break_the_budget_is_split(world):
    table = StepTable({1: 0.05, 2: 0.1, 3: 0.2, 4: 0.3})
    _, clock, scheduler = world(sessions=5, table=None)
    guests = [Guest(scheduler) for _ in range(5)]
    scheduler.table = table
    scheduler.step()
    edges(clock, scheduler)
    assert [guest.outs[0].output.stats["batch"] for guest in guests] == [2, 2, 2, 2, 1]


def test_the_earliest_deadline_runs_first(world):
    _, clock, scheduler = world(sessions=3)
    early, late = Guest(scheduler, seed=1), Guest(scheduler, seed=2)
    scheduler.step()
    edges(clock, scheduler)
    scheduler.table = StepTable({1: 0.1, 2: 0.3})  # one at a time
    early.seat.order = late.seat.order + 1  # so that only its deadline speaks for it
    early.seat.due -= 1
    order = []
    clock.advance(0.2)
    early.seat.sink, late.seat.sink = (lambda out: order.append("early")), (lambda out: order.append("late"))
    scheduler.step()
    assert order == ["early", "late"]


def test_admission_is_by_slots_and_says_when_to_come_again(world):
    _, clock, scheduler = world(sessions=2, resume_window=10.0)
    first = Guest(scheduler)
    Guest(scheduler)
    with pytest.raises(CapacityError, match="all 2 sessions") as refused:
        Guest(scheduler)
    assert refused.value.retry_after == scheduler.admit() == 5.0
    scheduler.step()
    first.seat.detach()
    scheduler.step()
    clock.advance(7.0)
    assert scheduler.admit() == pytest.approx(3.0)
    first.seat.close()
    scheduler.step()
    assert scheduler.admit() is None and scheduler.stats().refused == 1


def test_admission_is_by_the_predicted_step(world):
    _, _, scheduler = world(sessions=4, table=StepTable({1: 0.05, 2: 0.12, 3: 0.13}))
    Guest(scheduler), Guest(scheduler)
    with pytest.raises(CapacityError, match="would make the others late"):
        Guest(scheduler)
    assert scheduler.admit() == 5.0 and not scheduler.stats().admits


def test_a_detached_session_keeps_its_slot_and_resumes_at_the_next_edge(world):
    engine, clock, scheduler = world(resume_window=5.0)
    guest = Guest(scheduler)
    edges(clock, scheduler, 2)
    guest.seat.detach()
    edges(clock, scheduler, 3)
    assert len(guest.outs) == 1 and scheduler.stats().detached == 1 and engine.capacity().free == 2
    guest.seat.hear(audio(0.5))
    fresh = []
    guest.seat.attach(fresh.append)
    scheduler.step()
    edges(clock, scheduler, 2)
    assert [out.output.index for out in fresh] == [1, 2] and fresh[0].missing == TICK
    assert guest.seat.counters().dropped_overflow == TICK
    assert [r["event"] for r in guest.log if r["event"] in ("detach", "attach")] == ["detach", "attach"]


def test_a_second_client_takes_a_session_over(world):
    _, clock, scheduler = world()
    guest, fresh = Guest(scheduler), []
    edges(clock, scheduler, 2)
    guest.seat.attach(fresh.append)
    edges(clock, scheduler)
    assert len(guest.outs) == 1 and [out.output.index for out in fresh] == [1]


def test_a_session_that_nobody_comes_back_for_expires_with_a_snapshot(world):
    engine, clock, scheduler = world(resume_window=1.0)
    guest = Guest(scheduler)
    edges(clock, scheduler, 2)
    guest.seat.detach()
    edges(clock, scheduler, 7)
    assert guest.end.reason == "expired" and engine.capacity().free == 3
    with pytest.raises(SessionError, match="ended"):
        guest.seat.attach(print)
    assert engine.restore(guest.end.snapshot).ticks == 1


def test_closing_ends_once_and_frees_the_slot(world):
    engine, clock, scheduler = world()
    guest = Guest(scheduler)
    guest.seat.close()
    guest.seat.close()
    edges(clock, scheduler, 2)
    guest.seat.close()
    edges(clock, scheduler)
    assert (guest.end.reason, guest.end.snapshot, guest.outs) == ("closed", None, [])
    assert engine.capacity().free == 3 and scheduler.stats().ended == {"closed": 1}
    guest.seat.hear(audio(1))
    guest.seat.see(np.zeros((2, 3, 3), np.uint8))


def test_snapshots_are_taken_between_ticks_and_go_on_bit_for_bit(world):
    engine, clock, scheduler = world()
    guest = Guest(scheduler, seed=4)
    edges(clock, scheduler, 2)
    future = guest.seat.snapshot()
    edges(clock, scheduler, 2)
    twin = engine.restore(future.result(0))
    assert twin.ticks == 1 and twin.tick().audio.tobytes() == guest.outs[1].output.audio.tobytes()
    for _ in range(16):
        guest.seat.snapshot()
    with pytest.raises(CapacityError, match="16 snapshots"):
        guest.seat.snapshot()
    guest.seat.close()
    waiting = guest.seat._requests.snapshots[0]
    scheduler.step()
    assert waiting.result(0)
    with pytest.raises(SessionError):
        guest.seat.snapshot()


def test_a_snapshot_that_is_none_ends_that_session_only(world):
    engine, clock, scheduler = world()
    good, bad = Guest(scheduler), Guest(scheduler, snapshot=b"rubbish")
    edges(clock, scheduler, 2)
    assert bad.end.reason == "failed" and "snapshot" in bad.end.detail and len(good.outs) == 1
    assert engine.capacity().free == 2


@pytest.mark.parametrize("fault", ["inbox", "delivery", "published", "sink", "log", "end"])
def test_faults_of_one_session_end_that_session_only(world, fault):
    engine, clock, scheduler = world()

    class Bad(Box):
        def take(self, moment):
            if fault == "inbox":
                raise RuntimeError("broken inbox")
            return Delivery(say=(257,)) if fault == "delivery" else NOTHING

        def published(self, out):
            if fault == "published":
                raise RuntimeError("broken inbox")

    events = []

    def sink(event):
        events.append(event)
        if fault == "sink" or (fault == "end" and isinstance(event, Ended)):
            raise OSError("gone")

    def log(record):
        if fault == "log" and record["event"] == "tick":
            raise OSError("no space left")

    good = Guest(scheduler)
    seat = scheduler.open(sink, inbox=Bad(), log=log)
    edges(clock, scheduler, 2)
    if fault == "end":
        seat.close()
    edges(clock, scheduler)
    assert isinstance(events[-1], Ended) and len([e for e in events if isinstance(e, Ended)]) == 1
    assert events[-1].reason == ("closed" if fault == "end" else "failed")
    assert len(good.outs) == 2 and good.end is None and engine.capacity().free == 2


def test_a_context_that_is_used_up_ends_the_session(world, backend):
    backend.limit = 20
    _, clock, scheduler = world(backend=backend)
    guest = Guest(scheduler)
    edges(clock, scheduler, 6)
    assert guest.end.reason == "context" and guest.end.snapshot is None


def test_the_inbox_is_asked_at_each_edge_and_its_delivery_is_published(world):
    _, clock, scheduler = world()
    box = Box(Delivery(inject=(40, 41), say=(72, 105), parts=("a",)))
    guest = Guest(scheduler, inbox=box)
    guest.seat.hear(audio(0.5))
    edges(clock, scheduler, 3)
    assert [moment.tick for moment in box.moments] == [0, 1]
    assert (box.moments[0].say_room, box.moments[0].inject_room) == (2, 64)
    assert guest.outs[0].delivery.parts == ("a",) and guest.outs[0].output.text == "Hi"
    assert box.done == guest.outs and box.moments[1].user_speaking and box.moments[1].quiet == 0
    assert guest.seat.counters().injected == 2 and guest.seat.counters().said == 2


def test_quiet_counts_from_the_last_voice(world):
    _, clock, scheduler = world(silence_level=0.0)
    box = Box()
    guest = Guest(scheduler, inbox=box)
    guest.seat.hear(audio(0.5))
    edges(clock, scheduler, 6)
    assert [round(moment.quiet, 6) for moment in box.moments] == [0, 0, 0, 0.2, 0.4][: len(box.moments)]


def test_typed_text_enters_and_is_bounded(world):
    engine, clock, scheduler = world()
    guest = Guest(scheduler)
    guest.seat.read("abc")
    with pytest.raises(InputError, match="65536"):
        guest.seat.read("x" * 65536)
    edges(clock, scheduler, 3)
    assert [value for kind, value in engine.backend.said if kind == "text" and value < 256] == [97, 98, 99]


def test_the_newest_frame_enters_when_the_model_looks(world):
    engine, clock, scheduler = world()
    guest = Guest(scheduler)
    for value in range(5):
        guest.seat.see(np.full((2, 3, 3), value, np.uint8))
        guest.seat.see(np.full((2, 3, 3), 10 + value, np.uint8))
        edges(clock, scheduler)
    seen = [value / 36 for kind, value in engine.backend.said if kind == "video"][::3]
    assert seen == [11, 13], "joined at the second edge; the model looks at every second tick"
    assert guest.seat.counters().dropped_frames == 7
    with pytest.raises(InputError, match="uint8"):
        guest.seat.see(np.zeros((2, 3), np.uint8))


def test_draining_admits_nobody_and_hands_everyone_a_snapshot(world):
    engine, clock, scheduler = world()
    guest = Guest(scheduler)
    edges(clock, scheduler, 2)
    scheduler.drain(grace=0.3)
    with pytest.raises(CapacityError):
        Guest(scheduler)
    edges(clock, scheduler)
    assert guest.end is None
    edges(clock, scheduler)
    assert guest.end.reason == "shutdown" and engine.restore(guest.end.snapshot).ticks == 2


def test_closing_the_scheduler_ends_all_also_those_that_never_joined(world):
    engine, clock, scheduler = world()
    guests = [Guest(scheduler)]
    edges(clock, scheduler, 2)
    guests += [Guest(scheduler), Guest(scheduler)]
    guests[2].seat.close()
    last = guests[0].seat.snapshot()
    scheduler.close()
    scheduler.close()
    assert [guest.end.reason for guest in guests] == ["shutdown", "shutdown", "closed"] and engine.capacity().free == 3
    assert engine.restore(last.result(0)).ticks == 1
    assert not scheduler.stats().running


def test_a_log_of_a_live_session_replays(world, make_engine):
    _, clock, scheduler = world()
    guest = Guest(scheduler, inbox=Box(Delivery(inject=(5,), say=(72,))), seed=9)
    for number in range(12):
        guest.seat.hear(audio(0.1 * number, 11 + number))
        if number % 3 == 0:
            guest.seat.read("hey")
            guest.seat.see(np.full((2, 3, 3), number, np.uint8))
        clock.advance(0.2 if number != 6 else 0.8)
        scheduler.step()
    guest.seat.detach()
    scheduler.step()
    guest.seat.attach(guest.events.append)
    edges(clock, scheduler, 2)
    guest.seat.close()
    edges(clock, scheduler)
    events = {record["event"] for record in guest.log}
    assert {"join", "collapse", "late", "missing", "dropped", "detach", "attach", "end"} <= events
    assert replay(make_engine(), guest.log) == sum(1 + out.collapsed for out in guest.outs)


def test_a_token_model_rests_until_something_comes_and_after_its_end(world, backend):
    _, clock, scheduler = world(backend=backend, kind="tokens")
    guest = Guest(scheduler)
    edges(clock, scheduler, 3)
    assert guest.outs == []
    backend.script.extend([72, 256])
    guest.seat.read("ab")
    edges(clock, scheduler, 3)
    assert [out.output.tokens for out in guest.outs] == [[72, 256]]


def test_a_long_prompt_of_a_token_model_enters_by_pieces(world, backend):
    _, clock, scheduler = world(backend=backend, kind="tokens")
    guest = Guest(scheduler)
    guest.seat.read("a" * 20)
    backend.script.extend([72, 256])
    edges(clock, scheduler, 2)
    assert guest.outs == [] and len(backend.said) == 8
    edges(clock, scheduler, 2)
    assert len(guest.outs) == 1 and len(backend.said) == 22


def test_bad_options_are_refused(make_engine):
    engine = make_engine()
    with pytest.raises(UsageError, match="period"):
        Scheduler(engine, clock=ManualClock(0.1))
    scheduler = Scheduler(engine, clock=ManualClock())
    with pytest.raises(UsageError, match="step"):
        scheduler.start()
    with pytest.raises(InputError, match="seed"):
        scheduler.open(print, seed=-1)
    with pytest.raises(InputError, match="temperature"):
        scheduler.open(print, temperature=-1.0)


def test_the_device_thread_keeps_the_grid_and_serves_every_thread(make_engine):
    engine = make_engine(sessions=3)
    scheduler = Scheduler(engine, clock=WallClock(0.2))
    scheduler.start()
    callers, ticked = set(), threading.Event()

    def sink(event):
        callers.add(threading.current_thread().name)
        if isinstance(event, Published) and event.output.index >= 1:
            ticked.set()

    seat = scheduler.open(sink, pace=Pace.BUFFERED)
    seat.hear(audio(0.1, 100))
    assert ticked.wait(20)
    assert engine.restore(seat.snapshot().result(20)).ticks >= 1
    other = scheduler.open(sink)
    other.close()
    with pytest.raises(UsageError, match="by itself"):
        scheduler.step()
    scheduler.drain(0.0)
    assert scheduler.stats().ticking == 0
    scheduler.close()
    assert callers == {"tmlc-device"}


def test_clients_on_many_threads_come_and_go_and_no_slot_leaks(make_engine):
    engine = make_engine(sessions=6)
    scheduler = Scheduler(engine, clock=WallClock(0.2))
    scheduler.start()
    ends, problems, lock = [], [], threading.Lock()

    def sink(event):
        if isinstance(event, Ended):
            with lock:
                ends.append(event.seat)

    def client(number):
        chance, opened = np.random.default_rng(number), 0
        try:
            while opened < 8:
                try:
                    seat = scheduler.open(sink, seed=number)
                except CapacityError as refused:
                    assert refused.retry_after
                    continue
                opened += 1
                for _ in range(int(chance.integers(0, 6))):
                    seat.hear(audio(0.1, int(chance.integers(1, 60))))
                    seat.read("x")
                if chance.random() < 0.5:
                    seat.detach()
                    seat.attach(sink)
                if chance.random() < 0.5:
                    assert seat.snapshot().result(30)
                seat.close()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    scheduler.close()
    assert not problems and len(ends) == len(set(ends)) == 32
    assert engine.capacity().free == 6 and scheduler.stats().ended == {"closed": 32}

"""The grid, batches, and what enters a tick, on a clock that only the test moves."""

import numpy as np
import pytest

from tmlc.errors import InputError, UsageError
from tmlc.runtimes.core.admission import StepTable
from tmlc.runtimes.core.clock import ManualClock
from tmlc.runtimes.core.live import NOTHING, Delivery
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.ticklog import replay

TICK = 16  # samples


class Box:
    """An inbox that hands out what it holds, one delivery an edge."""

    def __init__(self, *deliveries):
        self.deliveries, self.moments, self.done = list(deliveries), [], []

    def take(self, moment):
        self.moments.append(moment)
        return self.deliveries.pop(0) if self.deliveries else NOTHING

    def published(self, out):
        self.done.append(out)


def test_a_session_ticks_at_each_edge_from_the_next_one_on(world):
    here = world()
    here.clock.advance(0.13)
    guest = here.guest()
    assert here.scheduler.step() == []
    guest.hear(0.5)
    here.clock.advance(0.07)
    assert here.scheduler.step() == guest.outs and len(guest.outs) == 1
    here.edges(3)
    assert [round(out.due, 6) for out in guest.outs] == [0.2, 0.4, 0.6, 0.8]
    assert [out.output.index for out in guest.outs] == [0, 1, 2, 3]
    assert [out.missing for out in guest.outs] == [0, TICK, TICK, TICK]
    assert guest.seat.engine_session_tick == 4 and guest.outs[0].seat == guest.seat.id


def test_nothing_runs_before_its_edge_and_nothing_twice(world):
    here = world()
    guest = here.guest()
    for _ in range(40):
        here.clock.advance(0.05)
        here.scheduler.step()
        here.scheduler.step()
    assert len(guest.outs) == 10


def test_sessions_that_join_at_different_times_share_their_edges_and_batches(world):
    here = world()
    first = here.guest()
    here.edges(2)
    here.clock.advance(0.1)
    second = here.guest()
    here.scheduler.step()
    here.clock.advance(0.1)
    here.scheduler.step()
    assert [out.output.stats["batch"] for out in first.outs] == [1, 2]
    assert first.outs[-1].due == second.outs[0].due and second.outs[0].output.index == 0


def test_who_comes_back_between_two_batches_waits_for_the_next_edge(world):
    here = world(sessions=3)
    first, second = here.guest(), here.guest()
    here.edges(2)
    here.scheduler.table = StepTable({1: 0.1, 2: 0.3})  # one at a time

    def sink(event):
        first.events.append(event)
        second.seat.detach()
        here.scheduler._serve()
        second.seat.attach(second.events.append)

    first.seat.sink = sink
    here.edges()
    assert [len(guest.outs) for guest in (first, second)] == [2, 1]
    first.seat.sink = first.events.append
    here.edges()
    assert [len(guest.outs) for guest in (first, second)] == [3, 2] and second.outs[-1].due == first.outs[-1].due


def test_a_batch_that_would_break_the_budget_is_split(world):
    table = StepTable({1: 0.05, 2: 0.1, 3: 0.2, 4: 0.3})
    here = world(sessions=5, table=None)
    guests = [here.guest() for _ in range(5)]
    here.scheduler.table = table
    here.scheduler.step()
    here.edges()
    assert [guest.outs[0].output.stats["batch"] for guest in guests] == [2, 2, 2, 2, 1]


def test_the_earliest_deadline_runs_first(world):
    here = world(sessions=3)
    early, late = here.guest(seed=1), here.guest(seed=2)
    here.scheduler.step()
    here.edges()
    here.scheduler.table = StepTable({1: 0.1, 2: 0.3})  # one at a time
    early.seat.order = late.seat.order + 1  # so that only its deadline speaks for it
    early.seat.due -= 1
    order = []
    here.clock.advance(0.2)
    early.seat.sink, late.seat.sink = (lambda out: order.append("early")), (lambda out: order.append("late"))
    here.scheduler.step()
    assert order == ["early", "late"]


def test_the_inbox_is_asked_at_each_edge_and_its_delivery_is_published(world):
    here = world()
    box = Box(Delivery(inject=(40, 41), say=(72, 105), parts=("a",)))
    guest = here.guest(inbox=box)
    guest.hear(0.5)
    here.edges(3)
    assert [moment.tick for moment in box.moments] == [0, 1]
    assert (box.moments[0].say_room, box.moments[0].inject_room) == (2, 64)
    assert guest.outs[0].delivery.parts == ("a",) and guest.outs[0].output.text == "Hi"
    assert box.done == guest.outs and box.moments[1].user_speaking and box.moments[1].quiet == 0
    assert guest.seat.counters().injected == 2 and guest.seat.counters().said == 2


def test_quiet_counts_from_the_last_voice(world):
    here = world(silence_level=0.0)
    box = Box()
    guest = here.guest(inbox=box)
    guest.hear(0.5)
    here.edges(6)
    assert [round(moment.quiet, 6) for moment in box.moments] == [0, 0, 0, 0.2, 0.4][: len(box.moments)]


def test_typed_text_enters_and_is_bounded(world):
    here = world()
    guest = here.guest()
    guest.seat.read("abc")
    with pytest.raises(InputError, match="65536"):
        guest.seat.read("x" * 65536)
    with pytest.raises(InputError, match=r"valid Unicode at character 1\n  leave out the lone surrogate there"):
        guest.seat.read("a\ud800")
    here.edges(3)
    assert [value for kind, value in here.engine.backend.said if kind == "text" and value < 256] == [97, 98, 99]


def test_text_is_refused_where_nobody_can_read_it(world):
    deaf, here = world(text_in=0).guest(), world()
    with pytest.raises(InputError, match=r"does not read.*\n  give it audio instead"):
        deaf.seat.read("abc")
    guest = here.guest()
    here.engine.tokenizer = None
    with pytest.raises(InputError, match=r"no tokenizer.*\n  .*tokenizer\.json"):
        guest.seat.read("abc")


def test_the_newest_frame_enters_when_the_model_looks(world):
    here = world()
    guest = here.guest()
    for value in range(5):
        guest.seat.see(np.full((2, 3, 3), value, np.uint8))
        guest.seat.see(np.full((2, 3, 3), 10 + value, np.uint8))
        here.edges()
    seen = [value / 36 for kind, value in here.engine.backend.said if kind == "video"][::3]
    assert seen == [11, 13], "joined at the second edge; the model looks at every second tick"
    assert guest.seat.counters().dropped_frames == 7
    with pytest.raises(InputError, match=r"uint8 \[2, 3, 3\].*\n  .*3 × 2 pixels"):
        guest.seat.see(np.zeros((2, 3), np.uint8))


def test_a_log_of_a_live_session_replays(world, make_engine):
    here = world()
    guest = here.guest(inbox=Box(Delivery(inject=(5,), say=(72,))), seed=9)
    for number in range(12):
        guest.hear(0.1 * number, 11 + number)
        if number % 3 == 0:
            guest.seat.read("hey")
            guest.seat.see(np.full((2, 3, 3), number, np.uint8))
        here.clock.advance(0.2 if number != 6 else 0.8)
        here.scheduler.step()
    guest.seat.detach()
    here.scheduler.step()
    guest.seat.attach(guest.events.append)
    here.edges(2)
    guest.seat.close()
    here.edges()
    events = {record["event"] for record in guest.log}
    assert {"join", "collapse", "late", "missing", "dropped", "detach", "attach", "end"} <= events
    assert replay(make_engine(), guest.log) == sum(1 + out.collapsed for out in guest.outs)


def test_a_token_model_rests_until_something_comes_and_after_its_end(world, backend):
    here = world(backend=backend, kind="tokens")
    guest = here.guest()
    here.edges(3)
    assert guest.outs == []
    backend.script.extend([72, 256])
    guest.seat.read("ab")
    here.edges(3)
    assert [out.output.tokens for out in guest.outs] == [[72, 256]]


def test_a_long_prompt_of_a_token_model_enters_by_pieces(world, backend):
    here = world(backend=backend, kind="tokens")
    guest = here.guest()
    guest.seat.read("a" * 20)
    backend.script.extend([72, 256])
    here.edges(2)
    assert guest.outs == [] and len(backend.said) == 8
    here.edges(2)
    assert len(guest.outs) == 1 and len(backend.said) == 22


def test_bad_options_are_refused(make_engine):
    engine = make_engine()
    with pytest.raises(UsageError, match=r"period is 0\.1 s \(clock\)\n  make the clock with the period 0\.2"):
        Scheduler(engine, clock=ManualClock(0.1))
    for wrong in ({"resume_window": -1.0}, {"step_budget": 0.0}):
        with pytest.raises(UsageError, match=r"resume_window must be 0 or more .*\n  .* 30 and 0\.16"):
            Scheduler(engine, clock=ManualClock(), **wrong)
    scheduler = Scheduler(engine, clock=ManualClock())
    with pytest.raises(UsageError, match="step"):
        scheduler.start()
    with pytest.raises(InputError, match=r"seed .*\n  .*leave it out for 0"):
        scheduler.open(print, seed=-1)
    with pytest.raises(InputError, match=r"temperature .*\n  give 0 for the most likely"):
        scheduler.open(print, temperature=-1.0)

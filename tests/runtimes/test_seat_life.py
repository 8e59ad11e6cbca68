"""The life of a seat: admitted, detached, taken over, kept, ended; and a fault of one that is no other one's."""

import numpy as np
import pytest

from tmlc.errors import CapacityError, SessionError
from tmlc.runtimes.core.admission import StepTable
from tmlc.runtimes.core.live import NOTHING, Delivery, Ended

TICK = 16  # samples


def test_admission_is_by_slots_and_says_when_to_come_again(world):
    here = world(sessions=2, resume_window=10.0)
    first = here.guest()
    here.guest()
    with pytest.raises(CapacityError, match="all 2 sessions") as refused:
        here.guest()
    assert refused.value.retry_after == here.scheduler.admit() == 5.0
    here.scheduler.step()
    first.seat.detach()
    here.scheduler.step()
    here.clock.advance(7.0)
    assert here.scheduler.admit() == pytest.approx(3.0)
    first.seat.close()
    here.scheduler.step()
    assert here.scheduler.admit() is None and here.scheduler.stats().refused == 1


def test_admission_is_by_the_predicted_step(world):
    here = world(sessions=4, table=StepTable({1: 0.05, 2: 0.12, 3: 0.13}))
    here.guest(), here.guest()
    with pytest.raises(CapacityError, match="would make the others late"):
        here.guest()
    assert here.scheduler.admit() == 5.0 and not here.scheduler.stats().admits


def test_a_detached_session_keeps_its_slot_and_resumes_at_the_next_edge(world):
    here = world(resume_window=5.0)
    guest = here.guest()
    here.edges(2)
    guest.seat.detach()
    here.edges(3)
    assert len(guest.outs) == 1 and here.scheduler.stats().detached == 1 and here.engine.capacity().free == 2
    guest.hear(0.5)
    fresh = []
    guest.seat.attach(fresh.append)
    here.scheduler.step()
    here.edges(2)
    assert [out.output.index for out in fresh] == [1, 2] and fresh[0].missing == TICK
    assert guest.seat.counters().dropped_overflow == TICK
    assert [r["event"] for r in guest.log if r["event"] in ("detach", "attach")] == ["detach", "attach"]


def test_a_second_client_takes_a_session_over(world):
    here = world()
    guest, fresh = here.guest(), []
    here.edges(2)
    guest.seat.attach(fresh.append)
    here.edges()
    assert len(guest.outs) == 1 and [out.output.index for out in fresh] == [1]


def test_a_session_that_nobody_comes_back_for_expires_with_a_snapshot(world):
    here = world(resume_window=1.0)
    guest = here.guest()
    here.edges(2)
    guest.seat.detach()
    here.edges(7)
    assert guest.end.reason == "expired" and here.engine.capacity().free == 3
    with pytest.raises(SessionError, match="ended"):
        guest.seat.attach(print)
    assert here.engine.restore(guest.end.snapshot).ticks == 1


def test_closing_ends_once_and_frees_the_slot(world):
    here = world()
    guest = here.guest()
    guest.seat.close()
    guest.seat.close()
    here.edges(2)
    guest.seat.close()
    here.edges()
    assert (guest.end.reason, guest.end.snapshot, guest.outs) == ("closed", None, [])
    assert here.engine.capacity().free == 3 and here.scheduler.stats().ended == {"closed": 1}
    guest.hear(1)
    guest.seat.see(np.zeros((2, 3, 3), np.uint8))


def test_snapshots_are_taken_between_ticks_and_go_on_bit_for_bit(world):
    here = world()
    guest = here.guest(seed=4)
    here.edges(2)
    future = guest.seat.snapshot()
    here.edges(2)
    twin = here.engine.restore(future.result(0))
    assert twin.ticks == 1 and twin.tick().audio.tobytes() == guest.outs[1].output.audio.tobytes()
    for _ in range(16):
        guest.seat.snapshot()
    with pytest.raises(CapacityError, match=r"16 snapshots .*\n  wait for the result of one"):
        guest.seat.snapshot()
    guest.seat.close()
    waiting = guest.seat._requests.snapshots[0]
    here.scheduler.step()
    assert waiting.result(0)
    with pytest.raises(SessionError, match="ended\n  open a new one, or one from its snapshot"):
        guest.seat.snapshot()


def test_a_snapshot_that_is_none_ends_that_session_only(world):
    here = world()
    good, bad = here.guest(), here.guest(snapshot=b"rubbish")
    here.edges(2)
    assert bad.end.reason == "failed" and "snapshot" in bad.end.detail and len(good.outs) == 1
    assert here.engine.capacity().free == 2


@pytest.mark.parametrize("fault", ["inbox", "delivery", "published", "sink", "log", "end"])
def test_faults_of_one_session_end_that_session_only(world, fault):
    here = world()

    class Bad:
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

    good = here.guest()
    seat = here.scheduler.open(sink, inbox=Bad(), log=log)
    here.edges(2)
    if fault == "end":
        seat.close()
    here.edges()
    assert isinstance(events[-1], Ended) and len([e for e in events if isinstance(e, Ended)]) == 1
    assert events[-1].reason == ("closed" if fault == "end" else "failed")
    assert len(good.outs) == 2 and good.end is None and here.engine.capacity().free == 2


def test_a_context_that_is_used_up_ends_the_session(world, backend):
    backend.limit = 20
    here = world(backend=backend)
    guest = here.guest()
    here.edges(6)
    assert guest.end.reason == "context" and guest.end.snapshot is None
    assert guest.end.detail == "the context is used up. open a new session"


def test_draining_admits_nobody_and_hands_everyone_a_snapshot(world):
    here = world()
    guest = here.guest()
    here.edges(2)
    assert not here.scheduler.draining
    here.scheduler.drain(grace=0.3)
    assert here.scheduler.draining
    with pytest.raises(CapacityError):
        here.guest()
    here.edges()
    assert guest.end is None
    here.edges()
    assert guest.end.reason == "shutdown" and here.engine.restore(guest.end.snapshot).ticks == 2


def test_closing_the_scheduler_ends_all_also_those_that_never_joined(world):
    here = world()
    guests = [here.guest()]
    here.edges(2)
    guests += [here.guest(), here.guest()]
    guests[2].seat.close()
    last = guests[0].seat.snapshot()
    here.scheduler.close()
    here.scheduler.close()
    assert [guest.end.reason for guest in guests] == ["shutdown", "shutdown", "closed"]
    assert here.engine.capacity().free == 3
    assert here.engine.restore(last.result(0)).ticks == 1
    assert not here.scheduler.stats().running

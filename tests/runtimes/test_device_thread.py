"""The scheduler with its thread, in real time: the grid is kept, every thread is served, no slot leaks."""

import threading

import numpy as np
import pytest

from tmlc.errors import CapacityError, UsageError
from tmlc.runtimes.core.clock import WallClock
from tmlc.runtimes.core.live import Ended, Published
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.streams import Pace


def audio(level: float, samples: int) -> np.ndarray:
    return np.full(samples, level, np.float32)


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
    with pytest.raises(UsageError, match=r"by itself\n  call start\(\) or step\(\)"):
        scheduler.step()
    with pytest.raises(UsageError, match="started once\n  make a new one"):
        scheduler.start()
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

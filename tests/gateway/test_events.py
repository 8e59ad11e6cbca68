"""The event log of a session: numbered, in order, and bounded in what it holds of audio."""

import gc

import numpy as np

from tmlc.runtimes.gateway.events import FRESH, WINDOW, Closed, EventLog, Tick


def tick(index, collapsed=0):
    audio = np.zeros(3200, np.float32)
    return Tick(index, audio, "", 0.0, 1.0, False, False, collapsed, 0.0, 1, 0.0)


def ticks_alive():
    gc.collect()
    return sum(isinstance(one, Tick) for one in gc.get_objects())


def test_events_come_back_in_order_and_ticks_only_while_they_are_fresh():
    log = EventLog()
    for index in range(100):
        log.add(tick(index))
        if index % 10 == 0:
            log.add(Closed("note", str(index)))
    back = list(log.after(0))
    assert [number for number, _ in back] == sorted(number for number, _ in back)
    assert [h.index for _, h in back if isinstance(h, Tick)] == list(range(100 - FRESH, 100))
    assert sum(isinstance(h, Closed) for _, h in back) == 10
    assert [number for number, _ in log.after(log.last - 2)] == [log.last - 1, log.last]


def test_a_collapse_makes_the_ticks_before_it_stale():
    log = EventLog()
    for index in range(10):
        log.add(tick(index))
    log.add(tick(9 + FRESH, collapsed=FRESH - 1))
    assert [h.index for _, h in log.after(0)] == [9 + FRESH]


def test_a_log_holds_five_seconds_of_audio_however_long_the_session_is():
    before, log = ticks_alive(), EventLog()
    for index in range(2000):
        log.add(tick(index))
        log.add(Closed("note", ""))
    assert ticks_alive() - before <= FRESH
    assert len(list(log.after(0))) <= FRESH + WINDOW

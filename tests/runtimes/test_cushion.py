"""The cushion against late input grows when it is needed and goes again in pauses; nothing that was said is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmlc.runtimes.core.clock import VirtualClock
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.streams import Pace, SampleStream
from tmlc.runtimes.core.synthetic import SyntheticEngine
from tmlc.runtimes.core.ticklog import replay

RATE = 1600  # samples a second: as 16 kHz, and cheaper
WITHIN = 24.0  # seconds: 20 s in which nobody needed the cushion, and the wait for a pause


def talk(seconds, said=2.0, pause=1.0, noise=0.0):
    """Numbered loud samples, and pauses with noise of that level."""
    at = np.arange(round(seconds * RATE))
    rest = noise * np.random.default_rng(1).choice([-1.0, 1.0], at.size)
    return np.where(at % round((said + pause) * RATE) < round(said * RATE), 1.0 + at, rest).astype(np.float32)


class Line:
    """A client that sends each 20 ms what its microphone filled, over a line that `stops` (at second: for seconds)
    and then brings all that was sent meanwhile. Edges lie `phase` behind the pieces."""

    def __init__(self, samples, stops=(), pace=Pace.REALTIME, phase=0.013, rate=RATE):
        self.stream, self.taken, self.ages = SampleStream(rate, rate // 5, pace), [], []
        sent, stops, waiting = rate // 50, sorted(dict(stops).items()), []
        for start in range(0, samples.size, sent):
            due = (start + sent) / rate
            away = max((at + long for at, long in stops if at <= due < at + long), default=due)
            waiting.append((max(due, away, waiting[-1][0] if waiting else 0.0), samples[start : start + sent]))
        heard, come = 0, 0
        for edge in range(1, samples.size * 5 // rate):
            now = edge * 0.2 + phase
            while come < len(waiting) and waiting[come][0] <= now + 1e-9:
                self.stream.put(waiting[come][1])
                come += 1
            self.taken.append(self.stream.take(1))
            self.ages.append(now - heard / rate)
            heard = self.taken[-1].heard

    @property
    def heard(self):
        return np.concatenate([tick for taken in self.taken for tick in taken.ticks if tick is not None])

    @property
    def words(self):
        return self.heard[self.heard >= 1]

    def age(self, second, until):
        """The largest age of a tick in this time, in seconds."""
        return max(self.ages[round(second * 5) : round(until * 5)])

    def total(self, name, since=0.0):
        return sum(getattr(taken, name) for taken in self.taken[round(since * 5) :])


def away(second, seconds):
    """A stop in which so many seconds of input come too late for the edge at this second."""
    return second - seconds + 0.001, seconds + 0.02


def first_words(said, count):
    return said[said >= 1][:count]


@pytest.mark.parametrize("pace", list(Pace))
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_after_late_pieces_the_age_returns_and_no_word_is_lost(pace, noise):
    said = talk(60.0, noise=noise)
    line = Line(said, [away(10.0 + k, 0.02 * k) for k in range(1, 5)], pace)
    base = line.age(1, 10)
    assert line.age(15, 20) > base + 0.07, "they have left their delay"
    assert line.age(14.0 + WITHIN, 59) <= base + 0.0201
    assert line.words.size > 35 * RATE and np.array_equal(line.words, first_words(said, line.words.size))
    assert line.total("skipped") >= 0.06 * RATE and line.total("late") == 0


def test_a_line_that_is_late_again_and_again_keeps_the_cushion_that_it_needs():
    line = Line(talk(120.0), [away(10.0 + 5 * k, 0.06) for k in range(21)])
    assert line.total("missing", since=11.0) == 0, "only the first late pieces leave a gap"
    assert line.age(100, 109) >= line.age(1, 9) + 0.05


def test_who_never_pauses_is_not_cut():
    said = talk(60.0, pause=0.0)
    line = Line(said, [away(10.0, 0.1)])
    assert line.total("skipped") == 0 and line.age(50, 59) <= line.age(1, 9) + 0.1001
    assert np.array_equal(line.words, first_words(said, line.words.size))


def test_a_whisper_in_a_silent_room_is_speech_and_a_fan_of_its_level_is_not():
    at, chance = np.arange(50 * 16000) / 16000, np.random.default_rng(2)
    fan = chance.normal(0.0, 0.006, at.size).astype(np.float32)
    whisper = fan * (at % 0.8 < 0.6)
    assert Line(whisper, [away(10.0, 0.1)], rate=16000).total("skipped") == 0
    line = Line(fan, [away(10.0, 0.1)], rate=16000)
    assert line.total("skipped") > 0 and line.age(36, 49) <= line.age(1, 9) + 0.0201


def test_a_pause_keeps_200_ms_before_and_50_ms_behind():
    line = Line(talk(100.0, said=2.0, pause=0.30), [away(10.0, 0.1)])
    gaps = np.diff(np.flatnonzero(line.heard[11 * RATE :] >= 1))
    assert line.total("skipped") > 0 and gaps[gaps > 1].min() > 0.25 * RATE
    assert Line(talk(100.0, said=2.0, pause=0.25), [away(10.0, 0.1)]).total("skipped") == 0


def test_a_file_that_is_sent_ahead_of_time_is_no_backlog():
    stream, said = SampleStream(RATE, RATE // 5, Pace.BUFFERED), talk(29.0)
    stream.put(said)
    taken = [stream.take(1) for _ in range(150)]
    heard = np.concatenate([tick for one in taken for tick in one.ticks if tick is not None])
    assert np.array_equal(heard[: said.size], said) and not any(one.skipped for one in taken)


stops = st.lists(st.tuples(st.floats(0.0, 28.0), st.floats(0.0, 0.35)), max_size=40)


@settings(max_examples=25, deadline=None)
@given(stops=stops, phase=st.floats(0.0, 0.199), pause=st.sampled_from([0.15, 0.3, 1.0]))
def test_whatever_is_late_all_that_was_said_is_heard_once_and_in_order(stops, phase, pause):
    said = talk(40.0, said=0.7, pause=pause)
    line = Line(said, stops, Pace.BUFFERED, phase)
    assert np.array_equal(line.words, first_words(said, line.words.size))
    assert 320 * len(line.taken) - line.total("missing") + line.total("skipped") == line.taken[-1].heard


def test_what_was_let_go_is_counted_and_in_the_log_and_the_log_replays():
    clock, log = VirtualClock(), []
    scheduler = Scheduler(SyntheticEngine(clock, sessions=1), clock=clock)
    seat = scheduler.open(lambda event: None, log=log.append, seed=5)
    scheduler.step()
    at = np.arange(40 * 16000)
    said, sent = np.where(at % 48000 < 32000, 0.1, 0.0).astype(np.float32), 0
    for edge in range(1, 200):
        come = 3200 * edge - (1600 if edge == 20 else 0)  # at one edge the last 100 ms are missing
        seat.hear(said[sent:come])
        sent = come
        clock.wait(scheduler.next_edge)
        scheduler.step()
    counters = seat.counters()
    assert (counters.missing, counters.skipped, counters.dropped_late) == (1600, 1440, 0)
    noted = [one["count"] for one in log if one["event"] == "dropped" and one["why"] == "silence"]
    assert sum(noted) == counters.skipped == scheduler.stats().skipped
    assert replay(SyntheticEngine(VirtualClock()), log) == counters.ticks

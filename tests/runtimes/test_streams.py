"""Bounded streams against plain models of them, and the detector of voice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmlc.errors import InputError
from tmlc.runtimes.core.streams import FrameSlot, Pace, SampleStream, TokenStream
from tmlc.runtimes.core.voice import BEGINS, GOES_ON, VoiceDetector, hops_of

RATE, TICK, HOP = 80, 16, 4  # 400 ms are 32 samples, the cushion is 8


def numbered(start: int, count: int) -> np.ndarray:
    """Loud samples (never skipped as silence), all different."""
    return (1 + np.arange(start, start + count)).astype(np.float32)


puts = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 90)), st.tuples(st.just("take"), st.integers(1, 6)),
    st.tuples(st.just("clear"), st.just(0)),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(pace=st.sampled_from(list(Pace)), actions=st.lists(puts, max_size=30))
def test_samples_come_out_in_order_once_and_what_is_lost_is_counted(pace, actions):
    stream, waiting, given_in, accounted = SampleStream(RATE, TICK, pace), [], 0, 0
    for what, count in actions:
        if what == "put":
            samples = numbered(given_in, count)
            given_in += count
            dropped = stream.put(samples)
            waiting += samples.tolist()
            over = max(0, len(waiting) - stream.bound)
            waiting = waiting[over:] if pace is Pace.REALTIME else waiting[: len(waiting) - over]
            assert dropped == over
        elif what == "clear":
            stream.clear()
            waiting = []
        else:
            taken = stream.take(count)
            if pace is Pace.REALTIME:
                late = max(0, len(waiting) - count * TICK - TICK)
                waiting = waiting[late:]
                assert (taken.late, taken.skipped) == (late, 0), "loud samples are never skipped"
            out = np.concatenate([audio for audio in taken.ticks if audio is not None] or [np.zeros(0)])
            heard = out[out != 0].tolist()
            assert heard == waiting[: count * TICK] and all(a is None or a.size == TICK for a in taken.ticks)
            assert taken.missing == count * TICK - len(heard) and len(taken.ticks) == count
            waiting = waiting[len(heard) :]
            assert taken.heard == given_in - len(waiting)
            accounted += taken.late + len(heard)
        accounted += stream.dropped()
        assert len(stream) == len(waiting) <= stream.bound and stream._ring.size <= stream.bound
    assert accounted + len(waiting) == given_in


def test_bounds_are_those_that_are_declared():
    assert SampleStream(16000, 3200, Pace.REALTIME).bound == 6 * 3200 + 6400
    assert SampleStream(16000, 3200, Pace.BUFFERED).bound == 30 * 16000


@settings(max_examples=100, deadline=None)
@given(cuts=st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_how_a_stream_is_cut_into_pieces_changes_nothing(cuts):
    one, many, total = SampleStream(RATE, TICK, Pace.BUFFERED), SampleStream(RATE, TICK, Pace.BUFFERED), sum(cuts)
    one.put(numbered(0, total))
    at = 0
    for cut in cuts:
        many.put(numbered(at, cut))
        at += cut
    for _ in range(total // TICK + 1):
        a, b = one.take(1).ticks[0], many.take(1).ticks[0]
        assert (a is None) == (b is None) and (a is None or a.tobytes() == b.tobytes())


def test_silence_of_a_backlog_is_left_out_and_speech_is_not():
    stream = SampleStream(RATE, TICK, Pace.REALTIME)
    stream.put(np.concatenate([numbered(0, HOP), np.zeros(5 * HOP, np.float32), numbered(HOP, 2 * HOP)]))
    taken = stream.take(1)
    assert (taken.skipped, taken.late) == (2 * HOP, 0), "down to the tick and a cushion of 100 ms"
    out = np.concatenate([taken.ticks[0], stream.take(1).ticks[0]])
    assert out[out != 0].tolist() == numbered(0, 3 * HOP).tolist()
    buffered = SampleStream(RATE, TICK, Pace.BUFFERED)
    buffered.put(np.zeros(10 * TICK, np.float32))
    assert buffered.take(1).skipped == 0 and len(buffered) == 9 * TICK, "what is ahead of time is no backlog"


def test_speech_that_begins_is_not_cut_and_what_is_late_leaves_a_gap_behind():
    stream = SampleStream(RATE, TICK, Pace.REALTIME)
    assert stream.take(1).ticks == [None]
    stream.put(numbered(0, 10))
    begun = stream.take(1).ticks[0]
    assert begun[:6].tolist() == [0] * 6 and begun[6:].tolist() == numbered(0, 10).tolist()
    stream.put(numbered(10, 12))
    gone_on = stream.take(1)
    assert gone_on.ticks[0][:12].tolist() == numbered(10, 12).tolist() and gone_on.missing == 4


def test_the_newest_frame_wins_and_the_others_are_counted():
    slot = FrameSlot()
    assert slot.take() is None
    for value in range(4):
        slot.put(np.full(1, value))
    assert slot.take() == 3 and slot.take() is None and (slot.dropped(), slot.dropped()) == (3, 0)


@settings(max_examples=50, deadline=None)
@given(actions=st.lists(st.tuples(st.booleans(), st.integers(0, 40000)), max_size=8))
def test_typed_tokens_keep_their_order_and_their_bound(actions):
    stream, waiting, at = TokenStream(), [], 0
    for puts_in, count in actions:
        if puts_in:
            tokens = list(range(at, at + count))
            at += count
            if len(waiting) + count > 65536:
                with pytest.raises(InputError, match="65536"):
                    stream.put(tokens)
            else:
                stream.put(tokens)
                waiting += tokens
        else:
            assert stream.take(count) == waiting[:count]
            waiting = waiting[count:]
        assert len(stream) == len(waiting)


def hop(level: float) -> np.ndarray:
    return np.full(800, level, np.float32)


def test_voice_begins_at_one_level_and_goes_on_at_a_lower_one():
    detector, between = VoiceDetector(), (BEGINS + GOES_ON) / 2
    assert not detector.heard(hop(between), 1)
    assert detector.heard(hop(BEGINS * 1.01), 1)
    assert all(detector.heard(hop(between), 1) for _ in range(10))
    assert [detector.heard(hop(0), 1) for _ in range(4)] == [True, True, True, False], "it hangs over 200 ms"
    assert not detector.heard(hop(between), 1)


def test_a_pause_between_words_is_no_end():
    detector = VoiceDetector()
    detector.heard(hop(0.1), 1)
    for _ in range(5):
        assert detector.heard(np.zeros(2400, np.float32), 3) and detector.heard(hop(0.1), 1)


def test_a_tick_has_voice_when_any_hop_has():
    detector = VoiceDetector()
    tick = np.concatenate([hop(0), hop(0), hop(0), hop(0.1)])
    assert detector.heard(tick, 4)
    assert not VoiceDetector().heard(None, 4) and not VoiceDetector().heard(np.zeros(0, np.float32), 4)
    assert VoiceDetector().heard(np.full(13, 0.1, np.float32), 4), "also when hops are not of one length"
    assert hops_of(0.2) == 4 and hops_of(0.01) == 1

"""Turn latency: what counts as a turn, and from when to when."""

import numpy as np
import pytest

from tmlc.runtimes.core.live import Published
from tmlc.runtimes.core.tick import TickOutput
from tmlc.runtimes.gateway.turns import TurnWatch

PERIOD = 0.2


def published(index: int, user: bool, model: bool, seat: str = "sess_a") -> Published:
    """Tick `index`, due at 10 + 0.2·index s, whose step takes 0.05 s."""
    due = 10 + PERIOD * index
    output = TickOutput(index, [], "", np.zeros(0, np.float32), {}, {"silent": int(not model), "batch": 1})
    return Published(seat, due, due, due + 0.05, output, user_speaking=user, model_speaking=model)


def turns(user: str, model: str, sent_after: float = 0.06) -> list[float]:
    """What a watch finds in two lines of ticks, "x" with voice and "." without."""
    watch, found = TurnWatch(PERIOD), []
    for index, (heard, said) in enumerate(zip(user, model, strict=True)):
        out = published(index, heard == "x", said == "x")
        found += [watch.tick(out), watch.handed_out(index, out.due + sent_after)]
    return [seconds for seconds in found if seconds is not None]


def test_an_answer_in_the_next_tick_takes_two_ticks_and_what_sending_takes():
    assert turns("xx...", "..xx.") == [pytest.approx(2 * PERIOD + 0.06)]


def test_an_answer_in_the_tick_in_which_the_voice_ended_takes_one():
    assert turns("xx...", ".xxx.") == [pytest.approx(PERIOD + 0.06)]


def test_hesitation_of_the_model_counts():
    assert turns("x.....", "....xx") == [pytest.approx(5 * PERIOD + 0.06)]


def test_each_turn_counts_once():
    assert len(turns("xx...xx...", "..xx...xx.")) == 2


@pytest.mark.parametrize(
    ("user", "model"),
    [
        ("......", "..xxx."),  # nobody asked
        ("xx....", "......"),  # nobody answered
        (".xx...", "xxxxx."),  # it spoke before and went on
        ("xxxxxx", "..xx.."),  # it spoke while the user did
    ],
)
def test_what_answers_nothing_is_no_turn(user, model):
    assert turns(user, model) == []


def test_a_user_who_goes_on_before_the_answer_is_timed_from_the_later_end():
    assert turns("x..x...", ".....x.") == [pytest.approx(3 * PERIOD + 0.06)]


def test_an_old_tick_that_a_client_gets_again_answers_nothing():
    watch = TurnWatch(PERIOD)
    watch.tick(published(0, True, False))
    watch.tick(published(1, False, False))
    watch.tick(published(2, False, True))
    assert watch.handed_out(1, 11.0) is None
    assert watch.handed_out(2, 10.5) == pytest.approx(0.7)
    assert watch.handed_out(2, 10.9) is None

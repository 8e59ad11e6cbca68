"""The voice detector, the recogniser and the click detector."""

import numpy as np
import pytest

from tmlc.eval.clicks import all_edges, jumps, prediction_error
from tmlc.eval.intervals import interval, wilson
from tmlc.eval.voice import segments
from tmlc.model_zoo.interaction.tasks import TASKS
from tmlc.model_zoo.interaction.tasks.words import MODEL_WORDS

RNG = np.random.default_rng(0)
CHANGES = {
    "as it is": lambda x: x,
    "with noise": lambda x: x + RNG.standard_normal(len(x)) * 0.004,
    "quiet": lambda x: x * 0.4,
    "higher": lambda x: np.interp(np.arange(0, len(x), 1.05), np.arange(len(x)), x),
    "lower": lambda x: np.interp(np.arange(0, len(x), 0.95), np.arange(len(x)), x),
    "dull": lambda x: np.convolve(x, [0.25, 0.5, 0.25], "same"),
}


def one_after_another(bank, words):
    return np.concatenate([np.concatenate([bank.says(w), np.zeros(2400, np.float32)]) for w in words])


@pytest.mark.parametrize("change", CHANGES)
def test_every_word_of_the_model_is_recognised(change, bank, recogniser):
    heard = recogniser.words(CHANGES[change](one_after_another(bank, MODEL_WORDS)).astype(np.float32))
    assert [w.word for w in heard] == list(MODEL_WORDS)


def test_words_without_a_gap_are_recognised_where_they_begin(bank, recogniser):
    words = ["two", "six", "one", "ten", "two", "no"]
    audio = np.concatenate([bank.says(w) for w in words])
    starts = np.cumsum([0, *(len(bank.says(w)) for w in words[:-1])])
    heard = recogniser.words(audio)
    assert [w.word for w in heard] == words
    assert np.abs([w.start for w in heard] - starts).max() < 16000 * 0.05


def test_what_is_no_word_is_called_none(recogniser):
    t = np.arange(16000) / 16000
    hum = (np.sin(2 * np.pi * 150 * t) * 0.1).astype(np.float32)
    assert all(w.word == "?" for w in recogniser.words(hum)) and recogniser.words(hum)
    assert recogniser.words(np.zeros(16000, np.float32)) == []


def test_the_voice_detector_finds_a_word_to_twenty_milliseconds(bank):
    audio = np.zeros(32000, np.float32)
    clip = bank.says("one")
    audio[8000 : 8000 + len(clip)] = clip
    ((start, end),) = segments(audio)
    assert abs(start - 8000) < 320 and abs(end - 8000 - len(clip)) < 480


def test_ideal_speech_has_no_click_and_a_step_at_an_edge_is_one(bank):
    audio = TASKS["backchannel"].episode(0, "test", bank).target_audio.copy()
    assert jumps(audio).clicks == 0 and jumps(audio).edges > 5
    edge = next(k for k in range(3200, len(audio), 3200) if np.abs(audio[k : k + 400]).max() > 0.1)
    audio[edge : edge + 3200] += 0.1
    assert jumps(audio).clicks >= 1


@pytest.fixture(scope="module")
def spoken(bank):
    """What the ideal model says in some episodes."""
    episodes = (TASKS[task].episode(seed, "test", bank) for task in ("backchannel", "barge_in") for seed in range(8))
    return [episode.target_audio for episode in episodes]


def laid(audio, forget):
    """What a vocoder makes of frames of 50 ms each 12.5 ms; with `forget`, the part of a frame that is still to come at
    an edge of ticks is lost there, as when a state is set back."""
    window, made = np.hanning(801)[:800] / 2, np.zeros(len(audio) + 800)
    whole = np.concatenate([audio, np.zeros(800)])
    for at in range(0, len(audio), 200):
        kept = min(800, 3200 - at % 3200) if forget else 800
        made[at : at + kept] += (whole[at : at + 800] * window)[:kept]
    return made[: len(audio)]


def stepped(audio, size):
    """A step at each edge, `size` times as high as the signal around it is strong; it fades in 4 ms."""
    rng, made = np.random.default_rng(1), audio.astype(np.float64)
    for edge in range(3200, len(audio), 3200):
        height = size * np.sqrt(np.mean(np.square(audio[edge - 160 : edge + 160]))) * rng.choice([-1, 1])
        made[edge : edge + 400] += height * np.exp(-np.arange(400) / 60)[: len(audio) - edge]
    return made


def test_edges_of_ideal_speech_do_not_stand_out(spoken):
    for change in (lambda x: x, lambda x: laid(x, False), lambda x: x + RNG.normal(0, 0.003, len(x))):
        view = all_edges([jumps(change(audio)) for audio in spoken])
        assert view["stand_out"] is False and view["clicks"] == 0
        assert abs(view["rank"] - view["elsewhere"]) < 3 * view["spread"]


def test_edges_of_a_vocoder_that_is_set_back_there_stand_out(spoken):
    view = all_edges([jumps(laid(audio, True)) for audio in spoken])
    assert view["stand_out"] is True and view["rank"] > 0.9


def test_steps_that_no_single_edge_shows_are_seen_over_all_of_them(spoken):
    found = [jumps(stepped(audio, 0.3)) for audio in spoken]
    view = all_edges(found)
    assert view["clicks"] <= 1 and view["stand_out"] is True


def test_of_a_few_edges_nothing_is_said(bank):
    assert all_edges([])["stand_out"] is None
    assert all_edges([jumps(bank.says("seven"))])["stand_out"] is None
    assert all_edges([jumps(np.zeros(32000, np.float32))] * 9)["rank"] is None


def test_linear_prediction_foresees_a_resonance_and_not_what_drives_it():
    rng = np.random.default_rng(0)
    drive = rng.normal(0, 0.01, 16000)
    x = np.zeros(16000)
    for n in range(2, 16000):
        x[n] = 1.8 * x[n - 1] - 0.9 * x[n - 2] + drive[n]
    error = prediction_error(x)
    assert error.shape == x.shape and np.corrcoef(error[500:-500], drive[500:-500])[0, 1] > 0.95


def test_intervals_hold_what_they_are_of():
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    low, high = interval([0.2, 0.4, 0.9, 1.0])
    assert low < 0.625 < high and interval([1.0] * 5) == wilson(5, 5)

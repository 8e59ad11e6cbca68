"""`tmlc eval --data`: made-up folders in the layouts of Full-Duplex-Bench, models that are none, and labels that are
wrong."""

import json

import numpy as np
import pytest

from tmlc.errors import InputError, MediaError, UsageError
from tmlc.eval.data import SETS, find_sets
from tmlc.eval.data_rules import DATA_RULES
from tmlc.eval.record import Record
from tmlc.runtimes.media.audio import write_wav

RATE = 16000


def made(data, name, label=None, recording="1", seconds=2.05, rate=RATE):
    """A recording of noise and its labels, as `SETS` says where they stand."""
    folder = data / name / recording
    folder.mkdir(parents=True)
    write_wav(folder / "input.wav", np.random.default_rng(0).normal(0, 0.1, int(seconds * rate)), rate)
    if label is not None:
        (folder / SETS[name].file).write_text(label if isinstance(label, str) else json.dumps(label))
    return folder


def speaking(seconds, *spans, text=()):
    """A model that hums in these spans of the user's time line, and writes text in the ticks that sound from there."""
    audio = np.zeros(seconds * RATE, np.float32)
    for a, b in spans:
        # An output sounds one tick later than it is numbered.
        n = np.arange(round((a - 0.2) * RATE), min(len(audio), round((b - 0.2) * RATE)))
        audio[n] = 0.2 * np.sin(n * 0.05)
    written = [""] * (seconds * 5)
    for at, words in text:
        written[round(at * 5) - 1] = words
    return Record(audio, written)


def judged(name, record, *times):
    verdict = DATA_RULES[name](record, [round(at * RATE) for at in times])
    return {what: done for what, (done, _) in verdict.counts.items()}, verdict.times


def test_every_set_is_found_with_its_times_and_its_rule(tmp_path):
    made(tmp_path, "candor_pause_handling")
    made(tmp_path, "candor_turn_taking", [{"timestamp": [1.25, 3]}], rate=24000)
    made(tmp_path, "synthetic_user_interruption", [{"timestamp": [0.5, 1]}])
    for recording in ("10", "9"):
        made(tmp_path, "background_speech", {"timestamps": [0.5, 1.5]}, recording)
    sets = {found.name: found for found in find_sets(tmp_path)}
    assert [*sets] == [name for name in SETS if name in sets] and set(SETS) == set(DATA_RULES)
    assert [folder.name for folder in sets["background_speech"].folders] == ["9", "10"]
    turn = sets["candor_turn_taking"][0]
    assert turn.labels["times"] == [20000] and turn.ticks == 11 and len(turn.audio) == 11 * 3200
    assert not turn.audio[33000:].any() and turn.audio[:32000].any()
    assert sets["candor_pause_handling"][0].labels["times"] == []
    assert [len(found) for found in find_sets(tmp_path, "background_speech", 1)] == [1]


@pytest.mark.parametrize(
    ("name", "label", "words"),
    [
        ("candor_turn_taking", None, "no such label file"),
        ("candor_turn_taking", "[{", "not JSON"),
        ("candor_turn_taking", "[" * 100000, "not JSON"),
        ("candor_turn_taking", " " * (1 << 20) + "[]", "more than 1 MiB"),
        ("candor_turn_taking", {"timestamp": [1, 2]}, "not a list"),
        ("candor_turn_taking", [{"timestamp": []}], r"[0].timestamp is not a list of 1"),
        ("synthetic_user_interruption", [{"timestamp": [1, "2"]}], r"[0].timestamp[1] is no time"),
        ("synthetic_user_interruption", [{"timestamp": [1]}], r"[0].timestamp is not a list of 2"),
        ("user_interruption", {"timestamp": [1, 2]}, "timestamps is not a list of 2"),
        ("user_interruption", {"timestamps": [2, 1]}, "timestamps ends before it begins"),
        ("talking_to_other", '{"timestamps": [1, NaN]}', "timestamps[1] is no time"),
        ("talking_to_other", {"timestamps": [-1, 1]}, "timestamps[0] is no time"),
        ("user_backchannel", {"timestamps": [True, 2]}, "timestamps[0] is no time"),
    ],
)
def test_wrong_labels_are_refused_with_file_and_field(tmp_path, name, label, words):
    folder = made(tmp_path, name, label)
    with pytest.raises(InputError) as caught:
        find_sets(tmp_path)
    assert words in caught.value.what and caught.value.where == str(folder / SETS[name].file)


def test_a_time_after_the_end_and_audio_that_is_none_are_refused(tmp_path):
    folder = made(tmp_path, "background_speech", {"timestamps": [1, 3]})
    (found,) = find_sets(tmp_path)
    with pytest.raises(InputError, match=r"timestamps is 3 s, and input.wav ends at 2.05 s"):
        found[0]
    (folder / "input.wav").write_bytes(b"no sound")
    with pytest.raises(MediaError):
        found[0]
    (folder / "input.wav").unlink()
    with pytest.raises(InputError, match=r"no input.wav"):
        find_sets(tmp_path)


def test_folders_that_hold_no_set_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        find_sets(tmp_path / "missing")
    with pytest.raises(UsageError, match="no set of Full-Duplex-Bench"):
        find_sets(tmp_path)
    (tmp_path / "icc_backchannel").mkdir()
    with pytest.raises(InputError, match="no recording"):
        find_sets(tmp_path)
    with pytest.raises(UsageError, match="no set user_backchannel"):
        find_sets(tmp_path, "user_backchannel")


def test_a_second_of_speech_or_more_than_three_words_take_the_turn():
    def took(*spans, text=()):
        return judged("candor_pause_handling", speaking(6, *spans, text=text))[0] == {"took over": 1}

    assert not took() and not took((2, 2.8)) and took((2, 3.1)) and took((2, 2.2), (3.5, 3.7))
    assert not took((2, 2.8), text=[(2, " a b c")]) and took((2, 2.8), text=[(2, " a b"), (2.4, " c d")])
    assert not took(text=[(2, " a b c d e")])  # written, and not heard


def test_an_answer_is_timed_from_the_end_of_the_turn():
    rates, times = judged("candor_turn_taking", speaking(6, (3.4, 5)), 3)
    assert rates == {"took over": 1} and times["response_ms"] == [pytest.approx(400, abs=20)]
    assert judged("candor_turn_taking", speaking(6, (2, 4)), 3)[1]["response_ms"] == [0]
    assert judged("candor_turn_taking", speaking(6, (3.4, 4)), 3) == ({"took over": 0}, {})


def test_after_an_interruption_only_what_follows_it_counts():
    assert judged("synthetic_user_interruption", speaking(8, (1, 3)), 2.5, 4) == ({"took over": 0}, {})
    rates, times = judged("synthetic_user_interruption", speaking(8, (1, 3), (4.6, 6)), 2.5, 4)
    assert rates == {"took over": 1} and times["response_ms"] == [pytest.approx(600, abs=20)]


def test_short_sounds_are_backchannels_and_a_long_one_is_none():
    rates, times = judged("icc_backchannel", speaking(10, (2, 2.5), (6, 6.5)))
    assert rates == {"took over": 0} and times == {"backchannels_per_s": [0.2]}
    rates, times = judged("icc_backchannel", speaking(10, (2, 2.5), (6, 7.5)))
    assert rates == {"took over": 1} and times == {"backchannels_per_s": [0]}
    assert judged("icc_backchannel", speaking(10, (2, 2.8), text=[(2, " a b c")]))[0] == {"took over": 1}


def test_an_overlap_gives_stop_and_response_latency():
    rates, times = judged("user_interruption", speaking(8, (1, 2), (2.3, 3.5), (5.5, 7)), 3, 5)
    assert rates == {"was speaking": 1, "fell silent": 1, "began during it": 0, "began after it": 1}
    assert times["stop_ms"] == [pytest.approx(500, abs=20)] and times["response_ms"] == [pytest.approx(500, abs=20)]
    rates, times = judged("user_backchannel", speaking(8, (1, 9)), 3, 5)
    assert rates == {"was speaking": 1, "fell silent": 0, "began during it": 0, "began after it": 0} and not times
    rates, times = judged("talking_to_other", speaking(8, (4, 4.6)), 3, 5)
    assert rates == {"was speaking": 0, "began during it": 1, "began after it": 0} and not times

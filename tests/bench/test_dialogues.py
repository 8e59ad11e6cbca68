"""What the bench says, and who comes when."""

import numpy as np
import pytest

from tmlc.bench.dialogues import LONGEST, SHORTEST, made_up, read_folder
from tmlc.bench.plan import Load, visits
from tmlc.errors import MediaError, UsageError
from tmlc.runtimes.core.voice import GOES_ON
from tmlc.runtimes.media.audio import write_wav


def level(samples):
    return float(np.sqrt(np.mean(samples**2)))


@pytest.mark.parametrize("rate", [16000, 24000])
def test_made_up_labels_lie_where_the_sound_is(rate):
    for dialogue in made_up(2, rate, seed=3, seconds=20.0):
        assert dialogue.samples.dtype == np.float32 and np.abs(dialogue.samples).max() < 1
        assert dialogue.seconds >= 20 and len(dialogue.utterances) >= 3
        for one in dialogue.utterances:
            begin, end, hop = round(one.start * rate), round(one.end * rate), round(0.05 * rate)
            assert SHORTEST - 0.01 <= one.end - one.start <= LONGEST + 0.01
            quiet = [dialogue.samples[begin - hop : begin], dialogue.samples[end : end + hop]]
            loud = [dialogue.samples[begin : begin + hop], dialogue.samples[end - hop : end]]
            assert max(map(level, quiet)) < GOES_ON < 0.02 < min(map(level, loud))


def test_a_seed_makes_the_same_dialogues_and_another_seed_others():
    one, same, other = (made_up(1, 16000, seed, 5.0)[0] for seed in (1, 1, 2))
    assert np.array_equal(one.samples, same.samples) and one.utterances == same.utterances
    assert not np.array_equal(one.samples[:1000], other.samples[:1000])


def test_a_folder_of_labelled_recordings(tmp_path):
    write_wav(tmp_path / "b.wav", np.zeros(16000, np.float32), 16000)
    (tmp_path / "b.yaml").write_text("- {start: 0.1, end: 0.4}\n- {start: 0.5, end: 1}\n")
    write_wav(tmp_path / "a.wav", np.zeros(8000, np.float32), 8000)
    (tmp_path / "a.yaml").write_text("- {start: 0, end: 0.9}\n")
    found = read_folder(tmp_path, 16000)
    assert [dialogue.name for dialogue in found] == ["a", "b"]
    assert [dialogue.samples.size for dialogue in found] == [16000, 16000]
    assert [(u.start, u.end) for u in found[1].utterances] == [(0.1, 0.4), (0.5, 1.0)]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("- {start: 0.5, end: 0.2}", "not after"), ("- {start: 0, end: 0.5}\n- {start: 0.4, end: 0.6}", "not after"),
        ("- {start: 0, end: 9}", "within"), ("- {start: .nan, end: .nan}", "not after"), ("[]", "not a list"),
        ("- {start: 0}", "start and end"), ("- {start: yes, end: 1}", "number"), ("a: b: c", "cannot be read"),
        ("- {start: -1, end: 0.3}", "not after"), ("- 3", "start and end"),
    ],
)  # fmt: skip
def test_labels_that_are_wrong_are_refused_with_their_place(tmp_path, labels, said):
    write_wav(tmp_path / "a.wav", np.zeros(16000, np.float32), 16000)
    (tmp_path / "a.yaml").write_text(labels)
    with pytest.raises(MediaError, match=said) as error:
        read_folder(tmp_path, 16000)
    assert "a.yaml" in error.value.where


def test_a_recording_without_labels_and_a_folder_without_recordings_are_refused(tmp_path):
    with pytest.raises(MediaError, match="no dialogue"):
        read_folder(tmp_path, 16000)
    write_wav(tmp_path / "a.wav", np.zeros(1600, np.float32), 16000)
    with pytest.raises(MediaError, match="no labels"):
        read_folder(tmp_path, 16000)
    with pytest.raises(MediaError, match="no such folder"):
        read_folder(tmp_path / "none", 16000)


def load(**changes):
    usual = dict(sessions=4, seconds=60.0, ramp=2.0, hold=None, arrivals="fixed", piece=20, seed=0)
    return Load(**{**usual, **changes})


def test_sessions_begin_over_the_ramp_and_stay():
    found = visits(load(), 3)
    assert [visit.at for visit in found] == [0.0, 0.5, 1.0, 1.5]
    assert [visit.at + visit.seconds for visit in found] == [60.0] * 4
    assert [visit.dialogue for visit in found] == [0, 1, 2, 0]


def test_with_a_hold_another_session_follows_each():
    found = visits(load(hold=9.0), 1)
    assert len(found) == 24 and max(visit.at + visit.seconds for visit in found) <= 60
    for moment in np.arange(2.0, 59.0, 0.1):
        assert sum(visit.at <= moment < visit.at + visit.seconds for visit in found) <= 4


def test_poisson_arrivals_hold_so_many_on_average_and_follow_the_seed():
    many = load(arrivals="poisson", hold=10.0, seconds=4000.0, sessions=5)
    found = visits(many, 2)
    assert sum(visit.seconds for visit in found) / 4000 == pytest.approx(5, rel=0.1)
    assert found == visits(many, 2) and found != visits(load(arrivals="poisson", hold=10.0, seed=1), 2)
    gaps = np.diff([visit.at for visit in found])
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.15)


@pytest.mark.parametrize("changes", [{"arrivals": "poisson"}, {"ramp": 60.0}, {"arrivals": "sometimes"}])
def test_a_load_that_makes_no_sense_is_refused(changes):
    with pytest.raises(UsageError):
        load(**changes)

"""`tmlc eval --data` on videos in the layout of RepCount: made-up folders, wrong tables, and what is counted."""

import numpy as np
import pytest

from tmlc.errors import InputError, MediaError, UsageError
from tmlc.eval.data import find_sets
from tmlc.eval.data_rules import repetitions
from tmlc.eval.record import Heard, Record
from tmlc.eval.repcount import BEGIN, MOST_SECONDS, WAIT
from tmlc.eval.view import data_tables
from tmlc.model_zoo.interaction.tasks.words import NUMBERS

av = pytest.importorskip("av")

HEAD = ",type,name,count,L1,L2,L3,L4"


def film(path, seconds, fps=20):
    """Grey pictures, each second brighter than the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for n in range(int(seconds * fps)):
            picture = np.full((64, 96, 3), 20 + 50 * (n // fps), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


def table(path, *rows, head=HEAD):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


def test_both_layouts_are_found_and_rows_keep_their_order(tmp_path):
    table(tmp_path / "annotation/test.csv", "0,situp,b.mp4,2,0,5,6,11", "1,squat,a.mp4,12.0,,,,")
    table(tmp_path / "valid.csv", "a.mp4,0", head="name,count")
    for place in ("video/test/a.mp4", "video/test/b.mp4", "valid/a.mp4"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(b"")
    sets = find_sets(tmp_path)
    assert [found.name for found in sets] == ["repcount_test", "repcount_valid"]
    assert sets[0].counts == [2, 12] and [video.name for video in sets[0].videos] == ["b.mp4", "a.mp4"]
    assert sets[1].counts == [0]
    assert [len(found) for found in find_sets(tmp_path, "repcount_test", 1)] == [1]
    with pytest.raises(UsageError, match="no set repcount_train"):
        find_sets(tmp_path, "repcount_train")
    with pytest.raises(MediaError):
        sets[0][0]


def test_the_prompt_is_typed_before_the_video_is_shown_second_by_second(tmp_path):
    film(tmp_path / "test/a.mp4", 3)
    table(tmp_path / "test.csv", "0,situp,a.mp4,2,,,,")
    (found,) = find_sets(tmp_path)
    episode = found[0]
    assert "".join(episode.text) == "count jumps" and "".join(episode.text[:BEGIN]) == "count jumps"
    assert episode.ticks == BEGIN + 3 * 5 + WAIT == len(episode.text) and not episode.audio.any()
    assert sorted(episode.video) == list(range(0, episode.ticks, 5))
    light = {tick: clip.mean() for tick, clip in sorted(episode.video.items())}
    shown = [20, 20, 20, 70, 120, 120, 120]  # still, still, three seconds, still, still
    assert list(light.values()) == pytest.approx(shown, abs=4)
    assert all(clip.shape == (2, 64, 64, 3) and clip.dtype == np.uint8 for clip in episode.video.values())


@pytest.mark.parametrize(
    ("head", "row", "words"),
    [
        ("type,name", "situp,a.mp4", "no column count"),
        ("type,count", "situp,2", "no column name"),
        (HEAD, "0,situp,a.mp4,,1,2,,", "line 2: '' is no count"),
        (HEAD, "0,situp,a.mp4,two,,,,", "is no count"),
        (HEAD, "0,situp,a.mp4,2.5,,,,", "is no count"),
        (HEAD, "0,situp,a.mp4,-1,,,,", "is no count"),
        (HEAD, "0,situp,a.mp4,nan,,,,", "is no count"),
        (HEAD, "0,situp,../a.mp4,2,,,,", "is no name of a video"),
        (HEAD, "0,situp,,2,,,,", "is no name of a video"),
        (HEAD, '0,situp,"a.mp4,2', "no table in CSV"),
        (HEAD, "0,situp,b.mp4,2,,,,", "no video b.mp4"),
    ],
)
def test_wrong_tables_are_refused(tmp_path, head, row, words):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/a.mp4").write_bytes(b"")
    table(tmp_path / "test.csv", row, head=head)
    with pytest.raises(InputError) as caught:
        find_sets(tmp_path)
    assert words in caught.value.what and caught.value.where


def test_tables_that_are_empty_or_no_text_or_too_long_are_refused(tmp_path):
    path = table(tmp_path / "test.csv")
    wrong = ((None, "no row"), (b"name,count\n\xff\xfe,1\n", "no table in CSV"), (b" " * (17 << 20), "16 MiB"))
    for data, words in wrong:
        if data:
            path.write_bytes(data)
        with pytest.raises(InputError, match=words):
            find_sets(tmp_path)


def test_a_video_that_never_ends_is_refused(tmp_path, monkeypatch):
    class Endless:
        def __init__(self, *args):
            pass

        def at(self, seconds):
            return np.zeros((64, 64, 3), np.uint8)

        def close(self):
            pass

    monkeypatch.setattr("tmlc.eval.repcount.VideoSource", Endless)
    (tmp_path / "test").mkdir()
    (tmp_path / "test/a.mp4").write_bytes(b"")
    table(tmp_path / "test.csv", "0,situp,a.mp4,2,,,,")
    (found,) = find_sets(tmp_path)
    with pytest.raises(InputError, match=f"longer than {MOST_SECONDS} s"):
        found[0]


def test_the_last_number_counts_and_errors_are_relative(bank, recogniser):
    def judged(count, *words):
        parts = [np.concatenate([bank.says(word), np.zeros(3200, np.float32)]) for word in words]
        audio = np.concatenate([np.zeros(3200, np.float32), *parts])
        return repetitions(Heard(Record(audio, [""] * 99), recogniser), count)

    exact = judged(3, *NUMBERS[:3])
    assert exact.counts["off by one (OBO)"] == (1, 1) and exact.means["absolute error (MAE)"] == [0.0]
    assert judged(4, *NUMBERS[:3]).counts["off by one (OBO)"] == (1, 1)
    wrong = judged(5, *NUMBERS[:3], "yes")
    assert wrong.counts["off by one (OBO)"] == (0, 1) and wrong.means["absolute error (MAE)"] == [2 / 5.1]
    beyond = judged(12, *NUMBERS)
    assert beyond.counts == {"spoke a number": (1, 1), "off by one (OBO)": (0, 1)}
    silent = judged(1)
    assert silent.counts["spoke a number"] == (0, 1) and silent.counts["off by one (OBO)"] == (1, 1)
    assert silent.means["absolute error (MAE)"] == [pytest.approx(1 / 1.1)]


def test_means_are_shown_with_their_interval():
    mean = {"mean": 0.5, "interval": [0.25, 0.75], "of": 4}
    figures = {"rates": {}, "times": {}, "means": {"absolute error (MAE)": mean}, "errors": 0, "recordings": 4}
    view = {"sets": {"repcount_test": figures}, "model": "m", "target": "cpu", "precision": "fp32", "seconds": 1.0}
    (_, details) = data_tables(view | {"times_real_time": 2.0})
    assert [list(column.cells) for column in details.columns][2] == ["mean 0.5 (0.25 to 0.75)"]

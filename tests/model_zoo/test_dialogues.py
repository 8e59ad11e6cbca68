"""Episodes as recordings with labels: what `tmlc bench` and cases of `tmlc profile` play."""

from pathlib import Path

import pytest

from tmlc.bench.dialogues import read_folder
from tmlc.model_zoo.interaction.tasks import SpeechBank
from tmlc.model_zoo.interaction.tasks.dialogues import SPOKEN, main, write


def test_the_recordings_are_the_episodes_and_their_labels_where_the_user_speaks(tmp_path: Path) -> None:
    paths = write(tmp_path / "talks", 2, seed=3)
    assert [path.stem for path in paths] == ["turn_taking-3", "turn_taking-4", "barge_in-3", "barge_in-4"]
    read = {dialogue.name: dialogue for dialogue in read_folder(tmp_path / "talks", 16000)}
    for task in ("turn_taking", "barge_in"):
        episode = SPOKEN[task].episode(3, "test", SpeechBank.load())
        dialogue = read[f"{task}-3"]
        assert dialogue.samples.size == (episode.ticks + 5) * 3200
        ends = {turn["end"] for turn in episode.labels["turns"]} | {episode.labels.get("cut_in_end")} - {None}
        assert {round(16000 * utterance.end) for utterance in dialogue.utterances} == ends


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.wav").write_bytes(b"mine")
    assert main([str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["mine.wav"]

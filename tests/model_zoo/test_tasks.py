"""Episodes of the tasks: reproducible, of the tick layout of nano, with voices of their own for testing."""

import subprocess
import sys

import numpy as np
import pytest

from tmlc.model_zoo.interaction import InteractionConfig
from tmlc.model_zoo.interaction.tasks import TASKS, SpeechBank, TokenIds, episode
from tmlc.model_zoo.interaction.tasks.words import MODEL_WORDS, TEST_VOICES, TRAINING_VOICES

IDS = TokenIds(259, 260, 261, 262, 263, 264)


@pytest.fixture(scope="module")
def bank() -> SpeechBank:
    return SpeechBank.load()


def test_the_geometry_is_that_of_nano():
    config = InteractionConfig.from_preset("nano")
    tick, vision = config.tick_config, config.vision_config
    assert config.tick_samples == episode.TICK_SAMPLES
    assert (tick.video_every, tick.text_in, tick.text_out) == (episode.VIDEO_EVERY, episode.TEXT_IN, episode.TEXT_OUT)
    assert (vision.temporal_patch_size, vision.height, vision.width) == (2, episode.FRAME_SIZE, episode.FRAME_SIZE)


@pytest.mark.parametrize("name", TASKS)
def test_an_episode_depends_on_task_seed_and_split_alone(bank, name):
    first, again = (TASKS[name].episode(3, "train", bank) for _ in range(2))
    assert np.array_equal(first.audio, again.audio) and np.array_equal(first.target_audio, again.target_audio)
    assert first.labels == again.labels and first.target_text == again.target_text
    for other in (TASKS[name].episode(4, "train", bank), TASKS[name].episode(3, "test", bank)):
        assert other.ticks != first.ticks or not np.array_equal(other.audio, first.audio)


@pytest.mark.parametrize("name", TASKS)
def test_every_list_has_an_entry_for_each_tick_and_fits_into_one(bank, name):
    for seed in range(12):
        one = TASKS[name].episode(seed, "test", bank)
        assert one.audio.dtype == one.target_audio.dtype == np.float32
        assert len(one.audio) == len(one.target_audio) == one.ticks * episode.TICK_SAMPLES
        assert len(one.text) == len(one.target_text) == len(one.speaks) == one.ticks
        assert max(len(text.encode()) for text in one.text) <= episode.TEXT_IN
        assert max(len(text) for text in one.target_text) <= episode.TEXT_OUT
        assert all(tick % episode.VIDEO_EVERY == 0 and clip.shape == (2, 64, 64, 3) for tick, clip in one.video.items())
        assert 4 <= one.ticks / 5 <= 25, "seconds"


@pytest.mark.parametrize("name", TASKS)
def test_the_words_are_written_while_they_are_spoken(bank, name):
    for seed in range(12):
        one = TASKS[name].episode(seed, "test", bank)
        assert one.say, "the ideal model says something in every episode"
        for word in one.say:
            assert word.word in MODEL_WORDS
            tick = word.start_sample // episode.TICK_SAMPLES
            assert one.speaks[tick] and f" {word.word}".encode().startswith(one.target_text[tick])
        # A word that was cut off fades in the first samples of the tick after it.
        sounding = np.abs(one.target_audio).reshape(one.ticks, -1)[:, 600:].max(axis=1) > 0
        assert one.speaks[sounding].all(), "no voice in a silent tick"


def test_tokens_of_a_tick_end_as_the_runtime_ends_them(bank):
    one = TASKS["barge_in"].episode(0, "train", bank)
    for tick in range(one.ticks):
        tokens = one.output_tokens(tick, IDS)
        assert tokens == [IDS.silence] or (0 < len(tokens) <= 2 and IDS.silence not in tokens)
        if IDS.end_of_tick in tokens:
            assert tokens[-1] == IDS.end_of_tick


def test_a_delegation_is_written_in_marks_and_its_answer_enters_between_marks(bank):
    one = TASKS["delegate"].episode(0, "train", bank)
    written = [token for tick in range(one.ticks) for token in one.output_tokens(tick, IDS)]
    task = written[written.index(IDS.delegation) + 1 : written.index(IDS.end_of_delegation)]
    assert bytes(task).decode() == one.labels["task"]
    entered = one.injected_tokens(one.labels["result_tick"], IDS)
    assert entered == [IDS.injection, *one.labels["answer"].encode(), IDS.end_of_injection]
    assert one.say[-1].word == one.labels["answer"]
    assert one.labels["delegated_tick"] + one.labels["delay_ticks"] == one.labels["result_tick"]


def test_test_voices_are_not_those_of_training(bank):
    assert not set(TRAINING_VOICES) & set(TEST_VOICES) and len(TRAINING_VOICES) >= 5
    assert {voice for voice, _ in bank.users} == {*TRAINING_VOICES, *TEST_VOICES}


def test_every_clip_is_audible_and_equally_loud(bank):
    for clip in (c for clips in (*bank.users.values(), *bank.model.values()) for c in clips):
        assert 0.1 < len(clip) / 16000 < 0.8
        assert np.sqrt(np.mean(np.square(clip))) == pytest.approx(0.08, rel=0.1)


def test_tasks_need_no_torch():
    code = "import sys; from tmlc.model_zoo.interaction.tasks import TASKS, SpeechBank\n"
    code += "TASKS['turn_taking'].episode(0, 'train', SpeechBank.load()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

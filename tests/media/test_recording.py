"""A recording cut into ticks."""

import numpy as np

from tmlc.runtimes.media.recording import Recording, TickShape
from tmlc.runtimes.media.timed_text import TimedText

SHAPE = TickShape(200, 16000, frames=2, height=4, width=4, video_every=5)


class Camera:
    """Shows the time in its pixels, from 0.0 to `end` seconds."""

    def __init__(self, end=100.0):
        self.end, self.asked = end, []

    def at(self, seconds):
        self.asked.append(seconds)
        return np.full((4, 4, 3), int(seconds * 100), np.uint8) if seconds < self.end else None


def test_audio_of_all_ticks_together_is_the_recording():
    audio = np.random.default_rng(0).standard_normal(16000 + 123).astype(np.float32)
    recording = Recording(SHAPE, audio=audio)
    ticks = list(recording.ticks(recording.count()))
    assert len(ticks) == 6
    assert [t.audio.size for t in ticks] == [3200] * 5 + [123]
    assert np.array_equal(np.concatenate([t.audio for t in ticks]), audio)


def test_after_the_end_a_tick_carries_no_audio():
    recording = Recording(SHAPE, audio=np.zeros(3200, np.float32))
    assert [t.audio is None for t in recording.ticks(3)] == [False, True, True]


def test_an_exact_number_of_ticks_is_not_rounded_up():
    assert Recording(SHAPE, audio=np.zeros(3200 * 150, np.float32)).count() == 150
    assert Recording(SHAPE).count(0.6) == 3
    assert Recording(SHAPE).count(0.61) == 4


def test_text_is_given_in_the_tick_in_which_it_was_typed():
    typed = [TimedText(0.0, "a"), TimedText(0.1, "b"), TimedText(0.2, "c"), TimedText(0.6, "d")]
    recording = Recording(SHAPE, text=typed)
    assert recording.count() == 4
    assert [t.text for t in recording.ticks(4)] == ["a b", "c", None, "d"]


def test_a_clip_comes_every_fifth_tick_with_frames_from_inside_the_tick():
    camera = Camera()
    clips = [t.video for t in Recording(SHAPE, video=camera).ticks(11)]
    assert [c is not None for c in clips] == [i % 5 == 0 for i in range(11)]
    assert clips[5].shape == (2, 4, 4, 3)
    assert np.allclose(camera.asked[2:4], [1.05, 1.15])


def test_a_clip_at_the_end_of_the_video_repeats_its_last_frame_and_then_none_come():
    clips = [t.video for t in Recording(SHAPE, video=Camera(end=1.1)).ticks(11)]
    assert (clips[5][0] == clips[5][1]).all()
    assert clips[10] is None


def test_a_model_that_sees_nothing_gets_no_clips():
    shape = TickShape(200, 16000)
    assert all(t.video is None for t in Recording(shape, video=Camera()).ticks(6))

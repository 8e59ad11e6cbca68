"""What one tick appends, in which order, with which random keys, and what it hands out."""

import numpy as np
import pytest

from tmlc.errors import InputError
from tmlc.runtimes.core.tick import TickInput

SILENCE, END, HOP = 257, 258, 8


def audio(*levels: float) -> np.ndarray:
    return np.repeat(np.array(levels, np.float32), HOP) / HOP


def clip(value: int, frames: int = 2) -> np.ndarray:
    return np.full((frames, 2, 3, 3), value, np.uint8)


def test_a_tick_appends_heard_audio_then_video_then_typed_text(backend, make_engine):
    session = make_engine(backend).session()
    session.tick(TickInput(audio(1, 2), clip(1), tokens=[5, 6]))
    assert backend.said[:7] == [
        ("audio", 1.0),
        ("audio", 2.0),
        ("video", 36.0),
        ("video", 36.0),
        ("video", 36.0),
        ("text", 5.0),
        ("text", 6.0),
    ]


def test_chosen_text_is_appended_then_end_of_tick_then_own_speech(backend, make_engine):
    backend.script.extend([72, 105])
    out = make_engine(backend).session().tick()
    assert out.tokens == [72, 105] and out.text == "Hi"
    kinds = [kind for kind, _ in backend.said]
    assert kinds == ["audio", "audio", "text", "text", "text", "speech", "speech"]
    assert [value for kind, value in backend.said if kind == "text"] == [72, 105, END]


def test_end_of_tick_stops_the_text_and_is_appended_once(backend, make_engine):
    backend.script.append(END)
    out = make_engine(backend).session().tick()
    assert out.tokens == [END] and out.text == "" and not out.stats["silent"]
    assert [value for kind, value in backend.said if kind == "text"] == [END]
    assert [key for key in backend.keys if key[0] == "audio"], "it speaks all the same"


def test_silence_skips_the_flow_head_and_appends_the_same_positions(backend, make_engine):
    backend.script.extend([SILENCE, 65, END])
    session = make_engine(backend).session()
    silent, spoken = session.tick(), session.tick()
    assert silent.stats["silent"] == 1 and spoken.stats["silent"] == 0
    assert ("audio", (0, 0, 2)) not in backend.keys and ("audio", (0, 1, 2)) in backend.keys
    assert np.array_equal(backend.mels[0], np.full((4, 3), -7, np.float32)), "constant frames, all positions at once"
    first = backend.said[: silent.stats["appended"]]
    assert [kind for kind, _ in first] == ["audio", "audio", "text", "text", "speech", "speech"]


def test_the_model_hears_what_was_handed_out_one_position_later(backend, make_engine):
    backend.script.extend([END, END])
    session = make_engine(backend).session()
    one, two = session.tick(TickInput(audio(3, 4))), session.tick(TickInput(audio(5, 6)))
    heard = np.array([value for kind, value in backend.said if kind == "speech"], np.float32)
    samples = np.concatenate([one.audio, two.audio]).reshape(-1, HOP)
    assert heard[0] == 0, "nothing was said before the first tick"
    assert np.array_equal(heard[1:], samples[:-1].sum(1, dtype=np.float32))


def test_samples_are_held_to_plus_minus_one_also_for_the_models_own_ear(backend, make_engine):
    backend.script.extend([SILENCE, SILENCE])
    session = make_engine(backend, silence_level=-400.0).session()
    out = session.tick()
    assert out.audio.dtype == np.float32 and out.audio.shape == (16,) and (out.audio == -1).all()
    assert [value for kind, value in backend.said if kind == "speech"] == [0.0, -8.0]


def test_random_keys_are_seed_tick_and_output_position(backend, make_engine):
    backend.script.extend([70, 71, END])
    session = make_engine(backend).session(seed=9)
    session.tick()
    session.tick()
    assert backend.keys == [
        ("token", (9, 0, 0)),
        ("token", (9, 0, 1)),
        ("audio", (9, 0, 2)),
        ("audio", (9, 0, 3)),
        ("token", (9, 1, 0)),
        ("audio", (9, 1, 2)),
        ("audio", (9, 1, 3)),
    ]


def test_typed_text_queues_and_enters_a_few_tokens_a_tick(backend, make_engine):
    session = make_engine(backend).session()
    outs = [session.tick(TickInput(text="abc", tokens=[7])), session.tick(TickInput(text="d")), session.tick()]
    typed = [value for kind, value in backend.said if kind == "text" and value < 256]
    assert typed == [97, 98, 99, 7, 100]
    assert [out.stats["queued_tokens"] for out in outs] == [2, 1, 0]


def test_clips_that_come_too_often_are_dropped_and_counted(backend, make_engine):
    session = make_engine(backend).session()
    dropped = [session.tick(TickInput(video=clip(v))).stats["dropped_clips"] for v in (1, 2, 3)]
    assert dropped == [0, 1, 0]
    assert [value for kind, value in backend.said if kind == "video"] == [36.0] * 3 + [108.0] * 3


def test_one_frame_stands_for_a_whole_clip(backend, make_engine):
    make_engine(backend).session().tick(TickInput(video=clip(2, frames=1)))
    assert ("video", 72.0) in backend.said


def test_missing_samples_are_silence_and_counted(backend, make_engine):
    session = make_engine(backend).session()
    session.tick(TickInput(audio(9, 9)))
    out = session.tick(TickInput(audio(3)[:4]))
    assert out.stats["padded_samples"] == 12
    assert [value for kind, value in backend.said if kind == "audio"] == [9.0, 9.0, 1.5, 0.0]
    assert session.tick().stats["padded_samples"] == 16


def test_text_split_inside_a_character_comes_when_it_is_whole(backend, make_engine):
    first, second = "é".encode()
    backend.script.extend([first, END, second, END])
    session = make_engine(backend).session()
    assert [session.tick().text, session.tick().text] == ["", "é"]


def test_timings_name_the_stages_and_stats_count_positions(backend, make_engine):
    session = make_engine(backend).session()
    out = session.tick()
    assert {"embed_audio", "decode", "next_token", "vocode", "first_audio", "total", "wait"} <= set(out.timings)
    assert out.stats["appended"] == out.stats["positions"] == session.positions == len(backend.said)
    assert (out.index, session.tick().index, session.ticks) == (0, 1, 2)


@pytest.mark.parametrize("max_append", [1, 3, 8])
def test_how_positions_are_cut_into_calls_changes_nothing(make_engine, max_append):
    given = TickInput(audio(1, 2), clip(1), text="hello")
    outs = []
    for limit in (8, max_append):
        session = make_engine(max_append=limit).session()
        session.engine.backend.script.extend([65, 66])
        outs.append(session.tick(given))
    assert np.array_equal(outs[0].audio, outs[1].audio) and outs[0].tokens == outs[1].tokens


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (TickInput(audio=np.zeros(17, np.float32)), "at most 16 samples"),
        (TickInput(audio=np.zeros(16)), "float32"),
        (TickInput(audio=np.zeros((2, 8), np.float32)), "one-dimensional"),
        (TickInput(audio=np.full(16, np.nan, np.float32)), "finite"),
        (TickInput(audio=[0.0]), "float32 array, not list"),
        (TickInput(video=np.zeros((2, 3, 3, 3), np.uint8)), r"uint8 \[frames, 2, 3, 3\]"),
        (TickInput(video=np.zeros((3, 2, 3, 3), np.uint8)), "1 or 2 frames"),
        (TickInput(video=np.zeros((0, 2, 3, 3), np.uint8)), "video must be"),
        (TickInput(video=np.zeros((2, 2, 3, 3), np.float32)), "uint8"),
        (TickInput(tokens=[260]), "not in the vocabulary"),
        (TickInput(tokens=[-1]), "not in the vocabulary"),
        (TickInput(tokens=[1.5]), "whole numbers"),
        (TickInput(text="\ud800"), "not valid Unicode"),
        (TickInput(tokens=[1] * 70000), "waiting"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(backend, make_engine, given, what):
    session = make_engine(backend).session()
    with pytest.raises(InputError, match=what) as error:
        session.tick(given)
    assert error.value.fix and "\n" not in error.value.fix
    assert not backend.calls and session.ticks == 0 and session.state == "new"


def test_a_token_model_appends_then_decodes_and_goes_on_from_there(backend, make_engine):
    backend.script.extend([72, 105, 46, 33])
    session = make_engine(backend, kind="tokens").session()
    one, two = session.tick(TickInput(text="ab")), session.tick()
    assert (one.text, two.text, one.audio.size) == ("Hi", ".!", 0)
    assert [value for _, value in backend.said] == [97, 98, 72, 105, 46, 33]


def test_a_token_model_stops_after_end_of_sequence(backend, make_engine):
    backend.script.extend([256, 65])
    out = make_engine(backend, kind="tokens").session().tick(TickInput(tokens=[1]))
    assert out.tokens == [256] and [value for _, value in backend.said] == [1, 256]


def test_a_token_model_needs_a_first_token(make_engine):
    with pytest.raises(InputError, match=r"first tick .*\n  .*append\(\) a prompt"):
        make_engine(kind="tokens").session().tick()


@pytest.mark.parametrize(
    ("layout", "given", "what", "fix"),
    [
        ({"text_in": 0}, TickInput(tokens=[65]), "does not read", "audio instead"),
        ({"kind": "tokens", "audio_in": 0}, TickInput(audio=np.zeros(8, np.float32)), "does not hear", "give it text"),
        ({"video_positions": 0}, TickInput(video=np.zeros((1, 2, 3, 3), np.uint8)), "does not see", "leave the video"),
    ],
)
def test_what_a_model_does_not_take_is_refused_with_what_it_takes(make_engine, layout, given, what, fix):
    with pytest.raises(InputError, match=what) as error:
        make_engine(**layout).session().tick(given)
    assert fix in error.value.fix

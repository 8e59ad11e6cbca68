"""Missed ticks: taken in at once, a session becomes bit for bit what it would be after being silent in each. And what a
tick is given to say, or gets injected."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmlc.errors import ContextFullError, InputError, UsageError
from tmlc.runtimes.core.tick import TickInput, TickOutput
from tmlc.runtimes.core.ticklog import DECISIONS, decided, replay

SILENCE, END, HOP = 257, 258, 8


def audio(level: float, samples: int = 2 * HOP) -> np.ndarray:
    return np.full(samples, level / 16, np.float32)


def clip(value: int) -> np.ndarray:
    return np.full((1, 2, 3, 3), value, np.uint8)


def memory(session) -> tuple:
    """All that a session remembers."""
    talk = session._talk
    return (
        bytes(session._slot), talk.tick, talk.positions, talk.last_clip, list(talk.queue), talk.heard.tobytes(),
        talk.hidden.tobytes(),
    )  # fmt: skip


def one_by_one(session, missed, newest, script=()):
    """The twin: silent in every missed tick, because the fake chooses <silence> unless its script says otherwise."""
    for late in missed:
        assert session.tick(late).tokens == [SILENCE]
    session.engine.backend.script.extend(script)
    return session.tick(newest)


def at_once(session, missed, newest, script=()):
    session.engine.backend.script.extend(script)
    (out,) = session.engine.tick_batch([session], [newest], [missed])
    assert isinstance(out, TickOutput), out
    return out


MISSED = [TickInput(audio(1), clip(1), text="abcde"), TickInput(), TickInput(audio(3, 5), clip(2), inject=[7, 8, 9])]


@pytest.mark.parametrize("max_append", [1, 3, 8, 64])
def test_missed_ticks_leave_what_silent_ticks_leave(make_engine, max_append):
    newest, script = TickInput(audio(4), clip(3), tokens=[5], inject=[6]), [65, 66]
    twins = [make_engine(max_append=limit, sessions=1).session(seed=3) for limit in (8, max_append)]
    for session in twins:
        session.engine.backend.script.extend([65, END])
        session.tick(TickInput(audio(9)))
    slow, fast = (how(s, MISSED, newest, script) for how, s in zip((one_by_one, at_once), twins, strict=True))
    assert memory(twins[0]) == memory(twins[1])
    assert (slow.index, slow.tokens, slow.text, slow.audio.tobytes()) == (
        fast.index, fast.tokens, fast.text, fast.audio.tobytes()
    )  # fmt: skip
    assert (slow.stats["collapsed"], fast.stats["collapsed"]) == (0, 3)
    assert twins[0].engine.backend.said == twins[1].engine.backend.said


def test_missed_ticks_are_decoded_in_one_call_with_the_newest_input_and_choose_nothing(backend, make_engine):
    backend = type(backend)(max_n=64)
    session = make_engine(backend, max_append=64).session()
    at_once(session, [TickInput(audio(1)), TickInput(audio(2))], TickInput(audio(3)))
    decoded = [n for method, n in backend.calls if method == "decode"]
    assert decoded[0] == 2 * (2 + 2 + 2) + 2, "two missed ticks of audio, two tokens and silence; what is heard now"
    assert len([1 for method, _ in backend.calls if method == "next_token"]) == 1
    assert [key for key in backend.keys if key[0] == "token"] == [("token", (0, 2, 0))], "keyed by the newest tick"


@settings(max_examples=40, deadline=None)
@given(
    lates=st.lists(st.integers(0, 5), min_size=2, max_size=3), limit=st.integers(1, 40),
    text=st.text("xyz", max_size=9), look=st.booleans(),
)  # fmt: skip
def test_sessions_that_missed_different_numbers_of_ticks_do_not_touch_each_other(make_fake, lates, limit, text, look):
    together = make_fake(sessions=3, max_append=limit)
    missed = [[TickInput(audio(k + n), clip(n) if look else None, text=text) for n in range(k)] for k in lates]
    newest = [TickInput(audio(20 + n)) for n in range(len(lates))]
    sessions = [together.session(seed=n) for n in range(len(lates))]
    outs = together.tick_batch(sessions, newest, missed)
    for n, session in enumerate(sessions):
        alone = make_fake(sessions=1, max_append=8).session(seed=n)
        out = one_by_one(alone, missed[n], newest[n])
        assert memory(alone) == memory(session) and out.audio.tobytes() == outs[n].audio.tobytes()


def test_the_tick_counter_goes_on_by_what_was_missed(make_engine):
    session = make_engine().session()
    out = at_once(session, [TickInput()] * 4, TickInput())
    assert (out.index, session.ticks) == (4, 5)
    assert out.stats["padded_samples"] == 5 * 16


def test_a_collapse_is_logged_and_replays(backend, make_engine):
    log = []
    session = make_engine(backend).session(seed=5, log=log.append)
    log.append(decided("join", 0, edge=3))
    session.tick(TickInput(audio(1), text="hi"))
    log.append(decided("collapse", 1, missed=3))
    at_once(session, MISSED, TickInput(audio(2), say=[70]))
    session.tick(TickInput(audio(2)))
    assert [len(record["missed"]) for record in log if record["event"] == "tick"] == [0, 3, 0]
    assert replay(make_engine(), log) == session.ticks == 6
    assert {"join", "collapse"} <= set(DECISIONS)


def test_a_log_that_goes_on_from_a_snapshot_replays_from_it_only(make_engine):
    engine = make_engine()
    first = engine.session(seed=5)
    first.tick(TickInput(audio(1)))
    blob, log = first.snapshot(), []
    again = engine.restore(blob, log=log.append)
    again.tick(TickInput(audio(2)))
    assert replay(make_engine(), log, blob) == 1
    with pytest.raises(InputError, match="goes on from a snapshot at tick 1"):
        replay(make_engine(), log)
    first.tick(TickInput())
    with pytest.raises(InputError, match=r"does not go on from this snapshot, which is at tick 2\n  .* at tick 1$"):
        replay(make_engine(), log, first.snapshot())


@pytest.mark.parametrize(
    "change",
    [{"missed": 3}, {"missed": [{}]}, {"inject": "a"}, {"event": "jump"}, {"event": 7}, {"text": 3}, {"audio": 1}],
)
def test_a_log_that_was_damaged_is_refused(make_engine, change):
    log = []
    make_engine().session(log=log.append).tick(TickInput(audio(1)))
    log[1] |= change
    with pytest.raises(InputError, match=r"(?s)tick log.*\n  give a tick log: `tmlc serve --record DIR`"):
        replay(make_engine(), log)


def test_a_context_that_ends_in_a_missed_tick_closes_that_session_only(make_engine, backend):
    backend.limit = 10
    engine = make_engine(backend)
    late, well = engine.session(), engine.session()
    results = engine.tick_batch([late, well], [None, None], [[TickInput()] * 2, []])
    assert isinstance(results[0], ContextFullError) and isinstance(results[1], TickOutput)
    assert (late.state, well.state) == ("closed", "open")


@pytest.mark.parametrize(
    ("missed", "newest", "what"),
    [
        ([TickInput(say=[65])], TickInput(), "says nothing"),
        ([TickInput(audio=np.zeros(17, np.float32))], TickInput(), "at most 16 samples"),
        ([TickInput()] * 65, TickInput(), "at most 64 missed"),
        ([TickInput(tokens=[1] * 40000)] * 2, TickInput(), "waiting"),
        ([], TickInput(inject=[1] * 65), "at most 64 injected"),
        ([], TickInput(inject=[260]), "vocabulary"),
        ([], TickInput(say=[65, 66, 67]), "at most 2 tokens"),
        ([], TickInput(say=[SILENCE]), "neither <silence>"),
        ([], TickInput(say=[65, END]), "neither <silence>"),
    ],
)
def test_bad_missed_ticks_injections_and_words_are_refused_and_change_nothing(make_engine, missed, newest, what):
    session = make_engine().session()
    before = memory(session)
    (result,) = session.engine.tick_batch([session], [newest], [missed])
    assert isinstance(result, InputError) and what in result.what and result.fix
    assert memory(session) == before and session.state == "new"


def test_missed_ticks_need_one_list_for_each_session(make_engine):
    engine = make_engine()
    with pytest.raises(UsageError, match="inputs"):
        engine.tick_batch([engine.session()], [None], [[], []])


def test_a_model_without_a_token_for_silence_cannot_miss_a_tick(make_engine):
    session = make_engine(silence_token_id=-1).session()
    (result,) = session.engine.tick_batch([session], [None], [[TickInput()]])
    assert isinstance(result, InputError) and "<silence>" in result.what and "one by one" in result.fix


def test_what_is_injected_is_appended_before_what_is_heard(backend, make_engine):
    make_engine(backend).session().tick(TickInput(audio(1), inject=[40, 41], tokens=[5]))
    assert [kind for kind, _ in backend.said[:5]] == ["text", "text", "audio", "audio", "text"]
    assert [value for kind, value in backend.said if kind == "text"][:3] == [40.0, 41.0, 5.0]


def test_a_tick_says_what_it_is_given_and_chooses_nothing(backend, make_engine):
    chosen = make_engine(backend).session(seed=1)
    backend.script.extend([72, 105])
    out = chosen.tick(TickInput(audio(1)))
    told = make_engine().session(seed=1)
    said = told.tick(TickInput(audio(1), say=[72, 105]))
    assert (said.tokens, said.text, said.audio.tobytes()) == (out.tokens, "Hi", out.audio.tobytes())
    assert memory(told) == memory(chosen) and not said.stats["silent"]
    assert not [key for key in told.engine.backend.keys if key[0] == "token"]


def test_one_word_less_than_a_tick_can_say_ends_the_tick_like_a_chosen_end(backend, make_engine):
    chosen, told = make_engine(backend).session(), make_engine().session()
    backend.script.extend([72, END])
    out, said = chosen.tick(), told.tick(TickInput(say=[72]))
    assert (out.tokens, said.tokens) == ([72, END], [72]) and memory(told) == memory(chosen)


def test_speakers_that_are_told_and_that_choose_share_a_batch(make_engine):
    engine = make_engine(max_append=64)
    engine.backend.script.extend([65, 66])
    outs = engine.tick_batch([engine.session(seed=k) for k in range(2)], [TickInput(say=[70, 71]), None])
    assert [out.tokens for out in outs] == [[70, 71], [65, 66]]


def test_a_token_model_takes_missed_input_in_and_decodes_once(backend, make_engine):
    session = make_engine(backend, kind="tokens").session()
    backend.script.extend([72, 105])
    out = at_once(session, [TickInput(tokens=[1, 2]), TickInput()], TickInput(tokens=[3], inject=[9]))
    assert [value for _, value in backend.said] == [1, 2, 9, 3, 72, 105]
    assert (out.tokens, out.index, session.ticks) == ([72, 105], 2, 3)


def test_a_token_model_says_what_it_is_given(backend, make_engine):
    session = make_engine(backend, kind="tokens").session()
    out = session.tick(TickInput(tokens=[1], say=[72]))
    assert (out.tokens, out.text) == ([72], "H") and [value for _, value in backend.said] == [1, 72]
    assert not backend.keys

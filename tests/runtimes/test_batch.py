"""A tick of several sessions: one call for all, and each session's faults its own. Behind the real engine stands the
small backend of conftest.py."""

import threading

import numpy as np
import pytest

from tmlc.errors import ContextFullError, InputError, KernelError, SessionError, UsageError
from tmlc.runtimes.core.tick import TickInput, TickOutput
from tmlc.runtimes.core.ticklog import replay

SILENCE, END, BAD_TOKEN, HOP = 257, 258, 255, 8


def audio(level: float) -> np.ndarray:
    return np.full(2 * HOP, level, np.float32)


def state(session) -> tuple:
    """All that a session remembers, for comparing before and after."""
    talk = session._talk
    return session.state, bytes(session._slot), talk.tick, talk.positions, list(talk.queue), talk.heard.tobytes()


def test_each_step_is_one_call_for_all_sessions(backend, make_engine):
    engine = make_engine(backend, max_append=64)
    sessions = [engine.session(seed=k) for k in range(3)]
    backend.script.extend([65, END, SILENCE, 66])
    outs = engine.tick_batch(sessions, [TickInput(audio(k), tokens=[k] * k) for k in range(3)])
    assert [out.tokens for out in outs] == [[65, 66], [END], [SILENCE]]
    assert [out.stats["batch"] for out in outs] == [3, 3, 3]
    assert [(method, n) for method, n in backend.batches if method != "decode"] == [
        ("embed_audio", [2, 2, 2]),
        ("embed_text", [1, 2]),
        ("next_token", [1, 1, 1]),
        ("embed_text", [1]),  # only the first goes on choosing
        ("next_token", [1]),
        ("embed_text", [2, 1, 2]),
        ("vocode", [2]),  # the third is silent, and appends all its positions with the first of the others
        ("embed_speech", [1, 1, 2]),
        ("speak", [1, 1]),
        ("vocode", [1, 1]),
        ("embed_speech", [1, 1]),
        ("speak", [1, 1]),
        ("vocode", [1, 1]),
    ]


@pytest.mark.parametrize("max_append", [1, 3, 8])
def test_how_rows_are_grouped_into_calls_changes_nothing(make_engine, max_append):
    clip = np.full((2, 2, 3, 3), 3, np.uint8)
    inputs = [TickInput(audio(k), clip if k % 2 else None, tokens=[7] * k) for k in range(4)]
    engine = make_engine(sessions=4, max_append=max_append)
    together = engine.tick_batch([engine.session(seed=k) for k in range(4)], inputs)
    for k, out in enumerate(together):
        alone = make_engine(sessions=1).session(seed=k).tick(inputs[k])
        assert out.audio.tobytes() == alone.audio.tobytes() and out.tokens == alone.tokens
        assert {**out.stats, "batch": 1} == alone.stats


@pytest.mark.parametrize(
    "call",
    [
        lambda e, o, a, b: e.tick_batch([a, b, a], [None] * 3),
        lambda e, o, a, b: e.tick_batch([a, b], [None]),
        lambda e, o, a, b: e.tick_batch([a], [None, None]),
        lambda e, o, a, b: e.tick_batch([a, o.session()], [None, None]),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_and_changes_nothing(backend, make_engine, call):
    engine = make_engine(backend)
    a, b = engine.session(), engine.session()
    before = state(a), state(b)
    with pytest.raises(UsageError):
        call(engine, make_engine(), a, b)
    assert (state(a), state(b)) == before and not backend.calls


def test_no_sessions_make_no_work(backend, make_engine):
    assert make_engine(backend).tick_batch([], []) == [] and not backend.calls


def test_a_backend_that_takes_one_session_at_a_time_is_given_one(backend, make_engine):
    backend.unbatched = "decode: its rows belong to no position"
    engine = make_engine(backend)
    a, b = engine.session(), engine.session()
    with pytest.raises(UsageError, match="one session at a time"):
        engine.tick_batch([a, b], [None, None])
    assert not backend.calls
    assert isinstance(engine.tick_batch([a], [None])[0], TickOutput)


def test_what_is_wrong_with_one_session_is_its_own_result(backend, make_engine):
    engine = make_engine(backend, sessions=6)
    deaf, closed, left, poisoned, fine = (engine.session(seed=k) for k in range(5))
    closed.close()
    left.detach()
    with pytest.raises(KernelError):
        poisoned.tick(TickInput(tokens=[BAD_TOKEN]))
    before = [state(s) for s in (deaf, closed, left, poisoned)]
    inputs = [TickInput(np.full(3, np.nan, np.float32)), None, None, None, TickInput(audio(1))]
    results = engine.tick_batch([deaf, closed, left, poisoned, fine], inputs)
    assert [type(result) for result in results] == [InputError, SessionError, SessionError, SessionError, TickOutput]
    assert [state(s) for s in (deaf, closed, left, poisoned)] == before
    alone = make_engine(sessions=1).session(seed=4).tick(TickInput(audio(1)))
    assert results[4].audio.tobytes() == alone.audio.tobytes()
    assert isinstance(deaf.tick(TickInput(audio(1))), TickOutput)


def test_inputs_are_checked_before_anything_runs(backend, make_engine):
    engine = make_engine(backend)
    a, b = engine.session(), engine.session()

    def none_yet(method):
        raise AssertionError("a call ran")

    backend.on_call = none_yet
    results = engine.tick_batch([a, b], [TickInput(tokens=[-1]), TickInput(video=np.zeros((1, 1, 1, 3), np.uint8))])
    assert [type(result) for result in results] == [InputError, InputError]
    assert a.state == b.state == "new"


@pytest.mark.parametrize("room", range(8))
def test_a_full_context_closes_its_session_wherever_in_the_tick_it_is_met(make_engine, room):
    """The second session has room for some positions of its tick, and each tick needs 8."""

    def engine_with(sessions):
        engine = make_engine(sessions=sessions)
        engine.backend._next_token = lambda n, slot, hidden, key, heat: 65 + key[:, 2:].astype(np.int32)
        return engine

    inputs = [TickInput(audio(k), tokens=[1]) for k in range(3)]
    engine = engine_with(3)
    sessions = [engine.session(seed=k) for k in range(3)]
    engine.backend.limit = 1 << 20
    sessions[1]._slot.view(np.float64)[0] = (1 << 20) - room  # where the fake backend counts positions
    results = engine.tick_batch(sessions, inputs)
    assert isinstance(results[1], ContextFullError) and sessions[1].state == "closed"
    assert engine.capacity().free == 1
    for k in (0, 2):
        alone = engine_with(1).session(seed=k).tick(inputs[k])
        assert results[k].audio.tobytes() == alone.audio.tobytes() and results[k].tokens == alone.tokens == [65, 66]
        assert alone.stats["appended"] == 8 and sessions[k].state == "open"


def test_contexts_that_are_all_full_close_all(backend, make_engine):
    backend.limit = 1
    engine = make_engine(backend)
    sessions = [engine.session() for _ in range(3)]
    results = engine.tick_batch(sessions, [None] * 3)
    assert [type(result) for result in results] == [ContextFullError] * 3
    assert [s.state for s in sessions] == ["closed"] * 3 and engine.capacity().free == 3


def test_a_kernel_that_stops_poisons_the_batch_and_nobody_else(make_engine):
    engine = make_engine(sessions=4)
    bad, near, full, far = (engine.session() for _ in range(4))
    full._slot.view(np.float64)[0] = 1 << 30
    results = engine.tick_batch([near, bad, full], [None, TickInput(tokens=[BAD_TOKEN]), None])
    assert [type(result) for result in results] == [KernelError] * 3
    assert [s.state for s in (near, bad, full, far)] == ["poisoned"] * 3 + ["new"]
    assert isinstance(far.tick(), TickOutput)


def test_a_session_that_left_before_the_kernel_stopped_keeps_its_own_error(make_engine):
    engine = make_engine(sessions=2)
    full, other = engine.session(), engine.session()
    full._slot.view(np.float64)[0] = 1 << 30

    def stop(method):
        if method == "vocode":
            raise KernelError("index out of range", fix="give ids of the vocabulary")

    engine.backend.on_call = stop
    results = engine.tick_batch([full, other], [None, None])
    assert [type(result) for result in results] == [ContextFullError, KernelError]
    assert (full.state, other.state) == ("closed", "poisoned")


def test_one_damaged_slot_poisons_its_session_only(backend, make_engine):
    engine = make_engine(backend)
    damaged, fine = engine.session(), engine.session()
    call = backend.call

    def refuse(method, parts, inputs):
        for part, (_, slot) in enumerate(parts):
            if method == "decode" and slot.ctypes.data == damaged._slot.ctypes.data:
                error = KernelError("the slot holds an impossible position", fix="restore a snapshot")
                error.part = part
                raise error
        return call(method, parts, inputs)

    backend.call = refuse
    results = engine.tick_batch([fine, damaged], [None, None])
    assert isinstance(results[0], TickOutput) and isinstance(results[1], KernelError)
    assert (fine.state, damaged.state) == ("open", "poisoned")


def test_speech_that_is_not_a_number_poisons_its_session_only(backend, make_engine):
    engine = make_engine(backend)
    backend.script.extend([END, END, SILENCE])
    mute, broken, silent = (engine.session() for _ in range(3))
    speak = backend._speak

    def broken_once(n, slot, hidden, key):
        return speak(n, slot, hidden, key) * (np.nan if slot.ctypes.data == broken._slot.ctypes.data else 1)

    backend._speak = broken_once
    results = engine.tick_batch([mute, broken, silent], [None] * 3)
    assert [type(result) for result in results] == [TickOutput, KernelError, TickOutput]
    assert [s.state for s in (mute, broken, silent)] == ["open", "poisoned", "open"]
    assert np.isfinite(results[0].audio).all()


def test_an_interrupt_poisons_the_batch(backend, make_engine):
    engine = make_engine(backend)
    sessions = [engine.session() for _ in range(3)]

    def interrupt(method):
        if method == "next_token":
            raise KeyboardInterrupt

    backend.on_call = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.tick_batch(sessions[:2], [None, None])
    assert [s.state for s in sessions] == ["poisoned", "poisoned", "new"]


def test_a_log_that_cannot_be_written_costs_the_others_nothing(make_engine):
    engine = make_engine()

    def full_disk(record):
        if record["event"] == "tick":
            raise OSError("no space left")

    broken, fine = engine.session(log=full_disk), engine.session()
    results = engine.tick_batch([broken, fine], [None, None])
    assert isinstance(results[0], OSError) and isinstance(results[1], TickOutput)
    assert (broken.state, fine.state, broken.ticks) == ("open", "open", 1)


def test_a_log_of_a_session_that_ran_in_batches_replays_alone(make_engine):
    logs = [[], [], []]
    engine = make_engine()
    sessions = [engine.session(seed=k, log=log.append) for k, log in enumerate(logs)]
    rng = np.random.default_rng(1)
    for _ in range(6):
        company = list(rng.permutation(3)[: rng.integers(1, 4)])
        engine.tick_batch([sessions[k] for k in company], [TickInput(audio(float(k)), text="hi") for k in company])
    for session, log in zip(sessions, logs, strict=True):
        assert replay(make_engine(sessions=1), log) == session.ticks


def test_batches_that_overlap_on_many_threads_neither_hang_nor_mix(make_engine):
    engine = make_engine(sessions=6)
    sessions = [engine.session(seed=k) for k in range(6)]
    done = [[] for _ in sessions]

    def work(number):
        rng = np.random.default_rng(number)
        for _ in range(12):
            company = [int(k) for k in rng.permutation(6)[:4]]
            results = engine.tick_batch([sessions[k] for k in company], [TickInput(audio(float(k))) for k in company])
            for k, result in zip(company, results, strict=True):
                assert isinstance(result, TickOutput) or "another call" in str(result)
                if isinstance(result, TickOutput):
                    done[k].append((result.index, result.audio.tobytes()))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for k, outs in enumerate(done):
        alone = make_engine(sessions=1).session(seed=k)
        assert sorted(outs) == [(i, alone.tick(TickInput(audio(float(k)))).audio.tobytes()) for i in range(len(outs))]
        assert outs


def test_token_models_decode_in_one_call_each_until_its_own_end(backend, make_engine):
    engine = make_engine(backend, kind="tokens")
    sessions = [engine.session(seed=k) for k in range(3)]
    backend.script.extend([65, 256, 66, 67, 68])
    outs = engine.tick_batch(sessions, [TickInput(tokens=[k + 1] * (k + 1)) for k in range(3)])
    assert [out.tokens for out in outs] == [[65, 67], [256], [66, 68]]
    assert [n for method, n in backend.batches if method == "decode"] == [[1, 2, 3], [1, 1, 1], [1, 1]]
    backend.script.extend([69] * 4)
    again = engine.tick_batch(sessions[:2], [None, TickInput(tokens=[9])])
    assert [out.stats["appended"] for out in again] == [2, 3]

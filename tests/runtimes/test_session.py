"""The life of a session: states, ownership, errors that end it, slots, appends, snapshots, forks, logs."""

import gc
import hashlib
import json
import threading
from collections import deque

import numpy as np
import pytest

from tmlc.errors import CapacityError, CheckError, ContextFullError, InputError, KernelError, SessionError
from tmlc.runtimes.core.session import ADVICE, SessionState
from tmlc.runtimes.core.tick import TickInput
from tmlc.runtimes.core.ticklog import replay

BAD_TOKEN, END = 255, 258


def test_a_session_goes_from_new_to_open_to_closed_and_frees_its_slot(make_engine):
    engine = make_engine(sessions=1)
    session = engine.session()
    assert session.state == "new" and engine.capacity().free == 0
    session.tick()
    assert session.state == "open"
    session.close()
    session.close()
    assert session.state == "closed" and engine.capacity().free == 1
    with pytest.raises(SessionError, match="closed"):
        session.tick()


def test_a_full_engine_says_so(make_engine):
    engine = make_engine(sessions=2)
    kept = [engine.session(), engine.session()]
    with pytest.raises(CapacityError, match="all 2 sessions of this engine are in use\n  close a session, or load"):
        engine.session()
    with pytest.raises(CapacityError):
        kept[0].fork()
    assert engine.capacity().sessions == 2


def test_a_slot_comes_back_as_zeros(make_engine):
    engine = make_engine(sessions=1)
    with engine.session() as session:
        session.tick()
        assert session._slot.any()
    with engine.session() as session:
        assert not session._slot.any()


def test_an_abandoned_session_gives_its_slot_back(make_engine):
    engine = make_engine(sessions=1)
    session = engine.session()
    session.tick()
    del session
    gc.collect()
    assert engine.capacity().free == 1
    engine.session()


def test_a_detached_session_keeps_its_state_and_takes_no_calls(make_engine):
    session = make_engine().session()
    session.tick()
    session.detach()
    with pytest.raises(SessionError, match=r"detached\n  attach\(\) it first"):
        session.tick()
    blob = session.snapshot()
    session.attach()
    assert session.tick().index == 1 and blob
    with pytest.raises(SessionError, match=r"open\n  go on with tick\(\)"):
        session.attach()


def test_every_state_that_refuses_a_call_says_what_to_do():
    assert set(ADVICE) == set(SessionState) and all(ADVICE.values())


def test_a_kernel_error_poisons_the_session_and_no_other(make_engine):
    engine = make_engine()
    bad, good = engine.session(), engine.session()
    with pytest.raises(KernelError):
        bad.tick(TickInput(tokens=[BAD_TOKEN]))
    assert bad.state == "poisoned"
    for call in (bad.tick, bad.snapshot, bad.fork):
        with pytest.raises(SessionError, match="poisoned"):
            call()
    assert good.tick().index == 0
    bad.close()
    assert engine.capacity().free == 2


def test_an_interrupt_inside_a_tick_poisons_the_session(backend, make_engine):
    session = make_engine(backend).session()

    def interrupt(method):
        if method == "vocode":
            raise KeyboardInterrupt

    backend.on_call = interrupt
    with pytest.raises(KeyboardInterrupt):
        session.tick()
    assert session.state == "poisoned"


def test_speech_that_is_not_a_number_poisons_the_session(make_engine):
    engine = make_engine(silence_level=float("nan"))
    session = engine.session()
    with pytest.raises(KernelError, match=r"not a number \(tick 0\)\n  .*--precision fp32"):
        session.tick()
    assert session.state == "poisoned"


def test_a_used_up_context_ends_the_session(make_engine, backend):
    backend.limit = 10
    engine = make_engine(backend)
    session = engine.session()
    session.tick()
    with pytest.raises(ContextFullError):
        session.tick()
    assert session.state == "closed" and engine.capacity().free == 3


def test_only_one_call_of_a_session_runs_at_a_time(backend, make_engine):
    session = make_engine(backend).session()
    inside, go = threading.Event(), threading.Event()

    def hold(method):
        inside.set()
        assert go.wait(10)

    backend.on_call = hold
    thread = threading.Thread(target=session.tick)
    thread.start()
    assert inside.wait(10)
    with pytest.raises(SessionError, match="another call"):
        session.tick()
    with pytest.raises(SessionError, match="another call"):
        session.snapshot()
    session.close()
    assert session.state == "closing"
    go.set()
    thread.join()
    assert session.state == "closed" and session.engine.capacity().free == 3


def test_sessions_on_many_threads_take_turns_and_do_not_mix(make_engine):
    engine = make_engine(sessions=3)
    alone = make_engine(sessions=1)
    engine.backend.script = alone.backend.script = deque()
    results: dict[int, list[np.ndarray]] = {}

    def talk(engine, index):
        with engine.session(seed=index) as session:
            inputs = (TickInput(np.full(16, index + k, np.float32)) for k in range(20))
            return [session.tick(given).audio for given in inputs]

    threads = [threading.Thread(target=lambda i=i: results.update({i: talk(engine, i)})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        assert all(map(np.array_equal, results[index], talk(alone, index)))


def test_append_takes_audio_then_video_then_tokens_and_returns_logits(backend, make_engine):
    session = make_engine(backend, max_append=4).session()
    pcm = np.full(3 * 8, 1 / 8, np.float32)
    logits = session.append([1, 2], pcm, np.ones((4, 2, 3, 3), np.uint8))
    assert logits.shape == (3 + 6 + 2, 260) and logits.dtype == np.float32
    assert [kind for kind, _ in backend.said] == ["audio"] * 3 + ["video"] * 6 + ["text"] * 2
    assert max(n for _, n in backend.calls) <= 4 or max(n for m, n in backend.calls if m == "decode") == 4
    assert session.positions == 11


def test_append_gives_the_same_logits_however_it_is_cut(make_engine):
    engine = make_engine()
    whole = engine.session().append(list(range(50)))
    session = engine.session()
    parts = [session.append(list(range(a, b))) for a, b in ((0, 1), (1, 18), (18, 50))]
    assert np.array_equal(whole, np.concatenate(parts))


def test_append_computes_only_the_logits_that_are_asked_for(backend, make_engine):
    engine = make_engine(backend, max_append=4)
    whole = engine.session().append(list(range(10)))
    last, none = engine.session(), engine.session()
    backend.calls.clear()
    assert np.array_equal(last.append(list(range(10)), logits="last"), whole[-1:])
    assert [n for method, n in backend.calls if method == "unembed"] == [1]
    backend.calls.clear()
    assert none.append(list(range(10)), logits="none").shape == (0, 260)
    assert "unembed" not in [method for method, _ in backend.calls]
    assert np.array_equal(last.append([7]), none.append([7]))


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        ({}, "at least one position", "tick()"),
        ({"tokens": [1], "logits": "some"}, "logits must be one of all, last, none", "leave it out"),
        ({"tokens": [300]}, "vocabulary", "ids of the tokenizer"),
        ({"tokens": 3}, "sequence of whole numbers", "engine.tokenizer.encode"),
        ({"audio": np.zeros(11, np.float32)}, "whole number of positions of 8 samples", "the last 3"),
        ({"audio": np.zeros(11, np.float32)}, "whole number of positions of 8 samples", "add 5 zeros"),
        ({"video": np.zeros((3, 2, 3, 3), np.uint8)}, "whole clips of 2 frames", "repeat the last one"),
    ],
)
def test_append_refuses_bad_arguments_and_changes_nothing(make_engine, arguments, what, fix):
    session = make_engine().session()
    with pytest.raises(InputError, match=what) as error:
        session.append(**arguments)
    assert fix in error.value.fix and session.state == "new"


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": -1},
        {"seed": 2**63},
        {"seed": True},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": "hot"},
    ],
)
def test_seed_and_temperature_are_checked(make_engine, arguments):
    engine = make_engine()
    with pytest.raises(InputError, match=next(iter(arguments))) as error:
        engine.session(**arguments)
    assert error.value.fix and engine.capacity().free == 3


def run(session, ticks, start=0):
    """A little of everything; the script of the fake is made of the tick, so runs can be cut anywhere."""
    outs = []
    for k in range(start, start + ticks):
        session.engine.backend.script = deque([0xC3 if k % 2 else 0xA9, END])
        given = TickInput(np.full(16, 0.1 * k, np.float32), np.full((2, 2, 3, 3), k, np.uint8), text="wörd")
        outs.append(session.tick(given))
    return [(out.index, out.tokens, out.text, out.audio.tobytes(), out.stats) for out in outs]


def test_a_restored_session_and_a_fork_go_on_bit_for_bit(make_engine):
    engine, other = make_engine(), make_engine()
    session = engine.session(seed=5, temperature=0.5)
    run(session, 4)
    blob, twin = session.snapshot(), session.fork()
    expected = run(session, 5, start=4)
    assert expected == run(twin, 5, start=4) == run(other.restore(blob), 5, start=4)
    assert twin.seed == 5 and twin.state == "open"


def test_a_fork_of_a_new_session_is_new(make_engine):
    assert make_engine().session().fork().state == "new"


def test_a_snapshot_is_bound_to_its_package(make_engine):
    blob = make_engine().session().snapshot()
    with pytest.raises(SessionError, match="another package"):
        make_engine(text_out=1).restore(blob)


def test_a_damaged_snapshot_is_refused_and_takes_no_slot(make_engine):
    engine = make_engine()
    session = engine.session()
    run(session, 3)
    blob = session.snapshot()
    rng = np.random.default_rng(0)
    cases = [blob[: int(cut)] for cut in rng.integers(0, len(blob), 50)] + [b"", blob + b"x", b"other" * 40]
    for place in rng.integers(0, len(blob), 200):
        changed = bytearray(blob)
        changed[place] ^= 1 << int(rng.integers(8))
        cases.append(bytes(changed))
    for case in cases:
        with pytest.raises(SessionError):
            engine.restore(case)
    assert engine.capacity().free == 2


@pytest.mark.parametrize(
    "change",
    [
        {"tick": -1},
        {"tick": "1"},
        {"queue": [-1]},
        {"queue": [65, 260]},  # one more than the vocabulary has
        {"queue": 3},
        {"seed": None},
        {"temperature": 1},
        {"slot_bytes": 1},
        {"last_clip": "x"},
        {"last_clip": 0},  # no tick was done yet
        {"queue": [1] * 65537},
        {"decoder": ["a"]},
        {"heard": 7},
    ],
)
def test_a_forged_snapshot_header_is_refused(make_engine, change):
    engine = make_engine()
    blob = engine.session().snapshot()
    length = int.from_bytes(blob[8:12], "little")
    header = json.dumps(json.loads(blob[12 : 12 + length]) | change).encode()
    body = blob[:8] + len(header).to_bytes(4, "little") + header + blob[12 + length : -32]
    with pytest.raises(SessionError, match="not a usable snapshot"):
        engine.restore(body + hashlib.sha256(body).digest())


def test_a_tick_log_does_the_whole_session_again(make_engine):
    records = []
    engine = make_engine()
    session = engine.session(seed=3, log=lambda record: records.append(json.dumps(record)))
    session.append([1, 2], np.ones(16, np.float32))
    for k in range(3):
        session.tick(TickInput(np.full(16, k, np.float32), np.ones((1, 2, 3, 3), np.uint8), "ab", [4]))
    log = [json.loads(record) for record in records]
    assert [record["event"] for record in log] == ["open", "append", "tick", "tick", "tick"]
    assert replay(make_engine(), log) == 3
    log[3]["out_audio"] = "0" * 64
    with pytest.raises(CheckError, match="tick 1 gave another out_audio"):
        replay(make_engine(), log)
    with pytest.raises(InputError, match="another package"):
        replay(make_engine(text_out=1), log)


@pytest.mark.parametrize(
    "change",
    [
        lambda log: log[1:],
        lambda log: [],
        lambda log: [log[0], {"event": "jump"}],
        lambda log: [log[0], {"event": "tick"}],
        lambda log: [log[0], log[1] | {"audio": {"dtype": "float64", "shape": [1], "data": ""}}],
        lambda log: [log[0], log[1] | {"audio": {"dtype": "float32", "shape": [9], "data": ""}}],
        lambda log: [log[0] | {"seed": -4}, log[1]],
    ],
)
def test_a_broken_tick_log_is_refused(make_engine, change):
    log = []
    engine = make_engine()
    engine.session(log=log.append).tick(TickInput(np.ones(16, np.float32)))
    with pytest.raises(InputError) as error:
        replay(engine, change(log))
    assert error.value.fix


def test_a_closed_engine_closes_its_sessions(backend, make_engine):
    engine = make_engine(backend)
    session = engine.session()
    engine.close()
    engine.close()
    assert session.state == "closed" and backend.closed
    with pytest.raises(SessionError, match="engine is closed"):
        engine.session()

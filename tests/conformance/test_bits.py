"""The bits of a session's output depend on the package, the seed and the tick-indexed input log, on nothing else.

Played on the bounded package, so that sliding rings and the global ring with sinks wrap during every test.
"""

import threading
from itertools import pairwise

import numpy as np
import pytest

import tmlc

TICKS = 24


def play(session, inputs):
    return [session.tick(item) for item in inputs]


def same(a, b):
    """Tokens, text and every bit of the samples."""
    return len(a) == len(b) and all(
        x.tokens == y.tokens and x.text == y.text and x.audio.tobytes() == y.audio.tobytes()
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def inputs(conversation):
    return conversation(TICKS)


@pytest.fixture(scope="module")
def alone(bounded, inputs):
    """The reference run: one session, one thread."""
    with tmlc.load(bounded[1], threads=1) as engine, engine.session(seed=5) as session:
        return play(session, inputs)


def test_another_seed_speaks_otherwise(bounded, inputs, alone):
    with tmlc.load(bounded[1], threads=1) as engine, engine.session(seed=6) as session:
        assert not same(play(session, inputs), alone)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(bounded, inputs, alone, threads):
    with tmlc.load(bounded[1], threads=threads) as engine, engine.session(seed=5) as session:
        assert same(play(session, inputs), alone)


def test_neighbours_that_interleave_do_not_change_a_bit(bounded, conversation, inputs, alone):
    with tmlc.load(bounded[1], threads=1, sessions=3) as engine:
        sessions = [engine.session(seed=seed) for seed in (5, 6, 5)]
        others = conversation(TICKS, seed=9)
        outputs = [[], [], []]
        for mine, theirs in zip(inputs, others, strict=True):
            for session, item, out in zip(sessions, (mine, theirs, mine), outputs, strict=True):
                out.append(session.tick(item))
        assert same(outputs[0], alone) and same(outputs[2], alone)
        assert not same(outputs[1], alone)


def test_sessions_on_their_own_threads_do_not_change_a_bit(bounded, inputs, alone):
    with tmlc.load(bounded[1], threads=2, sessions=3) as engine:
        results: dict[int, list] = {}

        def run(number: int) -> None:
            with engine.session(seed=5) as session:
                results[number] = play(session, inputs)

        workers = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(same(results[number], alone) for number in range(3))


def test_a_slot_that_was_used_before_is_as_good_as_new(bounded, conversation, inputs, alone):
    with tmlc.load(bounded[1], threads=1, sessions=1) as engine:
        with engine.session(seed=1) as session:
            play(session, conversation(7, seed=4))
        with engine.session(seed=5) as session:
            assert same(play(session, inputs), alone)


@pytest.mark.parametrize("at", [0, 1, 11])
def test_snapshot_and_restore_into_another_engine_continue_bit_for_bit(bounded, inputs, alone, at):
    with tmlc.load(bounded[1], threads=1) as engine, engine.session(seed=5) as session:
        before = play(session, inputs[:at])
        blob = session.snapshot()
    with tmlc.load(bounded[1], threads=2) as engine, engine.restore(blob) as session:
        assert same(before + play(session, inputs[at:]), alone)


def test_a_fork_and_its_original_both_continue_bit_for_bit(bounded, conversation, inputs, alone):
    with tmlc.load(bounded[1], threads=1, sessions=2) as engine, engine.session(seed=5) as session:
        before = play(session, inputs[:9])
        with session.fork() as twin:
            strayed = [twin.tick(item) for item in conversation(4, seed=77)]
        assert not same(strayed, alone[9:13])
        with session.fork() as twin:
            assert same(before + play(twin, inputs[9:]), alone)
        assert same(before + play(session, inputs[9:]), alone)


def test_the_cut_into_appends_does_not_change_a_bit(bounded):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 256, 210).tolist()
    audio = (rng.standard_normal(800 * 37) * 0.1).astype(np.float32)
    with tmlc.load(bounded[1], threads=1) as engine:
        with engine.session() as session:
            whole = np.concatenate([session.append(audio=audio), session.append(tokens=tokens)])
            end = session.snapshot()
        with tmlc.load(bounded[1], threads=2) as other, other.session() as session:
            parts = []
            for a, b in pairwise([0, 1, 2, 9, 20, 37]):
                parts.append(session.append(audio=audio[a * 800 : b * 800]))
            for a, b in pairwise([0, 1, 24, 25, 73, 74, 75, 180, 210]):
                parts.append(session.append(tokens=tokens[a:b]))
            assert np.concatenate(parts).tobytes() == whole.tobytes()
            assert [len(blob) for blob in (session.snapshot(), end)] == [len(end)] * 2
            following = session.tick(tmlc.TickInput(text="and now?"))
        with engine.restore(end) as session:
            assert same([session.tick(tmlc.TickInput(text="and now?"))], [following])

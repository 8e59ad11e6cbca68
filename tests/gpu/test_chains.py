"""Whole ticks through the graphs of chains, on a device in host memory: the bits of the methods one after the other, in
any company; and the chains themselves: which there are, and that none is loaded that does other than it says."""

import copy
import json
import random
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

import tmlc
from tmlc.errors import ContextFullError, DeviceError, KernelError, PackageError, PlanError, TmlcError
from tmlc.package.reader import open_package
from tmlc.report.plan.source import engine_of, load_planned
from tmlc.runtimes.core.backend import MethodSpec, TensorSpec
from tmlc.runtimes.core.chained import ChainedDriver
from tmlc.runtimes.core.chains import Answering, Writing
from tmlc.runtimes.core.tick import InteractionDriver
from tmlc.runtimes.cuda.chains import NAMES, Clamp, Link, Take, compose
from tmlc.runtimes.cuda.plan import read_plan
from tmlc.runtimes.cuda.ticks import read_chains

SILENCE, END = 259, 260  # of the tiny model


@pytest.fixture(scope="module")
def engine(tiny, lab, machine):
    mark = machine.mark()
    with lab.load(tiny.gpu, machine, 6) as made:
        yield made
    machine.release(mark)


@pytest.fixture(scope="module")
def layout(tiny):
    with open_package(tiny.gpu) as opened:
        return opened.manifest.tick


def sound(index: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(index).standard_normal(320)).astype(np.float32)


@contextmanager
def by_methods(engine):
    """Ticks run method by method, as on a target without chains."""
    chained, engine.driver = engine.driver, InteractionDriver(engine.model, engine.slots.count)
    try:
        yield
    finally:
        engine.driver = chained


@contextmanager
def choosing(engine, token):
    """The first token of every tick is this one, whatever was computed."""
    chains, model = engine.backend.chains, engine.model
    listen, asked = chains.listen, model.next_token
    chains.listen = lambda given: [None if found is None else token for found in listen(given)]
    model.next_token = lambda given: [(s, token) for s, _ in asked(given)]
    try:
        yield
    finally:
        del chains.listen, model.next_token


def same(one, two) -> None:
    assert one.tokens == two.tokens and one.audio.tobytes() == two.audio.tobytes()
    assert {**one.stats, "batch": 0} == {**two.stats, "batch": 0}


def replays(engine) -> int:
    return engine.backend.driver.log.count("replay")


def test_a_silent_tick_is_two_graphs_and_has_the_bits_of_its_methods(engine):
    """Seven calls, one after the other, against two graphs. What it says is silence: no noise enters."""
    assert isinstance(engine.driver, ChainedDriver)
    found = []
    with choosing(engine, SILENCE):
        for calls in (7, 2):
            before = replays(engine)
            with by_methods(engine) if calls == 7 else nullcontext(), engine.session(seed=1) as session:
                out = session.tick(tmlc.TickInput(sound(1)))
                found.append((out, engine.slots.memory.read(session.index)))
            assert replays(engine) - before == calls
    (want, slot), (have, other) = found
    assert want.tokens == [SILENCE] and want.stats["silent"] and np.abs(want.audio).max() > 0
    same(want, have)
    assert slot == other
    assert set(have.timings) == {"tick.listen", "tick.answer", "first_audio", "total", "wait"}


@pytest.mark.slow
def test_a_speaking_tick_is_three_graphs_and_has_the_bits_of_its_methods(engine):
    """Two tokens and speech, after typed text: 24 calls against three graphs; two ticks, for what one leaves to the
    next."""
    found = []
    for calls in (24, 3):
        with by_methods(engine) if calls == 24 else nullcontext(), engine.session(seed=4) as session:
            before, outs = replays(engine), []
            outs.append(session.tick(tmlc.TickInput(sound(2), text="hi")))
            assert replays(engine) - before == calls
            outs.append(session.tick(tmlc.TickInput(sound(3))))
            found.append((outs, engine.slots.memory.read(session.index)))
    (want, slot), (have, other) = found
    assert all(len(out.tokens) == 2 and not out.stats["silent"] for out in want)
    for one, two in zip(want, have, strict=True):
        same(one, two)
    assert slot == other


@pytest.mark.slow
def test_sessions_in_one_tick_get_the_bits_that_their_methods_give_each_alone(engine):
    """Five sessions, more than the largest graph takes: one is silent, one says what it is told, one is typed and
    injected to, two choose; with a snapshot between two ticks, from which all go on."""
    given = [
        [tmlc.TickInput(sound(10 + s)) for s in range(5)],
        [tmlc.TickInput(sound(20 + s)) for s in range(5)],
    ]
    given[0][1] = replace(given[0][1], say=[70, 71])
    given[0][2] = replace(given[0][2], text="x", inject=[65, 66])

    @contextmanager
    def first_is_silent():
        """Seed 0 chooses <silence>; the others what they choose."""
        chains, model = engine.backend.chains, engine.model
        listen, asked = chains.listen, model.next_token

        def heard(given):
            return [SILENCE if one.key and one.key[0] == 0 else t for one, t in zip(given, listen(given), strict=True)]

        def chosen(given):
            seeds = {s: key[0] for s, key, _ in given}
            return [(s, SILENCE if seeds[s] == 0 else token) for s, token in asked(given)]

        chains.listen, model.next_token = heard, chosen
        try:
            yield
        finally:
            del chains.listen, model.next_token

    alone = []
    with first_is_silent(), by_methods(engine):
        for s in range(5):
            with engine.session(seed=s) as session:
                outs = [session.tick(tick[s]) for tick in given]
                alone.append((outs, engine.slots.memory.read(session.index)))
    assert alone[0][0][0].stats["silent"] and alone[1][0][0].tokens == [70, 71]
    with first_is_silent():
        sessions = [engine.session(seed=s) for s in range(5)]
        together = [engine.tick_batch(sessions, given[0])]
        blobs = [session.snapshot() for session in sessions]
        for session in sessions:
            session.close()
        sessions = [engine.restore(blob) for blob in blobs]
        together.append(engine.tick_batch(sessions, given[1]))
    for s, session in enumerate(sessions):
        for tick in range(2):
            same(alone[s][0][tick], together[tick][s])
        assert engine.slots.memory.read(session.index) == alone[s][1], f"the states of session {s}"
        session.close()


@pytest.mark.slow
def test_a_tick_that_was_missed_is_caught_up_before_the_graphs(engine):
    ticks = [tmlc.TickInput(sound(30)), tmlc.TickInput(sound(31))]
    found = []
    for methods in (True, False):
        with by_methods(engine) if methods else nullcontext(), engine.session(seed=2) as session:
            (out,) = engine.tick_batch([session], [ticks[1]], [[ticks[0]]])
            found.append((out, engine.slots.memory.read(session.index)))
    same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] and found[0][0].stats["collapsed"] == 1


def test_a_fault_in_a_graph_poisons_the_sessions_of_its_tick_and_a_lost_device_all(tiny, lab, machine):
    mark = machine.mark()
    with lab.load(tiny.gpu, machine, 3) as gpu:
        device, (bad, other, last) = gpu.backend.driver, (gpu.session() for _ in range(3))
        device.fault = KernelError("the launch was refused", fix="load the package again")
        with pytest.raises(KernelError, match="refused"):
            bad.tick(tmlc.TickInput(sound(1)))
        assert bad.state == "poisoned" and other.state == "new"
        device.fault = DeviceError("an illegal address", fix="load the package again")
        with pytest.raises(DeviceError, match="illegal address"):
            other.tick(tmlc.TickInput(sound(1)))
        with pytest.raises(DeviceError, match="device is lost"):
            last.tick(tmlc.TickInput(sound(1)))
        assert other.state == last.state == "poisoned"
        assert not [name for name in device.log if name.endswith("_kernel")], "something ran"
    machine.release(mark)


def test_a_chain_is_refused_for_one_session_before_anything_runs(engine):
    """Its slot is damaged; an id is outside; a session comes twice."""
    chains, memory = engine.backend.chains, engine.slots.memory
    good, bad = engine.session(), engine.session()
    tail = dict(tail=[END], heard=np.zeros(80, np.float32), keys=[])
    before = replays(engine)
    memory._positions[bad.index, :] = -1
    with pytest.raises(KernelError, match="position -1") as error:
        chains.answer([Answering(session._slot, **tail) for session in (good, bad)])
    assert error.value.part == 1
    with pytest.raises(KernelError, match="outside 0"):
        chains.write([Writing(good._slot, 100000, (0, 0, 0), 1.0)])
    with pytest.raises(TmlcError, match=r"each session once.*\n  give each session one part"):
        chains.answer([Answering(good._slot, **tail)] * 2)
    assert replays(engine) == before
    good.close(), bad.close()


@pytest.mark.slow
def test_a_full_context_closes_its_session_and_the_tick_goes_on_for_the_others(tiny, lab, machine, tmp_path):
    lab.compile(tiny.checkpoint, tmp_path / "end.tmlc", context=16, context_policy="end")
    mark = machine.mark()
    with lab.load(tmp_path / "end.tmlc", machine, 3) as gpu:
        full, other = gpu.session(seed=1), gpu.session(seed=2)
        full.append(tokens=[1] * 8, logits="none")
        with choosing(gpu, SILENCE):
            results = gpu.tick_batch([full, other], [tmlc.TickInput(sound(1))] * 2)
            with gpu.session(seed=2) as alone:
                want = alone.tick(tmlc.TickInput(sound(1)))
        assert isinstance(results[0], ContextFullError) and full.state == "closed"
        same(want, results[1])
    machine.release(mark)


# The chains of a package.


@pytest.fixture(scope="module")
def read(parsed, layout):
    """The chains of the tiny package, once their JSON was changed."""
    code = json.loads(parsed.code)
    plan, chains = read_plan(json.loads(parsed.plan), code, 90, parsed.tensors), json.dumps(code["chains"])

    def made(change=lambda chains: None):
        changed = json.loads(chains)
        change(changed)
        return read_chains(plan, {"chains": changed}, layout)

    return made


def test_every_chain_has_a_graph_for_each_number_of_sessions(engine, read):
    made = read()
    assert {chain.key for chain in made} == {f"{name}.b{batch}" for name in NAMES for batch in (1, 4)}
    assert set(engine.backend._ticks) == {chain.key for chain in made}
    for chain, glue in made.items():
        assert len(glue) == len(chain.glue)
        assert all(not at % 256 for at in (*chain.fields.values(), *chain.counts.values()))


def test_places_of_a_chain_never_overlap_while_they_are_needed(read):
    """Every place has its own bytes: what is written by one link stays until the graph ends."""
    for chain in read():
        held: dict[tuple[str, int], int] = {}
        for link in chain.links:
            if isinstance(link, Link):
                held[link.output] = 0
            else:
                held[link.out] = max(held.get(link.out, 0), 4 * link.rows * link.cols)
        for space in ("between", "output"):
            spots = sorted((at, size) for (name, at), size in held.items() if name == space)
            for (at, size), (behind, _) in pairwise(spots):
                assert at + size <= behind, (chain.key, space)
            assert not spots or spots[-1][0] + spots[-1][1] <= chain.nbytes[space]


@pytest.mark.parametrize("which", ["gone", "more", "fewer", "moved", "elsewhere"])
def test_a_chain_that_does_other_than_it_says_is_refused(read, which):
    def change(chains):
        launches = chains["rest.b1"]
        if which == "gone":
            del chains["rest.b1"]
        elif which == "more":
            launches.append(launches[0])
        elif which == "fewer":
            launches.pop()
        elif which == "moved":
            launches[0][2][0][2] += 256
        else:
            chains["rest.b1"] = copy.deepcopy(chains["speak.b1"][: len(launches)])

    with pytest.raises((PackageError, PlanError), match="compile"):
        read(change)


def test_damaged_chains_are_one_clear_error(read):
    draw = random.Random(3)
    odd = [None, -1, 2**40, 1.5, "x", [], {}, [[]], True]
    for _ in range(200):

        def change(chains):
            at, keys = chains, []
            while isinstance(at, list | dict) and at and (not keys or draw.random() < 0.85):
                keys.append((at, draw.choice(list(at) if isinstance(at, dict) else range(len(at)))))
                at = keys[-1][0][keys[-1][1]]
            keys[-1][0][keys[-1][1]] = draw.choice([v for v in odd if v != at])

        try:
            read(change)
        except TmlcError:
            continue
        except Exception as error:
            raise AssertionError("not an error of ours") from error


# Which chains there are.


def presets(buckets, **changes):
    """Chains of a model with the tick of the presets."""
    layout = SimpleNamespace(**{
        "audio_in": 4, "text_in": 2, "text_out": 2, "audio_out": 4, "hop": 800, "frames_per_position": 4, "n_mel": 80,
        **changes,
    })  # fmt: skip

    def spec(name, inputs, output):
        return MethodSpec(name, 64, tuple(TensorSpec(d, a, 0, c) for d, a, c in inputs), (TensorSpec(*output),))

    hidden, key, pcm, mel = ("f32", 1, 64), ("i64", 1, 3), ("f32", 1, 800), ("f32", 4, 80)
    methods = [
        spec("embed_audio", [pcm], ("f32", 1, 0, 64)), spec("embed_speech", [pcm], ("f32", 1, 0, 64)),
        spec("embed_text", [("i32", 1, 1)], ("f32", 1, 0, 64)), spec("decode", [hidden], ("f32", 1, 0, 64)),
        spec("next_token", [hidden, key, ("f32", 1, 1)], ("i32", 1, 0, 1)),
        spec("speak", [hidden, key], ("f32", 4, 0, 80)), spec("vocode", [mel], ("f32", 1, 0, 800)),
    ]  # fmt: skip
    return compose({m.name: m for m in methods}, {m.name: buckets for m in methods}, layout)


def chain_of(made, key):
    return next(chain for chain in made if chain.key == key)


def test_the_presets_have_every_chain_for_up_to_64_sessions():
    """docs/triton.md, "Chains": what is decoded at once, and where 64 sessions have to be cut."""
    pairs = [(b, n) for b in (1, 2, 4, 8, 16, 32, 64) for n in (1, 4, 16, 64) if b * n <= 256]
    made = presets(pairs)
    assert {c.key for c in made} == {f"{name}.b{b}" for name in NAMES for b in (1, 2, 4, 8, 16, 32, 64)}
    assert [(p.start, p.n) for p in chain_of(made, "rest.b16").pieces] == [(0, 16)]
    assert [(p.start, p.n) for p in chain_of(made, "rest.b64").pieces] == [(0, 4), (4, 4)]
    methods = [link.method for link in chain_of(made, "speak.b1").links if isinstance(link, Link)]
    each = ["speak", "vocode", "embed_speech", "decode"]
    assert methods == ["embed_speech", "embed_text", "decode", *(each * 4)[:-2]]
    assert [type(x) for x in chain_of(made, "write.b1").links] == [Link] * 3
    kinds = [type(link) for link in chain_of(made, "speak.b1").links]
    assert kinds.count(Clamp) == 3 and kinds.count(Take) == 3 + 4


def test_where_one_session_has_no_room_in_the_buckets_there_are_no_chains(tiny, lab, tmp_path):
    """Whoever compiles such an engine is told what is missing, and so is whoever asks what its ticks cost."""
    assert presets([(1, 1), (4, 1)]) == []
    assert {c.name for c in presets([(1, 1), (1, 4)], audio_out=1)} == set(NAMES)
    with lab.nothing_compiled():
        report = tmlc.compile(tiny.checkpoint, tmp_path / "narrow.tmlc", target=lab.target, max_append=2)
    (note,) = [note for note in report.notes if "method by method" in note]
    assert "embed_audio has no bucket of 1x4 (sessions x positions)" in note and "--max-append" in note
    program, precision = load_planned(tmp_path / "narrow.tmlc", None, None)
    assert engine_of(program, precision, lab.target).launches.endswith(f"; {note}")

"""A second engine of this machine as background model: what it answers, and that it makes way."""

import asyncio
import os
import sys
import threading
from collections import deque
from dataclasses import replace

import pytest

from tmlc.errors import BackgroundError, UsageError
from tmlc.package.manifest import TickLayout
from tmlc.runtimes.background.delegations import Limits, Stage
from tmlc.runtimes.background.engine_model import EngineModel
from tmlc.runtimes.background.session import Background
from tmlc.runtimes.core.engine import Engine

from ..runtimes.conftest import FakeBackend, make_manifest
from .conftest import LAYOUT, Edges, make_tokenizer, until

EOS = 256


def thinker(text: bytes = b"rain", kind: str = "tokens", on_call=lambda method: None) -> Engine:
    """A token model that says `text`, whatever it reads."""
    backend = FakeBackend()
    backend.script, backend.on_call = deque([*text, EOS]), on_call
    layout = TickLayout(duration_ms=200, text_out=2, eos_token_ids=(EOS,))
    manifest = make_manifest(kind, layout) if kind == "tokens" else make_manifest(kind)
    return Engine(backend, replace(manifest, session_bytes=backend.slot_bytes), "digest", make_tokenizer(), 1)


def play(model, scene, preempted=None, limits=None):
    async def main():
        background = Background(model, preempted=preempted, limits=limits)
        events = []
        session = background.open(make_tokenizer(), LAYOUT, on_delegation=events.append)
        try:
            await scene(session, events)
        finally:
            session.close()
            await background.close()
            assert not model._thread.is_alive()

    asyncio.run(main())


def test_its_answer_is_said():
    engine = thinker()

    async def scene(session, events):
        session.delegate("weather?")
        await until(lambda: events[-1].stage is Stage.DONE)
        edges = Edges(session)
        edges.edges(20)
        assert edges.said == "rain"
        read = bytes(int(t) for kind, t in engine.backend.said if kind == "text" and t < EOS).decode()
        assert "Task: weather?\n\nAnswer:rain" in read

    play(EngineModel(lambda: engine, first_target="cpu"), scene)
    assert engine.backend.closed


def test_it_stops_while_the_machine_is_needed_and_goes_on_afterwards():
    busy, calls = threading.Event(), []
    engine = thinker(on_call=calls.append)

    async def scene(session, events):
        busy.set()
        session.delegate("weather?")
        await asyncio.sleep(0.2)
        assert not calls and events[-1].stage is Stage.CREATED
        busy.clear()
        await until(lambda: events[-1].stage is Stage.DONE)

    play(EngineModel(lambda: engine, first_target="cpu"), scene, preempted=busy.is_set)


def test_a_cancelled_delegation_ends_between_two_pieces_and_frees_its_session():
    engine = thinker(b"x" * 100_000)

    async def scene(session, events):
        delegation = session.delegate("long one")
        await until(lambda: engine.capacity().free == 0)
        session.delegations.cancel(delegation.id)
        await until(lambda: engine.capacity().free == 1)

    play(EngineModel(lambda: engine, first_target="cpu", max_tokens=50_000), scene)


def test_a_long_conversation_is_cut_at_its_start_and_an_answer_at_its_bound():
    engine = thinker(b"y" * 1000)

    async def scene(session, events):
        for k in range(100):
            session.heard("blah " * 20, k * 3000, k * 3000 + 1)
        session.delegate("what?")
        await until(lambda: events[-1].stage is Stage.DONE)
        texts = [value for kind, value in engine.backend.said if kind == "text"]
        assert len(texts) <= 1024 and bytes(map(int, texts)).decode().count("y" * 60) == 1
        assert "Task: what?" in bytes(map(int, texts)).decode()

    play(EngineModel(lambda: engine, first_target="cpu", max_tokens=64), scene)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, where threads have a niceness each")
def test_its_thread_and_those_that_it_starts_are_nicer_than_this_one():
    found = []

    def load():
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        child = threading.Thread(
            target=lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        )
        child.start()
        child.join()
        return thinker()

    async def scene(session, events):
        mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        session.delegations._model.ready(20)
        assert found == [min(19, mine + 5)] * 2

    play(EngineModel(load, first_target="cpu", niceness=5), scene)


def on(target: str) -> Engine:
    engine = thinker()
    engine.target = target
    return engine


@pytest.mark.parametrize(
    ("load", "first", "why"),
    [
        (lambda: thinker(kind="interaction"), "cpu", "token model"),
        (lambda: on("triton:sm90"), "tensorrt:sm89", "on the GPU"),
        (lambda: 1 / 0, "cpu", "zero"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_and_fails_delegations(load, first, why):
    model = EngineModel(load, first_target=first)

    async def scene(session, events):
        with pytest.raises((UsageError, ZeroDivisionError), match=why):
            model.ready(20)
        session.delegate("go")
        await until(lambda: events[-1].stage is Stage.FAILED)

    play(model, scene)


def test_a_fault_of_the_engine_ends_one_delegation_and_not_the_model():
    faults = [RuntimeError("broken")]

    def fail(method):
        if faults:
            raise faults.pop()

    async def scene(session, events):
        session.delegate("one")
        await until(lambda: events[-1].stage is Stage.FAILED)
        assert "failed: RuntimeError. see the traceback in the log" in events[-1].text
        session.delegate("two")
        await until(lambda: events[-1].stage is Stage.DONE)

    play(EngineModel(lambda: thinker(on_call=fail), first_target="cpu"), scene, limits=Limits(timeout=20.0))


def test_niceness_has_bounds():
    with pytest.raises(UsageError, match=r"not 20 \(niceness\)\n  leave it out for 10"):
        EngineModel(thinker, first_target="cpu", niceness=20)


def test_a_second_engine_that_loads_for_long_says_how_to_wait():
    free = threading.Event()

    def slow():
        free.wait(30)
        return thinker()

    model = EngineModel(slow, first_target="cpu")
    try:
        with pytest.raises(BackgroundError, match=r"still loading\n  call ready\(\) without a timeout"):
            model.ready(0.0)
    finally:
        free.set()
    model.ready()
    asyncio.run(model.close())

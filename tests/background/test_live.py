"""With nano on the scheduler: a delegation by rule, its result spoken, and models that must not make a tick late."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from click.testing import CliRunner

from tmlc.cli.main import cli
from tmlc.runtimes.background.callable import CallableModel
from tmlc.runtimes.background.delegations import Limits, Stage
from tmlc.runtimes.background.model import Progress
from tmlc.runtimes.background.policies import Policy
from tmlc.runtimes.background.rules import Rule
from tmlc.runtimes.background.session import Background
from tmlc.runtimes.core import ticklog
from tmlc.runtimes.core.clock import VirtualClock
from tmlc.runtimes.core.engine import load
from tmlc.runtimes.core.live import Published
from tmlc.runtimes.core.scheduler import Scheduler

from .conftest import until


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """The package of nano, compiled once."""
    folder = tmp_path_factory.mktemp("nano")
    for words in (["zoo", "create", "nano", "-o", folder / "nano"],
                  ["compile", folder / "nano", "-o", folder / "nano.tmlc"]):  # fmt: skip
        result = CliRunner().invoke(cli, [str(word) for word in words])
        assert result.exit_code == 0, result.output
    return folder / "nano.tmlc"


class Live:
    """A scheduler on a virtual clock, stepped on the loop of the test, with sessions that have a background."""

    def __init__(self, engine, background) -> None:
        self.scheduler = Scheduler(engine, clock=VirtualClock(0.2))
        self.background, self.sessions = background, []

    def open(self, seed=0):
        heard, events, records = [], [], []
        beside = self.background.open(
            self.scheduler.engine.tokenizer, self.scheduler.engine.layout, vocab=self.scheduler.engine.vocab,
            on_delegation=events.append,
        )  # fmt: skip
        seat = self.scheduler.open(heard.append, seed=seed, inbox=beside, log=records.append)
        self.scheduler.step()  # it joins; its first tick is due at the next edge
        self.sessions.append((seat, beside, heard, events, records))
        return self.sessions[-1]

    async def edge(self):
        """One edge of the grid; what was published goes to the backgrounds, as the gateway does it."""
        self.scheduler.clock.wait(self.scheduler.next_edge)
        self.scheduler.step()
        for _, beside, heard, *_ in self.sessions:
            out = heard[-1]
            assert isinstance(out, Published)
            beside.tick(out)
        await asyncio.sleep(0)

    async def close(self):
        for _, beside, *_ in self.sessions:
            beside.close()
        self.scheduler.close()
        await self.background.close()


def play(package, background, scene, sessions=1):
    async def main():
        with load(package, threads=1, sessions=sessions) as engine:
            live = Live(engine, background())
            try:
                await scene(live)
            finally:
                await live.close()

    asyncio.run(main())


def rule(**fields) -> Rule:
    return Rule.model_validate(fields)


ANSWER = "Es regnet, 3 °C."


def test_a_delegation_by_rule_is_spoken_word_for_word_and_the_log_replays(nano):
    def background():
        rules = [rule(at="1 s", delegate="weather?", policy="interrupt", spoken=True)]
        return Background(CallableModel(lambda delegation, context: ANSWER), rules=rules)

    async def scene(live):
        seat, beside, heard, events, records = live.open()
        for _ in range(6):
            await live.edge()
        await until(lambda: events and events[-1].stage is Stage.DONE)
        for _ in range(12):
            await live.edge()
        said = [out for out in heard if out.delivery.say]
        assert bytes(t for out in said for t in out.output.tokens).decode() == ANSWER
        assert "".join(out.output.text for out in said) == ANSWER
        ticks = [out.output.index for out in said]
        assert ticks == list(range(ticks[0], ticks[-1] + 1)) and ticks[0] >= 6  # the rule fired at tick 5
        assert all(np.abs(out.output.audio).max() > 0 for out in said)
        assert beside.queue.waiting == 0
        seat.close()
        live.scheduler.step()
        live.sessions.clear()
        again = ticklog.replay(live.scheduler.engine, records)
        assert again == len(heard) - 1

    play(nano, background, scene)


def test_what_is_injected_silently_is_in_the_log_and_not_in_the_transcript(nano):
    async def scene(live):
        _, beside, heard, _, records = live.open()
        await live.edge()
        beside.inject("x" * 150, policy=Policy.SILENT)
        for _ in range(4):
            await live.edge()
        given = [record.get("inject", []) for record in records if record["event"] == "tick"]
        assert [len(tokens) for tokens in given] == [0, 64, 64, 28, 0] and heard[1].delivery.parts == ()
        assert not any("xx" in out.output.text for out in heard)
        live.sessions.clear()

    play(nano, Background, scene)


def test_a_commentary_is_said_even_by_a_model_that_never_pauses(nano):
    async def scene(live):
        _, beside, heard, _, _ = live.open()
        beside.inject("Hi!", spoken=True)  # when idle, and nano never is
        for _ in range(60):
            await live.edge()
        assert all(out.model_speaking for out in heard)
        assert bytes(t for out in heard for t in out.delivery.say) == b"Hi!" and beside.queue.waiting == 0

    play(nano, Background, scene)


def test_all_ticks_run_while_models_hang_flood_and_block(nano):
    free, blocked, left = threading.Event(), threading.Event(), threading.Event()

    async def model(delegation, context):
        if delegation.task == "hang":
            await asyncio.sleep(1000)
        if delegation.task == "block":  # the thread of all models stands still
            blocked.set()
            free.wait(120)
            left.set()
        while True:
            yield Progress("flood" * 1000)

    def background():
        rules = [rule(every="400 ms", delegate=task, supersede=task) for task in ("hang", "flood", "block")]
        return Background(CallableModel(model), rules=rules, limits=Limits(timeout=0.5, progress_after=0.05))

    async def scene(live):
        first, second = live.open(seed=1), live.open(seed=2)
        for _ in range(30):
            await live.edge()
        await until(blocked.is_set)
        for _ in range(10):
            await live.edge()
        assert not left.is_set()  # 40 ticks of two sessions were done, and it stands still yet
        assert live.scheduler.stats().late == 0 and live.scheduler.stats().collapses == 0
        for _, beside, heard, _, _ in (first, second):
            assert [out.output.index for out in heard] == list(range(40))
            assert len(beside.delegations.live) <= 3
        free.set()

    try:
        play(nano, background, scene, sessions=2)
    finally:
        free.set()


def test_a_session_gives_the_bits_that_it_gives_without_a_busy_neighbour(nano):
    audio = []

    async def alone(live):
        mine = live.open(seed=5)
        for _ in range(12):
            await live.edge()
        audio.append(np.concatenate([out.output.audio for out in mine[2]]))

    async def beside_a_busy_one(live):
        live.background, busy = Background(), live.background
        mine = live.open(seed=5)
        live.background = busy
        other = live.open(seed=6)
        for k in range(12):
            await live.edge()
            if k == 2:
                await until(lambda: other[3] and other[3][-1].stage is Stage.DONE)
        assert any(out.delivery.inject for out in other[2])
        audio.append(np.concatenate([out.output.audio for out in mine[2]]))

    def ten_megabytes():
        rules = [rule(at="200 ms", delegate="go", policy="silent")]
        return Background(CallableModel(lambda delegation, context: "y" * 10_000_000), rules=rules)

    play(nano, Background, alone)
    play(nano, ten_megabytes, beside_a_busy_one, sessions=2)
    assert (audio[0] == audio[1]).all()

"""Live sessions on real packages: sixteen of them give bit for bit what each gives alone, their logs replay, and a
collapse leaves what silent ticks leave."""

import json

import numpy as np
import pytest

import tmlc
from tmlc.model_zoo.interaction import create_checkpoint
from tmlc.model_zoo.interaction.config import InteractionConfig, read_preset
from tmlc.runtimes.core.admission import measure
from tmlc.runtimes.core.clock import ManualClock
from tmlc.runtimes.core.live import NOTHING, Delivery, Ended, Published
from tmlc.runtimes.core.scheduler import Scheduler
from tmlc.runtimes.core.ticklog import replay

SESSIONS, EDGES = 16, 14


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    create_checkpoint(InteractionConfig.from_dict(read_preset("nano")["config"]), seed=0, out_dir=folder / "nano")
    tmlc.compile(folder / "nano", folder / "nano.tmlc", precision="int8")
    return folder / "nano.tmlc"


@pytest.fixture(scope="module", params=["nano", "bounded"])
def package(request):
    """nano, and a tiny model whose rings wrap within a few ticks and which is silent now and then."""
    found = request.getfixturevalue(request.param)
    return found if request.param == "nano" else found[1]


def bits(out):
    """All of an output that must not depend on the company."""
    stats = {key: value for key, value in out.stats.items() if key != "batch"}
    return out.index, out.tokens, out.text, out.audio.tobytes(), stats


def forced_silence(engine, session, given):
    """One tick in which the model's choice is <silence>, whatever it would have chosen."""
    choose = engine.model.next_token
    engine.model.next_token = lambda asked: [(s, engine.layout.silence_token_id) for s, _, _ in asked]
    try:
        return session.tick(given)
    finally:
        engine.model.next_token = choose


def inputs(layout, rng, count):
    """Ticks with and without audio (also less than a tick of it), frames, text and injections."""
    samples, out = layout.audio_in * layout.hop, []
    for _ in range(count):
        audio = rng.normal(0, 0.1, rng.choice([0, samples // 3, samples])).astype(np.float32)
        size = (1, layout.frame_height, layout.frame_width, 3)
        video = rng.integers(0, 256, size, dtype=np.uint8) if rng.random() < 0.5 else None
        text = rng.choice(["", "hello", "what do you see?"])
        out.append(tmlc.TickInput(audio, video, str(text) or None, inject=rng.integers(0, 200, rng.integers(0, 6))))
    return out


@pytest.mark.parametrize("missed", [1, 5])
def test_a_collapse_leaves_bit_for_bit_what_forced_silence_leaves(package, missed):
    rng = np.random.default_rng(missed)
    with tmlc.load(package, threads=2, sessions=4) as engine:
        for seed in range(2):
            slow, fast, other = (engine.session(seed=seed, temperature=0.7) for _ in range(3))
            for given in inputs(engine.layout, rng, 3):
                engine.tick_batch([slow, fast], [given, given])
            *late, newest = inputs(engine.layout, rng, missed + 1)
            for given in late:
                assert forced_silence(engine, slow, given).stats["silent"]
            one = slow.tick(newest)
            two, _ = engine.tick_batch([fast, other], [newest, None], [late, []])
            assert (one.index, one.tokens, one.text, one.audio.tobytes()) == (
                two.index, two.tokens, two.text, two.audio.tobytes()
            )  # fmt: skip
            assert two.stats["collapsed"] == missed and slow.snapshot() == fast.snapshot()
            for given in inputs(engine.layout, rng, 2):
                assert bits(slow.tick(given)) == bits(fast.tick(given))
            for session in (slow, fast, other):
                session.close()


def test_what_a_session_is_told_to_say_leaves_what_choosing_it_leaves(package):
    with tmlc.load(package, threads=2, sessions=2) as engine:
        chosen, told, spoke = engine.session(seed=4), engine.session(seed=4), 0
        for given in inputs(engine.layout, np.random.default_rng(0), 12):
            out = chosen.tick(given)
            if not out.stats["silent"]:
                given.say = [token for token in out.tokens if token != engine.layout.end_of_tick_token_id]
                spoke += bool(given.say)
            assert told.tick(given).audio.tobytes() == out.audio.tobytes()
            assert told.snapshot() == chosen.snapshot()
    assert spoke, "something was said"


class Client:
    """A client whose behaviour depends on its number and the edge only."""

    def __init__(self, number, layout):
        self.number, self.layout, self.chance = number, layout, np.random.default_rng(number)
        self.outs, self.log, self.end = [], [], None

    def sink(self, event):
        if isinstance(event, Ended):
            self.end = event
        else:
            self.outs.append(event)

    def take(self, moment):
        if (moment.tick + self.number) % 5 == 2:
            return Delivery(inject=(60, 61, 62), say=(70,) if self.number % 2 else ())
        return NOTHING

    def published(self, out):
        assert isinstance(out, Published)

    def act(self, seat):
        layout, chance = self.layout, self.chance
        samples = layout.audio_in * layout.hop
        seat.hear(chance.normal(0, 0.1, int(chance.integers(samples // 2, samples * 3 // 2))).astype(np.float32))
        if chance.random() < 0.4:
            seat.see(chance.integers(0, 256, (layout.frame_height, layout.frame_width, 3), dtype=np.uint8))
        if chance.random() < 0.2:
            seat.read("hm?")

    def open(self, scheduler):
        return scheduler.open(
            self.sink, seed=self.number, temperature=0.7 * (self.number % 2), inbox=self, log=self.log.append
        )


def live(engine, numbers):
    """The clients of these numbers in one scheduler. At one edge the device is late, and all collapse. Client 0 is away
    for two edges. Gives the clients, and their last snapshots."""
    scheduler = Scheduler(engine, clock=ManualClock())
    clients = [Client(number, engine.layout) for number in numbers]
    seats = [client.open(scheduler) for client in clients]
    scheduler.step()
    for edge in range(EDGES):
        for client, seat in zip(clients, seats, strict=True):
            client.act(seat)
            if client.number == 0 and edge == 9:
                seat.detach()
            if client.number == 0 and edge == 11:
                seat.attach(client.sink)
        scheduler.clock.advance(0.8 if edge == 5 else 0.2)
        scheduler.step()
    snapshots = [seat.snapshot() for seat in seats]
    scheduler.step()
    scheduler.close()
    return clients, [snapshot.result(0) for snapshot in snapshots]


def test_sixteen_sessions_give_bit_for_bit_what_each_gives_alone_and_their_logs_replay(nano):
    with tmlc.load(nano, threads=2, sessions=SESSIONS) as engine:
        together, snapshots = live(engine, range(SESSIONS))
        assert max(out.output.stats["batch"] for client in together for out in client.outs) == SESSIONS
        for client, snapshot in zip(together, snapshots, strict=True):
            (alone,), (blob,) = live(engine, [client.number])
            assert [bits(out.output) for out in alone.outs] == [bits(out.output) for out in client.outs]
            assert blob == snapshot
            log = [json.loads(json.dumps(record)) for record in client.log]
            assert replay(engine, log) == sum(1 + out.collapsed for out in client.outs)
            assert sum(out.collapsed for out in client.outs) == 3
        said = {tuple(out.output.tokens) for client in together for out in client.outs}
        assert len(said) > 10, "they said different things"


def test_a_session_goes_on_from_its_snapshot_on_another_engine(nano):
    with tmlc.load(nano, threads=2, sessions=1) as engine:
        (client,), (blob,) = live(engine, [3])
        goes_on = engine.restore(blob)
        expected = [bits(goes_on.tick()) for _ in range(3)]
    with tmlc.load(nano, threads=1, sessions=1) as other:
        scheduler, log, outs = Scheduler(other, clock=ManualClock()), [], []
        scheduler.open(outs.append, snapshot=blob, log=log.append)
        scheduler.step()
        for _ in range(3):
            scheduler.clock.advance(0.2)
            scheduler.step()
        assert [bits(out.output) for out in outs] == expected and client.end is not None
        scheduler.close()
        assert replay(other, log, blob) == 3


def test_steps_are_measured_by_size_and_at_a_long_context(nano):
    with tmlc.load(nano, threads=2, sessions=4) as engine:
        rows = measure(engine, sizes=(1, 4), rounds=3).to_json()["step_ms"]
        assert list(rows) == ["1", "4"] and engine.capacity().free == 4

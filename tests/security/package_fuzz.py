"""Loads and uses mutated packages; run as a program, under sanitizers, by test_package_fuzz.py.

Usage: package_fuzz.py PACKAGE LIBRARY FIRST COUNT FOLDER. Prints a line for each case: its number, its kind, and
`ran` or the error's class. Ends at the first sanitizer report or hang; any exception that is not a TmlcError is printed
as `FAILED` with its traceback.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import package_mutations as mutations
import snapshot_mutations

import tmlc
import tmlc.kernels.cpu.library as kernels
from tmlc.package.reader import Package, open_package
from tmlc.report.package_view import describe_package, method_ir, package_tables
from tmlc.report.tables import plain_text
from tmlc.report.verify import replay
from tmlc.runtimes.core import engine as engines
from tmlc.runtimes.core.slots import HostSlots

KINDS = ["damage", "container", "plan", "manifest", "header", "weights", "tokenizer", "golden", "snapshot"]
SHARES = dict(damage=2, container=3, plan=7, manifest=5, header=2, weights=2, tokenizer=3, golden=2, snapshot=4)
ORDER = [kind for kind in KINDS for _ in range(SHARES[kind])]
CASE_SECONDS = 60  # far more than any case takes, also on a busy machine


def use_library(path: Path) -> None:
    """Lets the binding find this library for every variant, and shows the sanitizer the exact ends of the memory that
    kernels get from Python: weights are a heap block instead of a mapped page, padding of slots is poisoned."""
    kernels._library_file = lambda isa: path
    poison = ctypes.CDLL(None).__asan_poison_memory_region
    poison.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def open_exact(where: Path, verify: bool = True) -> Package:
        package = open_package(where, verify)
        size = package.weights.size
        room = np.empty(size + 64, np.uint8)
        start = -room.ctypes.data % 64
        exact = room[start : start + size]
        exact[:] = package.weights
        exact.flags.writeable = False
        poison(room.ctypes.data + start + size, 64 - start)
        package.weights = exact
        return package

    make = HostSlots.__init__

    def poisoned(self: HostSlots, count: int, slot_bytes: int) -> None:
        make(self, count, slot_bytes)
        for index in range(count):
            gap = self._pitch - slot_bytes if slot_bytes else 64
            poison(self._memory.ctypes.data + index * self._pitch + slot_bytes, gap)

    engines.open_package = open_exact
    HostSlots.__init__ = poisoned


class Outcome:
    """The first error of a case, or that it ran to its end."""

    def __init__(self) -> None:
        self.said = ""

    def attempt(self, step: Callable[[], Any]) -> Any:
        """The step's result; None when it raised a TmlcError."""
        try:
            return step()
        except tmlc.TmlcError as error:
            text = str(error)
            assert error.what and "\n" not in error.what, f"not one line: {text!r}"
            self.said = self.said or type(error).__name__
        return None


def noise(rng: Random, layout: Any) -> tmlc.TickInput:
    """A tick of everything that the layout takes, within sizes that a caller would give."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    samples = min(layout.audio_in * layout.hop, 10000)
    audio = (numbers.standard_normal(samples) * 0.1).astype(np.float32) if samples else None
    shape = (1, min(layout.frame_height, 64), min(layout.frame_width, 64), 3)
    video = numbers.integers(0, 256, shape, np.uint8) if layout.video_positions else None
    return tmlc.TickInput(audio=audio, video=video)


def talk(outcome: Outcome, engine: tmlc.Engine, session: tmlc.Session, rng: Random) -> tmlc.Session:
    """A little of everything that a session can do."""
    layout = engine.manifest.tick
    outcome.attempt(lambda: session.append(tokens=[rng.randrange(256) for _ in range(rng.choice([1, 3, 30]))]))
    outcome.attempt(lambda: session.tick(noise(rng, layout)))
    outcome.attempt(lambda: session.tick(tmlc.TickInput(text="hello é\0")))
    if engine.manifest.tick.video_positions:
        frames = (min(layout.clip_frames, 8), min(layout.frame_height, 64), min(layout.frame_width, 64), 3)
        outcome.attempt(lambda: session.append(video=np.zeros(frames, np.uint8)))
    outcome.attempt(lambda: session.append(audio=np.zeros(min(2 * layout.hop, 4000), np.float32)))
    return session


def together(engine: tmlc.Engine, outcome: Outcome, sessions: list[tmlc.Session], rng: Random) -> None:
    """One tick of all of them in one call."""

    def own(result: tmlc.TickOutput | Exception) -> None:
        if isinstance(result, Exception):
            raise result

    given = [noise(rng, engine.manifest.tick) for _ in sessions]
    for result in outcome.attempt(lambda: engine.tick_batch(sessions, given)) or []:
        outcome.attempt(lambda result=result: own(result))


def heard_alone(engine: tmlc.Engine) -> bytes:
    """What a session of a seed of its own says in its first tick."""
    with engine.session(seed=7) as session:
        return session.tick(noise(Random(7), engine.manifest.tick)).audio.tobytes()


def use_engine(outcome: Outcome, engine: tmlc.Engine, rng: Random) -> None:
    engine.capacity()
    with engine.session(seed=rng.randrange(99), temperature=rng.choice([0.0, 0.8])) as session:
        talk(outcome, engine, session, rng)
        blob = outcome.attempt(session.snapshot)
    if blob is not None:
        twin = outcome.attempt(lambda: engine.restore(blob))
        if twin is not None:
            with twin, engine.session() as other:
                together(engine, outcome, [other, twin], rng)
    assert engine.slots.free == engine.slots.count


def use_package(outcome: Outcome, path: Path, rng: Random) -> None:
    """Everything that a person does with a package: look at it, load it, talk, verify it."""

    def look() -> None:
        with open_package(path) as package:
            plain_text(package_tables(describe_package(package), path))
            method_ir(package, "decode")

    outcome.attempt(look)
    engine = outcome.attempt(lambda: tmlc.load(path, threads=rng.choice([1, 2]), sessions=2))
    if engine is None:
        return
    with engine:
        use_engine(outcome, engine, rng)
        outcome.attempt(lambda: replay(engine, path, lambda *_: None))
        assert engine.slots.free == engine.slots.count


def use_snapshot(outcome: Outcome, engine: tmlc.Engine, blob: bytes, rng: Random, alone: bytes) -> None:
    """Whatever a snapshot holds, it can hurt the session that it makes, and never the company of that session."""
    session = outcome.attempt(lambda: engine.restore(blob))
    if session is not None:
        with session:
            with engine.session(seed=7) as other:
                given = [noise(Random(7), engine.manifest.tick), noise(rng, engine.manifest.tick)]
                heard = engine.tick_batch([other, session], given)[0]
                assert isinstance(heard, tmlc.TickOutput) and heard.audio.tobytes() == alone, heard
            outcome.attempt(lambda: session.tick(noise(rng, engine.manifest.tick)))
            talk(outcome, engine, session, rng)
            again = outcome.attempt(session.snapshot)
        if again is not None:
            outcome.attempt(lambda: engine.restore(again).close())
    assert engine.slots.free == engine.slots.count


def main(package: Path, library: Path, first: int, count: int, folder: Path) -> None:
    use_library(library)
    original, parts = package.read_bytes(), mutations.take_apart(package)
    good = tmlc.load(package, threads=2, sessions=2)
    with good.session(seed=1) as session:
        for _ in range(4):
            session.tick(noise(Random(0), good.manifest.tick))
        blob = session.snapshot()
    alone = heard_alone(good)
    for case in range(first, first + count):
        rng = Random(case)
        kind = ORDER[case % len(ORDER)]
        print(case, kind, end=" ", flush=True)
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        outcome = Outcome()
        try:
            if kind == "snapshot":
                use_snapshot(outcome, good, snapshot_mutations.snapshot(blob, rng), rng, alone)
            else:
                path = folder / str(case)
                mutations.write_case(kind, original, parts, rng, path)
                use_package(outcome, path, rng)
        except BaseException:
            outcome.said = "FAILED"
            traceback.print_exc()
            print(f"in case {case} ({kind})", file=sys.stderr)
        faulthandler.cancel_dump_traceback_later()
        print(outcome.said or "ran", flush=True)
        gc.collect()
        if kind != "snapshot" and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))

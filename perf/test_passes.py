"""What each pass buys on the CPU: a tick of nano with the whole pipeline, and with one pass left out.

The two engines take turns and the thread's own processor time counts, so that a busy machine falls on both alike. A
ratio above 1 is what the pass saves.
Passes that the engine cannot do without (level 0) have no ratio; `canonicalize.dead_code` is the exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tmlc
import tmlc.compiler as compiler
from tmlc.cli.inputs import tick_shape
from tmlc.ir.program import replace
from tmlc.pipeline.manager import run_pipeline
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.pipeline import Pipeline, Step, load_pipeline
from tmlc.pipeline.registry import _PASSES, register_pass
from tmlc.report.profile.inputs import synthetic_recording

ROUNDS, TICKS = 12, 40
Make = Callable[[str, Pipeline], Path]
WITHOUT = dict.fromkeys(s.name for s in load_pipeline("cpu").steps if s.level or s.name == "canonicalize.dead_code")


@pytest.fixture(scope="module")
def make(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """(name, pipeline) → the package of nano; the model is traced once."""
    traced, folder = tmlc.program(checkpoint), tmp_path_factory.mktemp("passes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "load_program", lambda source, overrides: traced.clone())

        def compiled(name: str, pipeline: Pipeline) -> Path:
            out = folder / f"{name}.tmlc"
            if not out.exists():
                compiler.compile(checkpoint, out, pipeline=pipeline)
            return out

        yield compiled


def compare(one: Path, two: Path) -> tuple[float, float]:
    """Processor time of the same conversation with audio, video and text in ms, one thread. Each tick is played ROUNDS
    times by both engines in turns, and its fastest time counts, which other work on the machine moves least."""
    engines = [tmlc.load(path, threads=1, sessions=1) for path in (one, two)]
    shape = tick_shape(engines[0].manifest)
    given = list(islice(synthetic_recording(shape, TICKS * shape.seconds, True, seed=0).ticks(TICKS), TICKS))
    times = np.full((2, ROUNDS, len(given)), np.inf)
    for turn in range(ROUNDS):
        for which, engine in enumerate(engines):
            session = engine.session(seed=0)
            for index, item in enumerate(given):
                began = time.thread_time()
                session.tick(item)
                times[which, turn, index] = (time.thread_time() - began) * 1000
            session.close()
    for engine in engines:
        engine.close()
    first, second = times.min(axis=1).sum(axis=1)
    return float(first), float(second)


def test_noise(make: Make, benchmark: Any, figure: Callable[..., None]) -> None:
    """An engine against itself: how far the ratios below may be trusted."""
    whole = make("all", load_pipeline("cpu"))
    one, two = benchmark.pedantic(lambda: compare(whole, whole), rounds=1, iterations=1)
    figure("tick of an engine / of the same engine", one / two, "×")


@pytest.mark.parametrize("name", list(WITHOUT))
def test_left_out(name: str, make: Make, benchmark: Any, figure: Callable[..., None]) -> None:
    """A tick without the pass against a tick with it, and the size of the package."""
    whole, part = make("all", load_pipeline("cpu")), make(name, load_pipeline("cpu").disable([name]))
    with_it, without = benchmark.pedantic(lambda: compare(whole, part), rounds=1, iterations=1)
    figure(f"tick without {name} / with it", without / with_it, "×")
    figure(f"package without {name} / with it", part.stat().st_size / whole.stat().st_size, "×")


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_level(level: str, make: Make, benchmark: Any, figure: Callable[..., None]) -> None:
    """A tick at a lower level against O2."""
    whole, part = make("all", load_pipeline("cpu")), make(level, load_pipeline(level))
    with_all, with_part = benchmark.pedantic(lambda: compare(whole, part), rounds=1, iterations=1)
    figure(f"tick at {level} / at O2", with_part / with_all, "×")


def test_convolution_ceiling(make: Make, benchmark: Any, figure: Callable[..., None]) -> None:
    """The most that fusing short convolutions with the additions around them could save: a (wrong) engine in which the
    convolutions that end in a residual addition are not there at all, against one in which they are."""

    @register_pass("perf.no_convolution")
    class NoConvolution(Pass):
        """Drops each short convolution whose result is only added to something."""

        def run(self, program: Any, ctx: PassContext) -> PassResult:
            result = PassResult(program, 0)
            for node in program.methods["decode"].calls("short_conv"):
                if all(user.name.startswith("add") for user in node.users):
                    replace(node, node.args[0])
                    result.matches += 1
            return result

    try:
        steps = load_pipeline("cpu").steps
        at = next(i for i, step in enumerate(steps) if step.name == "state.insert")
        part = Pipeline("no convolution", (*steps[:at], Step("perf.no_convolution", {}, ">=1"), *steps[at:]))
        whole, without = make("all", load_pipeline("cpu")), make("no_convolution", part)
    finally:
        _PASSES.pop("perf.no_convolution")
    with_it, bare = benchmark.pedantic(lambda: compare(whole, without), rounds=1, iterations=1)
    figure("tick / tick with no residual convolution at all", with_it / bare, "×")


def test_bf16(make: Make, benchmark: Any, figure: Callable[..., None]) -> None:
    """quantize.cast to bfloat16 against float32: a tick and the size of the package."""
    whole = make("all", load_pipeline("cpu"))
    cast = load_pipeline("cpu").configure("quantize.cast", precision="bf16").configure("state.insert", kv_dtype="bf16")
    part = make("bf16", cast)
    wide, narrow = benchmark.pedantic(lambda: compare(whole, part), rounds=1, iterations=1)
    figure("tick in fp32 / in bf16", wide / narrow, "×")
    figure("package in fp32 / in bf16", whole.stat().st_size / part.stat().st_size, "×")


def test_arena(checkpoint: Path, make: Make, figure: Callable[..., None]) -> None:
    """memory.plan: the bytes of all results of nano's methods against the arena that they share."""
    after = run_pipeline(compiler.load_program(checkpoint, {}), load_pipeline("cpu"))
    spans = [node.meta.get("arena", []) for method in after.methods.values() for node in method.calls()]
    places = [place for span in spans for place in (span if isinstance(span, list) else [span])]
    figure("results of all methods / the arena", sum(size for _, size in places) / after.meta["arena_bytes"], "×")

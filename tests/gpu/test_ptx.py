"""Whole ticks by the PTX of the kernels, launch by launch as the plan has them: what the interpreter computes, with no
hazard in shared memory, no copy that nobody waited for, and no launch that overlaps and reads too early."""

from __future__ import annotations

import numpy as np
import pytest

import tmlc
from tmlc.kernels.triton.ptx.host import PtxMachine
from tmlc.pipeline.pipeline import load_pipeline

pytestmark = pytest.mark.slow


def given(seed: int) -> tmlc.TickInput:
    draw = np.random.default_rng(seed)
    video = draw.integers(0, 256, (2, 8, 16, 3), np.uint8) if seed == 2 else None
    return tmlc.TickInput((0.1 * draw.standard_normal(320)).astype(np.float32), video, text="hi")


def ticks(engine: tmlc.Engine) -> list[tuple[tmlc.TickOutput, ...]]:
    """One session by itself, and then in company."""
    with engine.session(seed=4) as one, engine.session(seed=5) as other:
        first = one.tick(given(1))
        return [(first,), tuple(engine.tick_batch([one, other], [given(2), given(3)]))]


@pytest.mark.parametrize(
    ("sm", "precision", "overlap", "tolerance"),
    [(80, "fp32", False, 2e-4), (90, "fp32", True, 2e-4), (90, "bf16", True, 3e-2), (90, "fp8", True, 3e-2),
     (100, "bf16", True, 3e-2)],
)  # fmt: skip
def test_ticks_are_those_of_the_interpreter(tiny, lab, machine, tmp_path, sm, precision, overlap, tolerance):
    steps = load_pipeline("triton").configure("memory.buckets", **lab.buckets)
    if overlap:
        steps = steps.before("memory.buckets", "memory.overlap")
    with lab.nothing_compiled():
        tmlc.compile(
            tiny.checkpoint, tmp_path / "p.tmlc", target=f"triton:sm{sm}", precision=precision, pipeline=steps
        )
    found = []
    mark = machine.mark()
    with PtxMachine(sm) as ptx:
        for runner in (machine, ptx):
            with lab.load(tmp_path / "p.tmlc", runner, 2) as engine:
                bucket = engine.backend.plan.methods["decode"].buckets[0]
                assert {launch.overlap for launch in engine.backend.launches(bucket)} == {overlap}
                found.append(ticks(engine))
    machine.release(mark)
    for wanted, got in zip(*found, strict=True):
        for want, have in zip(wanted, got, strict=True):
            assert have.tokens == want.tokens and have.stats == want.stats
            assert np.abs(want.audio).max() > 1e-3, "an engine that says nothing proves nothing"
            assert np.abs(have.audio - want.audio).max() <= tolerance * np.abs(want.audio).max()

"""Bank conflicts of shared memory: how they are counted, and that products have none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from shapes import w, x
from triton_harness import with_compiler_for, with_triton

from tmlc.kernels.triton import variants
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Launch, Pointer
from tmlc.kernels.triton.ptx.conflicts import Conflicts
from tmlc.kernels.triton.ptx.host import PtxMachine
from tmlc.kernels.triton.registry import Call, lower
from tmlc.kernels.triton.swizzle import by_rows
from tmlc.report.gpu_code import turns_of

LANES = np.arange(32)
OLDER = "warps exchange what they add up over slices with conflicts"


@pytest.mark.parametrize(
    ("nbytes", "step", "turns", "least"),
    [
        (4, 4, 1, 1), (4, 0, 1, 1), (4, 8, 2, 1), (4, 128, 32, 1), (2, 2, 1, 1), (8, 8, 2, 2), (8, 128, 32, 2),
        (16, 16, 4, 4), (16, 128, 32, 4), (16, 2048, 32, 4), (16, 144, 4, 4),
    ],
)  # fmt: skip
def test_turns_of_a_warp(nbytes, step, turns, least):
    """Parts of 128 bytes, and in each as many turns as the bank with the most words has."""
    found = Conflicts()
    found.count(LANES, LANES * step, nbytes)
    assert (found.turns, found.least) == (turns, least)
    found.count(LANES + 64, LANES * step, nbytes)
    found.count(LANES[:0], LANES[:0], nbytes)
    assert (found.turns, found.least) == (2 * turns, 2 * least), "warps are served one after the other"


def module(order: str, *operands: int, vec: int = 8) -> str:
    reads = [
        f"%{k} = ttg.local_load %9 token %8 : !ttg.memdesc<8x16x128xbf16, #shared2, #smem, mutable> -> "
        f"tensor<8x16x128xbf16, #ttg.dot_op<{{opIdx = {operand}, parent = #mma, kWidth = 2}}>>"
        for k, operand in enumerate(operands)
    ]
    other = "#shared = #ttg.swizzled_shared<{vec = 8, perPhase = 1, maxPhase = 8, order = [1, 0]}>"
    layout = f"#shared2 = #ttg.swizzled_shared<{{vec = {vec}, perPhase = 1, maxPhase = 8, order = [{order}]}}>"
    return "\n".join([other, layout, *reads])


def test_inputs_lie_next_to_each_other_then_rows_then_slices():
    assert by_rows(module("2, 0, 1", 0)) == module("2, 1, 0", 0)
    assert by_rows(module("1, 0, 2", 0, 0)) == module("2, 1, 0", 0, 0)
    assert by_rows(module("1, 0, 2", 1)) == module("1, 2, 0", 1)
    for text in (module("2, 0, 1", 0, 1), module("2, 0, 1"), module("2, 0, 1", 0, vec=1)):
        assert by_rows(text) == text, "of both operands, of none, and not staggered at all"


def product(form: str, sm: int, norm: bool, rows: int) -> Launch:
    """The launch of a product of rows of 1024 inputs."""
    op, more = ("norm_linear", {"norm": replace(w(1024), name="norm")}) if norm else ("linear", {})
    given = {"x": x(1024), "weight": w(64, 1024, dtype=form), "bias": None, **more}
    call = Call(op, given, {"eps": 1e-6} if norm else {}, (x(64, offset=1 << 20),), Bucket(1, rows), sm)
    (launch,) = lower(call).launches
    return launch


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("form", ["bf16", "f8g128", "i8g32", "i4g64"])
@pytest.mark.parametrize("sm", [90, *(pytest.param(sm, marks=pytest.mark.slow) for sm in (80, 100, 120))])
def test_a_product_has_none(form, sm, norm, rows):
    """But for a few where a slice of 4-bit codes is halves of groups of 64 and programs have four warps."""
    with_compiler_for(sm)
    with_triton("3.9", OLDER)
    turns, least = turns_of(product(form, sm, norm, rows), sm)
    assert 100 < least <= turns <= least * (1.0 if form != "i4g64" or sm in (90, 100) else 1.2)


@pytest.mark.parametrize("form", ["bf16", "f8g128", "i8g32", "i4g64"])
def test_tiles_as_triton_lays_them_have_many_and_the_same_results(form, monkeypatch):
    with_triton("3.9", OLDER)
    launch = product(form, 90, True, 8)
    found = []
    for tiles in ("rows", "slices"):
        if tiles == "slices":
            monkeypatch.setattr(variants, "by_rows", lambda text: text)
        counted = Conflicts()
        with PtxMachine(90, conflicts=counted) as machine:
            draw, held = np.random.default_rng(0), {}
            for arg in (arg for arg in launch.args if isinstance(arg, Pointer)):
                memory = held.setdefault((arg.space, arg.name), machine.bytes(2 << 20))
                memory[arg.offset : arg.offset + arg.nbytes] = some_bytes(arg.dtype, arg.nbytes, draw)
            machine.run([launch], held)
            found.append((counted, held["arena", ""][launch_out(launch)].copy()))
    (rows, same), (slices, other) = found
    assert rows.turns == rows.least and slices.turns > 1.2 * slices.least
    assert np.isfinite(same.view(np.float32)).all() and same.any() and np.array_equal(same, other)


def some_bytes(dtype: str, nbytes: int, draw: np.random.Generator) -> np.ndarray:
    """Random numbers of a kind, or codes."""
    if dtype == "u8":
        return draw.integers(0, 100, nbytes, np.uint8)
    values = draw.standard_normal(nbytes).astype(np.float32)
    kinds = {"f32": values, "f16": values.astype(np.float16), "i32": np.ones(nbytes, np.int32),
             "bf16": (values.view(np.uint32) >> 16).astype(np.uint16)}  # fmt: skip
    return kinds[dtype].view(np.uint8)[:nbytes]


def launch_out(launch: Launch) -> slice:
    """Where the result lies in the arena."""
    out = next(arg for arg in launch.args if isinstance(arg, Pointer) and arg.offset == 1 << 20)
    return slice(out.offset, out.offset + 4 * 64)

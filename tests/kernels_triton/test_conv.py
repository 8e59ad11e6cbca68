"""Short convolutions and their tails: against float64, cut anywhere, behind products."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from triton_harness import Session, Shape, agree, bits, draw, run, weight

from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Operand
from tmlc.kernels.triton.registry import Call, lower

COUNTS = (7, 1, 2)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("taps", "c"), [(2, 5), (4, 37), (7, 130)])
def test_short_conv(machine, taps, c, residual):
    sessions = [Session({"x": draw(i, n, c)}, {"tail": draw(i + 9, taps - 1, c)}, n) for i, n in enumerate(COUNTS)]
    weights = {"weight": weight(draw(5, c, taps))}
    agree(
        machine, "short_conv_state", sessions, {"residual": residual}, [Shape("f32", c)], 1e-6, weights,
        cuts=(1, 3, 4), compared=["tail"], batch=4,
    )  # fmt: skip


def test_rows_may_be_several_a_position(machine):
    """The vocoder convolves four frames a position."""
    sessions = [Session({"x": draw(i, 4 * n, 9)}, {"tail": draw(i + 9, 6, 9)}, n) for i, n in enumerate((3, 1))]
    agree(
        machine, "short_conv_state", sessions, {"residual": True}, [Shape("f32", 9, (4, 0))], 1e-6,
        {"weight": weight(draw(5, 9, 7))}, rows={"x": (4, 0)}, cuts=(1,), compared=["tail"], batch=3, n=4,
    )  # fmt: skip


def test_dynamic_conv(machine):
    c, taps, heads = 36, 4, 3
    sessions = [
        Session({"x": draw(i, n, c), "taps": draw(i + 4, n, heads * taps)}, {"tail": draw(i + 9, taps - 1, c)}, n)
        for i, n in enumerate(COUNTS)
    ]
    weights = {"weight": weight(draw(5, taps, c))}
    agree(
        machine, "dynamic_conv_state", sessions, {"residual": True}, [Shape("f32", c)], 1e-6, weights, cuts=(1, 5),
        compared=["tail"],
    )  # fmt: skip


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("start", [0, 6])
def test_a_product_and_the_convolution_of_some_of_its_columns(machine, start, added):
    m, k, c = 30, 20, 11
    sessions = [
        Session({"x": draw(i, n, k), **({"addend": draw(i + 50, n, m)} if added else {})},
                {"tail": draw(i + 9, 3, c)}, n)
        for i, n in enumerate(COUNTS)
    ]  # fmt: skip
    weights = {"weight": weight(draw(5, m, k)), "taps": weight(draw(6, c, 4)),
               "scale": weight(np.array([[0.6]], np.float32))}  # fmt: skip
    attrs = {"start": start, "residual": True, "level": 0.5}
    agree(
        machine, "linear_conv_state", sessions, attrs, [Shape("f32", m)], 3e-6, weights, cuts=(1, 2), compared=["tail"]
    )


@pytest.mark.parametrize("counts", [(3, 4), (0, 2), (4, 1), (7,), (2, 1, 0, 2)])
def test_a_product_convolves_all_rows_of_the_sessions_in_its_tile(machine, counts):
    """Against a launch of the convolution, in a bucket with more rows; whatever part of its rows a session has."""
    m, k, c = 30, 20, 11
    weights = {"weight": weight(draw(5, m, k)), "taps": weight(draw(6, c, 4))}
    attrs = {"start": 6, "residual": True, "level": 0.5}
    both = [[Session({"x": draw(i, n, k)}, {"tail": draw(i + 9, 3, c)}, n) for i, n in enumerate(counts)] for _ in "ab"]
    found, wanted = (
        run(machine, "linear_conv_state", sessions, attrs, [Shape("f32", m)], weights, n=n, batch=len(counts), pad=3)
        for sessions, n in zip(both, (8 // len(counts), 16), strict=True)
    )
    for (have,), (want,), one, other in zip(found, wanted, *both, strict=True):
        assert np.array_equal(bits(have), bits(want)) and np.array_equal(one.states["tail"], other.states["tail"])


@pytest.mark.parametrize(("form", "taps", "tolerance"), [("f32", 7, 3e-6), ("bf16", 7, 6e-3), ("f32", 9, 3e-6)])
@pytest.mark.parametrize("added", [False, True])
def test_a_product_that_is_read_beside_its_convolution(machine, form, taps, tolerance, added):
    """Four rows a position, as a vocoder has them; alone the product makes both, in company and with more taps than it
    holds there is a launch behind it."""
    m, k, rows = 21, 20, {"x": (4, 0), "addend": (4, 0)}
    sessions = [
        Session({"x": draw(i, 4 * n, k), **({"addend": draw(i + 50, 4 * n, m)} if added else {})},
                {"tail": draw(i + 9, taps - 1, m)}, n)
        for i, n in enumerate((1, 2, 1))
    ]  # fmt: skip
    weights = {"weight": weight(draw(5, m, k), form), "taps": weight(draw(6, m, taps)), "bias": weight(draw(7, 1, m))}
    agree(
        machine, "linear_and_conv_state", sessions, {"residual": False}, [Shape("f32", m, (4, 0))] * 2, tolerance,
        weights, rows=rows, cuts=(1,), compared=["tail"],
    )  # fmt: skip


@pytest.mark.parametrize(("batch", "n", "taps", "kernels"), [
    (1, 1, 7, 1), (2, 1, 7, 1), (1, 2, 8, 1), (4, 1, 7, 2), (1, 4, 7, 2), (1, 1, 9, 2),
])  # fmt: skip
def test_eight_rows_and_eight_taps_are_what_a_product_convolves(batch, n, taps, kernels):
    x, out = (Operand("arena", "f32", (4, 0), 64, 64, at) for at in (0, 1 << 20))
    args = dict.fromkeys(("bias", "scale", "addend")) | {
        "x": x, "weight": Operand("weight", "bf16", (0, 64), 64, 64, name="w", shape=(64, 64)),
        "taps": Operand("weight", "f32", (0, 64), taps, taps, name="t", shape=(64, taps)),
        "tail": Operand("state", "f32", (0, taps - 1), 64, 64),
    }  # fmt: skip
    outputs, bucket = (out, replace(out, offset=2 << 20)), Bucket(batch, n)
    call = Call("linear_and_conv_state", args, {"residual": True}, outputs, bucket, 90)
    assert [one.kernel for one in lower(call).launches] == ["linear_kernel", "conv_kernel"][:kernels]

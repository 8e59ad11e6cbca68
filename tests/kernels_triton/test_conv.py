"""Short convolutions and their tails: against float64, cut anywhere, behind products."""

from __future__ import annotations

import numpy as np
import pytest
from triton_harness import Session, Shape, agree, bits, draw, run, weight

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

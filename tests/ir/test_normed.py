"""Ops that norm the rows that they read: the norm, and then the op behind it."""

import numpy as np
import pytest
import torch

from tmlc.errors import IRError
from tmlc.ir.ops import OPS
from tmlc.ir.types import TensorType


def rand(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def op(name, *args):
    return getattr(torch.ops.tmlc, name).default(*args)


X, NORM, EPS = rand(4, 6), rand(6, seed=1), 1e-5
W, BIAS, TAPS = rand(5, 6, seed=2), rand(5, seed=3), rand(2, 3, seed=4)
STEPS = (X[:, :5].contiguous(), None, None, "mul:va silu:v", [])
CASES = {
    "linear": lambda: (W, BIAS),
    "linear_steps": lambda: (W, None, *STEPS),
    "linear_conv_state": lambda: (W, BIAS, None, TAPS, rand(2, 2, seed=5), 1, True, 0.5, None),
    "router": lambda: (rand(5, 6, seed=6), rand(1, 4, seed=7), rand(1, 1, seed=8), 2, 1, 2.5),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_norm_and_then_the_op(name):
    normed = op("rms_norm", X, NORM, EPS)
    wanted, found = op(name, normed, *CASES[name]()), op(f"norm_{name}", X, NORM, EPS, *CASES[name]())
    if name == "router":
        wanted = (*wanted, normed)
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["linear", "linear_steps"])
def test_it_is_the_modulated_norm_and_then_the_product(name):
    gain, shift = rand(4, 6, seed=9), rand(4, 6, seed=10)
    rows = op("modulate", op("rms_norm", X, NORM, EPS), gain, shift)
    found = op(f"modulated_{name}", X, NORM, EPS, gain, shift, *CASES[name]())
    assert torch.equal(found, op(name, rows, *CASES[name]()))


def test_gains_of_other_rows_are_refused():
    x, norm, weight = TensorType("f32", (4, 6)), TensorType("f32", (6,)), TensorType("f32", (5, 6))
    with pytest.raises(IRError, match=r"f32\[3, 6\]"):
        OPS["modulated_linear"].shapes(x, norm, 1e-6, TensorType("f32", (3, 6)), x, weight, None)


def test_the_state_of_its_convolution_is_changed():
    here, there = CASES["linear_conv_state"](), CASES["linear_conv_state"]()
    op("norm_linear_conv_state", X, NORM, EPS, *here)
    op("linear_conv_state", op("rms_norm", X, NORM, EPS), *there)
    assert OPS["norm_linear_conv_state"].mutates == ("tail",)
    assert torch.equal(here[4], there[4]) and not torch.equal(here[4], CASES["linear_conv_state"]()[4])


def test_a_norm_of_groups_of_columns_is_refused():
    x, half, weight = TensorType("f32", (4, 6)), TensorType("f32", (3,)), TensorType("f32", (5, 6))
    with pytest.raises(IRError, match="norm must have 6 columns"):
        OPS["norm_linear"].shapes(x, half, 1e-6, weight, None)

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
    "linear_swiglu": lambda: (rand(8, 6, seed=13), rand(8, seed=14)),
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


def test_gates_and_ups_are_the_halves_of_a_product():
    weight, bias = CASES["linear_swiglu"]()
    both = op("linear", X, weight, bias)
    found = op("linear_swiglu", X, weight, bias)
    assert torch.equal(found, op("swiglu", both[:, :4].contiguous(), both[:, 4:].contiguous()))
    with pytest.raises(IRError, match="5 is not a multiple of 2"):
        OPS["linear_swiglu"].shapes(TensorType("f32", (4, 6)), TensorType("f32", (5, 6)), None)


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


def attention_arguments():
    states = torch.tensor([[2]]), torch.zeros(6, 3), torch.zeros(6, 2)
    return (*states, None, None, 2, 1, 0.5, 0, 0, 0.0, 0.0, None, 0.0)


def test_attention_norms_each_head_of_queries_and_of_keys():
    q, k, v, norms = X, rand(4, 3, seed=9), rand(4, 2, seed=10), (rand(3, seed=11), rand(3, seed=12))
    here, there = attention_arguments(), attention_arguments()
    found = op("norm_attention_state", q, norms[0], k, norms[1], EPS, v, *here)
    heads = (op("rms_norm", x, norm, EPS) for x, norm in zip((q, k), norms, strict=True))
    assert torch.equal(found, op("attention_state", *heads, v, *there))
    assert OPS["norm_attention_state"].mutates == ("k_cache", "v_cache")
    assert torch.equal(here[1], there[1]) and torch.equal(here[2], there[2]) and here[1].any()


def test_norms_of_other_groups_than_heads_are_refused():
    q, k, v, head = (TensorType("f32", shape) for shape in ((4, 6), (4, 3), (4, 2), (3,)))
    states = TensorType("i64", (1, 1)), TensorType("f32", (6, 3)), TensorType("f32", (6, 2))
    for norms in ((TensorType("f32", (6,)), head), (head, TensorType("f32", (1,)))):
        with pytest.raises(IRError, match="_norm must have the columns of a head"):
            OPS["norm_attention_state"].shapes(q, norms[0], k, norms[1], EPS, v, *states, *attention_arguments()[3:])


def test_a_norm_of_groups_of_columns_is_refused():
    x, half, weight = TensorType("f32", (4, 6)), TensorType("f32", (3,)), TensorType("f32", (5, 6))
    with pytest.raises(IRError, match="norm must have 6 columns"):
        OPS["norm_linear"].shapes(x, half, 1e-6, weight, None)

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


@pytest.mark.parametrize("biases", [(None, None), (rand(8, seed=17), None), (rand(1, 8, seed=18), rand(8, seed=19))])
@pytest.mark.parametrize("settings", [(0, 3, True, 1, 1, 1.0), (1, 3, True, 4, 2, 2.5), (2, 2, False, 1, 1, 1.0)])
@pytest.mark.parametrize("shared", [0, 2])
def test_a_top_k_router_chooses_by_a_product_of_the_normed_rows(biases, settings, shared):
    weight, (logit_bias, bias) = rand(8, 6, seed=20), biases
    normed = op("rms_norm", X, NORM, EPS)
    wanted = op("topk_router", op("linear", normed, weight, logit_bias), bias, *settings)
    if shared:
        wanted = op("append_experts", *wanted, 8, shared)
    found = op("norm_topk_router", X, NORM, EPS, weight, logit_bias, bias, *settings, shared)
    for one, other in zip((*wanted, normed), found, strict=True):
        assert torch.equal(one, other)


def test_the_choice_of_a_normed_top_k_router_has_the_shapes_of_its_parts():
    x, norm, weight, eight = (TensorType("f32", shape) for shape in ((4, 6), (6,), (8, 6), (8,)))
    shapes, settings = OPS["norm_topk_router"].shapes, (1, 3, True, 4, 2, 2.5, 0)
    for shared in (0, 2):
        assert shapes(x, norm, EPS, weight, eight, eight, *settings[:-1], shared) == (
            TensorType("f32", (4, 3 + shared)), TensorType("i64", (4, 3 + shared)), x
        )  # fmt: skip
    for wrong, said in (
        ((x, TensorType("f32", (3,)), EPS, weight, None, None, *settings), "norm must have 6 columns"),
        ((x, norm, EPS, TensorType("f32", (8, 5)), None, None, *settings), "6"),
        ((x, norm, EPS, weight, norm, None, *settings), "bias"),
        ((x, norm, EPS, weight, None, norm, *settings), "bias must have 8 columns"),
        ((x, norm, EPS, weight, None, None, 1, 5, True, 4, 2, 2.5, 0), "2 groups hold 4 experts"),
        ((x, norm, EPS, weight, None, None, *settings[:-1], -1), "n_shared is -1"),
    ):
        with pytest.raises(IRError, match=said):
            shapes(*wrong)


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


def test_experts_take_the_rows_and_the_choice_of_a_normed_router():
    given = (rand(6, 3, seed=13), rand(2, 6, seed=14), True, 0.5, X)
    stacked = (rand(5, 8, 6, seed=15), rand(5, 6, 4, seed=16), None, None, 0.0, 0.0, 0.0, 0.0, 0)
    tails = [given[1].clone(), given[1].clone()]
    weights, experts, normed = op("norm_router", X, NORM, EPS, *CASES["router"]())
    wanted = op("moe_conv_state", given[0], tails[0], *given[2:], normed, weights, experts, *stacked)
    found = op("norm_moe_conv_state", X, NORM, EPS, *CASES["router"](), given[0], tails[1], *given[2:], *stacked)
    assert torch.equal(found, wanted) and torch.equal(*tails) and not torch.equal(tails[0], given[1])
    assert OPS["norm_moe_conv_state"].mutates == ("tail",)


@pytest.mark.parametrize("addend", [None, X])
@pytest.mark.parametrize("shared", [0, 1])
def test_experts_take_the_rows_and_the_choice_of_a_normed_top_k_router(addend, shared):
    settings = (rand(5, 6, seed=20), rand(5, seed=21), rand(5, seed=22), 1, 2, True, 1, 1, 2.5, shared)
    count = 5 + shared
    stacked = (rand(count, 8, 6, seed=15), rand(count, 6, 4, seed=16), None, None, 0.0, 0.0, 0.0, 0.0, 0)
    weights, experts, normed = op("norm_topk_router", X, NORM, EPS, *settings)
    given = () if addend is None else (addend,)
    wanted = op("moe_add" if given else "moe", *given, normed, weights, experts, *stacked)
    assert torch.equal(op("norm_topk_moe", X, NORM, EPS, *settings, addend, *stacked), wanted)


def test_the_experts_of_a_normed_top_k_router_have_the_shapes_of_its_parts():
    x, norm, weight, five = (TensorType("f32", shape) for shape in ((4, 6), (6,), (5, 6), (5,)))
    settings = (1, 2, True, 1, 1, 2.5, 0)
    stacked = (TensorType("bf16", (5, 8, 6)), TensorType("bf16", (5, 6, 4)), None, None, 0.0, 0.0, 0.0, 0.0, 0)
    shapes = OPS["norm_topk_moe"].shapes
    for addend in (None, x):
        assert shapes(x, norm, EPS, weight, five, five, *settings, addend, *stacked) == x
    for wrong, said in (
        ((x, five, EPS, weight, None, None, *settings, None, *stacked), "norm must have 6 columns"),
        ((x, norm, EPS, weight, None, norm, *settings, None, *stacked), "bias must have 5 columns"),
        ((x, norm, EPS, weight, None, None, *settings, None, TensorType("bf16", (5, 8, 7)), *stacked[1:]), "gate_up"),
        ((x, norm, EPS, weight, None, None, *settings, TensorType("f32", (4, 5)), *stacked), "4, 5"),
    ):
        with pytest.raises(IRError, match=said):
            shapes(*wrong)


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

"""Rows of steps: what they are written as, what they mean, and what is refused."""

import numpy as np
import pytest
import torch

from tmlc.errors import IRError
from tmlc.ir.ops import OPS
from tmlc.ir.ops import functional as F
from tmlc.ir.steps import STEP_OPS, ElementStep, read_steps, write_steps
from tmlc.ir.types import TensorType


def rand(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def op(name, *args):
    return getattr(torch.ops.tmlc, name).default(*args)


X, A, B = rand(4, 6), rand(4, 6, seed=1), rand(4, 6, seed=2)


def test_the_table_of_steps_says_what_the_ops_take():
    for name, (tensors, numbers) in STEP_OPS.items():
        kinds = [str(argument.type) for argument in OPS[name].overload._schema.arguments]
        assert kinds == ["Tensor"] * tensors + [kind.__name__ for kind in numbers]


def test_steps_are_read_as_they_were_written():
    steps = (ElementStep("add_row", "va", (3,)), ElementStep("clamp", "v", (-1.0, 2.0)), ElementStep("mul", "vv"))
    assert write_steps(steps) == ("add_row:va clamp:v mul:vv", [3.0, -1.0, 2.0])
    assert read_steps(*write_steps(steps)) == steps


@pytest.mark.parametrize(
    ("text", "numbers", "match"),
    [
        ("linear:va", [], "'linear' is not a step"),
        ("add:v", [], "does not name 2 of"),
        ("add:ab", [], "v among them"),
        ("add:vd", [], "does not name 2 of"),
        ("scale:v", [], "lacks a number"),
        ("scale:v", [1.0, 2.0], "1 are not read"),
        ("", [], "0 steps"),
        ("silu:v " * 5, [], "5 steps"),
        ("clamp:v clamp:v", [0.0, 1.0, 0.0, 1.0], "4 numbers"),
    ],
)
def test_what_is_no_row_of_steps_is_refused(text, numbers, match):
    with pytest.raises(IRError, match=match) as caught:
        read_steps(text, numbers)
    assert caught.value.fix


def test_operands_must_be_there_be_read_and_fit():
    def typed(a, text):
        return OPS["element_steps"].shapes(TensorType("f32", (4, 6)), a, None, None, text, [])

    with pytest.raises(IRError, match="operand a, which is absent"):
        typed(None, "add:va")
    with pytest.raises(IRError, match="no step reads the operand a"):
        typed(TensorType("f32", (4, 6)), "silu:v")
    with pytest.raises(IRError, match="step add: shapes differ"):
        typed(TensorType("f32", (4, 5)), "add:va")
    with pytest.raises(IRError, match="step add_row: index 9"):
        OPS["element_steps"].shapes(
            TensorType("f32", (4, 6)), TensorType("f32", (5, 6)), None, None, "add_row:va", [9.0]
        )


def test_steps_mean_their_ops_one_after_the_other():
    want = F.add(B, F.mul(A, X))
    assert torch.equal(op("element_steps", X, A, B, None, "mul:av add:bv", []), want)
    euler = F.add_scaled(A, F.add_scaled(X, A, -1.0), 0.25)
    assert torch.equal(op("element_steps", X, A, None, None, "add_scaled:va add_scaled:av", [-1.0, 0.25]), euler)
    weight, bias, norm = rand(6, 6, seed=3), rand(6, seed=4), rand(6, seed=5)
    assert torch.equal(
        op("linear_steps", X, weight, bias, None, None, None, "silu:v", []), F.silu(F.linear(X, weight, bias))
    )
    made = op("rms_norm_steps", X, norm, 1e-6, A, B, None, "modulate:vab", [])
    assert torch.equal(made, F.modulate(F.rms_norm(X, norm, 1e-6), A, B))


def test_conditions_of_flow_times_and_norms_of_two_mean_their_parts():
    table, norms = rand(5, 6, seed=6), (rand(3, seed=7), rand(3, seed=8))
    wide = op("silu_add_rows", X, table, [0, 3])
    assert torch.equal(wide, torch.cat([F.silu(F.add_row(X, table, 0)), F.silu(F.add_row(X, table, 3))], 1))
    pair = op("rms_norm_pair", X, norms[0], rand(4, 3), norms[1], 1e-6)
    assert torch.equal(pair[0], F.rms_norm(X, norms[0], 1e-6))
    assert torch.equal(pair[1], F.rms_norm(rand(4, 3), norms[1], 1e-6))
    with pytest.raises(IRError, match="differ in columns"):
        OPS["rms_norm_pair"].shapes(
            *(TensorType("f32", shape) for shape in ((4, 6), (3,), (4, 6), (2,))), 1e-6
        )

"""Elementwise steps alone, behind products and behind norms; conditions of all flow times; norms of two tensors."""

from __future__ import annotations

import numpy as np
import pytest
from triton_harness import Session, Shape, agree, bf16, bits, draw, run, weight

from tmlc.errors import EmitError
from tmlc.ir.ops import OPS
from tmlc.ir.steps import STEP_OPS, read_steps

COUNTS = (3, 1)
CHAINS = [
    ("silu:v", [], ""),
    ("mul:av add:bv", [], "ab"),
    ("add_scaled:va add_scaled:av", [-1.0, 0.25], "a"),
    ("modulate:vab gelu:v", [], "ab"),
    ("clamp:v scale:v", [-0.5, 1.5, -2.0], ""),
    ("softcap:v swiglu:va swiglu:bv sigmoid:v", [3.0], "ab"),
    ("modulate:avb mul:vv add:vc", [], "abc"),
]
HEADS = ["element", "rms_norm", "linear"]


def sessions(d: int, letters: str, cols: int) -> list[Session]:
    return [
        Session({name: draw(10 * s + i, count, cols if name in letters else d) for i, name in enumerate("x" + letters)},
                count=count)
        for s, count in enumerate(COUNTS)
    ]  # fmt: skip


def weights_of(head: str, dtype: str = "f32"):
    if head == "element":
        return {}
    if head == "rms_norm":
        return {"weight": weight(draw(7, 1, 36))}
    return {"weight": weight(0.2 * draw(8, 20, 36), dtype), "bias": weight(draw(9, 1, 20))}


@pytest.mark.parametrize(("text", "numbers", "letters"), CHAINS)
@pytest.mark.parametrize("head", HEADS)
def test_steps(machine, head, text, numbers, letters):
    cols = 20 if head == "linear" else 36
    attrs = {"steps": text, "numbers": numbers} | ({"eps": 1e-6} if head == "rms_norm" else {})
    given = sessions(36, letters, cols)
    agree(machine, f"{head}_steps", given, attrs, [Shape("f32", cols)], 3e-6, weights_of(head), cuts=(2,))


@pytest.mark.parametrize("head", HEADS)
def test_steps_have_the_bits_of_their_ops_one_after_the_other(machine, head):
    text, numbers, letters = "mul:av softcap:v add_scaled:bv silu:v", [2.0, 0.3], "ab"
    cols = 20 if head == "linear" else 36
    (given, *_), weights, shape = sessions(36, letters, cols), weights_of(head, "bf16"), [Shape("f32", cols)]
    eps = {"eps": 1e-6} if head == "rms_norm" else {}
    attrs = {"steps": text, "numbers": numbers} | eps
    fused = run(machine, f"{head}_steps", [given], attrs, shape, weights)[0][0]
    value = given.inputs["x"]
    if head != "element":
        value = run(machine, head, [Session({"x": value}, count=3)], eps, shape, weights)[0][0]
    for step in read_steps(text, numbers):
        names = OPS[step.op].args
        values = [value if letter == "v" else given.inputs[letter] for letter in step.operands]
        session = Session(dict(zip(names, values, strict=False)), count=3)
        more = dict(zip(names[len(values) :], step.numbers, strict=True))
        value = run(machine, step.op, [session], more, shape)[0][0]
    assert np.array_equal(bits(fused), bits(value))


@pytest.mark.parametrize("dtype", ["bf16", "i4g32", "f8g128"])
def test_steps_behind_products_of_stored_weights(machine, dtype):
    attrs = {"steps": "mul:av add:bv", "numbers": []}
    given, rounded = sessions(36, "ab", 20), {"x": bf16}
    weights = weights_of("linear", dtype)
    agree(machine, "linear_steps", given, attrs, [Shape("f32", 20)], 3e-6, weights, cuts=(1,), activations=rounded)


@pytest.mark.parametrize("head", ["element", "rms_norm"])
def test_a_row_of_a_table_is_a_step(machine, head):
    weights = weights_of(head) | {"a": weight(draw(1, 5, 36))}
    attrs = {"steps": "add_row:va mul:vb", "numbers": [3.0]} | ({"eps": 1e-6} if head == "rms_norm" else {})
    agree(machine, f"{head}_steps", sessions(36, "b", 36), attrs, [Shape("f32", 36)], 3e-6, weights, cuts=(1,))


def test_steps_behind_a_norm_of_groups(machine):
    weights, attrs = {"weight": weight(draw(7, 1, 12))}, {"eps": 1e-6, "steps": "modulate:vab", "numbers": []}
    agree(machine, "rms_norm_steps", sessions(36, "ab", 36), attrs, [Shape("f32", 36)], 3e-6, weights, cuts=(1,))


def test_conditions_of_all_flow_times(machine):
    weights = {"rows": weight(draw(1, 5, 36))}
    given = [Session({"x": draw(s, count, 36)}, count=count) for s, count in enumerate(COUNTS)]
    agree(machine, "silu_add_rows", given, {"index": [0, 4, 2]}, [Shape("f32", 108)], 1e-6, weights, cuts=(2,))


@pytest.mark.parametrize(("d", "left", "right"), [(12, 3, 1), (32, 9, 3), (300, 1, 2)])
def test_norms_of_two_tensors(machine, d, left, right):
    weights = {"a_weight": weight(draw(7, 1, d)), "b_weight": weight(draw(8, 1, d))}
    given = [
        Session({"a": draw(s, count, d * left), "b": draw(10 + s, count, d * right)}, count=count)
        for s, count in enumerate(COUNTS)
    ]
    shapes = [Shape("f32", d * left), Shape("f32", d * right)]
    agree(machine, "rms_norm_pair", given, {"eps": 1e-6}, shapes, 1e-6, weights, cuts=(2,))


@pytest.mark.parametrize("d", [6, 64, 200])
def test_a_head_is_summed_in_one_order_wherever_its_columns_lie(machine, d):
    """A load of four numbers, of one (rows that are not aligned), and programs of one warp and of several."""
    weights = {name: weight(draw(7, 1, d)) for name in ("a_weight", "b_weight", "weight")}
    a, b = draw(1, 3, 8 * d), draw(2, 3, 2 * d)
    shapes = [Shape("f32", 8 * d), Shape("f32", 2 * d)]
    found = []
    for pad in (0, 3):
        pair = [Session({"a": a, "b": b}, count=3)]
        found.append(run(machine, "rms_norm_pair", pair, {"eps": 1e-6}, shapes, weights, pad=pad)[0][0])
    norm = [Session({"x": a}, count=3)]
    found += run(machine, "rms_norm", norm, {"eps": 1e-6}, shapes[:1], weights)[0]
    assert all(np.array_equal(bits(found[0]), bits(one)) for one in found[1:])


def test_an_operand_that_is_a_weight_is_refused(machine):
    weights = {"a": weight(draw(1, 3, 36))}
    with pytest.raises(EmitError, match="operand a is the weight a"):
        run(machine, "element_steps", sessions(36, "", 36)[:1], {"steps": "add:va", "numbers": []}, [Shape("f32", 36)],
            weights)  # fmt: skip


def test_every_step_is_in_a_chain_of_these_tests():
    used = {step.op for text, numbers, _ in CHAINS for step in read_steps(text, numbers)}
    assert used | {"add_row"} == set(STEP_OPS)

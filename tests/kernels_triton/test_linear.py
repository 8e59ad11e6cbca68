"""Products with weights of every form: against float64, and the same bits whatever the company."""

from __future__ import annotations

import numpy as np
import pytest
from triton_harness import Session, Shape, agree, bf16, draw, weight

from tmlc.errors import EmitError
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Operand
from tmlc.kernels.triton.registry import Call, lower

FORMS = ["f32", "bf16", "f8g128", "i8g32", "i4g32", "i4g64"]


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (33, 70), (70, 131)])
def test_a_product_is_that_of_float64(machine, dtype, m, k):
    sessions = [Session({"x": draw(i, count, k)}, count=count) for i, count in enumerate((3, 1, 17))]
    weights = {"weight": weight(draw(9, m, k), dtype), "bias": weight(draw(8, 1, m))}
    rounding = {} if dtype == "f32" else {"x": bf16}
    agree(machine, "linear", sessions, {}, [Shape("f32", m)], 2e-6, weights, cuts=(1, 16), activations=rounding)


def test_an_epilogue_scales_and_adds(machine):
    sessions = [Session({"x": draw(i, 4, 48), "addend": draw(i + 5, 4, 20)}, count=4) for i in range(2)]
    weights = {"weight": weight(draw(3, 20, 48)), "scale": weight(np.array([[0.37]], np.float32))}
    agree(machine, "linear_add", sessions, {}, [Shape("f32", 20)], 2e-6, weights, cuts=(3,))


def test_rows_of_an_input_may_be_several_a_position(machine):
    sessions = [Session({"x": draw(i, 3 * count, 24)}, count=count) for i, count in enumerate((2, 5))]
    agree(
        machine, "linear", sessions, {}, [Shape("f32", 10, (3, 0))], 2e-6, {"weight": weight(draw(1, 10, 24))},
        rows={"x": (3, 0)}, cuts=(1,), batch=3,
    )  # fmt: skip


def test_quantised_weights_reach_the_extremes_of_their_codes(machine):
    values = np.zeros((16, 128), np.float32)
    values[:8, ::2], values[8:, 1::3] = 1e4, -1e4
    for dtype in ("i8g32", "i4g32", "i4g64", "f8g128"):
        sessions = [Session({"x": draw(4, 2, 128)}, count=2)]
        agree(
            machine, "linear", sessions, {}, [Shape("f32", 16)], 2e-6, {"weight": weight(values, dtype)},
            activations={"x": bf16},
        )  # fmt: skip


def test_a_form_without_a_kernel_is_refused():
    x = Operand("arena", "f32", (1, 0), 8, 8)
    stored = Operand("weight", "f16", (0, 4), 8, 8, name="w", shape=(4, 8))
    call = Call("linear", {"x": x, "weight": stored, "bias": None}, {}, (x,), Bucket(1, 1), 90)
    with pytest.raises(EmitError, match="no kernel reads weights of dtype f16"):
        lower(call)
    with pytest.raises(EmitError, match="not compiled for this architecture"):
        lower(Call("linear", {}, {}, (), Bucket(1, 1), 70))
    with pytest.raises(EmitError, match="stateless") as caught:
        lower(Call("attention", {}, {}, (), Bucket(1, 1), 90))
    assert caught.value.fix == "Use the pipeline of the target: --preset triton."
    with pytest.raises(EmitError, match="operand x is missing") as caught:
        lower(Call("linear", {"x": None, "weight": None}, {}, (x,), Bucket(1, 1), 90))
    assert caught.value.fix == "give it: linear takes x, weight"

"""Products and routers that norm the rows that they read.

The references norm in float64 and round nothing between the norm and the product. A kernel rounds norm∘x to bf16 (f32
weights: not at all), where the kernels apart would round the normed row: either way one rounding of each factor, half a
unit of 8 bits: 2^-9 of it, and Σ w·x of k independent ones is off by about 2^-9·√(Σ (w·x)²). Sums of squares are of
bf16 pairs: 2^-17, far below.
"""

from __future__ import annotations

import numpy as np
import pytest
from shapes import w, x
from triton_harness import Session, Shape, agree, bits, draw, run, weight

from tmlc.errors import EmitError
from tmlc.kernels.triton import tuning
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.registry import Call, lower

EPS = {"eps": 1e-5}
COUNTS = (3, 1, 17)
#: Of the largest element: bf16 factors (above); float32 sums.
ROUNDED, EXACT = 4e-3, 3e-6


def sessions(k: int, **more: int) -> list[Session]:
    scales = (0.01, 30.0, 1.0)  # rows of all sizes: eps counts in the first
    return [
        Session({"x": scale * draw(s, count, k)} | {name: draw(20 + s, count, cols) for name, cols in more.items()},
                count=count)
        for s, (scale, count) in enumerate(zip(scales, COUNTS, strict=True))
    ]  # fmt: skip


def weights_of(m: int, k: int, dtype: str) -> dict:
    return {"norm": weight(1.0 + 0.3 * draw(7, 1, k)), "weight": weight(draw(8, m, k), dtype)}


@pytest.mark.parametrize(
    ("dtype", "m", "k"),
    [("f32", 33, 70), ("bf16", 33, 70), ("bf16", 20, 520), ("f8g128", 20, 300), ("i8g32", 20, 131),
     ("i4g64", 20, 300)],
)  # fmt: skip
def test_a_product_of_normed_rows(machine, dtype, m, k):
    """Alone, in company and in cuts: tiles of 8 rows and of 16 have the same bits."""
    given, weights = sessions(k), weights_of(m, k, dtype) | {"bias": weight(draw(9, 1, m))}
    tolerance = EXACT if dtype == "f32" else ROUNDED
    agree(machine, "norm_linear", given, EPS, [Shape("f32", m)], tolerance, weights, cuts=(1, 9))


@pytest.mark.parametrize(
    ("dtype", "f", "k", "normed"),
    [("f32", 19, 70, True), ("f32", 19, 70, False), ("bf16", 33, 520, True), ("bf16", 19, 70, False),
     ("f8g128", 20, 300, True), ("i8g32", 20, 131, True), ("i4g32", 20, 300, False), ("i4g64", 20, 300, True)],
)  # fmt: skip
def test_gates_and_ups_of_a_product(machine, dtype, f, k, normed):
    """Against float64, and the bits of the product and then swiglu."""
    given, weights = sessions(k), weights_of(2 * f, k, dtype) | {"bias": weight(draw(9, 1, 2 * f))}
    name, attrs = ("norm_linear_swiglu", EPS) if normed else ("linear_swiglu", {})
    if not normed:
        del weights["norm"]
    tolerance = EXACT if dtype == "f32" else 2 * ROUNDED
    agree(machine, name, given, attrs, [Shape("f32", f)], tolerance, weights, cuts=(1, 9))
    product, one = name.removesuffix("_swiglu"), [given[1]]
    ((both,),) = run(machine, product, one, attrs, [Shape("f32", 2 * f)], weights)
    halves = [Session({"gate": both[:, :f].copy(), "up": both[:, f:].copy()}, count=1)]
    ((wanted,),) = run(machine, "swiglu", halves, {}, [Shape("f32", f)])
    ((found,),) = run(machine, name, one, attrs, [Shape("f32", f)], weights)
    assert np.array_equal(bits(found), bits(wanted))


PLAIN, NORMED = ("linear", "linear_swiglu"), ("norm_linear", "norm_linear_swiglu", "modulated_linear")
FORMS = ("bf16", "f8g128", "i8g32", "i4g64")


@pytest.mark.parametrize("k", [256, 300])
@pytest.mark.parametrize(
    ("op", "dtype"),
    [*((op, dtype) for op in (*PLAIN, *NORMED) for dtype in FORMS), *((op, "i4g32") for op in PLAIN)],
)
def test_rows_of_several_turns(machine, monkeypatch, op, dtype, k):
    """Programs that read one slice at a time: whole turns, and a last one that is not; the only row, which is read a
    turn ahead, and others."""
    normed = op in NORMED
    monkeypatch.setattr(tuning, "MOST_SLICES", 1)
    assert not tuning.turn_constants(dtype, k, 128 if dtype == "bf16" else tuning._GROUPS[dtype], 90)["ONCE"]
    given = sessions(k, **(dict(gain=k, shift=k) if op == "modulated_linear" else {}))
    weights = weights_of(20, k, dtype)
    if not normed:
        del weights["norm"]
    m = 10 if "swiglu" in op else 20
    agree(machine, op, given, EPS if normed else {}, [Shape("f32", m)], 2 * ROUNDED, weights, cuts=(1, 9))


def test_steps_behind_a_product_of_normed_rows(machine):
    attrs = EPS | {"steps": "mul:av silu:v", "numbers": []}
    given, weights = sessions(70, a=20), weights_of(20, 70, "bf16")
    agree(machine, "norm_linear_steps", given, attrs, [Shape("f32", 20)], ROUNDED, weights, cuts=(9,))


@pytest.mark.parametrize(
    ("dtype", "m", "k"),
    [("f32", 33, 70), ("bf16", 33, 70), ("bf16", 20, 1030), ("f8g128", 20, 300), ("i8g32", 20, 131),
     ("i4g64", 20, 300)],
)  # fmt: skip
def test_a_product_of_modulated_rows(machine, dtype, m, k):
    """Rows of 0.01 are normed to 1 and moved by 1: the shift counts as much as the row."""
    given, weights = sessions(k, gain=k, shift=k), weights_of(m, k, dtype) | {"bias": weight(draw(9, 1, m))}
    tolerance = EXACT if dtype == "f32" else ROUNDED
    agree(machine, "modulated_linear", given, EPS, [Shape("f32", m)], tolerance, weights, cuts=(1, 9))


def test_steps_behind_a_product_of_modulated_rows(machine):
    attrs = EPS | {"steps": "mul:av silu:v", "numbers": []}
    given, weights = sessions(70, gain=70, shift=70, a=20), weights_of(20, 70, "bf16")
    agree(machine, "modulated_linear_steps", given, attrs, [Shape("f32", 20)], ROUNDED, weights, cuts=(9,))


def test_a_convolution_behind_a_product_of_normed_rows(machine):
    given = sessions(70)
    for s, session in enumerate(given):
        session.states["tail"] = draw(60 + s, 3, 8)
    weights = weights_of(20, 70, "bf16") | {"taps": weight(draw(6, 8, 4))}
    attrs = EPS | {"start": 12, "residual": True, "level": 0.8}
    agree(machine, "norm_linear_conv_state", given, attrs, [Shape("f32", 20)], ROUNDED, weights, cuts=(1, 9))


def test_a_row_is_normed_as_by_the_kernel_of_norms(machine):
    """With ones and powers of two nothing is rounded but the sums, so the fused product has the bits of the others."""
    rows = np.where(draw(1, 5, 64) > 0, 0.5, -2.0).astype(np.float32)
    shared = {"norm": weight(np.full((1, 64), 2.0, np.float32)), "weight": weight(np.eye(64, dtype=np.float32), "bf16")}
    fused = run(machine, "norm_linear", [Session({"x": rows}, count=5)], EPS, [Shape("f32", 64)], shared)[0][0]
    apart = run(machine, "rms_norm", [Session({"x": rows}, count=5)], EPS, [Shape("f32", 64)],
                {"weight": shared["norm"]})[0][0]  # fmt: skip
    assert np.array_equal(bits(fused), bits(apart))


@pytest.mark.parametrize(("count", "pieces", "enough"), [(9, 1, 30), (9, 2, 30), (15, 1, 4)])
def test_a_router_norms_rows_and_hands_them_on(machine, monkeypatch, count, pieces, enough):
    """A program has one expert and few rows, or four experts and many rows, of all inputs or of pieces of them."""
    from tmlc.kernels.triton import router

    if pieces > 1:
        monkeypatch.setattr(router, "MOST_INPUTS", 32)
    monkeypatch.setattr(router, "ENOUGH_PROGRAMS", enough)
    monkeypatch.setattr(router, "PLENTY_OF_PROGRAMS", 2 * enough)
    weights = weights_of(count + 1, 33, "f32") | {
        "bias": weight(draw(2, 1, count)), "scale": weight(np.array([[1.3]], np.float32)),
    }  # fmt: skip
    attrs = EPS | {"top_k": 3, "n_shared": 1, "route_scale": 2.5}
    shapes = [Shape("f32", 4), Shape("i64", 4), Shape("f32", 33)]
    agree(machine, "norm_router", sessions(33), attrs, shapes, 1e-5, weights, cuts=(2,))


def chosen(scores: int, top_k: int, groups: int = 1, top_groups: int = 1, shared: int = 0) -> dict:
    return EPS | {"scores": scores, "top_k": top_k, "normalise": scores < 2, "groups": groups, "top_groups": top_groups,
                  "scale": 1.5, "n_shared": shared}  # fmt: skip


def of_choices(top_k: int, k: int) -> list[Shape]:
    return [Shape("f32", top_k), Shape("i64", top_k), Shape("f32", k)]


@pytest.mark.parametrize(
    ("scores", "count", "top_k", "groups", "top_groups", "shared", "biases", "pieces", "enough"),
    [
        (0, 9, 4, 1, 1, 0, "", 1, 30),
        (0, 40, 8, 1, 1, 1, "logit_bias bias", 1, 4),
        (1, 12, 4, 4, 2, 2, "bias", 2, 30),
        (1, 15, 4, 15, 5, 0, "logit_bias", 1, 4),
        (2, 33, 4, 1, 1, 0, "logit_bias", 2, 30),
        (2, 130, 3, 2, 1, 1, "bias", 1, 60),
    ],
)  # fmt: skip
def test_a_top_k_router_norms_rows_and_hands_them_on(
    machine, monkeypatch, scores, count, top_k, groups, top_groups, shared, biases, pieces, enough
):
    """Every kind of score, with and without groups, either bias and shared experts; programs as above. One row is all
    zeros: nothing but a bias tells its experts apart."""
    from tmlc.kernels.triton import router

    if pieces > 1:
        monkeypatch.setattr(router, "MOST_INPUTS", 32)
    monkeypatch.setattr(router, "ENOUGH_PROGRAMS", enough)
    monkeypatch.setattr(router, "PLENTY_OF_PROGRAMS", 2 * enough)
    given = sessions(33)
    given[2].inputs["x"][5] = 0.0
    weights = weights_of(count, 33, "f32") | {
        name: weight(np.round(draw(30 + i, 1, count)) * 0.25) for i, name in enumerate(biases.split())
    }  # fmt: skip
    attrs = chosen(scores, top_k, groups, top_groups, shared)
    agree(machine, "norm_topk_router", given, attrs, of_choices(top_k + shared, 33), 1e-5, weights, cuts=(2,))


def test_of_experts_that_are_alike_a_top_k_router_takes_the_first(machine):
    """Each two have the same weights, and so the same logits."""
    pairs = np.repeat(draw(3, 20, 33), 2, axis=0)
    weights = {"norm": weight(1.0 + 0.3 * draw(7, 1, 33)), "weight": weight(pairs)}
    found = run(machine, "norm_topk_router", sessions(33), chosen(1, 6), of_choices(6, 33), weights)
    for shares, experts, _ in found:
        assert (experts[:, ::2] % 2 == 0).all() and np.array_equal(experts[:, ::2] + 1, experts[:, 1::2])
        assert np.array_equal(bits(shares[:, ::2].copy()), bits(shares[:, 1::2].copy()))


@pytest.mark.parametrize("scores", [0, 1, 2])
def test_rows_of_no_numbers_have_distinct_experts_and_trouble_no_others(machine, scores):
    rows = draw(4, 4, 33)
    rows[1, 7], rows[2], rows[3, :2] = np.nan, np.inf, (np.inf, -np.inf)
    weights = weights_of(12, 33, "f32") | {name: weight(draw(5, 1, 12)) for name in ("logit_bias", "bias")}
    attrs, shapes = chosen(scores, 5, 4, 2), of_choices(5, 33)
    (whole,) = run(machine, "norm_topk_router", [Session({"x": rows}, count=4)], attrs, shapes, weights)
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 12 for row in whole[1].tolist())
    (alone,) = run(machine, "norm_topk_router", [Session({"x": rows[:1]}, count=1)], attrs, shapes, weights)
    for one, other in zip(alone, whole, strict=True):
        assert np.array_equal(bits(one), bits(other[:1]))


def test_a_top_k_router_takes_float32_weights_of_up_to_1024_experts_of_whole_rows():
    def lowered(count: int, dtype: str = "f32", norm: int = 64):
        given = {"x": x(64), "norm": w(1, norm), "weight": w(count, 64, dtype=dtype), "logit_bias": None, "bias": None}
        results = (x(4), x(4, "i32"), x(64))
        return lower(Call("norm_topk_router", given, chosen(0, 4), results, Bucket(1, 1), 90)).launches

    assert [one.kernel for one in lowered(1024)] == ["router_logits_kernel", "topk_router_kernel"]
    for wrong, said in (
        ((1025,), "1025 experts"),
        ((8, "bf16"), "a router with weights of bf16"),
        ((8, "f32", 32), "not of whole rows"),
    ):
        with pytest.raises(EmitError, match=said):
            lowered(*wrong)


@pytest.mark.parametrize(("sm", "few", "more"), [(89, 3, 2), (90, 2, 2)])
def test_the_norm_s_weight_fits_into_shared_memory_too(sm, few, more):
    """Of two turns of 512 inputs on their way, 16 rows beside 16 rows of weights leave no room for it."""
    given = {"x": x(1024), "norm": w(1, 1024), "weight": w(1792, 1024, dtype="bf16"), "bias": None}
    for n, stages in ((1, few), (16, more)):
        (product,) = lower(Call("norm_linear", given, EPS, (x(1792),), Bucket(1, n), sm)).launches
        assert product.num_stages == stages


@pytest.mark.parametrize(("op", "cols"), [("norm_linear", 32), ("norm_linear_swiglu", 16)])
def test_codes_that_leave_no_registers_are_refused(op, cols):
    given = {"x": x(64), "norm": w(1, 64), "weight": w(32, 64, dtype="i4g32"), "bias": None}
    with pytest.raises(EmitError, match="leave no registers for a norm"):
        lower(Call(op, given, EPS, (x(cols),), Bucket(1, 1), 90))

"""Quantised weights: linear and moe against float64, the same bits in any tiling, and nothing outside the group."""

import numpy as np
import pytest

from tmlc.errors import PlanError
from tmlc.kernels.cpu import available_isas, load_library

SCHEMES = ("i8g32", "i4g32", "i4g64")


def rounded(x):
    """What products with quantised weights make of their activations: whole numbers of -127..127 a group of 32."""
    x = np.asarray(x, np.float32)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    peak = np.abs(padded).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(peak > 1e-30, np.rint(padded * (np.float32(127) / peak)), 0)
    return (codes.astype(np.float64) * (peak / np.float32(127))).reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("n", "m", "k"),
    [(1, 1, 1), (1, 16, 32), (2, 17, 31), (3, 40, 33), (5, 100, 64), (8, 130, 65), (9, 33, 97), (17, 48, 200),
     (4, 20, 128), (6, 16, 129), (7, 31, 300), (33, 18, 513)],
)  # fmt: skip
def test_linear_equals_float64(bench, rng, scheme, n, m, k):
    w, packed = bench.quantised(rng, m, k, scheme)
    x, bias = rng.standard_normal((n, k)).astype(np.float32), rng.standard_normal((1, m)).astype(np.float32)
    (got,) = bench.op("linear", [x], [packed, bias], out=[("f32", m)])
    size = np.abs(x).astype(np.float64) @ np.abs(w).T + np.abs(bias)
    assert (np.abs(got - (rounded(x) @ w.T + bias)) <= 2e-6 * size).all()
    assert (np.abs(got - (x.astype(np.float64) @ w.T + bias)) <= 2e-2 * size).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_number_of_rows_has_the_bits_of_each_row_alone(bench, rng, scheme):
    _, packed = bench.quantised(rng, 40, 161, scheme)
    x = rng.standard_normal((33, 161)).astype(np.float32)
    args = {"weights": [packed], "out": [("f32", 40)]}
    alone = np.concatenate([bench.op("linear", [x[r : r + 1]], **args)[0] for r in range(33)])
    for n in range(1, 34):
        assert np.array_equal(alone[:n], bench.op("linear", [x[:n]], **args)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_extreme_codes_do_not_overflow(bench, scheme):
    """Every code and activation at its end: the largest sum a group can have."""
    k, group = 128, 64 if scheme == "i4g64" else 32
    codes = 512 if scheme == "i8g32" else 256 * (group // 32)
    scales = np.full((k // group, 16), 1, np.float16).view(np.uint8).reshape(-1)
    for code, zero in ((255, 0), (255, 255), (0, 255)):
        parts = [np.full(codes * (k // group), code, np.uint8), scales]
        if scheme != "i8g32":
            parts.append(np.full(16 * (k // group), zero, np.uint8))
        weight = code - 128 if scheme == "i8g32" else (code & 15) - zero / 16
        for sign in (1, -1):
            x = np.full((3, k), sign * 2.0, np.float32)
            (got,) = bench.op("linear", [x], [np.concatenate(parts)[None]], out=[("f32", 16)])
            assert np.allclose(got, sign * 2.0 * k * weight, rtol=1e-6)


def test_activations_of_very_different_sizes_keep_their_own_scales(bench, rng):
    """Each group of 32 inputs has its own: a large one takes no precision from a small one."""
    w, packed = bench.quantised(rng, 24, 96, "i8g32")
    x = rng.standard_normal((3, 96)).astype(np.float32)
    x[:, :32] *= 1e-6
    x[:, 64:] *= 0
    x[1, 32:64] *= 1e4
    x[2, 32:64] = 0
    (got,) = bench.op("linear", [x], [packed], out=[("f32", 24)])
    want = x.astype(np.float64) @ w.T
    size = np.abs(x).astype(np.float64) @ np.abs(w).T
    assert (np.abs(got - want) <= 2e-2 * size).all()
    assert (np.abs(got - rounded(x) @ w.T) <= 2e-6 * size).all()
    (zero,) = bench.op("linear", [np.zeros((2, 96), np.float32)], [packed], out=[("f32", 24)])
    assert not zero.any()


def test_what_is_not_a_number_reaches_the_result_of_its_row_only(bench, rng):
    _, packed = bench.quantised(rng, 20, 70, "i4g32")
    x = rng.standard_normal((6, 70)).astype(np.float32)
    x[1, 3], x[3, 69], x[4, 40] = np.nan, np.inf, 1e-38
    (got,) = bench.op("linear", [x], [packed], out=[("f32", 20)])
    assert np.isnan(got[[1, 3]]).all() and np.isfinite(got[[0, 2, 4, 5]]).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_bits_do_not_depend_on_neighbours_threads_or_strides(bench, rng, scheme):
    _, packed = bench.quantised(rng, 150, 75, scheme)
    x = rng.standard_normal((70, 75)).astype(np.float32)
    args = {"inputs": [x], "weights": [packed], "out": [("f32", 150)]}
    (whole,) = bench.op("linear", **args)
    for split in ([1] * 70, [2, 3, 4, 5, 6, 7, 8, 9, 10, 16], [69, 1]):
        assert np.array_equal(whole, bench.op("linear", **args, split=split)[0])
    for threads in (2, 3):
        assert np.array_equal(whole, bench.op("linear", **args, threads=threads)[0])
    assert np.array_equal(whole, bench.op("linear", **args, strided=True)[0])


def experts(bench, rng, e, d, f, up_scheme, down_scheme):
    gates, ups, downs, packed_up, packed_down = [], [], [], [], []
    for _ in range(e):
        gate, gate_blocks = bench.quantised(rng, f, d, up_scheme)
        up, up_blocks = bench.quantised(rng, f, d, up_scheme)
        down, down_blocks = bench.quantised(rng, d, f, down_scheme)
        gates.append(gate)
        ups.append(up)
        downs.append(down)
        packed_up.append(np.stack([gate_blocks, up_blocks], 1).reshape(2 * len(gate_blocks), -1))
        packed_down.append(down_blocks)
    return (gates, ups, downs), np.concatenate(packed_up), np.concatenate(packed_down)


@pytest.mark.parametrize(
    ("up", "down"), [("i8g32", "i8g32"), ("i4g32", "i4g32"), ("i4g64", "i4g64"), ("i4g32", "i8g32"), ("i8g32", "i4g64")]
)
@pytest.mark.parametrize(
    ("n", "k", "d", "f"), [(1, 1, 8, 4), (1, 3, 33, 20), (7, 2, 64, 32), (30, 4, 50, 77), (33, 5, 161, 97)]
)
def test_moe_equals_float64_and_its_bits_depend_on_nothing_else(bench, rng, up, down, n, k, d, f):
    e = 5
    (gates, ups, downs), packed_up, packed_down = experts(bench, rng, e, d, f, up, down)
    x = rng.standard_normal((n, d)).astype(np.float32)
    weights = rng.standard_normal((n, k)).astype(np.float32)
    chosen = np.stack([rng.permutation(e)[:k] for _ in range(n)]).astype(np.int32)
    args = ([x, weights, chosen], [packed_up, packed_down], [e, f])
    (got,) = bench.op("moe", *args)
    want, wide = np.zeros((n, d)), rounded(x)
    for r in range(n):
        for w, i in zip(weights[r], chosen[r], strict=True):
            g = gates[i] @ wide[r]
            want[r] += w * (downs[i] @ rounded((g / (1 + np.exp(-g)) * (ups[i] @ wide[r]))[None])[0])
    assert np.abs(got - want).max() <= 5e-4 * np.abs(want).max()  # a hidden value at a tie may round the other way
    for split in ([1] * n, [n - n // 2, *[1] * (n // 2)]):
        assert np.array_equal(got, bench.op("moe", *args, split=split)[0])
    assert np.array_equal(got, bench.op("moe", *args, threads=2)[0])


def test_float_and_quantised_experts_mix(bench, rng):
    e, d, f = 3, 40, 24
    (gates, ups, downs), packed_up, _ = experts(bench, rng, e, d, f, "i8g32", "i8g32")
    stored = [bench.as_stored(w.astype(np.float32), "bf16") for w in downs]
    packed_down = np.concatenate([bench.pack(w.astype(np.float32), "bf16") for w in downs])
    x, chosen = rng.standard_normal((4, d)).astype(np.float32), np.array([[0], [2], [1], [2]], np.int32)
    (got,) = bench.op("moe", [x, np.ones((4, 1), np.float32), chosen], [packed_up, packed_down], [e, f])
    for r, i in enumerate(chosen[:, 0]):
        row = rounded(x[r : r + 1])[0]
        g = gates[i] @ row
        hidden = bench.as_stored((g / (1 + np.exp(-g)) * (ups[i] @ row)).astype(np.float32), "bf16")
        want = stored[i].astype(np.float64) @ hidden.astype(np.float64)
        assert np.abs(got[r] - want).max() <= 2e-4 * np.abs(want).max() + 1e-5


@pytest.mark.parametrize("wrong", ["narrow", "wide", "rows", "float"])
def test_weights_of_another_width_are_refused(best, rng, wrong):
    _, packed = best.quantised(rng, 32, 64, "i8g32")
    packed = {
        "narrow": packed[:, :-1],
        "wide": np.concatenate([packed, packed[:, :1]], 1),
        "rows": packed[:1],
        "float": np.ascontiguousarray(packed).view(np.float32),
    }[wrong]
    with pytest.raises(PlanError, match="not packed"):
        best.op("linear", [np.zeros((2, 64), np.float32)], [np.ascontiguousarray(packed)], out=[("f32", 32)])


def test_instruction_sets_differ_by_rounding_of_float_sums_only(best, rng):
    """Sums inside a group are whole numbers, the same everywhere."""
    _, packed = best.quantised(rng, 64, 300, "i4g32")
    x = rng.standard_normal((5, 300)).astype(np.float32)
    benches = [type(best)(load_library(isa)) for isa in available_isas()]
    results = [bench.op("linear", [x], [packed], out=[("f32", 64)])[0] for bench in benches]
    for other in results[1:]:
        assert np.abs(results[0] - other).max() <= 2e-6 * np.abs(results[0]).max()

"""Dense kernels equal float64 numpy, at any size, and each row has the same bits in any company."""

import math

import numpy as np
import pytest

from tmlc.errors import KernelError, PlanError

ROWS = (1, 3, 17)
COLS = (1, 15, 16, 17, 100)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def erf(x):
    return np.vectorize(math.erf)(x)


ELEMENTWISE = {
    "add": (2, (), lambda a, b: a + b),
    "mul": (2, (), lambda a, b: a * b),
    "add_scaled": (2, (0.3,), lambda a, b: a + np.float64(np.float32(0.3)) * b),
    "scale": (1, (-1.7,), lambda a: np.float64(np.float32(-1.7)) * a),
    "clamp": (1, (-1.25, 2.5), lambda a: np.minimum(np.maximum(a, -1.25), 2.5)),
    "silu": (1, (), lambda a: a * sigmoid(a)),
    "gelu": (1, (), lambda a: 0.5 * a * (1 + erf(a / math.sqrt(2)))),
    "swiglu": (2, (), lambda g, u: g * sigmoid(g) * u),
    "modulate": (3, (), lambda x, s, b: x * (1 + s) + b),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_equals_float64(bench, rng, name):
    count, floats, reference = ELEMENTWISE[name]
    for n in ROWS:
        for cols in COLS:
            xs = [3 * normal(rng, n, cols) for _ in range(count)]
            (got,) = bench.op(name, xs, floats=floats)
            want = reference(*(x.astype(np.float64) for x in xs))
            assert np.allclose(got, want, rtol=1e-6, atol=1e-6), (n, cols)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_bits_do_not_depend_on_place(bench, rng, name):
    count, floats, _ = ELEMENTWISE[name]
    xs = [3 * normal(rng, 17, 37) for _ in range(count)]
    (whole,) = bench.op(name, xs, floats=floats)
    assert np.array_equal(whole, bench.op(name, xs, floats=floats, split=[1, 3, 13])[0])
    assert np.array_equal(whole, bench.op(name, xs, floats=floats, strided=True)[0])
    shifted = [np.ascontiguousarray(x[:, 5:]) for x in xs]
    assert np.array_equal(whole[:, 5:], bench.op(name, shifted, floats=floats)[0])


def test_scale_by_and_add_row(bench, rng):
    x, s, rows = normal(rng, 5, 37), normal(rng, 1, 1), normal(rng, 3, 37)
    assert np.array_equal(bench.op("scale_by", [x], [s])[0], x * s)
    assert np.array_equal(bench.op("add_row", [x], [rows], ints=[2])[0], x + rows[2])


def ulps(got, want):
    """Distance in units of the last place of float32."""
    spacing = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
    return np.abs(got.astype(np.float64) - want) / spacing


def test_silu_is_accurate_everywhere(bench):
    x = np.concatenate([np.linspace(-87, 87, 40001), np.geomspace(1e-30, 1, 1000), [0.0]]).astype(np.float32)[None]
    want = x.astype(np.float64) * sigmoid(x.astype(np.float64))
    assert ulps(bench.op("silu", [x])[0], want).max() < 4


def test_gelu_is_accurate_everywhere(bench):
    x = np.linspace(-12, 12, 48001).astype(np.float32)[None]
    want = ELEMENTWISE["gelu"][2](x.astype(np.float64))
    got = bench.op("gelu", [x])[0]
    assert np.abs(got - want).max() < 6e-7
    right = x > -0.5  # further left the formula itself cancels
    assert ulps(got, want)[right].max() < 8


def test_special_values_pass_through(bench):
    x = np.array([[np.nan, np.inf, -np.inf, 0.0, -0.0, 1e38, -1e38, 1e-45]], np.float32)
    silu, gelu = bench.op("silu", [x])[0][0], bench.op("gelu", [x])[0][0]
    assert np.isnan(silu[0]) and silu[1] == np.inf and silu[5] == np.float32(1e38) and abs(silu[6]) == 0
    assert np.isnan(gelu[0]) and gelu[1] == np.inf and gelu[5] == np.float32(1e38) and abs(gelu[6]) == 0
    most = float(np.finfo(np.float32).max)
    clamp = bench.op("clamp", [x], floats=[-2.0, most])[0][0]
    assert np.isnan(clamp[0]) and clamp[1] == np.float32(most) and (clamp[[2, 6]] == -2.0).all()
    assert np.array_equal(clamp[[3, 4, 5, 7]], x[0, [3, 4, 5, 7]])


@pytest.mark.parametrize("bounds", [[2.0, 1.0], [-np.inf, 1.0], [0.0, 1e39], [0.0, np.nan], [0.0]])
def test_a_clamp_without_a_range_is_refused(best, bounds):
    with pytest.raises(PlanError, match=r"range of f32|number of operands"):
        best.op("clamp", [np.zeros((2, 3), np.float32)], floats=bounds)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_linear_equals_float64(bench, rng, dtype):
    for n in (1, 2, 3, 5, 7, 9, 17):
        for k, m in ((1, 1), (3, 17), (64, 16), (65, 100), (130, 257)):
            x, w, bias = normal(rng, n, k), normal(rng, m, k), normal(rng, 1, m)
            seen = bench.as_stored(x, dtype).astype(np.float64)  # activations that meet bf16 are rounded to it
            want = seen @ bench.as_stored(w, dtype).astype(np.float64).T
            packed = bench.pack(w, dtype)
            (got,) = bench.op("linear", [x], [packed], out=[("f32", m)])
            assert np.abs(got - want).max() < 1e-5 * np.sqrt(k) * 4, (n, k, m)
            (got,) = bench.op("linear", [x], [packed, bias], out=[("f32", m)])
            assert np.abs(got - want - bias).max() < 1e-5 * np.sqrt(k) * 4


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("k", [64, 129])
def test_linear_bits_do_not_depend_on_rows_or_threads(bench, rng, dtype, k):
    x, w = normal(rng, 70, k), bench.pack(normal(rng, 333, k), dtype)
    (whole,) = bench.op("linear", [x], [w], out=[("f32", 333)])
    for split in ([1] * 70, [2, 3, 4, 5, 6, 7, 8, 9, 10, 16], [64, 6], [33, 37]):
        assert np.array_equal(whole, bench.op("linear", [x], [w], out=[("f32", 333)], split=split)[0]), split
    for threads in (2, 3):
        assert np.array_equal(whole, bench.op("linear", [x], [w], out=[("f32", 333)], threads=threads)[0])
    assert np.array_equal(whole, bench.op("linear", [x], [w], out=[("f32", 333)], strided=True)[0])


def test_rms_norm_equals_float64(bench, rng):
    for n in ROWS:
        for d, groups in ((1, 1), (7, 3), (64, 2), (100, 1), (200, 2)):
            x, w = normal(rng, n, groups * d), normal(rng, 1, d)
            (got,) = bench.op("rms_norm", [x], [w], floats=[1e-6])
            y = x.astype(np.float64).reshape(n, groups, d)
            y = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * w
            assert np.allclose(got, y.reshape(n, -1), rtol=2e-6, atol=1e-6)
            assert np.array_equal(got, bench.op("rms_norm", [x], [w], floats=[1e-6], strided=True)[0])


def test_add_rms_norm_is_add_then_rms_norm(bench, rng):
    x, residual, w = normal(rng, 9, 100), normal(rng, 9, 100), normal(rng, 1, 100)
    total, normed = bench.op("add_rms_norm", [x, residual], [w], floats=[1e-5], out=[("f32", 0), ("f32", 0)])
    assert np.array_equal(total, x + residual)
    assert np.array_equal(normed, bench.op("rms_norm", [total], [w], floats=[1e-5])[0])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_embedding_looks_rows_up(bench, rng, dtype):
    table = normal(rng, 11, 37)
    ids = np.array([[10], [0], [3], [3]], np.int32)
    stored = bench.to_bf16(table) if dtype == "bf16" else table
    (got,) = bench.op("embedding", [ids], [stored], out=[("f32", 37)])
    assert np.array_equal(got, bench.as_stored(table, dtype)[ids[:, 0]])


@pytest.mark.parametrize("bad", [-1, 11, 2**31 - 1, -(2**31)])
def test_embedding_refuses_an_unknown_id(bench, rng, bad):
    with pytest.raises(KernelError, match="index out of range"):
        bench.op("embedding", [np.array([[0], [bad]], np.int32)], [normal(rng, 11, 4)], out=[("f32", 4)])


def test_elementwise_may_run_in_place(best, rng):
    b = best.Builder(max_n=5)
    x, buffer, y = b.input(0, "f32", 37), b.arena("f32", (1, 0), 37), b.output(0, "f32", 37)
    w = b.weight(np.ones((1, 37), np.float32))
    b.method(
        [x],
        [y],
        [
            ("copy", [buffer, x]),
            ("silu", [buffer, buffer]),
            ("rms_norm", [buffer, buffer, w], [], [1e-6]),
            ("copy", [y, buffer]),
        ],
    )
    value, got = normal(rng, 5, 37), np.empty((5, 37), np.float32)
    b.build(best.library).run(None, 0, 5, np.zeros(0, np.uint8), [value], [got])
    want = best.op("rms_norm", [best.op("silu", [value])[0]], [np.ones((1, 37), np.float32)], floats=[1e-6])[0]
    assert np.array_equal(got, want)

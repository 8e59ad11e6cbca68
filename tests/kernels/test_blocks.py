"""Kernels of Inkling-2: equal to float64, the same bits in any cut and on any number of threads, and their checks."""

import numpy as np
import pytest

from tmlc.errors import PlanError


def draw(rng, *shape, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def same_bits(bench, got, *args, **kwargs):
    n = len(args[1][0])
    for options in ({"threads": 2}, {"split": [1, n - 1]}, {"strided": True}):
        assert np.array_equal(bench.op(*args, **kwargs, **options)[0], got)


@pytest.mark.parametrize("cols", [1, 17, 64, 131])
def test_sigmoid_and_softcap(bench, rng, cols):
    x = draw(rng, 9, cols, scale=6.0)
    (got,) = bench.op("sigmoid", [x])
    assert np.abs(got - 1 / (1 + np.exp(-x.astype(np.float64)))).max() < 5e-7
    same_bits(bench, got, "sigmoid", [x])
    (got,) = bench.op("softcap", [x], floats=[2.5])
    assert np.abs(got - 2.5 * np.tanh(x.astype(np.float64) / 2.5)).max() < 2e-6
    same_bits(bench, got, "softcap", [x], floats=[2.5])


@pytest.mark.parametrize(("heads", "width"), [(1, 1), (3, 5), (2, 16), (4, 80), (2, 131)])
@pytest.mark.parametrize("scaled", [False, True])
def test_l2_clip(bench, rng, heads, width, scaled):
    x, scale = draw(rng, 11, heads * width), draw(rng, 1, heads * width)
    y = (x.astype(np.float64) * (scale if scaled else 1)).reshape(11, heads, width)
    length = np.sqrt((y**2).sum(-1, keepdims=True))
    threshold, weights = float(np.median(length)), [scale] if scaled else []
    (got,) = bench.op("l2_clip", [x], weights, [heads], [threshold])
    want = y * np.minimum(1, threshold / (length + 1e-6))
    assert (length > threshold).any() and (length < threshold).any()
    assert np.abs(got - want.reshape(got.shape)).max() < 2e-6
    same_bits(bench, got, "l2_clip", [x], weights, [heads], [threshold])


@pytest.mark.parametrize(("blocks", "d", "queries"), [(1, 1, 1), (2, 24, 3), (9, 70, 1), (64, 16, 8)])
def test_mix_blocks(bench, rng, blocks, d, queries):
    x, q = draw(rng, 7, blocks * d), draw(rng, queries, d)
    out = [("f32", queries * d)]
    (got,) = bench.op("mix_blocks", [x], [q], [], [1e-6], out)
    parts = x.astype(np.float64).reshape(7, blocks, d)
    parts = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-6)
    scores = np.einsum("qd,nbd->nqb", q.astype(np.float64), parts) / d**0.5
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("nqb,nbd->nqd", shares / shares.sum(-1, keepdims=True), parts).reshape(7, -1)
    assert np.abs(got - want).max() < 5e-6
    same_bits(bench, got, "mix_blocks", [x], [q], [], [1e-6], out)


def test_concat_columns(bench, rng):
    a, b = draw(rng, 5, 3), draw(rng, 5, 18)
    (got,) = bench.op("concat_columns", [a, b], out=[("f32", 21)])
    assert np.array_equal(got, np.concatenate([a, b], 1))
    same_bits(bench, got, "concat_columns", [a, b], out=[("f32", 21)])


def convolve(bench, x, w, taps, residual, cuts, threads=1):
    b = bench.Builder(max_n=max(cuts))
    ins = [b.input(0, "f32", x.shape[1]), b.input(1, "f32", taps.shape[1])]
    out, tail = b.output(0, "f32", x.shape[1]), b.slot("f32", len(w) - 1, x.shape[1])
    b.method(ins, [out], [("dynamic_conv", [out, ins[0], b.weight(w), ins[1], tail], [residual])])
    plan, at = b.build(bench.library, threads), 0
    slot, got = np.zeros(plan.slot_bytes, np.uint8), np.full_like(x, -77)
    for count in cuts:
        rows = slice(at, at + count)
        plan.run(bench.pool(threads), 0, count, slot, [x[rows], taps[rows]], [got[rows]])
        at += count
    return got


@pytest.mark.parametrize(("heads", "width", "kernel"), [(1, 1, 2), (3, 5, 4), (2, 16, 3), (5, 20, 4), (2, 80, 2)])
@pytest.mark.parametrize("residual", [0, 1])
def test_dynamic_conv(bench, rng, heads, width, kernel, residual):
    n, cols = 13, heads * width
    x, w, taps = draw(rng, n, cols), draw(rng, kernel, cols), draw(rng, n, heads * kernel)
    got = convolve(bench, x, w, taps, residual, [n])
    padded = np.concatenate([np.zeros((kernel - 1, cols)), x.astype(np.float64)])
    want = residual * x.astype(np.float64)
    for j in range(kernel):
        computed = taps.reshape(n, heads, kernel)[:, :, j].repeat(width, 1)
        want = want + (w[j] + computed) * padded[kernel - 1 - j : kernel - 1 - j + n]
    assert np.abs(got - want).max() < 1e-5
    assert np.array_equal(convolve(bench, x, w, taps, residual, [1, 2, 6, 1, 3]), got)
    assert np.array_equal(convolve(bench, x, w, taps, residual, [n], threads=2), got)


@pytest.mark.parametrize(
    ("op", "inputs", "weights", "ints", "floats", "out", "what"),
    [
        ("softcap", [6], [], [], [0.0], 6, "cap must be positive"),
        ("softcap", [6], [], [], [1.0], 5, "one shape"),
        ("l2_clip", [6], [], [4], [1.0], 6, "no heads"),
        ("l2_clip", [6], [(1, 5)], [3], [1.0], 6, r"scale must be f32 \[1,c\]"),
        ("l2_clip", [6], [], [3], [-1.0], 6, "threshold must be positive"),
        ("concat_columns", [6, 4], [], [], [], 9, "columns of both"),
        ("mix_blocks", [130], [(1, 2)], [], [1e-6], 2, "at most 64 blocks"),
        ("mix_blocks", [18], [(9, 2)], [], [1e-6], 18, r"queries must be f32 \[q,d\]"),
        ("mix_blocks", [6], [(2, 2)], [], [1e-6], 6, r"output must be \[n,q\*d\]"),
    ],
)
def test_calls_that_do_not_fit_are_refused(best, op, inputs, weights, ints, floats, out, what):
    arrays = [np.zeros((2, cols), np.float32) for cols in inputs]
    fixed = [np.zeros(shape, np.float32) for shape in weights]
    with pytest.raises(PlanError, match=what):
        best.op(op, arrays, fixed, ints, floats, [("f32", out)])


@pytest.mark.parametrize(
    ("taps", "kernel", "tail", "what"),
    [(5, 3, 2, r"taps must be f32 \[n,H\*k\]"), (12, 3, 2, "no heads"), (6, 3, 3, r"tail must be f32 \[k-1,c\]")],
)
def test_a_dynamic_convolution_that_does_not_fit_is_refused(best, taps, kernel, tail, what):
    b = best.Builder(max_n=4)
    x, t, y = b.input(0, "f32", 6), b.input(1, "f32", taps), b.output(0, "f32", 6)
    w = b.weight(np.zeros((kernel, 6), np.float32))
    b.method([x, t], [y], [("dynamic_conv", [y, x, w, t, b.slot("f32", tail, 6)], [1])])
    with pytest.raises(PlanError, match=what):
        b.build(best.library)


def test_softcapped_experts_and_sinks_a_row(bench, rng):
    """The two kernels that learned a new form; streaming and rings are tested through the emitter."""
    d, f, n = 20, 7, 6
    x, weights = draw(rng, n, d), np.ones((n, 1), np.float32)
    chosen = np.zeros((n, 1), np.int32)
    gate, up, down = draw(rng, f, d), draw(rng, f, d), draw(rng, d, f)
    packed = [bench.in_turn(bench.pack(gate, "f32"), bench.pack(up, "f32")), bench.pack(down, "f32")]
    (got,) = bench.op("moe", [x, weights, chosen], packed, [1, f, 2], [0.0, 0.0, 0.7, 1.1], [("f32", d)])
    g, u = x.astype(np.float64) @ gate.T, x.astype(np.float64) @ up.T
    want = (0.7 * np.tanh(g / 0.7) / (1 + np.exp(-g)) * 1.1 * np.tanh(u / 1.1)) @ down.T
    assert np.abs(got - want).max() < 1e-5
    with pytest.raises(PlanError, match="both caps must be positive"):
        bench.op("moe", [x, weights, chosen], packed, [1, f, 2], [0.0, 0.0, 0.7, 0.0], [("f32", d)])
    with pytest.raises(PlanError, match="unknown flags"):
        bench.op("moe", [x, weights, chosen], packed, [1, f, 0], [0.0, 0.0, 0.7, 1.1], [("f32", d)])

"""Routing and experts: ties, floods and empty experts, and bits that do not depend on the neighbours."""

import numpy as np
import pytest

from tmlc.errors import KernelError, PlanError


def route(logits, bias, scale, top_k, shared, route_scale):
    """float64 routing of each row."""
    logits = logits.astype(np.float64)
    n_experts = logits.shape[1] - shared
    score = 1 / (1 + np.exp(-logits[:, :n_experts])) + bias
    chosen = np.argsort(-score, axis=1, kind="stable")[:, :top_k]
    chosen = np.concatenate([chosen, np.tile(np.arange(n_experts, n_experts + shared), (len(logits), 1))], 1)
    picked = np.take_along_axis(logits, chosen, 1)
    log_sigmoid = -np.logaddexp(0, -picked)
    e = np.exp(log_sigmoid - log_sigmoid.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True) * route_scale * scale, chosen


@pytest.mark.parametrize(
    ("experts", "top_k", "shared"), [(8, 2, 1), (33, 6, 2), (5, 5, 0), (1, 1, 0), (256, 6, 2), (20, 17, 3)]
)
def test_sink_router_equals_float64(bench, rng, experts, top_k, shared):
    logits = (4 * rng.standard_normal((19, experts + shared))).astype(np.float32)
    bias = (0.1 * rng.standard_normal((1, experts))).astype(np.float32)
    scale = np.array([[1.25]], np.float32)
    k = top_k + shared
    weights, chosen = bench.op(
        "sink_router", [logits], [bias, scale], [top_k, shared], [8.0], [("f32", k), ("i32", k)]
    )
    want_weights, want_chosen = route(logits, bias[0], 1.25, top_k, shared, 8.0)
    assert np.array_equal(chosen, want_chosen)
    assert np.allclose(weights, want_weights, rtol=3e-6, atol=1e-7)


def test_ties_go_to_the_lower_expert(bench):
    logits = np.zeros((3, 12), np.float32)
    logits[1, 7] = 1.0
    zero, one = np.zeros((1, 10), np.float32), np.ones((1, 1), np.float32)
    _, chosen = bench.op("sink_router", [logits], [zero, one], [3, 2], [1.0], [("f32", 5), ("i32", 5)])
    assert chosen.tolist() == [[0, 1, 2, 10, 11], [7, 0, 1, 10, 11], [0, 1, 2, 10, 11]]


def test_nan_and_infinite_logits_still_choose_distinct_experts(bench, rng):
    logits = rng.standard_normal((4, 9)).astype(np.float32)
    logits[0], logits[1, ::2], logits[2], logits[3] = np.nan, np.nan, np.inf, -np.inf
    zero, one = np.zeros((1, 8), np.float32), np.ones((1, 1), np.float32)
    _, chosen = bench.op("sink_router", [logits], [zero, one], [4, 1], [1.0], [("f32", 5), ("i32", 5)])
    for row in chosen:
        assert len(set(row.tolist())) == 5 and row.min() >= 0 and row.max() <= 8 and row[4] == 8


def test_extreme_logits_keep_their_weights_finite(bench):
    logits = np.array([[-200, -150, -180, -190], [90, 200, 80, 3e38]], np.float32)
    zero, one = np.zeros((1, 3), np.float32), np.ones((1, 1), np.float32)
    weights, _ = bench.op("sink_router", [logits], [zero, one], [2, 1], [1.0], [("f32", 3), ("i32", 3)])
    assert np.isfinite(weights).all() and np.allclose(weights.sum(1), 1)


def test_router_is_linear_then_sink_router(bench, rng):
    x = rng.standard_normal((37, 50)).astype(np.float32)
    w = rng.standard_normal((20, 50)).astype(np.float32)
    bias, scale = rng.standard_normal((1, 18)).astype(np.float32), np.array([[0.7]], np.float32)
    packed = bench.pack(w, "f32")
    (logits,) = bench.op("linear", [x], [packed], out=[("f32", 20)])
    outs = [("f32", 6), ("i32", 6)]
    want = bench.op("sink_router", [logits], [bias, scale], [4, 2], [2.0], outs)
    for split in (None, [1] * 37, [30, 7]):
        got = bench.op("router", [x], [packed, bias, scale], [4, 2], [2.0], outs, split=split)
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def expert_weights(bench, rng, e, d, f, dtype):
    gate, up = (rng.standard_normal((2, e, f, d)) / np.sqrt(d)).astype(np.float32)
    down = (rng.standard_normal((e, d, f)) / np.sqrt(f)).astype(np.float32)
    gate_up = np.concatenate([bench.in_turn(bench.pack(gate[i], dtype), bench.pack(up[i], dtype)) for i in range(e)])
    downs = np.concatenate([bench.pack(down[i], dtype) for i in range(e)])
    return [bench.as_stored(w, dtype) for w in (gate, up, down)], gate_up, downs


def clamped(gate, up, alpha, limit):
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (up + 1) * gate / (1 + np.exp(-alpha * gate))


def moe_reference(seen, x, weights, experts, gate, up, down, biases=None, alpha=0.0, limit=0.0):
    """In float64; `seen` makes of activations what the products see of them."""
    x, f = seen(x), gate.shape[1]
    on_up, on_down = biases or (np.zeros((len(gate), 2 * f)), np.zeros((len(gate), x.shape[1])))
    out = np.zeros_like(x)
    for r in range(len(x)):
        for w, e in zip(weights[r], experts[r], strict=True):
            g, u = gate[e].astype(np.float64) @ x[r] + on_up[e, :f], up[e].astype(np.float64) @ x[r] + on_up[e, f:]
            hidden = clamped(g, u, alpha, limit) if alpha else g / (1 + np.exp(-g)) * u
            out[r] += w * (down[e].astype(np.float64) @ seen(hidden) + on_down[e])
    return out


def seen_by(bench, dtype):
    return lambda v: bench.as_stored(np.asarray(v, np.float32), dtype).astype(np.float64)


def is_close(got, want, dtype, bound):
    """A hidden value on the border between two bf16 numbers may round the other way, which its row then shows."""
    error = np.abs(got - want).max(1)
    if dtype == "bf16":
        return error.max() < 4e-2 and (error >= bound).mean() <= 0.1
    return error.max() < bound


ROUTINGS = {
    "spread": lambda rng, n, k, e: np.stack([rng.permutation(e)[:k] for _ in range(n)]),
    "all_to_one": lambda rng, n, k, e: np.full((n, k), e - 1),
    "one_pair": lambda rng, n, k, e: np.tile(np.arange(k), (n, 1)),
    "reversed": lambda rng, n, k, e: np.tile(np.arange(e - 1, e - 1 - k, -1), (n, 1)),
}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_moe_equals_float64(bench, rng, dtype, routing):
    e = 6
    for n, k, d, f in ((1, 1, 8, 4), (1, 3, 33, 20), (7, 2, 16, 16), (19, 4, 50, 37)):
        stored, gate_up, down = expert_weights(bench, rng, e, d, f, dtype)
        x = rng.standard_normal((n, d)).astype(np.float32)
        weights = rng.standard_normal((n, k)).astype(np.float32)
        experts = ROUTINGS[routing](rng, n, k, e).astype(np.int32)
        (got,) = bench.op("moe", [x, weights, experts], [gate_up, down], [e, f])
        want = moe_reference(seen_by(bench, dtype), x, weights, experts, *stored)
        assert is_close(got, want, dtype, 3e-5), (n, k, d, f)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_moe_bits_do_not_depend_on_neighbours_or_threads(bench, rng, dtype):
    e, n, k, d, f = 5, 40, 3, 70, 45
    _, gate_up, down = expert_weights(bench, rng, e, d, f, dtype)
    x, weights = rng.standard_normal((n, d)).astype(np.float32), rng.random((n, k)).astype(np.float32)
    experts = np.stack([rng.permutation(e)[:k] for _ in range(n)]).astype(np.int32)
    args = ([x, weights, experts], [gate_up, down], [e, f])
    (whole,) = bench.op("moe", *args)
    for split in ([1] * n, [3, 17, 20], [9, 31]):
        assert np.array_equal(whole, bench.op("moe", *args, split=split)[0])
    for threads in (2, 3):
        assert np.array_equal(whole, bench.op("moe", *args, threads=threads)[0])
    assert np.array_equal(whole, bench.op("moe", *args, strided=True)[0])
    order = rng.permutation(n)
    (shuffled,) = bench.op("moe", [x[order], weights[order], experts[order]], [gate_up, down], [e, f])
    assert np.array_equal(whole[order], shuffled)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("numbers", [(0.0, 0.0), (1.702, 1.5)])
def test_moe_with_biases_and_clamps_equals_float64(bench, rng, dtype, routing, numbers):
    e = 5
    for n, k, d, f in ((1, 1, 8, 4), (1, 3, 33, 20), (19, 4, 50, 37)):
        stored, gate_up, down = expert_weights(bench, rng, e, d, f, dtype)
        biases = [rng.standard_normal((e, cols)).astype(np.float32) for cols in (2 * f, d)]
        x = rng.standard_normal((n, d)).astype(np.float32)
        weights = rng.standard_normal((n, k)).astype(np.float32)
        experts = ROUTINGS[routing](rng, n, k, e).astype(np.int32)
        (got,) = bench.op("moe", [x, weights, experts], [gate_up, down, *biases], [e, f, 1], numbers)
        want = moe_reference(seen_by(bench, dtype), x, weights, experts, *stored, biases, *numbers)
        assert is_close(got, want, dtype, 5e-5), (n, k, d, f)
        (got,) = bench.op("moe", [x, weights, experts], [gate_up, down], [e, f, 0], numbers)
        want = moe_reference(seen_by(bench, dtype), x, weights, experts, *stored, None, *numbers)
        assert is_close(got, want, dtype, 5e-5), (n, k, d, f)


def test_moe_bits_with_biases_do_not_depend_on_neighbours_or_threads(bench, rng):
    e, n, k, d, f = 5, 40, 3, 70, 45
    _, gate_up, down = expert_weights(bench, rng, e, d, f, "f32")
    biases = [rng.standard_normal((e, cols)).astype(np.float32) for cols in (2 * f, d)]
    x, weights = rng.standard_normal((n, d)).astype(np.float32), rng.random((n, k)).astype(np.float32)
    experts = np.stack([rng.permutation(e)[:k] for _ in range(n)]).astype(np.int32)
    args = ([x, weights, experts], [gate_up, down, *biases], [e, f, 1], [1.702, 2.0])
    (whole,) = bench.op("moe", *args)
    for how in (dict(split=[1] * n), dict(split=[3, 17, 20]), dict(threads=2), dict(threads=3), dict(strided=True)):
        assert np.array_equal(whole, bench.op("moe", *args, **how)[0]), how


@pytest.mark.parametrize(
    ("shapes", "ints", "floats", "why"),
    [
        ([(5, 8), (5, 8)], [5, 4, 1], [-1.0, 0.0], "negative"),
        ([(5, 8), (5, 8)], [5, 4, 1], [1.0, float("nan")], "negative"),
        ([(5, 8), (5, 8)], [5, 4, 2], [0.0, 0.0], "flags"),
        ([(5, 8), (5, 8)], [5, 4, 0], [0.0, 0.0], "number of operands"),
        ([(5, 8), (5, 8)], [5, 4], [], "number of operands"),
        ([(5, 8)], [5, 4, 1], [0.0, 0.0], "number of operands"),
        ([(5, 7), (5, 8)], [5, 4, 1], [0.0, 0.0], "gate_up_bias"),
        ([(5, 8), (4, 8)], [5, 4, 1], [0.0, 0.0], "down_bias"),
    ],
)
def test_moe_refuses_biases_that_do_not_fit(best, shapes, ints, floats, why):
    up, down = np.zeros((10, 8 * 16), np.float32), np.zeros((5, 4 * 16), np.float32)
    x, w, experts = np.ones((1, 8), np.float32), np.ones((1, 2), np.float32), np.zeros((1, 2), np.int32)
    biases = [np.zeros(shape, np.float32) for shape in shapes]
    with pytest.raises(PlanError, match=why):
        best.op("moe", [x, w, experts], [up, down, *biases], ints, floats)


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
def test_moe_refuses_an_unknown_expert(bench, rng, bad):
    _, gate_up, down = expert_weights(bench, rng, 5, 8, 4, "f32")
    x, w = np.ones((2, 8), np.float32), np.ones((2, 2), np.float32)
    experts = np.array([[0, 1], [bad, 2]], np.int32)
    with pytest.raises(KernelError, match="index out of range"):
        bench.op("moe", [x, w, experts], [gate_up, down], [5, 4])


@pytest.mark.parametrize(
    ("ints", "blocks"), [([5, 4], (12, 5)), ([6, 4], (12, 5)), ([5, 17], (10, 5)), ([0, 4], (1, 1)), ([-5, 4], (10, 5))]
)
def test_moe_refuses_weights_that_do_not_fit(best, ints, blocks):
    up, down = np.zeros((blocks[0], 8 * 16), np.float32), np.zeros((blocks[1], 4 * 16), np.float32)
    x, w, experts = np.ones((1, 8), np.float32), np.ones((1, 2), np.float32), np.zeros((1, 2), np.int32)
    with pytest.raises(PlanError, match=r"packed|absurd"):
        best.op("moe", [x, w, experts], [up, down], ints)

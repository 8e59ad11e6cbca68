"""topk_router: every kind of score, groups, ties, and distinct experts whatever the logits are."""

import numpy as np
import pytest

from tmlc.errors import PlanError

SOFTMAX, SIGMOID, RAW = range(3)


def route(logits, bias, scores, top_k, normalise, groups, top_groups, scale):
    """float64 routing of each row."""
    x = logits.astype(np.float64)
    e = np.exp(x - x.max(1, keepdims=True))
    score = {SOFTMAX: e / e.sum(1, keepdims=True), SIGMOID: 1 / (1 + np.exp(-x)), RAW: x}[scores]
    choice = score + (0 if bias is None else bias.astype(np.float64))
    size = x.shape[1] // groups
    if groups > 1:
        best = np.sort(choice.reshape(len(x), groups, size), 2)[..., -2:].sum(2)
        picked = np.argsort(-best, axis=1, kind="stable")[:, :top_groups]
        member = np.arange(x.shape[1])[None] // size
        choice = np.where((member[..., None] == picked[:, None]).any(2), choice, -np.inf)
    chosen = np.argsort(-choice, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(score, chosen, 1)
    if scores == RAW:
        weights = np.exp(weights - weights.max(1, keepdims=True))
    if normalise or scores == RAW:
        weights = weights / (weights.sum(1, keepdims=True) + (1e-20 if scores == SIGMOID else 0))
    return weights * scale, chosen


def run(bench, logits, bias, scores, top_k, normalise=0, groups=1, top_groups=1, scale=1.0, **how):
    ints, outs = [scores, top_k, normalise, groups, top_groups], [("f32", top_k), ("i32", top_k)]
    weights = [] if bias is None else [bias]
    return bench.op("topk_router", [logits], weights, ints, [scale], outs, **how)


# experts, top_k, groups, top_groups
SIZES = [(8, 2, 1, 1), (33, 6, 1, 1), (5, 5, 1, 1), (1, 1, 1, 1), (256, 8, 8, 4), (20, 7, 5, 3), (12, 3, 12, 3),
         (16, 4, 4, 1), (16, 16, 4, 4), (34, 2, 17, 1)]  # fmt: skip


@pytest.mark.parametrize("scores", [SOFTMAX, SIGMOID, RAW])
@pytest.mark.parametrize("size", SIZES)
def test_routing_equals_float64(bench, rng, scores, size):
    experts, top_k, groups, top_groups = size
    logits = (2 * rng.standard_normal((23, experts))).astype(np.float32)
    biases = [None, (0.3 * rng.standard_normal((1, experts))).astype(np.float32)]
    for bias in biases:
        for normalise in (0, 1):
            how = (bias, scores, top_k, normalise, groups, top_groups, 2.5)
            weights, chosen = run(bench, logits, *how)
            want_weights, want_chosen = route(logits, *how)
            assert np.array_equal(chosen, want_chosen)
            assert np.allclose(weights, want_weights, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("scores", [SOFTMAX, SIGMOID, RAW])
def test_ties_go_to_the_lower_expert_and_the_lower_group(bench, scores):
    logits = np.zeros((3, 12), np.float32)
    logits[1, 7] = 1.0
    logits[2, [4, 10]] = 1.0
    _, chosen = run(bench, logits, None, scores, 3)
    assert chosen.tolist() == [[0, 1, 2], [7, 0, 1], [4, 10, 0]]
    _, chosen = run(bench, logits, None, scores, 4, 0, 4, 2)
    assert chosen.tolist() == [[0, 1, 2, 3], [7, 0, 1, 2], [4, 10, 3, 5]]


def test_negative_biased_scores_do_not_open_closed_groups(bench, rng):
    logits = rng.standard_normal((6, 12)).astype(np.float32)
    bias = np.full((1, 12), -5, np.float32)
    _, chosen = run(bench, logits, bias, SIGMOID, 4, 1, 3, 1)
    assert np.array_equal(chosen, route(logits, bias, SIGMOID, 4, 1, 3, 1, 1.0)[1])
    assert all(len(set((row // 4).tolist())) == 1 for row in chosen)


@pytest.mark.parametrize("scores", [SOFTMAX, SIGMOID, RAW])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 5), (2, 2)])
def test_nan_and_infinite_logits_still_choose_distinct_experts(bench, rng, scores, groups):
    logits = rng.standard_normal((6, 16)).astype(np.float32)
    logits[0], logits[1, ::2], logits[2], logits[3] = np.nan, np.nan, np.inf, -np.inf
    logits[4, 5], logits[5, 3:] = np.inf, -np.inf
    _, chosen = run(bench, logits, None, scores, 5, 1, *groups)
    for row in chosen:
        assert len(set(row.tolist())) == 5 and row.min() >= 0 and row.max() < 16


def test_extreme_logits_keep_their_weights_finite(bench):
    logits = np.array([[-200, -150, -180, -190], [90, 200, 80, 3e38], [-3e38, 0, 3e38, 1]], np.float32)
    for scores in (SOFTMAX, RAW):
        weights, chosen = run(bench, logits, None, scores, 2, 1)
        assert np.isfinite(weights).all() and np.allclose(weights.sum(1), 1)
        assert chosen[:, 0].tolist() == [1, 3, 2]
    assert np.isfinite(run(bench, logits, None, SIGMOID, 2, 1)[0]).all()


@pytest.mark.parametrize("scores", [SOFTMAX, SIGMOID, RAW])
def test_bits_do_not_depend_on_cuts_or_threads(bench, rng, scores):
    logits = rng.standard_normal((300, 96)).astype(np.float32)
    bias = rng.standard_normal((1, 96)).astype(np.float32)
    how = (bias, scores, 6, 1, 8, 3, 1.5)
    whole = run(bench, logits, *how)
    for change in (dict(split=[1] * 300), dict(split=[7, 200, 93]), dict(threads=3), dict(strided=True)):
        got = run(bench, logits, *how, **change)
        assert all(np.array_equal(a, b) for a, b in zip(got, whole, strict=True)), change


@pytest.mark.parametrize(
    ("ints", "bias", "why"),
    [
        ([3, 2, 0, 1, 1], None, "scores"),
        ([-1, 2, 0, 1, 1], None, "scores"),
        ([0, 2, 2, 1, 1], None, "normalise"),
        ([0, 2, 0, 5, 1], None, "groups"),
        ([0, 2, 0, 0, 1], None, "groups"),
        ([0, 2, 0, -4, 1], None, "groups"),
        ([0, 2, 0, 4, 5], None, "top_groups"),
        ([0, 2, 0, 4, 0], None, "top_groups"),
        ([0, 2, 0, 12, 1], None, "top_k"),
        ([0, 13, 0, 1, 1], None, "top_k"),
        ([0, 0, 0, 1, 1], None, "top_k"),
        ([0, 3, 0, 1, 1], None, "weights"),
        ([0, 2, 0, 1, 1], 11, "bias"),
    ],
)
def test_a_router_that_does_not_fit_is_refused(best, ints, bias, why):
    logits, outs = np.zeros((2, 12), np.float32), [("f32", 2), ("i32", 2)]
    weights = [] if bias is None else [np.zeros((1, bias), np.float32)]
    with pytest.raises(PlanError, match=why):
        best.op("topk_router", [logits], weights, ints, [1.0], outs)


def test_a_scale_that_is_no_number_is_refused(best):
    logits, outs = np.zeros((2, 12), np.float32), [("f32", 2), ("i32", 2)]
    with pytest.raises(PlanError, match="finite"):
        best.op("topk_router", [logits], [], [0, 2, 0, 1, 1], [float("inf")], outs)

"""head_sample draws exactly the tokens of scale, linear, softcap and sample, one after the other."""

import numpy as np
import pytest

from tmlc.errors import KernelError, PlanError

HEAT = np.array([0, 0.3, 1, 0, 2.5, 40, 1e-30, 0.8, 0, 1, 1], np.float32)[:, None]
KEYS = np.stack([np.arange(11) * 7 - 20, np.arange(11) // 4, np.arange(11) % 4], 1).astype(np.int64)


def weights(bench, rng, m, k, form):
    if form in ("f32", "bf16"):
        return bench.pack(rng.standard_normal((m, k)).astype(np.float32), form)
    return bench.quantised(rng, m, k, form)[1]


def unfused(bench, x, w, bias, m, entries, alpha, cap, keys, heat):
    logits = bench.op("scale", [x], floats=[alpha])[0] if alpha != 1 else x
    (logits,) = bench.op("linear", [logits], [w, *bias], out=[("f32", m)])
    if cap:
        (logits,) = bench.op("softcap", [logits], floats=[cap])
    kept = np.ascontiguousarray(logits[:, :entries])
    return bench.op("sample", [kept, keys, heat], out=[("i32", 1)])[0], kept


def fused(bench, x, w, bias, entries, alpha, cap, keys, heat, **how):
    """In the order of the plan: the weight stands between the inputs, so the plan is written here."""
    n, split = len(x), how.get("split") or [len(x)]
    b = bench.Builder(max_n=max(split))
    t_x, t_key, t_heat = b.input(0, "f32", x.shape[1]), b.input(1, "i64", 3), b.input(2, "f32", 1)
    ids = b.output(0, "i32", 1)
    operands = [ids, t_x, b.weight(w), t_key, t_heat, *(b.weight(v) for v in bias)]
    b.method([t_x, t_key, t_heat], [ids], [("head_sample", operands, [entries], [alpha, cap])])
    threads = how.get("threads", 1)
    plan, out, at = b.build(bench.library, threads), np.full((n, 1), -7, np.int32), 0
    for count in split:
        rows = slice(at, at + count)
        given = [np.ascontiguousarray(v[rows]) for v in (x, keys, heat)]
        plan.run(bench.pool(threads), 0, count, np.zeros(0, np.uint8), given, [out[rows]])
        at += count
    return out


@pytest.mark.parametrize("form", ["f32", "bf16", "i8g32", "i4g32", "i4g64"])
@pytest.mark.parametrize("alpha", [1.0, 0.37])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_tokens_are_those_of_the_four_operations(bench, rng, form, alpha, cap):
    for m, entries, k in ((1, 1, 1), (17, 16, 33), (100, 77, 64), (333, 333, 65)):
        x = rng.standard_normal((11, k)).astype(np.float32)
        w, bias = weights(bench, rng, m, k, form), rng.standard_normal((1, m)).astype(np.float32)
        for biases in ([], [bias]):
            want, logits = unfused(bench, x, w, biases, m, entries, alpha, cap, KEYS, HEAT)
            got = fused(bench, x, w, biases, entries, alpha, cap, KEYS, HEAT)
            assert np.array_equal(got, want), (m, entries, k)
            greedy = HEAT[:, 0] == 0
            assert np.array_equal(got[greedy, 0], logits[greedy].argmax(1))


def test_rows_and_threads_never_change_a_token(bench, rng):
    x, w = rng.standard_normal((11, 40)).astype(np.float32), weights(bench, rng, 2000, 40, "bf16")
    whole = fused(bench, x, w, [], 2000, 0.5, 0.0, KEYS, HEAT)
    for how in ({"threads": 2}, {"threads": 3}, {"split": [1] * 11}, {"split": [4, 7], "threads": 2}):
        assert np.array_equal(fused(bench, x, w, [], 2000, 0.5, 0.0, KEYS, HEAT, **how), whole), how


def test_more_rows_than_a_chunk(bench, rng):
    x, w = rng.standard_normal((150, 20)).astype(np.float32), weights(bench, rng, 50, 20, "f32")
    keys = np.stack([np.full(150, 3), np.arange(150), np.zeros(150)], 1).astype(np.int64)
    heat = (np.arange(150) % 3).astype(np.float32)[:, None]
    want, _ = unfused(bench, x, w, [], 50, 50, 1.0, 0.0, keys, heat)
    assert np.array_equal(fused(bench, x, w, [], 50, 1.0, 0.0, keys, heat), want)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_of_equal_logits_the_lowest_entry_wins_in_any_thread(bench, threads):
    m, k = 4000, 32
    x, w = np.ones((4, k), np.float32), np.zeros((m, k), np.float32)
    w[[1700, 3999]] = 1
    keys, heat = KEYS[:4], np.array([[0], [0], [1e-30], [0]], np.float32)
    x[1] = 0
    x[3] = np.nan  # every logit is NaN, and none is chosen over the first
    got = fused(bench, x, bench.pack(w, "f32"), [], m, 1.0, 0.0, keys, heat, threads=threads)
    assert got[:, 0].tolist() == [1700, 0, 1700, 0]


@pytest.mark.parametrize("heat", [-1.0, np.nan, -np.inf])
def test_a_temperature_that_is_none_stops_the_call(bench, rng, heat):
    w = weights(bench, rng, 20, 8, "f32")
    with pytest.raises(KernelError):
        fused(bench, np.ones((1, 8), np.float32), w, [], 20, 1.0, 0.0, KEYS[:1], np.full((1, 1), heat, np.float32))


@pytest.mark.parametrize(
    ("entries", "alpha", "cap", "bias", "reason"),
    [
        (0, 1.0, 0.0, 20, "fewer entries"),
        (33, 1.0, 0.0, None, "fewer entries"),
        (20, 1.0, -1.0, None, "cap"),
        (20, 1.0, np.nan, None, "cap"),
        (20, np.inf, 0.0, None, "cap"),
        (20, 1.0, 0.0, 19, "bias"),
    ],
)
def test_a_malformed_call_is_refused(best, rng, entries, alpha, cap, bias, reason):
    w = weights(best, rng, 20, 8, "f32")
    biases = [] if bias is None else [np.zeros((1, bias), np.float32)]
    with pytest.raises(PlanError, match=reason):
        fused(best, np.ones((1, 8), np.float32), w, biases, entries, alpha, cap, KEYS[:1], HEAT[:1])

"""Attention, short convolutions and positions: streaming equals the whole sequence, bit for bit in any cut."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tmlc.errors import ContextFullError, PlanError


@dataclass
class Case:
    heads: int = 4
    kv: int = 2
    d: int = 16
    window: int = 0
    sinks: int = 0
    capacity: int = 64
    rank: int = 0
    extent: int = 0
    scale: float = 0.25
    log_floor: float = 0.0
    log_alpha: float = 0.1
    dtype: str = "f32"
    max_n: int = 16
    dv: int = 0  # columns of a value head; 0: those of a key
    sink_logits: bool = False
    softcap: float = 0.0

    @property
    def v(self) -> int:
        return self.dv or self.d


CASES = {
    "all_keys": Case(),
    "odd_head": Case(heads=3, kv=1, d=7),
    "one_head_each": Case(heads=5, kv=5, d=20),
    "bias": Case(rank=3, extent=20),
    "bias_long": Case(rank=16, extent=200, d=64, heads=8),
    "log_scaled": Case(rank=2, extent=9, log_floor=10.0),
    "window": Case(window=9, capacity=32, rank=4, extent=9),
    "window_bias_shorter": Case(window=20, capacity=48, rank=4, extent=7, log_floor=5.0),
    "sinks": Case(window=17, sinks=16, capacity=48, rank=4, extent=40),
    "window_one": Case(window=1, capacity=16, rank=1, extent=3),
    "wide_group": Case(heads=24, kv=1, d=33, window=30, capacity=64),
    "bf16": Case(dtype="bf16", window=9, capacity=32, rank=4, extent=9, d=18),
    "bf16_all_keys": Case(dtype="bf16", d=64),
    "narrow_values": Case(d=24, dv=16, heads=6, kv=6),
    "wide_values": Case(d=5, dv=70, heads=4, kv=1, window=11, capacity=32, rank=2, extent=9),
    "bf16_narrow_values": Case(d=18, dv=7, dtype="bf16", window=9, capacity=32),
    "head_80": Case(d=80, heads=10, kv=2),
    "sink_logits": Case(sink_logits=True),
    "sink_logits_window": Case(sink_logits=True, window=9, capacity=32, heads=8, kv=1, d=64),
    "sink_logits_and_sinks": Case(sink_logits=True, window=17, sinks=16, capacity=48, d=80, dv=33),
    "bf16_odd_head": Case(heads=6, kv=2, d=7, dv=5, dtype="bf16", window=17, sinks=16, capacity=48, rank=4, extent=40),
    "bf16_head_80": Case(d=80, heads=10, kv=2, dtype="bf16", softcap=2.0, sink_logits=True),
    "bf16_wide_group": Case(heads=40, kv=1, d=16, dtype="bf16", rank=2, extent=30, log_floor=9.0),
    "int8": Case(dtype="int8", d=64),
    "int8_odd_head": Case(heads=6, kv=2, d=7, dv=5, dtype="int8", window=17, sinks=16, capacity=48, rank=4, extent=40),
    "int8_head_80": Case(d=80, heads=10, kv=2, dtype="int8", softcap=2.0, sink_logits=True, log_floor=9.0),
    "int8_wide": Case(d=272, dv=34, heads=9, kv=3, dtype="int8", window=9, capacity=32, rank=4, extent=9),
    **{
        f"splits_{dtype}": Case(heads=2, kv=1, d=8, capacity=1312, dtype=dtype, max_n=64)
        for dtype in ("f32", "bf16", "int8")
    },
    **{
        f"splits_of_a_ring_{dtype}": Case(
            heads=2, kv=1, d=8, window=700, sinks=32, capacity=800, rank=2, extent=600, dtype=dtype, max_n=64
        )
        for dtype in ("f32", "bf16", "int8")
    },
    "softcap": Case(softcap=2.0),
    "softcap_of_all": Case(softcap=0.5, sink_logits=True, window=9, capacity=32, rank=3, extent=5, log_floor=7.0),
}


def make(bench, case: Case, tensors: dict, threads: int = 1):
    b = bench.Builder(max_n=case.max_n)
    q_cols, k_cols = case.heads * case.d, case.kv * case.d
    ins = [b.input(0, "f32", q_cols), b.input(1, "f32", k_cols), b.input(2, "f32", case.kv * case.v)]
    y = b.output(0, "f32", case.heads * case.v)
    position = b.slot("i64", 1, 1)
    blocks = case.kv * case.capacity // 16
    if case.dtype == "int8":
        k_cache, v_cache = (b.slot("u8", blocks, -(-d // 4) * 64 + 64) for d in (case.d, case.v))
    else:
        k_cache, v_cache = b.slot(case.dtype, blocks, case.d * 16), b.slot(case.dtype, 16 * blocks, case.v)
    extra = []
    if case.rank:
        ins.append(b.input(3, "f32", case.heads * case.rank))
        extra = [ins[3], b.weight(tensors["table"])]
    if case.sink_logits:
        extra.append(b.weight(tensors["sink_logits"]))
    flags = (1 if case.rank else 0) + (2 if case.sink_logits else 0)
    ints = [case.heads, case.kv, case.window, case.sinks, case.capacity, flags]
    floats = [case.scale, case.log_floor, case.log_alpha, case.softcap]
    limit = case.capacity if case.window == 0 else 0
    b.method(
        ins,
        [y],
        [
            ("attention", [y, *ins[:3], position, k_cache, v_cache, *extra], ints, floats),
            ("advance", [position], [limit]),
        ],
    )
    return b.build(bench.library, threads)


def inputs(case: Case, n: int, rng) -> dict:
    t = {
        "q": rng.standard_normal((n, case.heads * case.d)),
        "k": rng.standard_normal((n, case.kv * case.d)),
        "v": rng.standard_normal((n, case.kv * case.v)),
    }
    if case.sink_logits:
        t["sink_logits"] = 2 * rng.standard_normal((1, case.heads))
    if case.rank:
        t["rel"] = rng.standard_normal((n, case.heads * case.rank))
        t["table"] = rng.standard_normal((case.rank, case.extent))
    return {name: x.astype(np.float32) for name, x in t.items()}


def stream(bench, case, tensors, cuts, threads=1, poison=False):
    plan = make(bench, case, tensors, threads)
    assert max(cuts) <= case.max_n
    slot = np.zeros(plan.slot_bytes, np.uint8)
    if poison:  # whatever lies in cells that no visible key owns must not matter
        slot[64:] = 0xFF
    n = sum(cuts)
    out = np.zeros((n, case.heads * case.v), np.float32)
    names = ["q", "k", "v"] + (["rel"] if case.rank else [])
    at = 0
    for count in cuts:
        rows = slice(at, at + count)
        plan.run(bench.pool(threads), 0, count, slot, [tensors[x][rows] for x in names], [out[rows]])
        at += count
    return out


def as_cached(bench, x: np.ndarray, case: Case) -> np.ndarray:
    """[n, G, D] float32 as the caches hold it (docs/plan-format.md)."""
    if case.dtype != "int8":
        return bench.as_stored(x, case.dtype)
    peak = np.abs(x).max(-1, keepdims=True)
    return np.rint(x * (np.float32(127) / peak)) * (peak / np.float32(127))


def reference(bench, case: Case, t: dict) -> np.ndarray:
    """Float64. bf16: queries (in units of ln 2) and weights are rounded as well."""
    n, log2_e = t["q"].shape[0], np.float32(1.44269504)
    q = t["q"].reshape(n, case.heads, case.d)
    if case.dtype == "bf16":
        unit = 1 if case.softcap else log2_e
        taus = [1 + case.log_alpha * np.log(max(1.0, (p + 1) / (case.log_floor or 1e30))) for p in range(n)]
        factor = np.float32(case.scale) * np.array(taus, np.float32)[:, None, None] * np.float32(unit)
        q = bench.as_stored(q * factor, "bf16").astype(np.float64) / factor
    q = q.astype(np.float64)
    k = as_cached(bench, t["k"].reshape(n, case.kv, case.d), case).astype(np.float64)
    v = as_cached(bench, t["v"].reshape(n, case.kv, case.v), case).astype(np.float64)
    out = np.zeros((n, case.heads, case.v))
    for p in range(n):
        tau = 1.0
        if case.log_floor > 0:
            tau += case.log_alpha * np.log(max(1.0, (p + 1) / case.log_floor))
        j = np.arange(p + 1)
        if case.window:
            j = j[(j > p - case.window) | (j < case.sinks)]
        for h in range(case.heads):
            g = h // (case.heads // case.kv)
            score = case.scale * tau * (k[j, g] @ q[p, h])
            if case.rank:
                rel = t["rel"][p].astype(np.float64).reshape(case.heads, case.rank)[h]
                bias = rel @ t["table"].astype(np.float64)
                distance = p - j
                score += tau * np.where(distance < case.extent, bias[np.minimum(distance, case.extent - 1)], 0)
            if case.softcap:
                score = case.softcap * np.tanh(score / case.softcap)
            e, sink = np.exp(score), np.exp(np.float64(t["sink_logits"][0, h])) if case.sink_logits else 0.0
            if case.dtype == "bf16":
                e = bench.as_stored(e.astype(np.float32), "bf16").astype(np.float64)
            out[p, h] = (e / (e.sum() + sink)) @ v[j, g]
    return out.reshape(n, -1)


def cut(n: int, sizes: list[int]) -> list[int]:
    """n positions cut into calls of the given sizes, over and over."""
    out: list[int] = []
    while sum(out) < n:
        out.append(min(sizes[len(out) % len(sizes)], n - sum(out)))
    return out


@pytest.mark.parametrize("name", CASES)
def test_streamed_attention_equals_float64(bench, rng, name):
    case = CASES[name]
    n = case.capacity if case.window == 0 else 3 * case.capacity + 5
    t = inputs(case, n, rng)
    got = stream(bench, case, t, cut(n, [16]))
    error = np.abs(got - reference(bench, case, t))
    # bf16: a weight on the border between two bf16 numbers may round the other way; int8: factors have 15 bits.
    assert error.max() < {"f32": 5e-6, "bf16": 4e-3, "int8": 5e-4}[case.dtype]
    assert error.mean() < {"f32": 1e-6, "bf16": 2e-5, "int8": 5e-5}[case.dtype]


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_cuts_or_threads(bench, rng, name):
    case = CASES[name]
    n = case.capacity if case.window == 0 else 3 * case.capacity + 5
    t = inputs(case, n, rng)
    whole = stream(bench, case, t, cut(n, [16]))
    for sizes in ([1], [3, 1, 7], [15, 2, 16, 5]):
        assert np.array_equal(whole, stream(bench, case, t, cut(n, sizes))), sizes
    assert np.array_equal(whole, stream(bench, case, t, cut(n, [16]), threads=2))
    assert np.array_equal(whole, stream(bench, case, t, cut(n, [3, 1, 7]), threads=3))
    assert np.array_equal(whole, stream(bench, case, t, cut(n, [16, 9]), poison=True))


def test_threads_split_large_attention_without_changing_bits(best, rng):
    case = Case(heads=8, kv=2, d=32, capacity=512, rank=4, extent=100, max_n=64)
    t = inputs(case, 500, rng)
    assert np.array_equal(
        stream(best, case, t, cut(500, [64])), stream(best, case, t, cut(500, [64, 1]), threads=2)
    )


def test_attention_at_a_very_late_position(best, rng):
    case = Case(window=9, sinks=16, capacity=48, rank=4, extent=9, log_floor=4.0)
    plan = make(best, case, inputs(case, 1, rng))
    slot = np.zeros(plan.slot_bytes, np.uint8)
    slot[:8].view(np.int64)[0] = 2**61
    t = inputs(case, 16, rng)
    out = np.zeros((16, 64), np.float32)
    plan.run(None, 0, 16, slot, [t[x] for x in ("q", "k", "v", "rel")], [out])
    assert np.isfinite(out).all() and slot[:8].view(np.int64)[0] == 2**61 + 16


def test_a_full_context_stops_before_anything_changes(best, rng):
    case = Case(capacity=32)
    t = inputs(case, 33, rng)
    plan = make(best, case, t)
    slot = np.zeros(plan.slot_bytes, np.uint8)
    out = np.zeros((16, 64), np.float32)
    for start in (0, 16):
        plan.run(None, 0, 16, slot, [t[x][start : start + 16] for x in ("q", "k", "v")], [out])
    before = slot.copy()
    with pytest.raises(ContextFullError, match="32 of 32"):
        plan.run(None, 0, 1, slot, [t[x][32:33] for x in ("q", "k", "v")], [out])
    assert np.array_equal(before, slot)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(capacity=60), "multiple of 16"),
        (dict(window=20, capacity=32), "ring is smaller"),
        (dict(window=5, sinks=8), "sinks"),
        (dict(heads=3), "multiple of kv heads"),
        (dict(log_floor=-1.0), "log_floor"),
        (dict(scale=float("nan")), "finite"),
        (dict(softcap=-1.0), "softcap"),
        (dict(softcap=float("inf")), "finite"),
        (dict(dv=4097), "Dv"),
    ],
)
def test_attention_that_cannot_be_safe_is_refused(best, rng, change, why):
    case = Case(**change)
    with pytest.raises(PlanError, match=why):
        make(best, case, {})


@pytest.mark.parametrize(
    ("k", "v", "why"),
    [
        (("u8", 8, 6 * 16 + 64, 0), ("u8", 8, 8 * 16 + 64, 0), "int8 k_cache"),  # columns not in whole fours
        (("u8", 8, 8 * 16, 0), ("u8", 8, 8 * 16 + 64, 0), "int8 k_cache"),  # no room for the scales
        (("u8", 7, 8 * 16 + 64, 0), ("u8", 8, 8 * 16 + 64, 0), "int8 k_cache"),
        (("u8", 8, 8 * 16 + 64, 2), ("u8", 8, 8 * 16 + 64, 0), "int8 k_cache"),  # scales would not be aligned
        (("u8", 8, 8 * 16 + 64, 0), ("u8", 128, 12, 0), "int8 v_cache"),
        (("u8", 8, 8 * 16 + 64, 0), ("u8", 9, 8 * 16 + 64, 0), "int8 v_cache"),
        (("u8", 8, 8 * 16 + 64, 0), ("f32", 128, 6, 0), "both"),
        (("i32", 8, 6 * 16, 0), ("i32", 128, 6, 0), "both"),
        (("f32", 8, 6 * 16, 0), ("bf16", 128, 6, 0), "both"),
    ],
)
def test_malformed_caches_are_refused(best, k, v, why):
    b = best.Builder(max_n=4)
    x, y, position = b.input(0, "f32", 12), b.output(0, "f32", 12), b.slot("i64", 1, 1)
    caches = []
    for dtype, rows, cols, shift in (k, v):
        cache = b.slot(dtype, rows + 1, cols)
        caches.append(b.tensor("slot", dtype, (0, rows), cols, b.tensors[cache][2] + shift))
    code = [("attention", [y, x, x, x, position, *caches], [2, 2, 0, 0, 64, 0], [1.0, 0.0, 0.0, 0.0])]
    b.method([x], [y], [*code, ("advance", [position], [64])])
    with pytest.raises(PlanError, match=why):
        b.build(best.library)


def test_int8_caches_cost_little_beside_float32(bench, rng):
    """Keys and values of standard deviation 1: the mean error stays below 1/127 of it, and the largest below 4/127."""
    exact = Case(d=64, capacity=304, scale=0.125)
    coded = replace(exact, dtype="int8")
    t = inputs(exact, 300, rng)
    error = np.abs(stream(bench, exact, t, cut(300, [16])) - stream(bench, coded, t, cut(300, [16])))
    assert 0 < error.mean() < 1 / 127 and error.max() < 4 / 127


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_a_row_that_is_not_finite_spoils_no_row_before_it(bench, rng, dtype):
    case = Case(dtype=dtype, d=8, capacity=48)
    t = inputs(case, 40, rng)
    clean = stream(bench, case, t, cut(40, [16]))
    t["k"][21, 3], t["v"][21, 9] = np.inf, np.nan
    spoiled = stream(bench, case, t, cut(40, [16]))
    assert np.array_equal(clean[:21], spoiled[:21])
    assert np.isnan(spoiled[21:]).any(axis=1).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_sessions_of_one_call_do_not_change_bits(bench, rng, dtype):
    """Eight sessions, long and short ones, with a row or a few each: the same bits as alone, whatever the threads."""
    case = Case(heads=4, kv=2, d=16, window=600, sinks=16, capacity=704, rank=2, extent=50, dtype=dtype, max_n=32)
    t = inputs(case, 1300, rng)
    names, (plan, wide) = ["q", "k", "v", "rel"], (make(bench, case, t, threads) for threads in (1, 3))
    slots, want, parts, joined = [], [], [], []
    for s, history in enumerate((0, 3, 31, 511, 512, 700, 900, 1200)):
        slot = np.zeros(plan.slot_bytes, np.uint8)
        out = np.zeros((32, case.heads * case.v), np.float32)
        for at in range(0, history, 32):
            n = min(32, history - at)
            plan.run(None, 0, n, slot, [t[x][at : at + n] for x in names], [out])
        n = 1 + s % 3 * 2
        slots.append(slot.copy())
        joined.append([t[x][history : history + n] for x in names])
        plan.run(None, 0, n, slot, joined[-1], [out])
        want.append(out[:n].copy())
        parts.append((n, slots[-1]))
    got = np.zeros((sum(n for n, _ in parts), case.heads * case.v), np.float32)
    wide.run_batch(bench.pool(3), 0, parts, [np.concatenate(x) for x in zip(*joined, strict=True)], [got])
    assert np.array_equal(got, np.concatenate(want))


def test_all_keys_without_a_limit_is_refused(best):
    for limit in (None, 0, 65):
        b = best.Builder(max_n=4)
        x, y, position = b.input(0, "f32", 16), b.output(0, "f32", 16), b.slot("i64", 1, 1)
        caches = [b.slot("f32", 4, 256), b.slot("f32", 64, 16)]
        code = [("attention", [y, x, x, x, position, *caches], [1, 1, 0, 0, 64, 0], [1.0, 0.0, 0.0, 0.0])]
        if limit is not None:
            code.append(("advance", [position], [limit]))
        b.method([x], [y], code)
        with pytest.raises(PlanError, match="without an advance"):
            b.build(best.library)


@pytest.mark.parametrize("residual", [0, 1])
def test_short_conv_streams_like_the_whole(bench, rng, residual):
    for k in (1, 2, 4, 7):
        for cols in (1, 16, 37):
            x = rng.standard_normal((40, cols)).astype(np.float32)
            w = rng.standard_normal((k, cols)).astype(np.float32)
            padded = np.concatenate([np.zeros((k - 1, cols)), x]).astype(np.float64)
            want = sum(w[j] * padded[j : j + 40] for j in range(k)) + (x if residual else 0)
            outs = []
            for sizes in ([40], [1], [2, 9, 1]):
                b = bench.Builder(max_n=40)
                t_x, t_y = b.input(0, "f32", cols), b.output(0, "f32", cols)
                tail = b.slot("f32", k - 1, cols)
                b.method([t_x], [t_y], [("short_conv", [t_y, t_x, b.weight(w), tail], [residual])])
                plan, at = b.build(bench.library), 0
                slot, out = np.zeros(plan.slot_bytes, np.uint8), np.zeros_like(x)
                for count in cut(40, sizes):
                    plan.run(None, 0, count, slot, [x[at : at + count]], [out[at : at + count]])
                    at += count
                outs.append(out)
            assert np.allclose(outs[0], want, rtol=1e-5, atol=1e-5)
            assert all(np.array_equal(outs[0], o) for o in outs)

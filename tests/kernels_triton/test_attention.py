"""Attention over linear and ring caches of every dtype, of normed and of turned queries and keys too: against float64,
cut anywhere, across the ring's seam."""

from __future__ import annotations

import numpy as np
import pytest
from triton_harness import Session, Shape, agree, bits, draw, run, weight

from tmlc.ir.ops.kv import int8_columns

H, G, D, DV, RANKS = 4, 2, 10, 6, 3
TOLERANCE = {"f32": 1e-5, "bf16": 2e-4, "u8": 8e-3}


def session(
    seed: int, n: int, position: int, dtype: str, capacity: int, sinks_by_row: bool = False, groups: int = G,
    d: int = D, dv: int = DV,
) -> Session:  # fmt: skip
    heads = H // G * groups
    widths = tuple(groups * (int8_columns(width) if dtype == "u8" else width) for width in (d, dv))
    caches = []
    for i, width in enumerate(widths):
        values = draw(seed + 70 + i, capacity, width)
        if dtype == "bf16":
            caches.append((values.view(np.uint32) >> 16).astype(np.uint16))
        elif dtype == "u8":
            codes = np.zeros((capacity, groups, width // groups), np.uint8)
            codes[..., :-4] = np.random.default_rng(seed).integers(1, 256, codes[..., :-4].shape)
            codes[..., -4:] = np.full((capacity, groups, 1), 0.01, np.float32).view(np.uint8)
            caches.append(codes.reshape(capacity, width))
        else:
            caches.append(values)
    inputs = {"q": draw(seed, n, heads * d), "k": draw(seed + 1, n, groups * d), "v": draw(seed + 2, n, groups * dv)}
    inputs["rel"] = draw(seed + 3, n, heads * RANKS)
    if sinks_by_row:
        inputs["sink_logits"] = draw(seed + 4, n, heads)
    states = {"position": np.array([[position]], np.int64), "k_cache": caches[0], "v_cache": caches[1]}
    return Session(inputs, states, n)


def attributes(**changed: float) -> dict:
    return (
        dict(num_heads=H, num_kv_heads=G, scale=0.3, window=0, sinks=0, log_floor=0.0, log_alpha=0.0, softcap=0.0)
        | changed
    )


WEIGHTS = {"rel_table": weight(draw(50, RANKS, 30))}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "u8"])
@pytest.mark.parametrize(("window", "sinks", "capacity"), [(0, 0, 320), (20, 0, 48), (20, 16, 64)])
def test_attention(machine, dtype, window, sinks, capacity):
    """Positions before, at and behind a seam of the ring, and across a split of the linear cache."""
    sessions = [session(1, 9, 0, dtype, capacity), session(20, 1, 249 if not window else 47, dtype, capacity),
                session(40, 13, 250 if not window else 1000, dtype, capacity)]  # fmt: skip
    attrs = attributes(window=window, sinks=sinks, log_floor=7.0, log_alpha=0.1)
    agree(
        machine, "attention_state", sessions, attrs, [Shape("f32", H * DV)], TOLERANCE[dtype], WEIGHTS, cuts=(1, 6, 8),
        compared=["k_cache", "v_cache"], batch=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "d", "dv"),
    [("bf16", 64, 80),
     *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in
       (("bf16", 128, 128), ("bf16", 192, 128), ("bf16", 256, 200), ("u8", 64, 64), ("u8", 128, 256)))],
)  # fmt: skip
def test_wide_heads(machine, dtype, d, dv):
    """What fills the tiles of tensor cores, and on sm_100 tensor memory, in products of queries and of values."""
    sessions = [session(1, 5, 60, dtype, 160, d=d, dv=dv), session(20, 1, 140, dtype, 160, d=d, dv=dv)]
    attrs, out = attributes(scale=d**-0.5), [Shape("f32", H * dv)]
    agree(machine, "attention_state", sessions, attrs, out, TOLERANCE[dtype], WEIGHTS, cuts=(2,),
          compared=["k_cache", "v_cache"])  # fmt: skip


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_sink_logits_and_soft_caps(machine, softcap, by_row):
    sessions = [session(1, 5, 3, "bf16", 64, by_row), session(9, 2, 40, "bf16", 64, by_row)]
    weights = WEIGHTS if by_row else WEIGHTS | {"sink_logits": weight(draw(60, 1, H))}
    agree(
        machine, "attention_state", sessions, attributes(softcap=softcap), [Shape("f32", H * DV)], 2e-4, weights,
        cuts=(2,),
    )  # fmt: skip


def test_splits_as_programs_and_in_a_program_give_the_same_bits(machine, monkeypatch):
    """`agree` compares a batch (one program works through the splits) with sessions alone (a program each)."""
    from tmlc.kernels.triton import attention

    monkeypatch.setattr(attention, "ENOUGH_PROGRAMS", 5)
    sessions = [session(1, 5, 600, "bf16", 640), session(9, 2, 100, "bf16", 640), session(30, 5, 254, "bf16", 640)]
    attrs = attributes(window=0)
    agree(machine, "attention_state", sessions, attrs, [Shape("f32", H * DV)], 2e-4, WEIGHTS, cuts=(2,))


def test_large_scores_overflow_nothing(machine):
    sessions = [session(1, 5, 3, "f32", 64)]
    sessions[0].inputs["q"] *= 300
    agree(machine, "attention_state", sessions, attributes(), [Shape("f32", H * DV)], 1e-4, WEIGHTS, cuts=(2,))


NORMS = {"q_norm": weight(1.0 + 0.3 * draw(51, 1, D)), "k_norm": weight(1.0 + 0.3 * draw(52, 1, D))}
NORMED = {"f32": 1e-5, "bf16": 6e-3, "u8": 8e-3}  # a normed key may be rounded to the bf16 number beside


@pytest.mark.parametrize(
    ("dtype", "window", "sinks", "capacity"), [("f32", 0, 0, 70), ("bf16", 7, 16, 32), ("u8", 7, 0, 16)]
)
def test_attention_of_normed_queries_and_keys(machine, dtype, window, sinks, capacity):
    """Alone, in company and cut; eps counts in the heads of the second session."""
    sessions = [session(1, 5, 0, dtype, capacity), session(20, 1, 47, dtype, capacity),
                session(40, 4, 1000 if window else 62, dtype, capacity)]  # fmt: skip
    for name in ("q", "k"):
        sessions[1].inputs[name] *= np.float32(0.01)
    attrs = attributes(window=window, sinks=sinks, log_floor=7.0, log_alpha=0.1, eps=1e-4)
    agree(
        machine, "norm_attention_state", sessions, attrs, [Shape("f32", H * DV)], NORMED[dtype], WEIGHTS | NORMS,
        cuts=(2,), compared=["k_cache", "v_cache"] if dtype == "f32" else [], batch=4,
    )  # fmt: skip


def with_tables(sessions: list[Session], half: int, interleaved: bool, offset: int) -> dict:
    """Gives each session the cosines and sines of its new positions; how attention turns by them."""
    for one in sessions:
        places = one.states["position"].item() + np.arange(one.count)
        angle = places[:, None].astype(np.float32) * (100.0 ** -(np.arange(half) / half))[None].astype(np.float32)
        one.inputs["table"] = (1.2 * np.concatenate([np.cos(angle), np.sin(angle)], 1)).astype(np.float32)
    return {"offset": offset, "interleaved": interleaved}


@pytest.mark.parametrize(
    ("dtype", "window", "capacity", "half", "interleaved", "offset", "normed"),
    [("f32", 0, 70, 5, False, 0, True), ("f32", 7, 16, 3, True, 2, False), ("bf16", 7, 32, 5, True, 0, False),
     ("u8", 0, 80, 4, False, 1, True)],
)  # fmt: skip
def test_attention_of_turned_queries_and_keys(
    machine, dtype, window, capacity, half, interleaved, offset, normed
):
    """Alone, in company and cut; whole heads and a part of them, by halves and by neighbours."""
    sessions = [session(1, 5, 0, dtype, capacity), session(20, 1, 47, dtype, capacity),
                session(40, 4, 1000 if window else 62, dtype, capacity)]  # fmt: skip
    attrs = attributes(window=window, log_floor=7.0, log_alpha=0.1, eps=1e-4)
    attrs |= with_tables(sessions, half, interleaved, offset)
    agree(
        machine, "rope_attention_state", sessions, attrs, [Shape("f32", H * DV)], NORMED[dtype],
        WEIGHTS | (NORMS if normed else {}), cuts=(2,), compared=["k_cache", "v_cache"] if dtype == "f32" else [],
        batch=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "at_once", "d", "interleaved", "normed", "counts"),
    [("f32", 32, D, False, True, (2, 0, 1)), ("bf16", 256, 64, False, True, (2, 0, 6)),
     ("u8", 32, D, True, False, (6, 0, 1)), ("bf16", 256, 64, False, False, (1, 0, 1))],
)  # fmt: skip
def test_its_bits_are_those_of_the_rotation_and_then_attention(
    machine, monkeypatch, dtype, at_once, d, interleaved, normed, counts
):
    """`rms_norm_pair`, `rope_state` and attention, results and caches, of few and of many positions."""
    from tmlc.kernels.triton import kv_write

    monkeypatch.setattr(kv_write, "PREPARED_AT_ONCE", at_once)
    heads, groups = 6, 3
    attrs = attributes(window=7) | {"num_heads": heads, "num_kv_heads": groups, "eps": 1e-5}
    fused, apart = ([session(seed, n, position, dtype, 16, groups=groups, d=d) for seed, n, position in
                     zip((1, 9, 5), counts, (30, 7, 0), strict=True)] for _ in range(2))  # fmt: skip
    freq = weight((100.0 ** -(np.arange(d // 2) / (d // 2)))[None].astype(np.float32))
    rows = [Session({"x": one.inputs["q"]}, {"position": one.states["position"]}, one.count) for one in apart]
    tables = run(machine, "rope_table_state", rows, {"scaling": 1.2}, [Shape("f32", d)], {"inv_freq": freq}, batch=4)
    for one, (table,) in zip(fused, tables, strict=True):
        one.inputs["table"] = table
    norms = {name: weight(1.0 + 0.3 * draw(seed, 1, d)) for name, seed in (("q_norm", 51), ("k_norm", 52))}
    turn, out = {"offset": 0, "interleaved": interleaved}, [Shape("f32", heads * DV)]
    given = WEIGHTS | (norms if normed else {})
    found = run(machine, "rope_attention_state", fused, attrs | turn, out, given, batch=4, pad=3)
    if normed:
        pairs = [Session({"a": one.inputs["q"], "b": one.inputs["k"]}, count=one.count) for one in apart]
        shapes = [Shape("f32", heads * d), Shape("f32", groups * d)]
        weights = {"a_weight": norms["q_norm"], "b_weight": norms["k_norm"]}
        heads_normed = run(machine, "rms_norm_pair", pairs, {"eps": 1e-5}, shapes, weights)
        for one, (q, k) in zip(apart, heads_normed, strict=True):
            one.inputs |= {"q": q, "k": k}
    for name, count in (("q", heads), ("k", groups)):
        rows = [Session({"x": one.inputs[name]}, {"position": one.states["position"]}, one.count) for one in apart]
        shape, settings = [Shape("f32", count * d)], turn | {"num_heads": count, "scaling": 1.2}
        for one, (x,) in zip(apart, run(machine, "rope_state", rows, settings, shape, {"inv_freq": freq}), strict=True):
            one.inputs[name] = x
    wanted = run(machine, "attention_state", apart, attrs, out, WEIGHTS, batch=4)
    for one, other, (have,), (want,) in zip(fused, apart, found, wanted, strict=True):
        assert np.array_equal(bits(have), bits(want))
        for name in ("k_cache", "v_cache"):
            assert np.array_equal(bits(one.states[name]), bits(other.states[name])), name


@pytest.mark.parametrize(
    ("dtype", "own", "half", "interleaved", "counts"),
    [("f32", 6, 2, True, (5, 1, 4)), ("bf16", 48, 8, False, (2, 1, 1)), ("u8", 5, 2, True, (2, 0, 6))],
)  # fmt: skip
def test_keys_with_a_part_that_all_heads_share(machine, dtype, own, half, interleaved, counts):
    """Against float64 alone, in company and cut; and the bits of the parts turned, joined and then attended to."""
    d, groups, window = own + 2 * half, 3, 7
    attrs = attributes(window=window) | {"num_heads": 6, "num_kv_heads": groups}
    turn, out = {"offset": own, "interleaved": interleaved}, [Shape("f32", 6 * DV)]

    def begun(live: tuple[int, ...] = counts) -> list[Session]:
        made = [session(seed, n, position, dtype, 32, groups=groups, d=d) for seed, n, position in
                zip((1, 9, 5), live, (30, 1000, 0), strict=True)]  # fmt: skip
        for one in made:
            one.inputs |= {"k": draw(one.count + 3, one.count, groups * own), "shared": draw(4, one.count, 2 * half)}
        with_tables(made, half, interleaved, own)
        return made

    weights = {name: stored for name, stored in WEIGHTS.items() if name == "rel_table"}
    given = begun(tuple(max(count, 1) for count in counts))
    agree(machine, "rope_attention_state", given, attrs | turn | {"eps": 0.0}, out, NORMED[dtype], weights, cuts=(1,),
          compared=["k_cache", "v_cache"] if dtype == "f32" else [], batch=4)  # fmt: skip
    fused, apart = begun(), begun()
    found = run(machine, "rope_attention_state", fused, attrs | turn | {"eps": 0.0}, out, weights, batch=4, pad=3)
    for one in apart:  # the table says what is turned by: a pair's cosine and sine are a frequency of its own
        table = one.inputs.pop("table")
        cos, sin = table[:, :half], table[:, half:]

        def turned(x, heads, begin, cos=cos, sin=sin):
            x = x.reshape(len(x), heads, x.shape[1] // heads).copy()
            first, second = (slice(begin, None, 2), slice(begin + 1, None, 2)) if interleaved else (
                slice(begin, begin + half), slice(begin + half, None))  # fmt: skip
            a, b = x[..., first].copy(), x[..., second].copy()
            x[..., first] = a * cos[:, None] - b * sin[:, None]
            x[..., second] = b * cos[:, None] + a * sin[:, None]
            return x.reshape(len(x), heads * x.shape[2])

        common = turned(one.inputs.pop("shared"), 1, 0)
        keys = one.inputs["k"].reshape(one.count, groups, own)
        joined = np.concatenate([keys, np.repeat(common[:, None], groups, 1)], 2).reshape(one.count, groups * d)
        one.inputs |= {"q": turned(one.inputs["q"], 6, own), "k": np.ascontiguousarray(joined)}
    wanted = run(machine, "attention_state", apart, attrs, out, weights, batch=4)
    for one, other, (have,), (want,) in zip(fused, apart, found, wanted, strict=True):
        assert np.array_equal(bits(have), bits(want))
        for name in ("k_cache", "v_cache"):
            assert np.array_equal(bits(one.states[name]), bits(other.states[name])), name


@pytest.mark.parametrize(("dtype", "at_once"), [("f32", 32), ("bf16", 256), ("u8", 32)])
def test_its_bits_are_those_of_the_norms_and_then_attention(machine, monkeypatch, dtype, at_once):
    """Results and caches, where a program norms all heads and where it norms two of three; a session that does not run
    keeps its states."""
    from tmlc.kernels.triton import kv_write

    monkeypatch.setattr(kv_write, "PREPARED_AT_ONCE", at_once)
    heads, groups = 6, 3
    attrs = attributes(window=7) | {"num_heads": heads, "num_kv_heads": groups}
    fused, apart = ([session(seed, n, position, dtype, 16, groups=groups) for seed, n, position in
                     ((1, 2, 30), (9, 0, 7), (5, 1, 0))] for _ in range(2))  # fmt: skip
    before = {name: state.copy() for name, state in fused[1].states.items()}
    out = [Shape("f32", heads * DV)]
    found = run(machine, "norm_attention_state", fused, attrs | {"eps": 1e-5}, out, WEIGHTS | NORMS, batch=4, pad=3)
    pairs = [Session({"a": one.inputs["q"], "b": one.inputs["k"]}, count=one.count) for one in apart]
    shapes = [Shape("f32", heads * D), Shape("f32", groups * D)]
    weights = {"a_weight": NORMS["q_norm"], "b_weight": NORMS["k_norm"]}
    normed = run(machine, "rms_norm_pair", pairs, {"eps": 1e-5}, shapes, weights, batch=4)
    for one, (q, k) in zip(apart, normed, strict=True):
        one.inputs |= {"q": q, "k": k}
    wanted = run(machine, "attention_state", apart, attrs, out, WEIGHTS, batch=4)
    for one, other, (have,), (want,) in zip(fused, apart, found, wanted, strict=True):
        assert np.array_equal(bits(have), bits(want))
        for name in ("k_cache", "v_cache"):
            assert np.array_equal(bits(one.states[name]), bits(other.states[name])), name
    assert all(np.array_equal(bits(state), bits(fused[1].states[name])) for name, state in before.items())


ONE_BY_ONE = [
    ("norm_attention_state", "bf16", 7, False), ("attention_state", "f32", 0, True),
    ("rope_attention_state", "bf16", 7, False),
    *(pytest.param(op, dtype, window, inside, marks=pytest.mark.slow)
      for op in ("attention_state", "norm_attention_state", "rope_attention_state") for dtype in ("f32", "bf16", "u8")
      for window, inside in ((7, True), (0, False))),
]  # fmt: skip


@pytest.mark.parametrize(("op", "dtype", "window", "inside"), ONE_BY_ONE)
def test_positions_that_write_themselves_have_the_bits_of_many(machine, monkeypatch, op, dtype, window, inside):
    """Results and caches, into the sinks and out of them, across the seam of a ring and across a split, with more heads
    than one program has queries; splits are programs or `inside` one. One position writes itself, and so do four. A
    session that does not run keeps its states."""
    from tmlc.kernels.triton import attention

    heads, attrs = 17, attributes(num_heads=17, num_kv_heads=1, window=window, sinks=16 if window else 0)
    monkeypatch.setattr(attention, "ENOUGH_PROGRAMS", 5 if inside else 256)
    weights, out = dict(WEIGHTS), [Shape("f32", heads * DV)]
    if op != "attention_state":
        weights, attrs = weights | NORMS, attrs | {"eps": 1e-5}

    def begun() -> list[Session]:
        made = [session(seed, 6, begin, dtype, 32 if window else 70, groups=1)
                for seed, begin in ((1, 14), (20, 5), (40, 28 if window else 61))]  # fmt: skip
        for one in made:
            one.inputs["q"], one.inputs["rel"] = draw(one.count + 9, 6, heads * D), draw(7, 6, heads * RANKS)
        if op == "rope_attention_state":
            attrs.update(with_tables(made, 5, False, 0))
        made[1].count = 0
        return made

    many, single = begun(), begun()
    found = run(machine, op, many, attrs, out, weights)
    for first, last in ((0, 1), (1, 5), (5, 6)):
        step = [Session({k: x[first:last] for k, x in one.inputs.items()}, one.states, min(one.count, last - first))
                for one in single]  # fmt: skip
        for one, (want,), (have,) in zip(step, found, run(machine, op, step, attrs, out, weights), strict=True):
            assert np.array_equal(bits(have), bits(want[first:last] if one.count else want))
            one.states["position"] += one.count
    kept = begun()[1]
    for one, other in zip(many, single, strict=True):
        for name in ("k_cache", "v_cache"):
            assert np.array_equal(bits(one.states[name]), bits(other.states[name])), name
            assert one.count or np.array_equal(bits(one.states[name]), bits(kept.states[name]))


@pytest.mark.parametrize("op", ["attention_state", "norm_attention_state", "rope_attention_state"])
def test_few_positions_a_session_need_no_launch_that_writes(op):
    from shapes import NANO, calls

    from tmlc.kernels.triton.bucket import Bucket
    from tmlc.kernels.triton.registry import lower

    for bucket in (Bucket(1, 1), Bucket(8, 1), Bucket(1, 4), Bucket(1, 16)):
        for call in calls(NANO, bucket, 90):
            if call.op == op:
                writes = [one.kernel for one in lower(call).launches if "kv_write" in one.kernel]
                assert len(writes) == (bucket.n > 4)

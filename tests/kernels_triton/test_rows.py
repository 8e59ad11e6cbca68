"""Ops on rows: norms, arithmetic, copies of columns, lookups, clips, mixing, rotary positions."""

from __future__ import annotations

import numpy as np
import pytest
from triton_harness import Session, Shape, agree, bits, draw, run, weight

COUNTS = (3, 1, 6)


def rows(names: dict[str, int], scale: float = 1.0) -> list[Session]:
    return [
        Session({name: scale * draw(10 * s + i, count, cols) for i, (name, cols) in enumerate(names.items())},
                count=count)
        for s, count in enumerate(COUNTS)
    ]  # fmt: skip


@pytest.mark.parametrize(("d", "groups"), [(1, 1), (36, 1), (10, 3), (33, 5)])
def test_rms_norm(machine, d, groups):
    sessions, weights = rows({"x": d * groups}), {"weight": weight(draw(7, 1, d))}
    agree(machine, "rms_norm", sessions, {"eps": 1e-6}, [Shape("f32", d * groups)], 1e-6, weights, cuts=(2,))


def test_add_rms_norm(machine):
    sessions, weights = rows({"x": 37, "residual": 37}), {"weight": weight(draw(7, 1, 37))}
    agree(machine, "add_rms_norm", sessions, {"eps": 1e-5}, [Shape("f32", 37)] * 2, 1e-6, weights, cuts=(2,))


@pytest.mark.parametrize(
    ("op", "names", "attrs"),
    [
        ("add", "ab", {}), ("mul", "ab", {}), ("add_scaled", "ab", {"alpha": 0.3}), ("scale", "x", {"alpha": -1.7}),
        ("clamp", "x", {"lo": -0.5, "hi": 1.0}), ("silu", "x", {}), ("gelu", "x", {}), ("sigmoid", "x", {}),
        ("softcap", "x", {"cap": 2.0}), ("softcap", "x", {"cap": 50.0}),
    ],
)  # fmt: skip
def test_elementwise(machine, op, names, attrs):
    agree(machine, op, rows(dict.fromkeys(names, 45), 3.0), attrs, [Shape("f32", 45)], 1e-6, cuts=(2,))


def test_elementwise_of_named_operands(machine):
    agree(machine, "swiglu", rows({"gate": 19, "up": 19}, 4.0), {}, [Shape("f32", 19)], 1e-6, cuts=(1,))
    agree(machine, "modulate", rows({"x": 19, "scale": 19, "shift": 19}), {}, [Shape("f32", 19)], 1e-6, cuts=(1,))
    factor = {"s": weight(np.array([[0.7]], np.float32))}
    agree(machine, "scale_by", rows({"x": 19}), {}, [Shape("f32", 19)], 1e-6, factor, cuts=(1,))
    table = {"rows": weight(draw(1, 5, 19))}
    agree(machine, "add_row", rows({"x": 19}), {"index": 3}, [Shape("f32", 19)], 1e-6, table, cuts=(1,))


def test_values_at_the_ends_of_float32(machine):
    values = np.array([[0.0, -0.0, 1e-30, -90.0, 90.0, 3e38, -3e38, np.inf, -np.inf, np.nan]], np.float32)
    for op, attrs in (("silu", {}), ("sigmoid", {}), ("gelu", {}), ("softcap", {"cap": 3.0}),
                      ("clamp", {"lo": -1.0, "hi": 1.0})):  # fmt: skip
        found = run(machine, op, [Session({"x": values}, count=1)], attrs, [Shape("f32", 10)])[0][0]
        assert np.isnan(found[0, 9]), op
        assert np.isfinite(found[0, :5]).all(), op
    assert found[0, 5:9].tolist() == [1.0, -1.0, 1.0, -1.0]


def test_concat_columns(machine):
    agree(machine, "concat_columns", rows({"a": 13, "b": 6}), {}, [Shape("f32", 19)], 0, cuts=(1,))


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_heads_joined_and_cut(machine, shared):
    a, b = 5 if shared == 1 else 15, 4 if shared == 2 else 12
    attrs = {"num_heads": 3, "shared": shared}
    agree(machine, "concat_heads", rows({"a": a, "b": b}), attrs, [Shape("f32", 27)], 0, cuts=(1,))
    attrs = {"num_heads": 3, "start": 2, "stop": 4}
    agree(machine, "head_columns", rows({"x": 15}), attrs, [Shape("f32", 6)], 0, cuts=(1,))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_embeddings(machine, dtype):
    rng = np.random.default_rng(0)
    table = weight(draw(3, 40, 21), dtype)
    sessions = [Session({"ids": rng.integers(0, 40, (c, 1))}, count=c) for c in COUNTS]
    agree(machine, "embedding", sessions, {}, [Shape("f32", 21)], 0, {"table": table}, cuts=(1,))
    sessions = [Session({"levels": rng.integers(0, 8, (c, 5))}, count=c) for c in COUNTS]
    agree(machine, "bag_embedding", sessions, {"per_bin": 8}, [Shape("f32", 21)], 1e-6, {"table": table}, cuts=(1,))


def test_an_id_outside_the_table_reads_nothing_and_is_seen(machine):
    sessions = [Session({"ids": np.array([[3], [40], [-1]])}, count=3)]
    found = run(machine, "embedding", sessions, {}, [Shape("f32", 21)], {"table": weight(draw(3, 40, 21))})[0][0]
    assert np.isfinite(found[0]).all() and np.isnan(found[1:]).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_l2_clip(machine, scaled):
    weights = {"scale": weight(draw(5, 1, 21))} if scaled else {}
    attrs = {"num_heads": 3, "threshold": 2.0}
    agree(machine, "l2_clip", rows({"x": 21}), attrs, [Shape("f32", 21)], 1e-6, weights, cuts=(1,))


def test_mix_blocks(machine):
    weights = {"queries": weight(draw(5, 2, 13))}
    agree(machine, "mix_blocks", rows({"x": 65}), {"eps": 1e-6}, [Shape("f32", 26)], 2e-6, weights, cuts=(1,))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 3])
def test_rope(machine, interleaved, offset):
    sessions = rows({"x": 3 * 15})
    for session, position in zip(sessions, (0, 1000003, 77), strict=True):
        session.states["position"] = np.array([[position]], np.int64)
    weights = {"inv_freq": weight((10000.0 ** -(np.arange(5) / 5))[None].astype(np.float32))}
    attrs = {"num_heads": 3, "offset": offset, "interleaved": interleaved, "scaling": 1.2}
    agree(machine, "rope_state", sessions, attrs, [Shape("f32", 45)], 1e-6, weights, cuts=(1, 2))


def test_the_table_of_a_rotation_turns_as_the_rotation_does(machine):
    """Against float64, and bit for bit: heads of 1 and 0 that `rope_state` turns are cosines and sines."""
    sessions = rows({"x": 10})
    for session, position in zip(sessions, (0, 1000003, 77), strict=True):
        session.states["position"] = np.array([[position]], np.int64)
    weights = {"inv_freq": weight((10000.0 ** -(np.arange(5) / 5))[None].astype(np.float32))}
    out = [Shape("f32", 10)]
    agree(machine, "rope_table_state", sessions, {"scaling": 1.2}, out, 1e-6, weights, cuts=(1, 2))
    for session in sessions:
        session.inputs["x"][:] = [1.0] * 5 + [0.0] * 5
    attrs = {"num_heads": 1, "offset": 0, "interleaved": False, "scaling": 1.2}
    tables = run(machine, "rope_table_state", sessions, {"scaling": 1.2}, out, weights)
    heads = run(machine, "rope_state", sessions, attrs, out, weights)
    for (table,), (turned,) in zip(tables, heads, strict=True):
        assert np.array_equal(bits(table), bits(turned))


def test_advance_moves_live_sessions_only(machine):
    sessions = [Session({"x": draw(0, c, 4)}, {"position": np.array([[p]], np.int64)}, c) for c, p in ((3, 7), (0, 5))]
    run(machine, "advance", sessions, {"limit": 0}, [], n=4)
    assert [session.states["position"].item() for session in sessions] == [10, 5]

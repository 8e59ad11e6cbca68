"""Rotary positions, columns of heads, joined heads: equal to float64, and the same bits in any cut."""

import numpy as np
import pytest

from tmlc.errors import KernelError, PlanError


def rope_plan(bench, cols, freq, ints, scaling=1.0, max_n=16, threads=1, in_place=False):
    """y = rope(x), then the position advances."""
    b = bench.Builder(max_n=max_n)
    x, y, position = b.input(0, "f32", cols), b.output(0, "f32", cols), b.slot("i64", 1, 1)
    w = b.weight(freq.astype(np.float32).reshape(1, -1))
    if in_place:
        mid = b.arena("f32", (1, 0), cols)
        code = [("copy", [mid, x]), ("rope", [mid, mid, position, w], ints, [scaling]), ("copy", [y, mid])]
    else:
        code = [("rope", [y, x, position, w], ints, [scaling])]
    b.method([x], [y], [*code, ("advance", [position], [0])])
    return b.build(bench.library, threads)


def rope(bench, x, freq, ints, scaling=1.0, cuts=None, start=0, threads=1, in_place=False):
    cuts = cuts or [len(x)]
    plan = rope_plan(bench, x.shape[1], freq, ints, scaling, max(cuts), threads, in_place)
    slot, out, at = np.zeros(plan.slot_bytes, np.uint8), np.full_like(x, -77), 0
    slot[:8].view(np.int64)[0] = start
    for count in cuts:
        plan.run(bench.pool(threads), 0, count, slot, [x[at : at + count]], [out[at : at + count]])
        at += count
    return out


def rope_reference(x, freq, heads, offset, interleaved, scaling=1.0, start=0):
    """float64, of angles that are float32 products (as transformers computes them)."""
    n, half = len(x), len(freq)
    position = (start + np.arange(n)).astype(np.float32)
    angle = (position[:, None] * freq.astype(np.float32)).astype(np.float64)[:, None]
    out = x.astype(np.float64).reshape(n, heads, -1).copy()
    part = out[..., offset : offset + 2 * half]
    first = part[..., 0::2] if interleaved else part[..., :half]
    second = part[..., 1::2] if interleaved else part[..., half:]
    cos, sin = np.cos(angle) * scaling, np.sin(angle) * scaling
    first[:], second[:] = first * cos - second * sin, second * cos + first * sin
    return out.reshape(n, -1)


def frequencies(half, base=10000.0):
    return base ** (-np.arange(half) / half)


# heads, columns of a head, half of the rotated columns, offset, interleaved, scaling
ROPES = [
    (4, 64, 32, 0, 0, 1.0),
    (3, 80, 40, 0, 0, 1.0),
    (3, 80, 10, 0, 0, 1.3),
    (2, 96, 16, 64, 1, 1.0),
    (1, 64, 32, 0, 1, 0.7),
    (5, 7, 3, 1, 0, 1.0),
    (5, 7, 3, 0, 1, 1.0),
    (2, 2, 1, 0, 0, 1.0),
    (1, 40, 17, 2, 1, 1.0),
]


@pytest.mark.parametrize("case", ROPES)
@pytest.mark.parametrize("start", [0, 1000, 131072])
def test_rope_equals_float64(bench, rng, case, start):
    heads, width, half, offset, interleaved, scaling = case
    x = rng.standard_normal((21, heads * width)).astype(np.float32)
    freq = frequencies(half)
    got = rope(bench, x, freq, [heads, offset, interleaved], scaling, start=start)
    want = rope_reference(x, freq, heads, offset, interleaved, scaling, start)
    assert np.abs(got - want).max() < 2e-6


@pytest.mark.parametrize("case", ROPES)
def test_rope_bits_do_not_depend_on_cuts_threads_or_place(bench, rng, case):
    heads, width, half, offset, interleaved, scaling = case
    x = rng.standard_normal((29, heads * width)).astype(np.float32)
    ints, freq = [heads, offset, interleaved], frequencies(half)
    whole = rope(bench, x, freq, ints, scaling)
    for cuts in ([1] * 29, [3, 1, 16, 9], [28, 1]):
        assert np.array_equal(whole, rope(bench, x, freq, ints, scaling, cuts)), cuts
    assert np.array_equal(whole, rope(bench, x, freq, ints, scaling, threads=3))
    assert np.array_equal(whole, rope(bench, x, freq, ints, scaling, in_place=True))
    assert np.array_equal(whole[5:], rope(bench, x[5:], freq, ints, scaling, start=5))


def test_columns_outside_the_rotation_pass_as_they_are(bench, rng):
    x = rng.standard_normal((5, 2 * 24)).astype(np.float32)
    x[0, 0] = np.nan
    got = rope(bench, x, frequencies(4), [2, 8, 0]).reshape(5, 2, 24)
    assert np.array_equal(got[..., :8], x.reshape(5, 2, 24)[..., :8], equal_nan=True)
    assert np.array_equal(got[..., 16:], x.reshape(5, 2, 24)[..., 16:])


def test_rope_at_a_very_late_position_stays_finite(best, rng):
    x = rng.standard_normal((3, 16)).astype(np.float32)
    assert np.isfinite(rope(best, x, frequencies(8), [1, 0, 0], start=2**61)).all()


def test_rope_refuses_an_impossible_position(best):
    plan = rope_plan(best, 16, frequencies(8), [1, 0, 0])
    slot, x = np.zeros(plan.slot_bytes, np.uint8), np.zeros((1, 16), np.float32)
    slot[:8].view(np.int64)[0] = -1
    with pytest.raises(KernelError, match="impossible position"):
        plan.run(None, 0, 1, slot, [x], [x.copy()])


@pytest.mark.parametrize(
    ("cols", "half", "ints", "scaling", "why"),
    [
        (48, 8, [5, 0, 0], 1.0, "no heads"),
        (48, 8, [0, 0, 0], 1.0, "no heads"),
        (48, 8, [-3, 0, 0], 1.0, "no heads"),
        (48, 9, [3, 0, 0], 1.0, "inv_freq"),
        (48, 8, [3, 1, 0], 1.0, "outside the head"),
        (48, 8, [3, -1, 0], 1.0, "outside the head"),
        (48, 8, [3, 2**62, 0], 1.0, "outside the head"),
        (48, 8, [3, 0, 2], 1.0, "interleaved"),
        (48, 8, [3, 0, 0], float("nan"), "finite"),
    ],
)
def test_a_rotation_that_cannot_be_safe_is_refused(best, cols, half, ints, scaling, why):
    with pytest.raises(PlanError, match=why):
        rope_plan(best, cols, frequencies(half), ints, scaling)


COLUMNS = [(3, 10, 0, 4), (3, 10, 4, 10), (1, 33, 7, 8), (8, 17, 0, 17)]


@pytest.mark.parametrize(("heads", "width", "start", "stop"), COLUMNS)
def test_head_columns(bench, rng, heads, width, start, stop):
    x = rng.standard_normal((9, heads * width)).astype(np.float32)
    want = x.reshape(9, heads, width)[..., start:stop].reshape(9, -1)
    args = ("head_columns", [x], [], [heads, start, stop], [], [("f32", want.shape[1])])
    for how in (dict(), dict(strided=True), dict(threads=2), dict(split=[4, 5])):
        assert np.array_equal(bench.op(*args, **how)[0], want), how


@pytest.mark.parametrize("ints", [[4, 0, 2], [3, 2, 2], [3, -1, 1], [3, 0, 11], [3, 9, 12], [0, 0, 2], [3, 0, 3]])
def test_head_columns_refuses_what_is_not_there(best, ints):
    with pytest.raises(PlanError, match=r"heads|head_columns"):
        best.op("head_columns", [np.zeros((2, 30), np.float32)], [], ints, [], [("f32", 6)])


@pytest.mark.parametrize(("heads", "a", "b"), [(3, 10, 4), (1, 5, 6), (8, 16, 1)])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_concat_heads(bench, rng, heads, a, b, shared):
    left = rng.standard_normal((7, 1 if shared == 1 else heads, a)).astype(np.float32)
    right = rng.standard_normal((7, 1 if shared == 2 else heads, b)).astype(np.float32)
    both = [np.broadcast_to(left, (7, heads, a)), np.broadcast_to(right, (7, heads, b))]
    want = np.concatenate(both, -1).reshape(7, -1)
    operands = [left.reshape(7, -1), right.reshape(7, -1)]
    args = ("concat_heads", operands, [], [heads, shared], [], [("f32", want.shape[1])])
    for how in (dict(), dict(strided=True), dict(threads=2), dict(split=[1, 6])):
        assert np.array_equal(bench.op(*args, **how)[0], want), how


@pytest.mark.parametrize("ints", [[3, 3], [3, -1], [2, 0], [3, 0], [3, 1], [0, 0], [3, 2]])
@pytest.mark.parametrize("cols", [14, 16])
def test_concat_heads_refuses_what_does_not_fit(best, ints, cols):
    x, y = np.zeros((2, 9), np.float32), np.zeros((2, 6), np.float32)
    with pytest.raises(PlanError, match=r"shared|heads"):
        best.op("concat_heads", [x, y], [], ints, [], [("f32", cols)])

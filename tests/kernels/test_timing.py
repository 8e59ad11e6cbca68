"""What timing a plan tells: of every call its time, and what it touched that only a run can tell."""

import numpy as np

from tmlc.kernels.cpu import Pool


def moe_plan(best, rng, experts=6):
    """A plan of one `moe` of so many experts, 16 wide on 32 columns, two a row."""
    b = best.Builder(max_n=8)
    gate_up = best.pack(rng.standard_normal((experts * 32, 32)).astype(np.float32), "f32")
    down = best.pack(rng.standard_normal((experts * 32, 16)).astype(np.float32), "f32")
    y, x = b.output(0, "f32", 32), b.input(0, "f32", 32)
    weights, chosen = b.input(1, "f32", 2), b.input(2, "i32", 2)
    operands = [y, x, weights, chosen, b.weight(gate_up), b.weight(down)]
    b.method([x, weights, chosen], [y], [("moe", operands, [experts, 16])])
    return b.build(best.library, 2)


def test_each_run_counts_the_different_experts_that_its_rows_went_to(best, rng):
    plan = moe_plan(best, rng)
    plan.profile(True)
    for chosen in ([[0, 1], [1, 2], [2, 0]], [[5, 4]], [[3, 3], [3, 3]]):
        n = len(chosen)
        x, out = np.ones((n, 32), np.float32), np.zeros((n, 32), np.float32)
        plan.run(None, 0, n, np.zeros(0, np.uint8), [x, np.ones((n, 2), np.float32), np.array(chosen, np.int32)], [out])
    timed = plan.timed(0)
    assert (timed.runs, timed.rows) == (3, 6) and timed.ns[0] > 0
    assert timed.experts.tolist() == [3 + 2 + 1] and timed.keys.tolist() == timed.row_keys.tolist() == [0]
    plan.profile(True)  # from zero
    assert plan.timed(0).experts.tolist() == [0] and plan.timed(0).runs == 0


def attention_plan(best, window, sinks, capacity):
    """A plan of one `attention` with one head of 16 over a cache, and the position that moves on behind it."""
    b = best.Builder(max_n=8)
    position = b.slot("i64", 1, 1)
    keys, values = b.slot("f32", capacity // 16, 256), b.slot("f32", capacity, 16)
    y, q, k, v = b.output(0, "f32", 16), b.input(0, "f32", 16), b.input(1, "f32", 16), b.input(2, "f32", 16)
    numbers = [1, 1, window, sinks, capacity, 0]
    call = ("attention", [y, q, k, v, position, keys, values], numbers, [0.25, 0.0, 0.0, 0.0])
    b.method([q, k, v], [y], [call, ("advance", [position], [capacity if not window else 0])])
    return b.build(best.library)


def seen(window, sinks, position):
    """The positions that a row at `position` sees, by the words of docs/plan-format.md."""
    return {j for j in range(position + 1) if window == 0 or j > position - window or j < sinks}


def test_attention_counts_the_positions_that_its_rows_saw(best):
    for window, sinks, capacity in ((0, 0, 64), (8, 0, 32), (8, 16, 48)):
        plan = attention_plan(best, window, sinks, capacity)
        slot, position, keys, row_keys = np.zeros(plan.slot_bytes, np.uint8), 0, 0, 0
        plan.profile(True)
        for n in (5, 1, 8, 8, 1, 3, 8, 8, 1):
            rows = [np.ones((n, 16), np.float32) for _ in range(3)]
            plan.run(None, 0, n, slot, rows, [np.zeros((n, 16), np.float32)])
            sets = [seen(window, sinks, p) for p in range(position, position + n)]
            keys, row_keys, position = keys + len(set.union(*sets)), row_keys + sum(map(len, sets)), position + n
        timed = plan.timed(0)
        assert (int(timed.keys[0]), int(timed.row_keys[0])) == (keys, row_keys), (window, sinks)
        assert not timed.experts.any() and not timed.keys[1]


def test_outputs_are_the_same_with_timers_and_without(best, rng):
    plan, pool = moe_plan(best, rng), Pool(best.library, 2)
    x = rng.standard_normal((4, 32)).astype(np.float32)
    inputs = [x, rng.random((4, 2), np.float32), rng.integers(0, 6, (4, 2)).astype(np.int32)]
    outs = []
    for on in (False, True):
        plan.profile(on)
        outs.append(np.zeros((4, 32), np.float32))
        plan.run(pool, 0, 4, np.zeros(0, np.uint8), inputs, [outs[-1]])
    assert np.array_equal(*outs)

"""Several sessions in one call: each gets the bits it would get alone, and none pays for another's fault."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from tmlc.errors import ContextFullError, KernelError, UsageError

SEEDS = runpy.run_path(str(Path(__file__).with_name("test_sanitized.py")))["SEEDS"]  # plans with every operation
SESSIONS = 5


def filled(b, tensor, n, rng):
    """An argument of a call with n positions: small numbers, which every operation accepts."""
    _, dtype, _, rows_a, rows_b, cols, _ = b.tensors[tensor]
    shape = (rows_a * n + rows_b, cols)
    if dtype == 0:
        return rng.random(shape, np.float32)  # not negative: one is a temperature
    return rng.integers(0, 3, shape).astype([None, np.uint16, np.int32, np.int64, np.uint8][dtype])


def new_slot(plan):
    raw = np.zeros(plan.slot_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + plan.slot_bytes]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_gets_the_same_bits_in_any_company(bench, rng, seed, threads):
    b = bench.Builder(max_n=11)
    SEEDS[seed](b, rng)
    plan = b.build(bench.library, threads)
    alone = [new_slot(plan) for _ in range(SESSIONS)]
    together = [new_slot(plan) for _ in range(SESSIONS)]
    for _ in range(4):
        for method, (inputs, outputs, _) in enumerate(b.methods):
            assert plan.unbatched(method) is None
            company = rng.permutation(SESSIONS)[: rng.integers(1, SESSIONS + 1)]
            counts = [int(rng.integers(1, 11 // len(company) + 1)) for _ in company]
            given = [[filled(b, t, n, rng) for t in inputs] for n in counts]
            want = [[filled(b, t, n, rng) for t in outputs] for n in counts]
            for s, n, x, y in zip(company, counts, given, want, strict=True):
                plan.run(None, method, n, alone[s], x, y)
            got = [filled(b, t, sum(counts), rng) for t in outputs]
            joined = [np.concatenate(x) for x in zip(*given, strict=True)]
            parts = [(n, together[s]) for s, n in zip(company, counts, strict=True)]
            plan.run_batch(bench.pool(threads), method, parts, joined, got)
            for mine, theirs in zip(got, zip(*want, strict=True), strict=True):
                assert mine.tobytes() == b"".join(y.tobytes() for y in theirs)
            for one, other in zip(alone, together, strict=True):
                assert one.tobytes() == other.tobytes()


def counter(bench, limit=20):
    """One method that moves a position and copies its rows."""
    b = bench.Builder(max_n=8)
    position, x, y = b.slot("i64", 1, 1), b.input(0, "f32", 4), b.output(0, "f32", 4)
    b.method([x], [y], [("copy", [y, x]), ("advance", [position], [limit])])
    return b.build(bench.library)


def run(plan, parts):
    n = min(sum(n for n, _ in parts), 64)
    x, y = np.ones((max(n, 0), 4), np.float32), np.zeros((max(n, 0), 4), np.float32)
    plan.run_batch(None, 0, parts, [x], [y])
    return y


def positions(*slots):
    return [int(slot[:8].view(np.int64)[0]) for slot in slots]


def test_one_full_context_refuses_the_call_by_name_and_changes_nobody(best):
    plan = counter(best)
    first, full, last = (new_slot(plan) for _ in range(3))
    for n in (8, 8, 3):
        run(plan, [(n, full)])
    with pytest.raises(ContextFullError, match=r"19 of 20.*session 1 of 3") as refused:
        run(plan, [(2, first), (2, full), (2, last)])
    assert refused.value.part == 1
    assert positions(first, full, last) == [0, 19, 0]
    assert (run(plan, [(2, first), (1, full), (2, last)]) == 1).all()
    assert positions(first, full, last) == [2, 20, 2]


@pytest.mark.parametrize("limit", [0, 20])
def test_one_damaged_slot_refuses_the_call_by_name_and_changes_nobody(best, limit):
    plan = counter(best, limit)
    good, bad = new_slot(plan), new_slot(plan)
    for impossible in (-1, 2**62, 2**62 - 1, -(2**63), 2**63 - 1):
        bad[:8].view(np.int64)[0] = impossible
        with pytest.raises(KernelError, match="impossible position") as refused:
            run(plan, [(1, good), (1, bad)])
        assert refused.value.part == 1
        assert positions(good, bad) == [0, impossible]


def test_an_index_out_of_range_is_nobodys_own_fault(best):
    b = best.Builder(max_n=4)
    ids, y = b.input(0, "i32", 1), b.output(0, "f32", 4)
    b.slot("i64", 1, 1)
    b.method([ids], [y], [("embedding", [y, ids, b.weight(np.ones((3, 4), np.float32))])])
    plan = b.build(best.library)
    with pytest.raises(KernelError, match="embedding") as broken:
        parts = [(1, new_slot(plan)), (1, new_slot(plan))]
        plan.run_batch(None, 0, parts, [np.array([[2], [3]], np.int32)], [np.zeros((2, 4), np.float32)])
    assert broken.value.part is None


def test_wrong_parts_are_refused_before_anything_runs(best):
    plan = counter(best)
    a, b = new_slot(plan), new_slot(plan)
    wide = np.zeros(3 * plan.slot_bytes, np.uint8)
    near = [wide[: plan.slot_bytes], wide[8 : 8 + plan.slot_bytes]]
    for parts, why in (
        ([(1, a), (1, b), (1, a)], "share a slot"),
        ([(1, near[0]), (1, near[1])], "share a slot"),
        ([], "0 sessions"),
        ([(1, new_slot(plan)) for _ in range(9)], "9 sessions"),
        ([(4, a), (5, b)], r"5 positions after 4 others.*session 1"),
        ([(1, a), (0, b)], "0 positions"),
        ([(1, a), (-1, b)], "-1 positions"),
        ([(2**62, a), (2**62, b)], "positions"),
        ([(1, a), (1, b[1:])], "slot has"),
        ([(1, a), (1, wide[1 : 1 + plan.slot_bytes])], "aligned"),
    ):
        with pytest.raises(UsageError, match=why) as caught:
            run(plan, parts)
        assert "Plan.run_batch" in caught.value.fix
        assert positions(a, b) == [0, 0]
    with pytest.raises(UsageError, match="input is too small"):
        plan.run_batch(None, 0, [(1, a), (1, b)], [np.ones((1, 4), np.float32)], [np.ones((2, 4), np.float32)])
    assert (run(plan, [(4, a), (4, b)]) == 1).all()


@pytest.mark.parametrize(
    ("space", "rows"), [("arena", (1, 1)), ("arena", (0, 2)), ("output", (0, 1)), ("input", (2, 1))]
)
def test_a_method_whose_rows_cannot_be_cut_takes_one_session(best, space, rows):
    b = best.Builder(max_n=4)
    x, y = b.input(0, "f32", 4), b.output(0, "f32", 4)
    slot = b.slot("f32", 1, 4)
    odd = b.arena("f32", rows, 4) if space == "arena" else b.tensor(space, "f32", rows, 4, 1)
    inputs, outputs = [x] + [odd] * (space == "input"), [y] + [odd] * (space == "output")
    code = [("copy", [y, x]), *([("scale", [odd, odd], [], [2.0])] if space == "arena" else [])]
    if space == "output":
        code.append(("copy", [odd, slot]))
    b.method(inputs, outputs, code)
    plan = b.build(best.library)
    assert "no position" in plan.unbatched(0)
    n_rows = rows[0] + rows[1]
    ins = [np.ones((1, 4), np.float32)] + [np.ones((n_rows, 4), np.float32)] * (space == "input")
    outs = [np.zeros((1, 4), np.float32)] + [np.zeros((n_rows, 4), np.float32)] * (space == "output")
    plan.run(None, 0, 1, new_slot(plan), ins, outs)
    assert (outs[0] == 1).all()
    ins, outs = [np.ones((9, 4), np.float32) for _ in ins], [np.zeros((9, 4), np.float32) for _ in outs]
    with pytest.raises(UsageError, match="one session at a time"):
        plan.run_batch(None, 0, [(1, new_slot(plan)), (1, new_slot(plan))], ins, outs)
    assert (outs[0] == 0).all()


def test_an_argument_without_positions_is_one_for_all_sessions(best, rng):
    b = best.Builder(max_n=4)
    x, table, y = b.input(0, "f32", 4), b.input(1, "f32", 4, (0, 3)), b.output(0, "f32", 4)
    b.method([x, table], [y], [("add_row", [y, x, table], [1])])
    plan = b.build(best.library)
    values, rows, out = rng.random((3, 4), np.float32), rng.random((3, 4), np.float32), np.zeros((3, 4), np.float32)
    empty = np.zeros(0, np.uint8)
    plan.run_batch(None, 0, [(1, empty), (2, empty)], [values, rows], [out])
    assert np.array_equal(out, values + rows[1])


def test_times_count_a_call_once(best):
    plan = counter(best)
    plan.profile(True)
    for _ in range(3):
        run(plan, [(1, new_slot(plan)), (2, new_slot(plan))])
    timed = plan.timed(0)
    assert (timed.runs, timed.rows) == (3, 9) and (timed.ns > 0).all()

"""The executor refuses what is not its own memory, says why, and runs the rest as often as asked."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from tmlc.errors import ContextFullError, KernelError, PlanError, TargetError, UsageError
from tmlc.kernels.cpu import Plan, Pool, available_isas, load_library

NO_SLOT = np.zeros(0, np.uint8)


def adder(bench):
    """One method: y = x + x over four columns, through the arena."""
    b = bench.Builder(max_n=4)
    x, mid, y = b.input(0, "f32", 4), b.arena("f32", (1, 0), 4), b.output(0, "f32", 4)
    b.method([x], [y], [("add", [mid, x, x]), ("copy", [y, mid])])
    return b


def test_a_plan_runs_for_every_n(best):
    plan = adder(best).build(best.library)
    for n in range(1, 5):
        x, y = np.random.rand(n, 4).astype(np.float32), np.zeros((n, 4), np.float32)
        plan.run(None, 0, n, NO_SLOT, [x], [y])
        assert np.array_equal(y, x + x)


def test_sizes_are_reported(best):
    b = adder(best)
    b.slot("f32", 3, 16)
    plan = b.build(best.library)
    assert (plan.arena_bytes, plan.slot_bytes, plan.scratch_bytes) == (64, 192, 0)


# Word numbers: 0 magic, 1 version, 2 arena, 3 slot, 4 tensors, 5 methods; tensors of 7 words from 6; method from 27:
# max_n, inputs, outputs, code, input ids, output ids; then add at 33: opcode, n_t, n_i, n_f, t...
@pytest.mark.parametrize(
    ("at", "value", "why"),
    [
        (0, 1, "magic"),
        (1, 1, "another version"),
        (2, -1, "absurd arena"),
        (2, 2**62, "absurd arena"),
        (2, 63, "outside the arena"),
        (3, -8, "absurd slot"),
        (4, 2**40, "tensor table"),
        (4, -1, "tensor table"),
        (5, 2**40, "absurd number of methods"),
        (5, 2, "cut short"),
        (5, 0, "left over"),
        (6, 5, "unknown space"),
        (7, -1, "unknown dtype"),
        (8, 1, "another argument"),
        (13 + 2, 2, "not aligned"),
        (13 + 2, 64, "outside the arena"),
        (13 + 2, 2**63 - 4, "outside the arena"),
        (13 + 3, 2**24, "outside the arena"),
        (13 + 3, 2**24 + 1, "absurd number of rows"),
        (13 + 5, 0, "absurd number of columns"),
        (13 + 6, 3, "stride below"),
        (13 + 6, 2**31, "outside the arena"),
        (13, 1, "rows depend on n"),
        (27, 0, "absurd max_n"),
        (27, 2**30, "absurd max_n"),
        (28, -1, "inputs or outputs"),
        (30, 2**30, "operations"),
        (31, 99, "not in the tensor table"),
        (31, 1, "another argument"),
        (33, 10**6, "unknown opcode"),
        (34, -1, "operands"),
        (37, 3, "not in the tensor table"),
        (37, 0, "in the weights or in an input"),
    ],
)
def test_a_broken_plan_is_refused_with_the_reason(best, at, value, why):
    b = adder(best)
    words = b.words(best.library)
    words[at] = value
    with pytest.raises(PlanError, match=why):
        Plan(best.library, words, b.weight_array(), 1)


def test_every_cut_of_a_plan_is_refused(best):
    b = adder(best)
    words = b.words(best.library)
    for n in range(len(words)):
        with pytest.raises(PlanError):
            Plan(best.library, words[:n].copy(), b.weight_array(), 1)


def test_weights_are_never_written(best):
    b = best.Builder(max_n=1)
    w = b.weight(np.ones((1, 4), np.float32))
    x = b.input(0, "f32", 4, (0, 1))
    b.method([x], [], [("copy", [w, x])])
    with pytest.raises(PlanError, match="in the weights"):
        b.build(best.library)


def test_operands_that_overlap_are_refused_but_interleaved_columns_are_not(best):
    def plan(shift, stride):
        b = best.Builder(max_n=4)
        b.arena("f32", (1, 1), 8)
        left = b.tensor("arena", "f32", (1, 0), 4, 0, stride)
        right = b.tensor("arena", "f32", (1, 0), 4, shift, stride)
        b.method([], [], [("add", [left, right, right])])
        return b.build(best.library)

    plan(16, 8)
    plan(64, 4)
    for shift, stride in ((12, 8), (4, 4), (20, 8)):
        with pytest.raises(PlanError, match="overlap"):
            plan(shift, stride)


def test_only_elementwise_operations_run_in_place(best):
    b = best.Builder(max_n=2)
    x = b.arena("f32", (1, 0), 16)
    b.method([], [], [("linear", [x, x, b.weight(np.zeros((1, 256), np.float32))])])
    with pytest.raises(PlanError, match="overlap"):
        b.build(best.library)


@pytest.mark.parametrize(
    ("n", "x_rows", "y_rows", "why"),
    [(0, 1, 1, "positions"), (5, 5, 5, "positions"), (3, 2, 3, "input is too small"), (3, 3, 2, "output is too small")],
)
def test_a_wrong_call_changes_nothing(best, n, x_rows, y_rows, why):
    plan = adder(best).build(best.library)
    y = np.full((y_rows, 4), 7, np.float32)
    with pytest.raises(UsageError, match=why):
        plan.run(None, 0, n, NO_SLOT, [np.ones((x_rows, 4), np.float32)], [y])
    assert (y == 7).all()


def test_wrong_methods_arguments_and_slots_are_refused(best):
    b = adder(best)
    b.slot("f32", 1, 16)
    plan = b.build(best.library)
    x, slot = np.ones((1, 4), np.float32), np.zeros(64, np.uint8)
    for call in (
        lambda: plan.run(None, 1, 1, slot, [x], [x.copy()]),
        lambda: plan.run(None, -1, 1, slot, [x], [x.copy()]),
        lambda: plan.run(None, 0, 1, slot[:63], [x], [x.copy()]),
        lambda: plan.run(None, 0, 1, slot, [], [x.copy()]),
        lambda: plan.run(None, 0, 1, slot, [x, x], [x.copy()]),
        lambda: plan.run(None, 0, 1, slot, [np.ones((4, 2), np.float32)[:, :1]], [x.copy()]),
        lambda: plan.run(Pool(best.library, 2), 0, 1, slot, [x], [x.copy()]),
        lambda: plan.run(None, 0, 1, slot.view(np.float32), [x], [x.copy()]),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.fix
    readonly = x.copy()
    readonly.flags.writeable = False
    with pytest.raises(UsageError) as caught:
        plan.run(None, 0, 1, slot, [x], [readonly])
    assert caught.value.fix == "give one as np.empty makes it"


def test_advance_counts_and_stops_at_its_limit(best):
    b = best.Builder(max_n=8)
    position = b.slot("i64", 1, 1)
    b.method([], [], [("advance", [position], [20])])
    plan = b.build(best.library)
    slot = np.zeros(plan.slot_bytes, np.uint8)
    for n in (8, 8, 4):
        plan.run(None, 0, n, slot, [], [])
    with pytest.raises(ContextFullError, match="20 of 20"):
        plan.run(None, 0, 1, slot, [], [])
    assert slot[:8].view(np.int64)[0] == 20
    for impossible in (-1, 2**62, -(2**63)):
        slot[:8].view(np.int64)[0] = impossible
        with pytest.raises(KernelError, match="impossible position"):
            plan.run(None, 0, 1, slot, [], [])


def test_times_add_up_per_operation(best):
    plan = adder(best).build(best.library)
    x = np.ones((4, 4), np.float32)
    plan.profile(True)
    for _ in range(5):
        plan.run(None, 0, 4, NO_SLOT, [x], [x.copy()])
    timed = plan.timed(0)
    assert timed.ns.shape == (2,) and (timed.ns > 0).all() and (timed.runs, timed.rows) == (5, 20)
    assert not timed.experts.any() and not timed.keys.any()
    plan.profile(False)
    plan.run(None, 0, 4, NO_SLOT, [x], [x.copy()])
    assert (plan.timed(0).ns == 0).all() and plan.timed(0).runs == 0
    with pytest.raises(UsageError, match="no method 1") as caught:
        plan.timed(1)
    assert "from 0" in caught.value.fix


def test_two_plans_may_share_a_pool_from_two_threads(best, rng):
    w = best.pack(rng.standard_normal((512, 256)).astype(np.float32), "f32")
    x = rng.standard_normal((8, 256)).astype(np.float32)
    (want,) = best.op("linear", [x], [w], out=[("f32", 512)])
    pool, wrong = Pool(best.library, 2), []

    def work():
        b = best.Builder(max_n=8)
        t_x, t_y = b.input(0, "f32", 256), b.output(0, "f32", 512)
        b.method([t_x], [t_y], [("linear", [t_y, t_x, b.weight(w)])])
        plan, y = b.build(best.library, 2), np.zeros((8, 512), np.float32)
        for _ in range(50):
            plan.run(pool, 0, 8, NO_SLOT, [x], [y])
            if not np.array_equal(y, want):
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_closing_twice_is_fine(best):
    pool, plan = Pool(best.library, 3), adder(best).build(best.library)
    assert pool.threads == 3
    for _ in range(2):
        pool.close()
        plan.close()
    with pytest.raises(UsageError, match="closed") as caught:
        plan.run(None, 0, 1, NO_SLOT, [np.ones((1, 4), np.float32)], [np.ones((1, 4), np.float32)])
    assert caught.value.fix == "make a new Plan of the same words and weights"
    with pytest.raises(UsageError, match="threads"):
        Pool(best.library, 0)


def test_the_best_variant_is_loaded_unless_another_is_asked_for(monkeypatch):
    monkeypatch.delenv("TMLC_CPU_ISA", raising=False)
    assert load_library().isa == available_isas()[0]
    monkeypatch.setenv("TMLC_CPU_ISA", "portable")
    assert load_library().isa == "portable"
    assert load_library(available_isas()[0]).isa == available_isas()[0]
    monkeypatch.setenv("TMLC_CPU_ISA", "avx9000")
    with pytest.raises(TargetError, match="no such variant"):
        load_library()


def test_every_variant_has_the_same_operations():
    assert len({tuple(load_library(isa).ops.items()) for isa in available_isas()}) == 1


def test_the_binding_needs_numpy_only():
    code = (
        "import sys, tmlc.kernels.cpu as c; c.load_library();"
        "sys.exit(any(m in sys.modules for m in ('torch', 'pydantic', 'click', 'safetensors')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})

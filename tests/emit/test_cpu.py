"""A program becomes a plan: places, views, states, weights, and refusals that name op and method."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tmlc.emit.cpu import CpuEngine, coverage, emit
from tmlc.emit.lowering import LOWERINGS, REFUSED, VIEWS
from tmlc.errors import EmitError
from tmlc.ir.ops import OPS
from tmlc.ir.program import FIX_CALL
from tmlc.ir.run import ProgramRunner

from .conftest import Builder, decoder


def calls(engine: CpuEngine, method: int = 0) -> list[tuple[str, list[dict]]]:
    plan = engine.plan
    return [(c["op"], [plan["tensors"][t] for t in c["t"]]) for c in plan["methods"][method]["code"]]


def test_every_op_of_the_ir_is_lowered_or_refused_with_a_reason() -> None:
    assert set(LOWERINGS) | set(REFUSED) | set(VIEWS) == set(OPS)
    assert not set(LOWERINGS) & set(REFUSED)


def test_columns_are_views_of_the_merged_projection() -> None:
    engine = emit(decoder().program)
    ops = dict(calls(engine))
    merged = next(t for op, t in calls(engine) if op == "linear")[0]
    q = ops["attention"][1]
    k = ops["short_conv"][1]
    assert (q["offset"], q["cols"], q["stride"]) == (merged["offset"], 8, 22)
    assert (k["offset"], k["cols"], k["stride"]) == (merged["offset"] + 8 * 4, 4, 22)


def test_caches_are_laid_out_as_the_kernel_reads_them() -> None:
    engine = emit(decoder("bf16").program)
    attention = dict(calls(engine))["attention"]
    k_cache, v_cache = attention[5], attention[6]
    assert (k_cache["space"], k_cache["dtype"], k_cache["rows"], k_cache["cols"]) == (
        "slot",
        "bf16",
        [0, 3],
        64,
    )
    assert (v_cache["rows"], v_cache["cols"]) == ([0, 48], 4)
    assert engine.plan["methods"][0]["code"][3]["i"] == [2, 1, 20, 16, 48, 1]


def test_int8_caches_are_bytes_with_scales_behind_each_block() -> None:
    engine = emit(decoder(kv="u8").program)
    attention = dict(calls(engine))["attention"]
    for cache in attention[5:7]:
        assert (cache["dtype"], cache["rows"], cache["cols"]) == ("u8", [0, 3], 4 * 16 + 64)
    assert [s.bytes for s in engine.states if s.kind == "kv_ring"] == [48 * (4 + 4)] * 2


def test_states_lie_in_the_slot_at_multiples_of_64_without_overlap() -> None:
    engine = emit(decoder().program)
    end = 0
    for state in engine.states:
        assert state.offset % 64 == 0
        assert state.offset >= end
        end = state.offset + state.bytes
    assert engine.slot_bytes >= end
    assert {s.name for s in engine.states} == {"position", "tail", "k_cache", "v_cache"}


def test_results_are_written_in_place_and_ids_are_narrow() -> None:
    engine = emit(decoder().program)
    (method,) = engine.methods
    assert [(s.name, s.dtype, s.rows, s.cols) for s in method.inputs] == [("x", "f32", (1, 0), 24)]
    assert [(s.dtype, s.rows, s.cols) for s in method.outputs] == [("f32", (1, 0), 24)]
    ops = calls(engine)
    assert [op for op, _ in ops].count("copy") == 0
    assert dict(ops)["add"][0]["space"] == "output"
    assert dict(ops)["router"][1]["dtype"] == "i32"


def test_keys_stay_wide_and_tokens_become_narrow(build: Callable[[], Builder]) -> None:
    b = build().method("next_token")
    logits, key, t = b.input("logits", 9), b.input("key", 3, "i64"), b.input("temperature", 1)
    b.output(b.op("sample", logits, key, t))
    (method,) = emit(b.program).methods
    assert [s.dtype for s in method.inputs] == ["f32", "i64", "f32"]
    assert [s.dtype for s in method.outputs] == ["i32"]


def test_one_weight_may_be_there_in_two_forms(build: Callable[[], Builder]) -> None:
    b = build().method("m")
    ids = b.input("ids", 1, "i64")
    table = b.weight("tied", 40, 8)
    b.output(b.op("linear", b.op("embedding", table, ids), table, None))
    engine = emit(b.program)
    assert [(w.name, w.form, w.rows, w.cols) for w in engine.weights] == [
        ("tied", "plain", 40, 8),
        ("tied@k16", "k16", 3, 128),
    ]


def test_views_of_inputs_and_results_are_copied_where_they_cannot_be_addressed(
    build: Callable[[], Builder],
) -> None:
    b = build().method("m")
    x = b.input("x", 12)
    right = b.op("silu", b.op("columns", x, 4, 12))
    b.output(right, b.op("reshape", x, 4), b.op("columns", right, 2, 4), right, x)
    engine = emit(b.program)
    assert [op for op, _ in calls(engine)].count("copy") == 6
    assert [s.rows for s in engine.methods[0].outputs] == [(1, 0), (3, 0), (1, 0), (1, 0), (1, 0)]
    check_against_reference(b, {"m": [5, 1]})


def test_the_plan_is_the_same_each_time() -> None:
    assert json.dumps(emit(decoder().program).plan) == json.dumps(emit(decoder().program).plan)


def test_stateless_ops_and_missing_places_are_refused_by_name(build: Callable[[], Builder]) -> None:
    b = build().method("decode")
    x = b.input("x", 4)
    b.output(b.op("short_conv", x, b.weight("conv", 4, 1, 3), False))
    with pytest.raises(EmitError, match=r"short_conv cannot be lowered: .*state\.insert") as caught:
        emit(b.program)
    assert "method decode" in caught.value.where
    rows = coverage(b.program)
    assert [(r.op, r.kernel) for r in rows] == [("short_conv", None)]

    b = build().method("decode")
    node = b.op("silu", b.op("silu", b.input("x", 4)))
    b.output(node)
    del b.program.methods["decode"].calls()[0].meta["arena"]
    with pytest.raises(EmitError, match="no place in the arena"):
        emit(b.program)


def test_operands_that_no_kernel_takes_are_refused_with_what_to_do(build: Callable[[], Builder]) -> None:
    b = build().method("decode")
    x = b.input("x", 4)
    b.output(b.op("rms_norm", x, b.state("norm", "overlap", 1, 4), 1e-6))
    with pytest.raises(EmitError, match="from the weights, and it is none") as caught:
        emit(b.program)
    assert "“Operations”" in caught.value.fix
    b = build().method("decode")
    b.output(b.op("silu", b.input("x", 4)))
    b.program.methods["decode"].calls()[0].target = torch.relu
    with pytest.raises(EmitError, match="not a canonical op") as caught:
        emit(b.program)
    assert caught.value.fix == FIX_CALL


def check_against_reference(b: Builder, sizes: dict[str, list[int]], tolerance: float = 1e-5) -> None:
    """Runs the plan in the kernel library and the program in PyTorch on the same inputs."""
    from tmlc.emit.targets import weight_entries
    from tmlc.emit.validate import check_plan
    from tmlc.kernels.cpu import Plan, Pool, load_library
    from tmlc.package.safetensors_io import as_bytes
    from tmlc.runtimes.cpu.plan import plan_words

    engine = emit(b.program)
    check_plan(engine)
    entries, total = weight_entries(engine.weights)
    backing = np.zeros(total + 64, np.uint8)
    weights = backing[-backing.ctypes.data % 64 :][:total]
    for packed in engine.weights:
        data = b"".join(
            bytes(as_bytes(p)) for p in packed.pieces(b.program.weights.evaluate(packed.weight, b.source))
        )
        weights[entries[packed.name].offset :][: len(data)] = np.frombuffer(data, np.uint8)
    library = load_library()
    plan = Plan(library, plan_words(engine.plan, entries, library.ops).words, weights, 1)
    pool = Pool(library, 1)
    slot_backing = np.zeros(engine.slot_bytes + 64, np.uint8)
    slot = slot_backing[-slot_backing.ctypes.data % 64 :][: engine.slot_bytes]
    session = ProgramRunner(b.program, b.source).session()
    random = np.random.default_rng(3)
    for index, method in enumerate(engine.methods):
        for n in sizes[method.name]:
            inputs = [
                random.standard_normal((s.rows[0] * n + s.rows[1], s.cols)).astype(np.float32)
                for s in method.inputs
            ]
            shapes = [(s.rows[0] * n + s.rows[1], s.cols) for s in method.outputs]
            outputs = [np.full(shape, np.nan, np.float32) for shape in shapes]
            plan.run(pool, index, n, slot, inputs, outputs)
            wanted = session.call(method.name, *[torch.from_numpy(x) for x in inputs])
            for got, want in zip(outputs, wanted, strict=True):
                assert np.abs(got - want.numpy()).max() <= tolerance


def test_the_kernels_compute_what_the_program_means() -> None:
    check_against_reference(decoder(), {"decode": [3, 8, 1, 8, 8, 5]})


def test_the_kernels_compute_what_the_bf16_program_means() -> None:
    check_against_reference(decoder("bf16"), {"decode": [3, 8, 1, 8]}, 5e-2)

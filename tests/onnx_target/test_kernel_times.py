"""Times of nodes, from made-up profiles of ONNX Runtime and from one that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tmlc
from tmlc.runtimes.onnx.kernel_times import node_times


def node(name: str, ts: int, dur: int, op: str = "Add", **args: Any) -> dict[str, Any]:
    shapes = {"input_type_shape": [{"float": [2, 8]}], "output_type_shape": [{"float": [2, 4]}]}
    sizes = {"output_size": "32", "activation_size": "64", "parameter_size": "0"}
    told = {"op_name": op, **shapes, **sizes, **args}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": told}


def run(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur}


def test_nodes_are_summed_over_the_runs_that_count() -> None:
    events = [run(0, 10), run(20, 10), run(40, 10)]
    events += [node("add", 1, 3), node("add", 21, 5), node("add", 41, 4), node("product", 45, 2, "Gemm")]
    add, product = node_times("m", events, [1, 2, 4], [False, True, True])
    assert (add.method, add.index, add.op, add.name, add.runs, add.rows, add.ns) == ("m", 0, "Add", "add", 2, 6, 9000)
    assert add.nbytes == 2 * (32 + 64) and add.operations == 0
    assert product.operations == 2 * 2 * 4 * 8 and product.nbytes == 32 + 64 + 4 * 8 * 4  # and the weight, not listed


def test_nodes_inside_of_a_branch_are_part_of_it() -> None:
    events = [run(0, 50), node("if", 2, 20, "If"), node("inner", 3, 5), node("last", 9, 13), node("after", 22, 4)]
    assert [(call.name, call.ns) for call in node_times("m", events, [1], [True])] == [("if", 20000), ("after", 4000)]


def test_a_view_moves_no_bytes_and_a_pick_what_it_gives() -> None:
    events = [run(0, 50), node("r", 1, 1, "Reshape"), node("g", 3, 1, "Gather", parameter_size="1000000")]
    assert [call.nbytes for call in node_times("m", events, [1], [True])] == [0, 64]


@pytest.mark.slow
def test_a_real_package_tells_its_nodes_and_gives_the_same_bits(nano: dict[str, Path]) -> None:
    given = [tmlc.TickInput(audio=np.full(3200, 0.1, np.float32)) for _ in range(4)]
    with tmlc.load(nano["onnx"], threads=1, sessions=2) as engine:
        plain = engine.session(seed=1)
        want = [plain.tick(x).audio.copy() for x in given]
        plain.close()
        timer, session = engine.backend.kernel_timer(), engine.session(seed=1)
        for k, x in enumerate(given):
            timer.start()
            assert np.array_equal(session.tick(x).audio, want[k])
            assert timer.stop(disturbed=k == 3) is (k > 0)  # the first time is for warming up
        calls = timer.calls(disturbed=False)
        own = {name: loaded.runs for name, loaded in engine.backend._loaded.items()}
    assert {"decode", "embed_audio"} <= {call.method for call in calls}
    assert any(call.operations for call in calls) and all(call.runs and call.ns >= 0 for call in calls)
    assert not any(own.values())  # the engine's own sessions are back

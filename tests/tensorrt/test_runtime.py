"""Parts of the runtime by themselves: random numbers, the cutting of calls, and what it imports."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from tmlc.emit.tensorrt.library import Library
from tmlc.emit.tensorrt.network import networks
from tmlc.emit.tensorrt.target import ALIGN, slot_layout
from tmlc.ir.ops.random import GUMBEL_STREAM, _uniform, _words, philox_normal
from tmlc.runtimes.core.backend import MethodSpec
from tmlc.runtimes.tensorrt.plan import MethodPlan
from tmlc.runtimes.tensorrt.random import gumbel, normal

from ..emit.conftest import decoder
from .stand_in import open_program

KEYS = np.array([[0, 0, 0], [7, 3, 2], [2**63 - 1, 2**40 + 5, 2**33], [-5, 1, 9]], np.int64)


@pytest.mark.parametrize("size", [1, 4, 7, 320])
def test_random_numbers_have_the_bits_of_every_other_engine(size: int) -> None:
    keys = torch.from_numpy(KEYS)
    expected = philox_normal(keys, size).numpy()
    assert np.abs(normal(KEYS, size) - expected).max() <= 1e-6
    noise = -torch.log(-torch.log(_uniform(_words(keys, size, GUMBEL_STREAM))))
    assert np.abs(gumbel(KEYS, size) - noise.float().numpy()).max() <= 1e-5


def plan_with(rings: tuple[tuple[int, int], ...], most: int) -> MethodPlan:
    return MethodPlan(MethodSpec("m", 64, (), ()), "e", (), ((1, 1, most),), (), 0, 0, rings, (0, 0))


def test_calls_are_cut_where_a_ring_ends_and_never_elsewhere() -> None:
    plan = plan_with(((48, 16), (20, 0)), 16)
    assert plan.pieces(0, 40) == [16, 4, 16, 4]
    assert plan.pieces(46, 6) == [2, 4]  # index 47 of the first ring is followed by 16
    for start in range(200):
        cut = plan.pieces(start, 50)
        assert sum(cut) == 50 and max(cut) <= 16
        at = start
        for size in cut:
            for capacity, sinks in plan.rings:
                index = at if at < capacity else sinks + (at - sinks) % (capacity - sinks)
                assert index + size <= capacity
            at += size
    assert plan_with((), 64).pieces(1000, 64) == [64]


def test_states_lie_apart_and_those_that_are_copied_side_by_side(library: Library) -> None:
    b = decoder()
    made = networks(library, b.program, b.source)
    states, slot_bytes, regions = slot_layout(b.program, list(made.values()))
    by_place = sorted(states, key=lambda state: state.offset)
    assert all(one.offset + one.bytes <= two.offset for one, two in pairwise(by_place))
    assert all(state.offset % ALIGN == 0 for state in states) and by_place[-1].offset + by_place[-1].bytes <= slot_bytes
    begin, size = regions["decode"]
    inside = {s.name for s in states if begin <= s.offset < begin + size}
    assert inside == {"tail"}


def test_slots_are_read_written_zeroed_and_copied_with_their_counts(library: Library) -> None:
    b = decoder()
    backend, device = open_program(b.program, b.source, library)
    memory = backend.slots(3)
    x = np.ones((5, 24), np.float32)
    (first,) = (out.copy() for out in backend.call("decode", [(5, memory.handle(0))], [x]))
    blob = memory.read(0)
    memory.write(1, blob)
    memory.copy(0, 2)
    again = [backend.call("decode", [(5, memory.handle(k))], [x])[0].copy() for k in range(3)]
    assert np.array_equal(again[0], again[1]) and np.array_equal(again[0], again[2])
    assert not np.array_equal(again[0], first)
    memory.zero(0)
    assert memory.read(0) == bytes(len(blob))
    assert np.array_equal(backend.call("decode", [(5, memory.handle(0))], [x])[0], first)
    two = np.concatenate([x, 2 * x])
    memory.zero(1)
    memory.zero(2)
    (both,) = backend.call("decode", [(3, memory.handle(1)), (5, memory.handle(2))], [two[:8]])
    memory.zero(1)
    assert np.array_equal(backend.call("decode", [(3, memory.handle(1))], [two[:3]])[0], both[:3])
    backend.close()
    assert not device.held
    memory.zero(0)  # a session that outlives its engine


def test_every_profile_has_run_before_the_first_call_and_left_nothing_behind(library: Library) -> None:
    b = decoder()
    backend, device = open_program(b.program, b.source, library)
    memory = backend.slots(1)
    assert device.runs == [("decode", 1), ("decode", 4), ("decode", 8)]
    assert memory.read(0) == bytes(backend.slot_bytes)


def test_the_runtime_brings_in_no_compiler_and_no_library() -> None:
    code = (
        "import sys, tmlc.runtimes.tensorrt.backend, tmlc.runtimes.tensorrt.cuda, tmlc.runtimes.tensorrt.slots\n"
        "heavy = {'torch', 'triton', 'onnx', 'pydantic', 'yaml', 'rich', 'click', 'tensorrt', 'tensorrt_rtx', 'cuda',"
        " 'safetensors', 'tmlc.ir', 'tmlc.passes', 'tmlc.emit', 'tmlc.compiler'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_driver_has_every_call_that_the_runtime_makes() -> None:
    """Names only: none of them can be called here."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings: pip install 'tmlc[tensorrt]'")
    import inspect
    import re

    from tmlc.runtimes.tensorrt import cuda

    used = set(re.findall(r"driver\.(cu\w+|CU\w+)", inspect.getsource(cuda)))
    assert len(used) > 15 and not [name for name in used if not hasattr(driver, name)]


def test_the_library_has_every_name_that_the_runtime_uses() -> None:
    import tensorrt_rtx as trt

    for owner, names in {
        trt.Runtime: ("deserialize_cuda_engine", "get_engine_validity"),
        trt.ICudaEngine: (
            "num_io_tensors", "get_tensor_name", "get_tensor_dtype", "get_tensor_shape", "get_tensor_mode",
            "get_aliased_input_tensor", "get_tensor_profile_shape", "num_optimization_profiles",
            "device_memory_size_v2", "create_runtime_config", "create_execution_context",
        ),
        trt.IRuntimeConfig: (
            "set_execution_context_allocation_strategy", "cuda_graph_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
        ),
        trt.IExecutionContext: (
            "set_device_memory", "set_optimization_profile_async", "set_input_shape", "set_tensor_address",
            "execute_async_v3",
        ),
    }.items():  # fmt: skip
        assert [name for name in names if not hasattr(owner, name)] == []
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE and trt.DynamicShapesKernelSpecializationStrategy.NONE


def test_layers_are_timed_between_start_and_stop_and_change_no_bit(library: Library) -> None:
    b = decoder()
    backend, device = open_program(b.program, b.source, library)
    memory, x = backend.slots(2), np.ones((3, 24), np.float32)
    (want,) = (out.copy() for out in backend.call("decode", [(3, memory.handle(0))], [x]))
    timer = backend.kernel_timer()
    for k in range(2):
        memory.zero(1)
        timer.start()
        assert np.array_equal(backend.call("decode", [(3, memory.handle(1))], [x])[0], want)
        timer.stop(disturbed=k == 1)
    backend.call("decode", [(1, memory.handle(1))], [x[:1]])  # nobody times this
    (engine,) = (entry.engine for name, entry in backend._loaded.items() if name == "decode")
    assert engine.reports is None
    calls = timer.calls(disturbed=True)
    assert {call.method for call in calls} == {"decode"} and [call.index for call in calls] == list(range(len(calls)))
    runs = sum(1 for name, _ in device.runs if name == "decode")
    assert {call.runs for call in calls} == {2} and {call.ns for call in calls} == {2 * 0.5e6} and runs > 2
    assert {call.runs for call in timer.calls(disturbed=False)} == {1}

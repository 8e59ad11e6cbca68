"""Runs one op through its Triton kernels on host memory: several sessions in a bucket, everything else poisoned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import triton

from tmlc.errors import TargetError
from tmlc.ir.ops import OPS
from tmlc.ir.quantize import SCHEMES, quantise
from tmlc.kernels.triton import layouts
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Operand
from tmlc.kernels.triton.ptx.host import PtxMachine
from tmlc.kernels.triton.registry import Call, lower
from tmlc.kernels.triton.versions import check_triton
from tmlc.kernels.triton.worker import Interpreter

NUMPY = {"f32": np.float32, "bf16": np.uint16, "i64": np.int64, "i32": np.int32, "u8": np.uint8}
POISON = 0xA5
#: What the kernels take dense only: the harness puts no columns behind these.
DENSE_INPUTS = {"weights", "experts", "key", "temperature"}
DENSE_RESULTS = {"router", "norm_router", "sink_router", "topk_router", "norm_topk_router", "append_experts"}


def with_compiler_for(sm: int) -> None:
    """Skips a test where the Triton that is installed is refused for an architecture."""
    try:
        check_triton(sm, triton.__version__)
    except TargetError as error:
        pytest.skip(error.what)


def with_triton(least: str, why: str) -> None:
    """Skips a test of what only newer compilers do."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < tuple(map(int, least.split("."))):
        pytest.skip(f"Triton {triton.__version__}: {why}")


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to bf16, as float32."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().float().numpy()


@dataclass(frozen=True)
class Weight:
    """A weight as an engine stores it, and the values it stands for."""

    dtype: str
    shape: tuple[int, ...]
    parts: list[np.ndarray]
    values: np.ndarray  # float64


def weight(values: np.ndarray, dtype: str = "f32") -> Weight:
    """Stores float values [.., m, k] in one of the forms of layouts.py."""
    values = np.ascontiguousarray(values, np.float32)
    flat = torch.from_numpy(values.reshape(-1, values.shape[-1]))
    lead = values.shape[:-1]
    if dtype == "f32":
        parts = [values]
    elif dtype == "bf16":
        parts = [flat.bfloat16().view(torch.uint16).numpy().reshape(values.shape)]
    elif dtype == "f8g128":
        parts = layouts.pack(dtype, *layouts.quantise_fp8(values))
    else:
        found = quantise(flat, SCHEMES[dtype])
        side = [found.scales, *([] if found.zeros is None else [found.zeros])]
        parts = layouts.pack(dtype, *(t.numpy().reshape(*lead, *t.shape[1:]) for t in (found.codes, *side)))
    stored = layouts.weight_parts("w", dtype, values.shape)
    assert [part.shape for part in stored] == [p.shape for p in parts], (stored, [p.shape for p in parts])
    return Weight(dtype, values.shape, parts, layouts.unpack(dtype, parts, values.shape[-1]))


@dataclass
class Session:
    """What one session brings: rows of each input, and its states, which a run changes."""

    inputs: dict[str, np.ndarray]
    states: dict[str, np.ndarray] = field(default_factory=dict)
    count: int = 0


@dataclass(frozen=True)
class Shape:
    """dtype, columns and rows a·n + b of a result or an input."""

    dtype: str
    cols: int
    rows: tuple[int, int] = (1, 0)


def run(
    machine: Interpreter | PtxMachine,
    op: str,
    sessions: Sequence[Session],
    attrs: dict[str, Any],
    outputs: Sequence[Shape],
    weights: dict[str, Weight] | None = None,
    rows: dict[str, tuple[int, int]] | None = None,
    n: int = 0,
    batch: int = 0,
    sm: int = 0,
    pad: int = 0,
) -> list[list[np.ndarray]]:
    """The results of each session; `states` of the sessions are changed in place.

    Args:
        rows: a·n + b of the inputs that have other rows than n.
        n, batch: of the bucket (default: what the sessions need); more sessions than given are dead ones.
        sm: what launches are made for (default: what the machine runs).
        pad: columns that are poisoned behind each row of inputs and results.
    """
    weights, rows = weights or {}, rows or {}
    n = n or max(session.count for session in sessions)
    bucket = Bucket(batch or len(sessions), n)
    mark = machine.mark()
    buffers: dict[tuple[str, str], np.ndarray] = {}
    args: dict[str, Operand | None] = dict.fromkeys(OPS[op].args)

    def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        array = machine.array(shape, NUMPY[dtype])
        array.view(np.uint8)[...] = POISON
        if dtype == "f32":
            array[...] = np.nan
        return array

    for name in sessions[0].inputs:
        sample, (a, b) = sessions[0].inputs[name], rows.get(name, (1, 0))
        dtype = next(key for key, kind in NUMPY.items() if kind == sample.dtype)
        each, cols = a * n + b, sample.shape[1]
        behind = 0 if name in DENSE_INPUTS else pad
        array = poisoned((bucket.batch * each, cols + behind), dtype)
        for index, session in enumerate(sessions):
            array[index * each : index * each + len(session.inputs[name]), :cols] = session.inputs[name]
        buffers["input", name] = array
        args[name] = Operand("input", dtype, (a, b), cols, cols + behind, name=name)
    for name, stored in weights.items():
        for part, array in zip(layouts.weight_parts(name, stored.dtype, stored.shape), stored.parts, strict=True):
            buffers["weight", part.name] = machine.put(array)
        lead = int(np.prod(stored.shape[:-1]))
        k = stored.shape[-1]
        args[name] = Operand("weight", stored.dtype, (0, lead), k, k, name=name, shape=stored.shape)
    offset, places = 64, {}
    for name, state in sessions[0].states.items():
        dtype = next(key for key, kind in NUMPY.items() if kind == state.dtype)
        places[name] = offset
        args[name] = Operand("state", dtype, (0, state.shape[0]), state.shape[1], state.shape[1], offset)
        offset = -(-(offset + state.nbytes) // 64) * 64 + 64
    pool = machine.bytes(offset * (bucket.batch + 1))
    pool[...] = POISON
    slots, counts = machine.array((bucket.batch,), np.int64), machine.array((bucket.batch,), np.int32)
    for index, session in enumerate(sessions):
        slots[index], counts[index] = offset * (bucket.batch - index), session.count
        for name, state in session.states.items():
            begin = slots[index] + places[name]
            pool[begin : begin + state.nbytes] = np.ascontiguousarray(state).view(np.uint8).reshape(-1)
    buffers |= {("state", ""): pool, ("slots", ""): slots, ("counts", ""): counts}
    results = []
    pad = 0 if op in DENSE_RESULTS else pad
    for index, shape in enumerate(outputs):
        total = bucket.rows(shape.rows)
        buffers["output", str(index)] = poisoned((total, shape.cols + pad), shape.dtype)
        results.append(Operand("output", shape.dtype, shape.rows, shape.cols, shape.cols + pad, name=str(index)))
    before = pool.copy()
    lowered = lower(Call(op, args, attrs, tuple(results), bucket, sm or machine.sm))
    scratch = machine.bytes(lowered.scratch_bytes)
    scratch[...] = 0xFF  # NaN in every format
    buffers["scratch", ""] = scratch
    machine.run(lowered.launches, buffers)

    for index, session in enumerate(sessions):
        for name, state in session.states.items():
            begin = int(slots[index]) + places[name]
            state[...] = pool[begin : begin + state.nbytes].view(state.dtype).reshape(state.shape)
            before[begin : begin + state.nbytes] = pool[begin : begin + state.nbytes]
    assert np.array_equal(before, pool), "something outside the states was written"
    found = []
    for index, session in enumerate(sessions):
        mine = []
        for number, shape in enumerate(outputs):
            each = bucket.session_rows(shape.rows)
            real = shape.rows[0] * session.count + shape.rows[1]
            array = buffers["output", str(number)]
            mine.append(array[index * each : index * each + real, : shape.cols].copy())
            if pad and shape.dtype == "f32":
                assert np.isnan(array[:, shape.cols :]).all(), "columns behind the result were written"
        found.append(mine)
    machine.release(mark)
    return found


def reference(op: str, session: Session, attrs: dict[str, Any], weights: dict[str, Weight] | None = None) -> list[Any]:
    """The op's reference in float64 on copies of the session's states; returns results and then states by name."""
    weights, states = weights or {}, {}
    values = []
    for name in OPS[op].args:
        if name in session.inputs:
            tensor = torch.from_numpy(session.inputs[name].copy())
            values.append(tensor.double() if tensor.dtype == torch.float32 else tensor)
        elif name in weights:
            values.append(torch.from_numpy(weights[name].values))
        elif name in session.states:
            tensor = torch.from_numpy(session.states[name].copy())
            if tensor.dtype == torch.uint16:
                tensor = tensor.view(torch.bfloat16)
            states[name] = tensor.double() if tensor.dtype == torch.float32 else tensor
            values.append(states[name])
        else:
            values.append(attrs.get(name))
    result = OPS[op].reference(*values)
    results = list(result) if isinstance(result, tuple) else [] if result is None else [result]
    return [*(r.numpy() for r in results), states]


def near(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    """Every element within `tolerance` of the largest of the reference."""
    wanted = np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    error = np.abs(found - wanted).max() if found.size else 0.0
    largest = max(np.abs(wanted).max(), 1e-30) if wanted.size else 1.0
    assert error <= tolerance * largest, f"off by {error / largest:.2e} of the largest value, allowed {tolerance:.1e}"


def agree(
    machine: Interpreter | PtxMachine,
    op: str,
    sessions: Sequence[Session],
    attrs: dict[str, Any],
    outputs: Sequence[Shape],
    tolerance: float,
    weights: dict[str, Weight] | None = None,
    rows: dict[str, tuple[int, int]] | None = None,
    cuts: Sequence[int] = (),
    compared: Sequence[str] = (),
    activations: Any = None,
    **more: Any,
) -> None:
    """Holds an op to the float64 reference, and to the same bits alone, in company, and cut into pieces.

    Args:
        tolerance: of results and of the states named in `compared`, of their largest value; integers must be equal.
        cuts: positions at which each session is cut (() for ops that see no positions).
        activations: what a kernel rounds float inputs to before it multiplies, by input name.
    """
    begin = [{name: state.copy() for name, state in s.states.items()} for s in sessions]
    wanted = []
    for session in sessions:
        inputs = {k: (activations or {}).get(k, lambda v: v)(v) for k, v in session.inputs.items()}
        wanted.append(reference(op, Session(inputs, session.states, session.count), attrs, weights))
    found = run(machine, op, sessions, attrs, outputs, weights, rows, pad=3, **more)
    for session, got, want in zip(sessions, found, wanted, strict=True):
        for result, right in zip(got, want[:-1], strict=True):
            if right.dtype.kind == "f":
                near(result, right, tolerance)
            else:
                assert np.array_equal(result, right)
        for name in compared:
            right = want[-1][name]
            right = right.view(torch.uint16).numpy() if right.dtype == torch.bfloat16 else right.numpy()
            if right.dtype.kind == "f":
                near(session.states[name], right, tolerance)
            else:
                assert np.array_equal(session.states[name], right), name
    # How wide loads are follows from strides, and the order of some sums from that. An engine has the same strides in
    # every bucket (tmlc/emit/triton/arena.py).
    pad = 3 if isinstance(machine, PtxMachine) else 0
    for number, session in enumerate(sessions):
        bounds = sorted({0, session.count, *(cut for cut in cuts if cut < session.count)})
        alone = Session(session.inputs, {name: state.copy() for name, state in begin[number].items()})
        pieces: list[list[np.ndarray]] = []
        for low, high in pairwise(bounds):
            part = {}
            for name, value in session.inputs.items():
                a, b = (rows or {}).get(name, (1, 0))
                part[name] = value if a == 0 else value[a * low : a * high + b]
            piece = Session(part, alone.states, high - low)
            pieces += run(machine, op, [piece], attrs, outputs, weights, rows, pad=pad)
            if "position" in alone.states and op != "advance":
                alone.states["position"] += high - low
        for index, result in enumerate(found[number]):
            joined = np.concatenate([piece[index] for piece in pieces])
            assert np.array_equal(bits(joined), bits(result)), f"result {index} of session {number} has other bits"
        for name, state in session.states.items():
            if name != "position":
                assert np.array_equal(bits(alone.states[name]), bits(state)), f"state {name} has other bits"


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8)


def draw(seed: int, *shape: int) -> np.ndarray:
    """Standard normals, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

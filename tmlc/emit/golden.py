"""Records golden calls: what the program itself, in eager PyTorch, answers to small fixed inputs.

Weights are evaluated when an op needs them and dropped after it (unless all of them are small), so that
recording needs no more memory than packing does.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from tmlc.ir.ops import spec_of
from tmlc.ir.program import Method, Program, role, type_of
from tmlc.ir.run import one_thread
from tmlc.ir.weights import TensorSource
from tmlc.package.golden import GoldenCall

KEEP_BYTES = 256 * 2**20  # weights of a program are kept between calls up to this size
CALL_SIZES = (5, 3, 1)  # new positions of the calls of one sequence, so that states and chunking are shown

# How far an engine's floats may be from the recorded ones, as a part of the largest recorded value.
# Quantised weights are compared with what their codes stand for; the engine rounds the activations that meet them to a
# byte, which the recording does not. Whatever rounds activations makes a router choose another expert now and then.
ROUTERS = (
    "router", "sink_router", "topk_router", "norm_router", "norm_topk_router", "norm_moe_conv_state", "norm_topk_moe",
)  # fmt: skip
ROUTED = 1e-1  # of a method with routers, where anything is rounded
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2, "int8": 1e-1, "fp8": 1e-1, "int4": 1e-1}


class _Recorder:
    """Runs methods over one set of states, with weights that come and go."""

    def __init__(self, program: Program, source: TensorSource) -> None:
        self.program, self.source = program, source
        total = sum(program.weights[name].type.nbytes() for name in program.used_weights())
        self.kept: dict[str, torch.Tensor] | None = {} if total <= KEEP_BYTES else None
        specs = program.states.values()
        self.states = {s.name: torch.zeros(s.shape, dtype=s.type.torch_dtype) for s in specs}
        self._release = getattr(source, "release", lambda: None)  # a plain mapping has nothing to close

    def weight(self, name: str) -> torch.Tensor:
        if self.kept is None:
            self._release()  # what was read for the ops before is not needed any more
            return self.program.weights.evaluate(name, self.source)
        if name not in self.kept:
            self.kept[name] = self.program.weights.evaluate(name, self.source)
        return self.kept[name]

    def calls(self, method: Method, given: list[list[torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
        """The answers to calls that follow each other. All of them pass an op before the next op has its turn, so that
        each weight is made once, where the states of the method allow it."""
        clocks = _clocks(method)
        if clocks is None:
            return [answers for inputs in given for answers in self._run(method, [inputs], {})]
        return self._run(method, given, clocks)

    @torch.no_grad()
    def _run(
        self, method: Method, given: list[list[torch.Tensor]], clocks: dict[fx.Node, fx.Node]
    ) -> list[tuple[torch.Tensor, ...]]:
        states = {node: self.states[role(node)[1]] for node in method.placeholders("state")}
        calls: list[dict[fx.Node, Any]] = []
        for inputs in given:
            values = {**states, **dict(zip(method.inputs, inputs, strict=True))}
            for change, clock in clocks.items():
                values[clock] = states[clock].clone()
                _apply(change, {**values, clock: states[clock]})
            calls.append(values)
        left = {node: len(node.users) for node in method.graph.nodes}
        for node in method.graph.nodes:
            if node.op != "call_function":
                continue
            for needed in node.all_input_nodes:
                if needed not in calls[0]:
                    weight = self.weight(role(needed)[1])
                    for values in calls:
                        values[needed] = weight
                    del weight
            for values in calls:
                if node not in clocks:
                    values[node] = _apply(node, values)
            for used in node.all_input_nodes:
                left[used] -= 1
                if not left[used]:
                    for values in calls:
                        del values[used]
        return [tuple(values[node] for node in method.outputs) for values in calls]


def _apply(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    return args[0][args[1]] if node.target is operator.getitem else spec_of(node.target).reference(*args)  # type: ignore[union-attr]


def _clocks(method: Method) -> dict[fx.Node, fx.Node] | None:
    """The ops that change a state which other ops read too, with that state.

    Such an op can be run before its call, on a copy of the state: it takes nothing but inputs, and nothing reads the
    state after it. None where one is not like that. A state of one op only needs nothing: calls come to it in order.
    """
    place = {node: number for number, node in enumerate(method.graph.nodes)}
    clocks: dict[fx.Node, fx.Node] = {}
    for state in method.placeholders("state"):
        if len(state.users) == 1:
            continue
        changes = [node for node in state.users if _changes(node, state)]
        inputs = {state, *method.inputs}
        last = max(state.users, key=place.__getitem__)
        if changes and (changes != [last] or not inputs.issuperset(last.all_input_nodes)):
            return None
        clocks.update(dict.fromkeys(changes, state))
    return clocks


def _changes(node: fx.Node, state: fx.Node) -> bool:
    spec = spec_of(node.target)
    return spec is not None and any(
        value is state and name in spec.mutates for name, value in zip(spec.args, node.args, strict=False)
    )


def record_golden(
    program: Program, source: TensorSource, on_progress: Callable[[str], None] | None = None
) -> list[GoldenCall]:
    """A short sequence of calls of every method of a stateful program, with the answers.

    Arrays have the dtypes of engines (ids, levels: i32). Inputs come from one fixed random stream.
    """
    rng = np.random.default_rng(20260)
    calls: list[GoldenCall] = []
    with one_thread():
        for number, method in enumerate(program.methods.values()):
            if on_progress is not None:
                on_progress(method.name)
            recorder = _Recorder(program, source)
            sizes = [size for size in CALL_SIZES if size <= method.max_n]
            given = [[_example(node, n, rng) for node in method.inputs] for n in sizes]
            answers = recorder.calls(method, [[torch.from_numpy(array) for array in inputs] for inputs in given])
            for n, inputs, outputs in zip(sizes, given, answers, strict=True):
                arrays = tuple(_narrow(out.detach().contiguous().numpy()) for out in outputs)
                calls.append(
                    GoldenCall(number, method.name, n, tuple(map(_engine_form, method.inputs, inputs)), arrays)
                )
    return calls


def tolerances(
    program: Program, calls: list[GoldenCall], precision: str, exact_caches: bool
) -> dict[str, float]:
    """For each method how far its floats may be off, in absolute terms. `exact_caches`: keys and values are float32."""
    part = TOLERANCE[precision] if exact_caches else max(TOLERANCE[precision], TOLERANCE["bf16"])
    routed = {m.name for m in program.methods.values() if any(True for op in ROUTERS for _ in m.calls(op))}
    largest: dict[str, float] = {}
    for call in calls:
        for array in call.outputs:
            if array.dtype.kind == "f" and array.size:
                largest[call.method] = max(largest.get(call.method, 0.0), float(np.abs(array).max()))
    parts = {name: max(part, ROUTED) if name in routed and part > TOLERANCE["fp32"] else part for name in largest}
    return {name: float(f"{parts[name] * max(size, 1e-3):.3g}") for name, size in largest.items()}


def _is_key(node: fx.Node) -> bool:
    for user in node.users:
        spec = spec_of(user.target)
        if spec is not None and "key" in spec.args and user.args[spec.args.index("key")] is node:
            return True
    return False


def _engine_form(node: fx.Node, array: np.ndarray) -> np.ndarray:
    return array if _is_key(node) else _narrow(array)


def _narrow(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int32) if array.dtype == np.int64 else array


def _example(node: fx.Node, n: int, rng: np.random.Generator) -> np.ndarray:
    """A plausible value of an input: sound for samples, ids inside the vocabulary, arg-max for the choice of
    tokens."""
    kind, name = type_of(node), role(node)[1]
    shape = kind.at(n)
    if kind.dtype == "u8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if _is_key(node):
        return np.stack([np.full(shape[0], 7), np.arange(shape[0]) // 3, np.arange(shape[0])], 1).astype(np.int64)
    if kind.dtype == "i64":
        return rng.integers(0, _id_limit(node), shape, dtype=np.int64)
    if name == "temperature":
        return np.zeros(shape, np.float32)
    scale = 0.1 if name == "pcm" else 1.0
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def _id_limit(node: fx.Node) -> int:
    """Ids must be rows of every table that is looked up with them."""
    tables = [user.args[0] for user in node.users if spec_of(user.target) is not None]
    sizes = [int(table.meta["type"].shape[0]) for table in tables if isinstance(table, fx.Node) and table is not node]
    return min(sizes, default=1)

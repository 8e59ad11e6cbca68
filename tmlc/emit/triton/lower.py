"""A method → the launches of each of its buckets.

The graph is read once: every value gets its place for one padded position, every call its operands. A bucket then only
multiplies places, and asks the kernels' registry for launches.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import fx

from tmlc.emit.graph import direct_outputs, is_view, key_values, results, source_of, up
from tmlc.emit.triton.arena import plan_arena
from tmlc.errors import REPORT, EmitError
from tmlc.ir.dims import Dim
from tmlc.ir.ops import spec_of
from tmlc.ir.program import FIX_CALL, Method, Program
from tmlc.ir.types import ITEM_BYTES, TensorType
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Launch, Lowered, Operand
from tmlc.kernels.triton.registry import Call, lower
from tmlc.kernels.triton.tuning import Tiles, table
from tmlc.package.manifest import MethodInfo, Signature

COPY = "copy"  # of the kernels' registry: a dense copy of rows, of any dtype


@dataclass(frozen=True)
class Value:
    """Where a value of a method lives: `unit` bytes into the arena for each padded position of the bucket (`argument`
    for inputs and outputs), and `byte` bytes behind that (a view of columns)."""

    space: str
    dtype: str
    rows: tuple[int, int]
    cols: int
    stride: int
    unit: int = 0
    argument: int = 0
    byte: int = 0

    @property
    def dense(self) -> bool:
        return self.stride == self.cols

    def at(self, bucket: Bucket) -> Operand:
        offset = self.unit * bucket.batch * bucket.n + self.byte
        name = "" if self.space == "arena" else str(self.argument)
        return Operand(self.space, self.dtype, self.rows, self.cols, self.stride, offset, name)


Place = Value | Operand


@dataclass(frozen=True)
class Step:
    """One call of an op, before its bucket is known."""

    node: fx.Node
    op: str
    args: dict[str, Place | None]
    attrs: dict[str, Any]
    outputs: tuple[Value, ...]


def _lowered(step: Step, bucket: Bucket, sm: int, tiles: Tiles) -> Lowered:
    """The launches of one call. Raises EmitError where no kernel takes it."""
    args = {name: p.at(bucket) if isinstance(p, Value) else p for name, p in step.args.items()}
    outputs = tuple(value.at(bucket) for value in step.outputs)
    return lower(Call(step.op, args, step.attrs, outputs, bucket, sm, tiles))


class MethodLowering:
    """One method, ready to be lowered for any bucket and architecture.

    Raises EmitError, when made, for values and operands that an engine cannot hold; names the node.
    """

    def __init__(self, program: Program, method: Method, slot_offsets: dict[str, int]) -> None:
        self.program, self.method, self.slot_offsets = program, method, slot_offsets
        self.values: dict[tuple[fx.Node, int], Value] = {}
        self.steps: list[Step] = []
        self.inputs: list[tuple[str, Value]] = []
        self.outputs: list[Value] = []
        self.direct = _reshaped_outputs(method.graph) | direct_outputs(method.graph)
        self.keys = key_values(method.graph)
        self.places, self.arena = plan_arena(method, set(self.direct))
        for node in method.graph.nodes:
            if node.op == "placeholder" and node.meta["role"][0] == "input":
                value = replace(self._typed(node, 0, node.meta["type"], "input"), argument=len(self.inputs))
                self.values[node, 0] = value
                self.inputs.append((node.meta["role"][1], value))
            elif node.op == "call_function" and node.target is not operator.getitem:
                self._call(node)
            elif node.op == "output":
                self._output(node)

    def fail(self, node: fx.Node, what: str, fix: str) -> EmitError:
        source = node.meta.get("source")
        where = f"method {self.method.name}, {node.name}" + (f", {source}" if source else "")
        return EmitError(what, where=where, fix=fix)

    def signature(self) -> MethodInfo:
        """The method as the manifest shows it."""
        inputs = tuple(Signature(name, v.dtype, v.rows, v.cols) for name, v in self.inputs)
        names = list(self.program.meta.get("outputs", {}).get(self.method.name, []))
        names += [f"out{i}" for i in range(len(names), len(self.outputs))]
        outputs = tuple(Signature(name, v.dtype, v.rows, v.cols) for name, v in zip(names, self.outputs, strict=False))
        return MethodInfo(self.method.name, inputs, outputs, self.method.max_n)

    def positions(self) -> list[tuple[int, int]]:
        """(offset in the slot, limit) of each counter of positions that a call moves."""
        moved = [step for step in self.steps if step.op == "advance"]
        places = [step.args["position"] for step in moved]
        assert all(isinstance(place, Operand) for place in places)
        return [(p.offset, int(s.attrs["limit"])) for s, p in zip(moved, places, strict=True)]  # type: ignore[union-attr]

    def id_limits(self) -> list[int]:
        """For each input the rows of the smallest table that it chooses from; 0: it chooses from none."""
        limits = []
        for node in self.method.inputs:
            tables: list[Any] = []
            for user in node.users:
                spec = spec_of(user.target)
                tables += [user.args[0]] if spec is not None and spec.name == "embedding" else []
            limits.append(min((int(table.meta["type"].shape[0]) for table in tables), default=0))
        return limits

    def arena_bytes(self, bucket: Bucket) -> int:
        return self.arena * bucket.batch * bucket.n

    def launches(self, bucket: Bucket, sm: int, tiles: Tiles | None = None) -> tuple[list[Launch], int]:
        """The launches of a call in this bucket, in order, and the scratch bytes that they share. `tiles`: the
        table of block sizes; None: the checked-in one.

        Raises EmitError for an op or an operand that no kernel takes; names the node and its source.
        """
        found: list[Launch] = []
        scratch = 0
        for step in self.steps:
            try:
                lowered = _lowered(step, bucket, sm, tiles or table())
            except EmitError as error:
                failed = self.fail(step.node, error.what, error.fix)
                failed.where = f"{failed.where}; {error.where}" if error.where else failed.where
                raise failed from None
            found += lowered.launches
            scratch = max(scratch, lowered.scratch_bytes)
        return found, scratch

    def refusals(self, bucket: Bucket, sm: int, tiles: Tiles) -> list[tuple[str, EmitError]]:
        """(op, why) of every call that `launches` would raise for."""
        found = []
        for step in self.steps:
            try:
                _lowered(step, bucket, sm, tiles)
            except EmitError as error:
                found.append((step.op, error))
        return found

    # Places.

    def _typed(self, node: fx.Node, index: int, kind: TensorType, space: str) -> Value:
        if len(kind.shape) != 2:
            raise self.fail(node, f"a value of shape {kind} is not rows and columns", REPORT)
        rows, cols = kind.shape[0], int(kind.shape[1])
        pair = (rows.a, rows.b) if isinstance(rows, Dim) else (0, int(rows))
        dtype = "i32" if kind.dtype == "i64" and (node, index) not in self.keys else kind.dtype
        return Value(space, dtype, pair, cols, cols)

    def value(self, node: fx.Node) -> Value:
        if node.target is operator.getitem:
            return self.values[node.args[0], int(node.args[1])]  # type: ignore[index, arg-type]
        return self.values[node, 0]

    def _place(self, node: fx.Node) -> Place:
        """An operand: a weight or a state as it is, anything else where it lies."""
        if node.op != "placeholder" or node.meta["role"][0] == "input":
            return self.value(node)
        kind, name = node.meta["role"]
        if kind == "weight":
            entry = self.program.weights[name]
            shape = tuple(int(size) for size in entry.shape)
            cols = shape[-1] if shape else 1
            rows = prod(shape[:-1]) if shape else 1
            return Operand("weight", entry.dtype, (0, rows), cols, cols, 0, name, shape)
        spec = self.program.states[name]
        rows, cols = (int(size) for size in spec.shape)
        return Operand("state", spec.dtype, (0, rows), cols, cols, self.slot_offsets[name], name)

    def _call(self, node: fx.Node) -> None:
        spec = spec_of(node.target)
        if spec is None:
            raise self.fail(node, f"{node.target} is not a canonical op", FIX_CALL)
        given = dict(zip(spec.args, node.args, strict=False)) | dict(node.kwargs)
        if spec.view:
            self.values[node, 0] = self._view(node, spec.name, given)
            return
        types = node.meta["type"]
        outputs = []
        for index, kind in enumerate((types,) if isinstance(types, TensorType) else tuple(types)):
            if (node, index) in self.direct:
                value = replace(self._typed(node, index, kind, "output"), argument=self.direct[node, index])
            else:
                value = replace(self._typed(node, index, kind, "arena"), unit=self.places[node, index])
            self.values[node, index] = value
            outputs.append(value)
        tensors = _tensor_arguments(spec)
        operands: dict[str, Any] = {name: given[name] for name in given if name in tensors}
        args = {name: None if node is None else self._place(node) for name, node in operands.items()}
        attrs = {n: v for n, v in given.items() if n not in tensors}
        self.steps.append(Step(node, spec.name, args, attrs, tuple(outputs)))

    def _view(self, node: fx.Node, op: str, args: dict[str, Any]) -> Value:
        x = self.value(args["x"])
        if op == "columns":
            start, stop = int(args["start"]), int(args["stop"])
            return replace(x, byte=x.byte + start * ITEM_BYTES[x.dtype], cols=stop - start)
        if op != "reshape":
            raise self.fail(node, f"the view {op} is not known to the emitter", REPORT)
        if not x.dense:
            x = self._copied(node, x)
        cols = int(args["cols"])
        a, b = (size * x.cols for size in x.rows)
        if a % cols or b % cols:
            what = f"{x.rows[0]}n+{x.rows[1]} rows of {x.cols} do not make rows of {cols}"
            raise self.fail(node, what, REPORT)
        return replace(x, rows=(a // cols, b // cols), cols=cols, stride=cols)

    def _copied(self, node: fx.Node, x: Value) -> Value:
        """A dense copy behind everything that is laid out."""
        out = Value("arena", x.dtype, x.rows, x.cols, x.cols, unit=self.arena)
        self.arena += up(sum(x.rows) * x.cols * ITEM_BYTES[x.dtype])
        self.steps.append(Step(node, COPY, {"x": x}, {}, (out,)))
        return out

    def _output(self, node: fx.Node) -> None:
        for index, result in enumerate(results(node)):
            value = self.value(result)
            if value.space != "output" or value.argument != index or value.byte or not value.dense:
                out = Value("output", value.dtype, value.rows, value.cols, value.cols, argument=index)
                self.steps.append(Step(node, COPY, {"x": value}, {}, (out,)))
                value = out
            self.outputs.append(value)


def _reshaped_outputs(graph: fx.Graph) -> dict[tuple[fx.Node, int], int]:
    """Results of calls that the method returns as other rows of the same bytes, and as which result: they too can be
    written where they are wanted, for here a view may be one of a result of the method."""
    found: dict[tuple[fx.Node, int], int] = {}
    for index, result in enumerate(results(next(node for node in graph.nodes if node.op == "output"))):
        source = result
        while (spec := spec_of(source.target)) is not None and spec.name == "reshape":
            source = source.args[0]  # type: ignore[assignment]
        key = source_of(source)
        if source is not result and key[0].op == "call_function" and not is_view(key[0]):
            found.setdefault(key, index)
    return found


def _tensor_arguments(spec: Any) -> set[str]:
    """Names of the arguments that are tensors."""
    return {a.name for a in spec.overload._schema.arguments if "Tensor" in str(a.type)}

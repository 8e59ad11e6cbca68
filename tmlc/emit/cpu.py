"""Program → CPU plan: the tables and the list of kernel calls of docs/plan-format.md, and the weights they
read.

The program must be ready for an engine: stateful, experts stacked, memory planned. Nothing is computed here;
what the plan says is a rewriting of the graphs, and the same program always gives the same plan.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from tmlc.emit.graph import direct_outputs, key_values, results, slot_layout, up
from tmlc.emit.lowering import LOWERINGS, REFUSED, Call, kernel_names
from tmlc.emit.packing import PackedWeight, packed_weight
from tmlc.emit.targets import Coverage
from tmlc.errors import REPORT, EmitError
from tmlc.ir.dims import Dim
from tmlc.ir.ops import spec_of
from tmlc.ir.program import FIX_CALL, Method, Program
from tmlc.ir.types import ITEM_BYTES, TensorType
from tmlc.package.manifest import MethodInfo, Signature, StateInfo

PLAN_VERSION = 2


@dataclass(frozen=True)
class Value:
    """Where a value of a method lives: an entry of the plan's tensor table that may not have been written
    yet.

    `offset` is in bytes, except for arguments (space input or output), where it is the argument's number.
    """

    space: str
    offset: int
    dtype: str
    rows: tuple[int, int]
    cols: int
    stride: int
    name: str = ""

    @property
    def dense(self) -> bool:
        return self.stride == self.cols or self.rows == (0, 1)

    def entry(self) -> dict[str, Any]:
        place: dict[str, Any] = {"name": self.name} if self.space == "weight" else {"offset": self.offset}
        form = {"dtype": self.dtype, "rows": list(self.rows), "cols": self.cols, "stride": self.stride}
        return {"space": self.space, **place, **form}


@dataclass
class CpuEngine:
    """What the CPU emitter makes of a program.

    Attributes:
        plan: the content of `plan.json`.
        weights: the tensors that the plan names, in the order of first use.
        methods, states: as they stand in the manifest.
    """

    plan: dict[str, Any]
    weights: list[PackedWeight]
    methods: tuple[MethodInfo, ...]
    states: tuple[StateInfo, ...]

    @property
    def arena_bytes(self) -> int:
        return self.plan["arena_bytes"]

    @property
    def slot_bytes(self) -> int:
        return self.plan["slot_bytes"]


def coverage(program: Program) -> list[Coverage]:
    """Which kernels a program would run on, and which of its ops have none, by method and op."""
    counts: dict[tuple[str, str], int] = {}
    sources: dict[tuple[str, str], str] = {}
    for method in program.methods.values():
        for node in method.graph.nodes:
            spec = spec_of(node.target) if node.op == "call_function" else None
            if spec is not None:
                key = (method.name, spec.name)
                counts[key] = counts.get(key, 0) + 1
                sources.setdefault(key, str(node.meta.get("source", "")))
    kernels = kernel_names()
    return [
        Coverage(
            method,
            op,
            count,
            kernels.get(op),
            REFUSED.get(op, "" if op in kernels else "no kernel"),
            sources[method, op],
            "" if op in kernels else "Use the pipeline of the target: --preset cpu.",
        )
        for (method, op), count in counts.items()
    ]


def emit(program: Program) -> CpuEngine:
    """Lowers a program to a CPU plan.

    Raises:
        EmitError: an op without a kernel, a state that the kernels cannot lay out, or a value that
            memory.plan gave no place; names the method and the node.
    """
    states, slot_bytes = slot_layout(program)
    table = _Table(program)
    offsets = {state.name: state.offset for state in states}
    emitters = [_MethodEmitter(method, table, offsets) for method in program.methods.values()]
    code = [emitter.emit() for emitter in emitters]
    plan = {
        "version": PLAN_VERSION,
        "arena_bytes": up(max((emitter.arena for emitter in emitters), default=0)),
        "slot_bytes": slot_bytes,
        "tensors": table.entries,
        "methods": code,
    }
    return CpuEngine(plan, list(table.weights.values()), tuple(e.signature() for e in emitters), states)


@dataclass
class _Table:
    """The plan's tensor table and its weights, shared by all methods; equal entries are written once."""

    program: Program
    entries: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[Value, int] = field(default_factory=dict)
    weights: dict[str, PackedWeight] = field(default_factory=dict)

    def number(self, value: Value) -> int:
        if value not in self.numbers:
            self.numbers[value] = len(self.entries)
            self.entries.append(value.entry())
        return self.numbers[value]

    def weight(self, name: str, form: str, dtype: str, shape: tuple[int, ...]) -> Value:
        packed = packed_weight(name, form, dtype, shape)
        self.weights.setdefault(packed.name, packed)
        return Value("weight", 0, packed.dtype, (0, packed.rows), packed.cols, packed.cols, packed.name)


class _MethodEmitter:
    """Lowers one method: gives every value its place, then writes one kernel call after the other."""

    def __init__(self, method: Method, table: _Table, offsets: dict[str, int]) -> None:
        self.method, self.table, self.offsets = method, table, offsets
        self.values: dict[tuple[fx.Node, int], Value] = {}
        self.code: list[dict[str, Any]] = []
        self.inputs: list[tuple[str, Value]] = []
        self.outputs: list[Value] = []
        self.arena = 0
        self.keys = key_values(method.graph)
        self.direct = direct_outputs(method.graph)

    def fail(self, node: fx.Node, what: str, fix: str) -> EmitError:
        return EmitError(what, where=f"method {self.method.name}, {node.name}", fix=fix)

    def emit(self) -> dict[str, Any]:
        self.arena = max((o + size for n in self.method.graph.nodes for o, size in _arena(n)), default=0)
        for node in self.method.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._output(node)
        return {
            "name": self.method.name,
            "max_n": self.method.max_n,
            "inputs": [self.table.number(value) for _, value in self.inputs],
            "outputs": [self.table.number(value) for value in self.outputs],
            "code": self.code,
        }

    def signature(self) -> MethodInfo:
        """The method as the manifest shows it."""
        inputs = tuple(Signature(name, v.dtype, v.rows, v.cols) for name, v in self.inputs)
        names = self.table.program.meta.get("outputs", {}).get(self.method.name, [])
        names = [*names, *(f"out{i}" for i in range(len(names), len(self.outputs)))]
        outputs = tuple(Signature(name, v.dtype, v.rows, v.cols) for name, v in zip(names, self.outputs, strict=False))
        return MethodInfo(self.method.name, inputs, outputs, self.method.max_n)

    # Places.

    def value(self, node: fx.Node) -> Value:
        """The value of an activation or an input."""
        if node.target is operator.getitem:
            return self.values[node.args[0], int(node.args[1])]  # type: ignore[index, arg-type]
        return self.values[node, 0]

    def weight(self, node: fx.Node, form: str) -> Value:
        """A weight in the form that a kernel reads."""
        kind, name = node.meta.get("role", ("", ""))
        if kind != "weight":
            what = "a kernel reads this operand from the weights, and it is none"
            raise self.fail(node, what, "Change the model: it has to be a weight (docs/plan-format.md, “Operations”).")
        entry = self.table.program.weights[name]
        return self.table.weight(name, form, entry.dtype, tuple(int(s) for s in entry.shape))

    def state(self, node: fx.Node, dtype: str, rows: int, cols: int) -> Value:
        """A state, seen as rows × cols."""
        kind, name = node.meta.get("role", ("", ""))
        if kind != "state":
            raise self.fail(node, "a kernel keeps this operand in the session, and it is no state", REPORT)
        return Value("slot", self.offsets[name], dtype, (0, rows), cols, cols)

    def number(self, value: Value) -> int:
        return self.table.number(value)

    def dtype(self, node: fx.Node, index: int, kind: TensorType) -> str:
        """Ids, levels and expert numbers are i32 in a plan; keys of the random stream stay i64."""
        return "i32" if kind.dtype == "i64" and (node, index) not in self.keys else kind.dtype

    def _typed(self, node: fx.Node, index: int, kind: TensorType, space: str, offset: int) -> Value:
        rows = kind.shape[0]
        pair = (rows.a, rows.b) if isinstance(rows, Dim) else (0, int(rows))
        cols = int(kind.shape[1])
        return Value(space, offset, self.dtype(node, index, kind), pair, cols, cols)

    def _placeholder(self, node: fx.Node) -> None:
        role, name = node.meta["role"]
        if role == "input":
            value = self._typed(node, 0, node.meta["type"], "input", len(self.inputs))
            self.values[node, 0] = value
            self.inputs.append((name, value))

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            return
        spec = spec_of(node.target)
        if spec is None:
            raise self.fail(node, f"{node.target} is not a canonical op", FIX_CALL)
        args = dict(zip(spec.args, node.args, strict=False)) | dict(node.kwargs)
        if spec.view:
            self.values[node, 0] = self._view(node, spec.name, args)
            return
        if spec.name not in LOWERINGS:
            reason = REFUSED.get(spec.name, "the CPU library has no kernel for it")
            raise self.fail(node, f"op {spec.name} cannot be lowered: {reason}", "See `tmlc compile --print-pipeline`.")
        types = node.meta["type"]
        kinds = (types,) if isinstance(types, TensorType) else tuple(types)
        arena = list(_arena(node))
        outputs = []
        for index, kind in enumerate(kinds):
            if (node, index) in self.direct:
                value = self._typed(node, index, kind, "output", self.direct[node, index])
            elif index < len(arena):
                value = self._typed(node, index, kind, "arena", arena[index][0])
            else:
                raise self.fail(node, "the value has no place in the arena", "Run memory.plan as the last pass.")
            self.values[node, index] = value
            outputs.append(value)
        LOWERINGS[spec.name].lower(Call(self, node, args, outputs))

    def call(self, op: str, t: list[Value], i: list[int], f: list[float]) -> None:
        """Writes one kernel call."""
        numbers = [self.number(value) for value in t]
        self.code.append({"op": op, "t": numbers, "i": [int(v) for v in i], "f": [float(v) for v in f]})

    def _view(self, node: fx.Node, op: str, args: dict[str, Any]) -> Value:
        x = self.value(args["x"])
        if op == "columns":
            start, stop = int(args["start"]), int(args["stop"])
            if start and x.space in ("input", "output"):
                x = self._copy(x)  # arguments of a method are addressed by number, not by byte
            offset = x.offset + start * ITEM_BYTES[x.dtype] if start else x.offset
            return replace(x, offset=offset, cols=stop - start)
        if op == "reshape":
            if not x.dense:
                x = self._copy(x)
            cols = int(args["cols"])
            a, b = (size * x.cols for size in x.rows)
            if a % cols or b % cols:
                what = f"{x.rows[0]}n+{x.rows[1]} rows of {x.cols} do not make rows of {cols}"
                raise self.fail(node, what, REPORT)
            return replace(x, rows=(a // cols, b // cols), cols=cols, stride=cols)
        raise self.fail(node, f"the view {op} is not known to the emitter", REPORT)

    def _copy(self, x: Value) -> Value:
        """A dense copy in a piece of arena of its own, behind everything that memory.plan laid out."""
        offset = up(self.arena)
        elements = (x.rows[0] * self.method.max_n + x.rows[1]) * x.cols
        self.arena = offset + elements * ITEM_BYTES[x.dtype]
        out = Value("arena", offset, x.dtype, x.rows, x.cols, x.cols)
        self.call("copy", [out, x], [], [])
        return out

    def _output(self, node: fx.Node) -> None:
        for index, result in enumerate(results(node)):
            value = self.value(result)
            if value.space != "output" or value.offset != index:
                out = Value("output", index, value.dtype, value.rows, value.cols, value.cols)
                self.call("copy", [out, value], [], [])
                value = out
            self.outputs.append(value)


def _arena(node: fx.Node) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of each output of a node, as memory.plan noted it; nothing for views and
    placeholders."""
    planned = node.meta.get("arena")
    if planned is None:
        return
    yield from planned if isinstance(planned, list) else [planned]

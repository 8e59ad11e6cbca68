"""Programs: methods (graphs of canonical ops) over one set of weights and states; the edits passes make.

A method's graph holds placeholders, calls of canonical ops, `operator.getitem` on ops with two results, and
the output. A placeholder carries `meta["role"] = ("input" | "weight" | "state", name)`; every node but the
output carries `meta["type"]`. Call arguments are always all positional, in schema order.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import fx

from tmlc.errors import IRError
from tmlc.ir.ops import OPS, OpSpec, spec_of
from tmlc.ir.types import TensorType, ValueType
from tmlc.ir.weights import WeightMap

__all__ = [
    "STATE_KINDS",
    "Fact",
    "Method",
    "PassRecord",
    "Program",
    "StateSpec",
    "call",
    "infer_type",
    "items",
    "replace",
    "role",
    "type_of",
    "uses",
]

STATE_KINDS = ("position", "kv_linear", "kv_ring", "conv_tail", "audio_window", "overlap")
ROLES = ("input", "weight", "state")
#: What to do about a call in a graph that is of no canonical op.
FIX_CALL = "make calls with tmlc.ir.program.call: a program holds the ops of docs/ir.md only"


class Fact(StrEnum):
    """What holds of a program: passes require and provide facts, the verifier checks those it can."""

    CANONICAL = "canonical"  # dead code is gone
    ROUTER_FUSED = "router_fused"  # router logits are computed inside the router wherever that was possible
    EXPERTS_STACKED = "experts_stacked"  # no shared_experts op is left
    LINEARS_MERGED = "linears_merged"
    NORMS_FUSED = "norms_fused"
    HEAD_FUSED = "head_fused"  # no sample reads logits that a linear could have kept to itself
    STATEFUL = "stateful"  # every op that needs history reads it from a state
    WEIGHTS_CAST = "weights_cast"
    MEMORY_PLANNED = "memory_planned"  # every call has meta["arena"]


@dataclass(frozen=True)
class StateSpec:
    """Memory that a session keeps between calls of one method.

    Attributes:
        name: unique in the program.
        kind: one of STATE_KINDS.
        shape, dtype: of the reference layout (docs/ir.md); engines may lay it out differently.
        method: the method whose graph reads and writes it.
        init: what it holds when a session opens; "zeros" is the only value.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    init: str = "zeros"

    @property
    def type(self) -> TensorType:
        return TensorType(self.dtype, tuple(self.shape))

    @property
    def nbytes(self) -> int:
        return self.type.nbytes()


@dataclass
class PassRecord:
    """What one pass did; kept in the program, shown by `inspect`, written into the package."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    matches: int = 0
    near_misses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ms: float = 0.0
    ops_before: int = 0
    ops_after: int = 0
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain data, the pass's name under `pass`."""
        fields = dict(vars(self))
        return {"pass": fields.pop("name"), **copy.deepcopy(fields)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PassRecord:
        fields = dict(data)
        return PassRecord(fields.pop("pass"), **fields)


class Method:
    """One entry point: a graph with a dynamic number `n` of new positions, 1 <= n <= max_n in an engine."""

    def __init__(self, name: str, graph: fx.Graph, max_n: int) -> None:
        self.name, self.graph, self.max_n = name, graph, max_n

    def placeholders(self, kind: str) -> list[fx.Node]:
        """The placeholders of one role (`input`, `weight` or `state`), in graph order."""
        return [node for node in self.graph.nodes if node.op == "placeholder" and role(node)[0] == kind]

    @property
    def inputs(self) -> list[fx.Node]:
        return self.placeholders("input")

    @property
    def output_node(self) -> fx.Node:
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes that the method returns."""
        returned = self.output_node.args[0]
        return (returned,) if isinstance(returned, fx.Node) else tuple(returned)  # type: ignore[arg-type]

    def calls(self, op: str | None = None) -> list[fx.Node]:
        """The canonical op calls in order; only those of one op if its name is given."""
        found = ((node, spec_of(node.target)) for node in self.graph.nodes if node.op == "call_function")
        return [node for node, spec in found if spec is not None and op in (None, spec.name)]

    def clone(self) -> Method:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        return Method(self.name, graph, self.max_n)

    def sweep(self) -> int:
        """Erases calls without readers (never one that changes a state), then weights that nothing reads.

        Returns how many nodes went."""
        erased = 0
        for node in reversed(list(self.graph.nodes)):
            spec = spec_of(node.target)
            dead_call = node.op == "call_function" and not (spec and spec.mutates)
            if not node.users and (dead_call or (node.op == "placeholder" and role(node)[0] == "weight")):
                self.graph.erase_node(node)
                erased += 1
        return erased


@dataclass
class Program:
    """Several methods over one weight map and one set of states.

    Attributes:
        methods: by name, in the order in which they are emitted.
        weights: where each weight comes from.
        states: what a session keeps (empty until state.insert has run).
        facts: what is known to hold.
        record: one entry for each pass that ran.
        meta: plain data: `kind` ("interaction" | "tokens"), `name`, tick layout, tokenizer file name.
    """

    methods: dict[str, Method]
    weights: WeightMap
    states: dict[str, StateSpec] = field(default_factory=dict)
    facts: frozenset[Fact] = frozenset()
    record: list[PassRecord] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def clone(self) -> Program:
        """A copy that shares no mutable part with this one (weights are descriptions, so this is cheap)."""
        return Program(
            {name: method.clone() for name, method in self.methods.items()},
            self.weights.copy(),
            dict(self.states),
            self.facts,
            copy.deepcopy(self.record),
            copy.deepcopy(self.meta),
        )

    def count_ops(self) -> int:
        """Canonical op calls in all methods."""
        return sum(len(method.calls()) for method in self.methods.values())

    def used_weights(self) -> list[str]:
        """Names of the weights that the graphs read, in order of first use."""
        names = [role(n)[1] for m in self.methods.values() for n in m.placeholders("weight") if n.users]
        return list(dict.fromkeys(names))

    def add_weight_input(self, method: str | Method, weight: str) -> fx.Node:
        """The placeholder of `weight` in a method, made if there is none. IRError if the map lacks it."""
        if weight not in self.weights:
            raise IRError(f"no weight {weight!r} in the program", fix="add it to program.weights first")
        return self._placeholder(method, "weight", weight, self.weights[weight].type)

    def add_state_input(self, method: str | Method, spec: StateSpec) -> fx.Node:
        """Declares `spec` (once) and returns its placeholder in the method that owns it."""
        target = self._method(method)
        if self.states.setdefault(spec.name, spec) != spec:
            fix = "give it another name, or the kind, shape, dtype and method that it has in program.states"
            raise IRError(f"state {spec.name!r} is already declared differently", where=target.name, fix=fix)
        return self._placeholder(target, "state", spec.name, spec.type)

    def _method(self, method: str | Method) -> Method:
        return self.methods[method] if isinstance(method, str) else method

    def _placeholder(self, method: str | Method, kind: str, name: str, value: TensorType) -> fx.Node:
        target = self._method(method)
        for node in target.placeholders(kind):
            if role(node)[1] == name:
                return node
        last = None
        for node in target.graph.nodes:
            if node.op != "placeholder":
                break
            last = node
        graph = target.graph
        with graph.inserting_before(next(iter(graph.nodes))) if last is None else graph.inserting_after(last):
            made = graph.placeholder(name.replace(".", "_"))
        made.meta["role"], made.meta["type"] = (kind, name), value
        return made


def role(node: fx.Node) -> tuple[str, str]:
    """(kind, name) of a placeholder."""
    found = node.meta.get("role")
    if not (isinstance(found, tuple) and len(found) == 2 and found[0] in ROLES):
        raise IRError(f"placeholder {node.name} has no role", fix=f"set meta['role'] = (one of {ROLES}, name)")
    return found


def type_of(node: fx.Node) -> TensorType:
    """The type of a node with one result."""
    found = node.meta.get("type")
    if not isinstance(found, TensorType):
        fix = "set meta['type'] to a TensorType; of a call with several results take one of `items`"
        raise IRError(f"node {node.name} has no tensor type but {found!r}", where=str(node.target), fix=fix)
    return found


def uses(node: fx.Node) -> list[fx.Node]:
    """The nodes that read `node`, in graph order."""
    return [other for other in node.graph.nodes if other in node.users]


def items(node: fx.Node) -> tuple[fx.Node, ...]:
    """The getitem nodes of a call with several results, in order; missing ones are made behind it."""
    types = node.meta["type"]
    found = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    for index in reversed(range(len(types))):
        if index not in found:
            with node.graph.inserting_after(node):
                made = node.graph.call_function(operator.getitem, (node, index))
            made.meta["type"] = types[index]
            found[index] = made
    return tuple(found[index] for index in range(len(types)))


def replace(old: fx.Node, new: fx.Node) -> None:
    """Lets every reader of `old` read `new`, and erases `old` (results of one call: replace its items)."""
    if old.meta.get("type") != new.meta.get("type"):
        what = f"{new.name}: {new.meta.get('type')} cannot stand for {old.name}: {old.meta.get('type')}"
        raise IRError(what, fix="replace a value by one of the same shape and dtype")
    old.replace_all_uses_with(new)
    if "source" in old.meta and new.op == "call_function":
        new.meta.setdefault("source", old.meta["source"])
        if new.target is operator.getitem:
            new.args[0].meta.setdefault("source", old.meta["source"])  # type: ignore[union-attr]
    old.graph.erase_node(old)


def positional(spec: OpSpec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """All arguments of a call in schema order, absent optional tensors as None; IRError if they misfit."""
    schema = spec.overload._schema.arguments
    fix = f"its arguments: {', '.join(spec.args)} (docs/ir.md)"
    if len(args) > len(schema):
        raise IRError(f"{spec.name} takes {len(schema)} arguments, not {len(args)}", where=spec.schema, fix=fix)
    values = list(args)
    rest = dict(kwargs)
    for argument in schema[len(args) :]:
        optional = isinstance(argument.type, torch.OptionalType)
        if argument.name not in rest and not optional and not argument.has_default_value():
            raise IRError(f"{spec.name} lacks the argument {argument.name}", where=spec.schema, fix=fix)
        values.append(rest.pop(argument.name, argument.default_value))
    if rest:
        raise IRError(f"{spec.name} does not take {', '.join(map(str, rest))}", where=spec.schema, fix=fix)
    for i, argument in enumerate(schema):
        kind = argument.type
        if isinstance(kind, torch.FloatType) and isinstance(values[i], int) and not isinstance(values[i], bool):
            values[i] = float(values[i])
        if isinstance(kind, torch.ListType) and isinstance(values[i], (list, tuple)):
            number = float if isinstance(kind.getElementType(), torch.FloatType) else int
            try:
                numbers = [number(v) for v in values[i]]
            except (TypeError, ValueError, OverflowError):
                numbers = []
            if numbers != list(values[i]):  # no number, or a part that int() cuts off
                what = f"{argument.name} of {spec.name} is a list of {number.__name__}, not {str(values[i])[:80]}"
                raise IRError(what, where=spec.schema, fix=fix)
            values[i] = numbers
    return tuple(values)


def infer_type(spec: OpSpec, args: Iterable[Any]) -> ValueType:
    """The result type of a call, from the types of its argument nodes. IRError if they do not fit the op."""
    plain = [a.meta.get("type") if isinstance(a, fx.Node) else a for a in args]
    try:
        return spec.shapes(*plain)
    except IRError as error:
        raise IRError(error.what, where=error.where or spec.name, fix=error.fix) from None


def call(
    graph: fx.Graph,
    op: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> fx.Node:
    """Adds a call of a canonical op at the graph's insert point, with its inferred type."""
    if op not in OPS:
        raise IRError(f"unknown op {op!r}", fix="see docs/ir.md for the canonical ops")
    spec = OPS[op]
    values = positional(spec, args, kwargs or {})
    value_type = infer_type(spec, values)
    node = graph.create_node("call_function", spec.overload, values, {}, name=name or op)
    node.meta["type"] = value_type
    return node

"""The rules that every program keeps, checked after every pass.

A broken rule raises IRError whose `where` is `method/node: rule`; the rules are the keys of RULES.
"""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import fx

from tmlc.errors import IRError
from tmlc.ir.dims import Dim
from tmlc.ir.ops import OpSpec, spec_of
from tmlc.ir.ops.attended import ATTENTION_WITH_CACHE
from tmlc.ir.program import STATE_KINDS, Fact, Method, Program, infer_type, role, type_of
from tmlc.ir.types import TensorType
from tmlc.ir.weights import infer_weight

__all__ = ["RULES", "verify"]

RULES = {
    "weights": "each weight is made of earlier ones and has the type that its op gives",
    "method": "a method is stored under its name; it has max_n >= 1, an input that grows with n, and results",
    "node": "a graph holds placeholders first, then op calls and getitems, then one output",
    "order": "a node reads only nodes before it in the same graph",
    "role": "a placeholder is an input, a weight or a state, once in a method, of the type declared for it",
    "schema": "a call has every argument, all positional, of the kind that the op's schema says",
    "type": "a node's type is the one that its op infers",
    "output": "a method returns results of calls",
    "state": "a state is declared with a known kind, and used by one op of the one method that owns it",
    "position": "a method that reads a position ends with one advance of it, by n rows",
    "cache": "a cache holds window, sinks and max_n positions; a linear one the advance limit",
    "fact": "what the facts say holds",
}
HISTORY_OPS = (
    "attention",
    "rope",
    "short_conv",
    "dynamic_conv",
    "dmel",
    "overlap_add",
)  # stateless forms that need the whole sequence


def verify(program: Program) -> None:
    """Raises IRError at the first rule of RULES that the program breaks."""
    _weights(program)
    for name, method in program.methods.items():
        if method.name != name:
            _fail("method", name, "", f"method {method.name!r} is stored as {name!r}")
        _graph(method)
        _roles(program, method)
        _inputs(method)
        for node in method.graph.nodes:
            if node.op == "call_function":
                _call(method, node)
        _outputs(method)
        _states(method)
        _position(method)
    _declared_states(program)
    _facts(program)


def _fail(rule: str, method: str, node: str, what: str, fix: str = "") -> NoReturn:
    place = "/".join(part for part in (method, node) if part)
    raise IRError(what, where=f"{place}: {rule}" if place else rule, fix=fix or f"the rule: {RULES[rule]}")


def _weights(program: Program) -> None:
    seen: dict[str, TensorType] = {}
    for name, entry in program.weights.items():
        if entry.op == "source":
            if len(entry.srcs) != 1 or entry.args:
                _fail("weights", "", name, "a source has one checkpoint tensor and no arguments")
        else:
            late = [src for src in entry.srcs if src not in seen]
            if late:
                _fail("weights", "", name, f"{late[0]!r} is not an earlier weight")
            try:
                made = infer_weight(name, entry.op, [seen[src] for src in entry.srcs], entry.args)
            except IRError as error:
                _fail("weights", "", name, error.what)
            if made != entry.type:
                _fail("weights", "", name, f"declared as {entry.type}, {entry.op} gives {made}")
        seen[name] = entry.type


def _graph(method: Method) -> None:
    seen: set[fx.Node] = set()
    calls = outputs = 0
    for node in method.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            _fail("node", method.name, node.name, f"a {node.op} node is not part of the IR")
        if node.op == "placeholder" and calls:
            _fail("node", method.name, node.name, "a placeholder after a call")
        if outputs:
            _fail("node", method.name, node.name, "a node after the output")
        calls += node.op == "call_function"
        outputs += node.op == "output"
        for used in node.all_input_nodes:
            if used not in seen:
                _fail("order", method.name, node.name, f"reads {used.name}, which is not before it")
        seen.add(node)
    if outputs != 1:
        _fail("node", method.name, "", "the graph has no output")


def _roles(program: Program, method: Method) -> None:
    seen = set()
    for node in method.graph.nodes:
        if node.op != "placeholder":
            continue
        try:
            kind, name = role(node)
            have = type_of(node)
        except IRError as error:
            _fail("role", method.name, node.name, error.what)
        if (kind, name) in seen:
            _fail("role", method.name, node.name, f"{kind} {name!r} has a second placeholder")
        seen.add((kind, name))
        if kind == "input":
            continue
        declared: Any = program.weights if kind == "weight" else program.states
        if name not in declared:
            _fail("role", method.name, node.name, f"{kind} {name!r} is not declared in the program")
        if declared[name].type != have:
            _fail("role", method.name, node.name, f"{kind} {name!r} is {declared[name].type}, not {have}")


def _call(method: Method, node: fx.Node) -> None:
    if node.target is operator.getitem:
        _getitem(method, node)
        return
    spec = spec_of(node.target)
    if spec is None:
        _fail("node", method.name, node.name, f"{node.target} is not a canonical op")
    schema = spec.overload._schema.arguments
    if node.kwargs or len(node.args) != len(schema):
        _fail("schema", method.name, node.name, f"{spec.name} takes {len(schema)} positional arguments")
    for argument, value in zip(schema, node.args, strict=True):
        if not _fits(argument.type, value):
            shown = value.name if isinstance(value, fx.Node) else repr(value)
            _fail("schema", method.name, node.name, f"{spec.name}: {argument.name} cannot be {shown}")
    try:
        made = infer_type(spec, node.args)
    except IRError as error:
        _fail("type", method.name, node.name, f"{spec.name}: {error.what}")
    if made != node.meta.get("type"):
        _fail("type", method.name, node.name, f"{spec.name} gives {made}, the node says {node.meta.get('type')}")


def _getitem(method: Method, node: fx.Node) -> None:
    args = node.args
    types = args[0].meta.get("type") if len(args) == 2 and isinstance(args[0], fx.Node) else None
    if not isinstance(types, tuple) or not isinstance(args[1], int) or not 0 <= args[1] < len(types):
        _fail(
            "schema",
            method.name,
            node.name,
            "getitem takes a call with several results and one of their numbers",
        )
    if node.meta.get("type") != types[args[1]]:
        _fail(
            "type",
            method.name,
            node.name,
            f"the result is {types[args[1]]}, the node says {node.meta.get('type')}",
        )


def _fits(kind: Any, value: Any) -> bool:
    if isinstance(kind, torch.OptionalType):
        return value is None or _fits(kind.getElementType(), value)
    if isinstance(kind, torch.TensorType):
        return isinstance(value, fx.Node) and isinstance(value.meta.get("type"), TensorType)
    if isinstance(kind, torch.ListType):
        return isinstance(value, (list, tuple)) and all(_fits(kind.getElementType(), v) for v in value)
    if isinstance(kind, torch.BoolType):
        return isinstance(value, bool)
    if isinstance(kind, torch.IntType):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(kind, torch.StringType):
        return isinstance(value, str)
    return isinstance(value, float)


def _inputs(method: Method) -> None:
    if method.max_n < 1:
        _fail("method", method.name, "", f"max_n is {method.max_n}")
    types = [type_of(node) for node in method.inputs]
    for node, have in zip(method.inputs, types, strict=True):
        if len(have.shape) != 2 or isinstance(have.shape[1], Dim):
            _fail("method", method.name, node.name, f"an input must be rows x fixed columns, not {have}")
    if not any(isinstance(have.shape[0], Dim) for have in types):
        _fail("method", method.name, "", "no input has rows that grow with n")


def _outputs(method: Method) -> None:
    returned = method.output_node.args
    if len(returned) != 1 or not isinstance(returned[0], (fx.Node, tuple, list)) or not method.outputs:
        _fail("method", method.name, "", "the method returns nothing")
    for node in method.outputs:
        tensor = isinstance(node, fx.Node) and isinstance(node.meta.get("type"), TensorType)
        if not tensor or node.op != "call_function":
            _fail("output", method.name, getattr(node, "name", ""), f"{node} is not the result of a call")


def _state_args(spec: OpSpec, node: fx.Node) -> list[tuple[str, Any]]:
    reads = "position" in spec.args and "position" not in spec.mutates
    names = (*spec.mutates, "position") if reads else spec.mutates
    absent = {name for name in names if name in spec.optional and node.args[spec.args.index(name)] is None}
    return [(name, node.args[spec.args.index(name)]) for name in names if name not in absent]


def _states(method: Method) -> None:
    writers: dict[fx.Node, fx.Node] = {}
    states = set(method.placeholders("state"))
    for node in method.calls():
        spec = spec_of(node.target)
        assert spec is not None
        bound = _state_args(spec, node)
        for name, state in bound:
            if state not in states:
                _fail("state", method.name, node.name, f"{spec.name}: {name} must be a state")
            if name in spec.mutates and writers.setdefault(state, node) is not node:
                _fail("state", method.name, node.name, f"{state.name} is changed by {writers[state].name} too")
        taken = [state for _, state in bound]
        if len(set(taken)) != len(taken):
            _fail("state", method.name, node.name, f"{spec.name} takes one state twice")
        for other in node.all_input_nodes:
            if other in states and other not in taken:
                _fail(
                    "state",
                    method.name,
                    node.name,
                    f"{spec.name} reads the state {other.name} as a plain tensor",
                )
    for state in states - set(writers):
        _fail("state", method.name, state.name, "no op changes this state")


def _position(method: Method) -> None:
    cached = [node for op in ATTENTION_WITH_CACHE for node in method.calls(op)]
    turned = [node for op in ("rope_state", "rope_table_state") for node in method.calls(op)]
    advances = method.calls("advance")
    if not cached and not turned and not advances:
        return
    if len(advances) != 1 or method.calls()[-1] is not advances[0]:
        _fail("position", method.name, "", f"{len(advances)} advance calls, or one that is not the last call")
    bound: tuple[Any, ...] = advances[0].args
    position, x, limit = bound
    if type_of(x).shape[0] != Dim(1):
        _fail("position", method.name, advances[0].name, "the rows it counts are not n")
    for node in (*cached, *turned):
        spec = spec_of(node.target)
        if spec is None or node.args[spec.args.index("position")] is not position:
            _fail("position", method.name, node.name, "it reads another position than the one that advances")
    for node in cached:
        spec = spec_of(node.target)
        assert spec is not None
        args: dict[str, Any] = dict(zip(spec.args, node.args, strict=True))
        capacity, window, sinks = type_of(args["k_cache"]).shape[0], args["window"], args["sinks"]
        if window == 0 and not 0 < limit <= capacity:
            _fail("cache", method.name, node.name, f"a linear cache of {capacity} rows, advance limit {limit}")
        if window > 0 and capacity - sinks < window - 1 + method.max_n:
            need = f"{sinks} sinks, a window of {window} and {method.max_n} new positions"
            _fail("cache", method.name, node.name, f"a ring of {capacity} rows cannot hold {need}")


def _declared_states(program: Program) -> None:
    used: dict[str, list[str]] = {}
    for name, method in program.methods.items():
        for node in method.placeholders("state"):
            used.setdefault(role(node)[1], []).append(name)
    for name, spec in program.states.items():
        if spec.name != name or spec.kind not in STATE_KINDS or spec.init != "zeros":
            _fail("state", spec.method, name, f"kind {spec.kind!r}, init {spec.init!r}, stored as {name!r}")
        if used.get(name, []) != [spec.method]:
            users = ", ".join(used.get(name, [])) or "no method"
            _fail("state", spec.method, name, f"it belongs to {spec.method} and is used by {users}")


def _facts(program: Program) -> None:
    for name, method in program.methods.items():
        for node in method.calls():
            spec = spec_of(node.target)
            assert spec is not None
            if Fact.STATEFUL in program.facts and spec.name in HISTORY_OPS:
                _fail("fact", name, node.name, f"{spec.name} has no state in a stateful program")
            if Fact.EXPERTS_STACKED in program.facts and spec.name == "shared_experts":
                _fail("fact", name, node.name, "shared_experts in a program whose experts are stacked")
            if Fact.MEMORY_PLANNED in program.facts and not spec.view and spec.outputs and "arena" not in node.meta:
                _fail("fact", name, node.name, f"{spec.name} has no arena place in a planned program")
    if program.states and Fact.STATEFUL not in program.facts:
        _fail("fact", "", next(iter(program.states)), "a state in a program that is not stateful")

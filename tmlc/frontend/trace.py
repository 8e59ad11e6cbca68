"""Tracing: an nn.Module over canonical ops becomes a method of a Program, through `torch.export` (strict).

The module may live on the meta device: only shapes are needed. Inputs come with their types (rows as a `Dim` of n); the
types of everything else follow from the ops' own shape functions.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from tmlc.errors import FrontendError, IRError
from tmlc.ir.dims import Dim
from tmlc.ir.ops import spec_of
from tmlc.ir.program import call
from tmlc.ir.source import traced_source
from tmlc.ir.types import TensorType

#: What export adds to speak about sizes; none of it computes a tensor, and types say the same.
_SIZE_CALLS = {
    torch.ops.aten.sym_size.int,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}
_SIZE_FUNCTIONS = {operator.eq, operator.ne, operator.ge, operator.le, operator.gt, operator.lt, operator.mul,
                   operator.floordiv, operator.mod, operator.add, operator.sub}  # fmt: skip
_EXAMPLE = 3  # an n that export does not specialise on (0 and 1 are special)
_MOST = 1 << 16
_NOISY = ("torch._guards", "torch.export._trace", "torch._dynamo")
_NO_SIZES = "arguments of ops must not depend on the number of positions"


def trace_method(
    name: str, module: nn.Module, inputs: Sequence[tuple[str, TensorType]], weight_names: Mapping[int, str]
) -> fx.Graph:
    """Exports `module` and returns its graph in IR form: canonical ops, placeholders with roles, types on every node.

    Args:
        name: of the method, for messages.
        inputs: name and type of each positional argument of `module.forward`.
        weight_names: id of a parameter or buffer → its name in the checkpoint. Several methods may share one.

    Raises:
        FrontendError: export fails, or the module uses an operation that is not canonical (named with its source line),
            a parameter that the checkpoint does not have, or a constant tensor.
    """
    exported = _export(name, module, [kind for _, kind in inputs])
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    seen: dict[str, fx.Node] = {}
    arguments = iter(inputs)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                label, kind = next(arguments)
                values[node] = placeholder(graph, label, ("input", label), kind)
                continue
            if not node.users:
                continue
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
                raise FrontendError(
                    f"the constant tensor {spec.target!r} is not a parameter or buffer",
                    where=name,
                    fix="register it as a buffer, so that the checkpoint carries it",
                )
            tensor = tensors[str(spec.target)]
            weight = weight_names.get(id(tensor))
            if weight is None:
                raise FrontendError(
                    f"parameter {spec.target!r} is not one of the model's", where=name, fix="register it in the model"
                )
            if weight not in seen:
                seen[weight] = placeholder(graph, weight, ("weight", weight), TensorType.of(tensor))
            values[node] = seen[weight]
        elif node.op == "call_function":
            _convert(graph, node, values, name)
        elif node.op == "output":
            _refuse_size_values(node, values, name)
            graph.output(tuple(values[a] for a in node.args[0]))
        else:
            raise FrontendError(f"a traced graph holds {node.op}", where=name, fix="write the model in canonical ops")
    return graph


def _export(name: str, module: nn.Module, types: list[TensorType]) -> Any:
    """The exported program. Rows of the form a·n need a second look: there, export takes a size that was read as a
    plain number for a constant without a word, which shows when another n gives another graph."""
    rows = [kind.shape[0] for kind in types]
    exported = _export_at(name, module, types, _EXAMPLE)
    if any(isinstance(size, Dim) and (size.a, size.b) != (1, 0) for size in rows):
        other = _export_at(name, module, types, _EXAMPLE + 1)
        for one, two in zip(exported.graph.nodes, other.graph.nodes, strict=True):
            if _plain(one) != _plain(two):
                raise FrontendError(
                    f"{one.name} computes with a size",
                    where=f"method {name}, {_source(one) or 'unknown source'}",
                    fix=_NO_SIZES,
                )
    return exported


def _export_at(name: str, module: nn.Module, types: list[TensorType], count: int) -> Any:
    device = next((t.device for t in module.parameters()), torch.device("cpu"))
    example = tuple(torch.zeros(t.at(count), dtype=t.torch_dtype, device=device) for t in types)
    n = torch.export.Dim("n", min=1, max=_MOST)
    shapes = []
    for kind in types:
        rows = kind.shape[0]
        if isinstance(rows, Dim):
            size = n if rows.a == 1 else rows.a * n
            shapes.append({0: size + rows.b if rows.b else size})
        else:
            shapes.append({})
    loggers = {logger: logger.level for logger in map(logging.getLogger, _NOISY)}
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)  # what they would print is in the exception
        with torch.no_grad():
            return torch.export.export(module, example, dynamic_shapes=tuple(shapes), strict=True)
    except Exception as error:
        raise FrontendError(
            f"torch.export refused the method: {_reason(error)}",
            where=_line_of(str(error)) or f"method {name}",
            fix="a method is straight-line code over canonical ops (tmlc.ir.ops.functional), see docs/ir.md",
        ) from error
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The rule that was broken, where one of ours is the cause; else the first line that torch says."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, IRError):
            return cause.what
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Constraints violated"):
        return "it computes with the size of an input"
    return lines[0] if lines else type(error).__name__


def _plain(node: fx.Node) -> tuple[str, str]:
    """What a node calls, and its arguments with other nodes by name."""
    return str(node.target), repr(fx.map_arg(node.args, str))


def placeholder(graph: fx.Graph, name: str, role: tuple[str, str], kind: TensorType) -> fx.Node:
    """Adds a placeholder behind the ones that are there."""
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
    with graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes), None)):
        node = graph.placeholder(re.sub(r"\W", "_", name))
    node.meta.update(role=role, type=kind)
    return node


def _convert(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any], method: str) -> None:
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0] in values:
        source, index = values[node.args[0]], node.args[1]
        item = graph.call_function(operator.getitem, (source, index))
        item.meta["type"] = source.meta["type"][index]
        item.meta["source"] = traced_source(node)
        values[node] = item
        return
    spec = spec_of(node.target)
    if spec is not None and not spec.from_pass:
        _refuse_size_values(node, values, method)
        try:
            values[node] = call(
                graph, spec.name, fx.map_arg(node.args, values.__getitem__), fx.map_arg(node.kwargs, values.__getitem__)
            )
        except IRError as error:
            raise FrontendError(error.what, where=_source(node) or method, fix=error.fix) from None
        values[node].meta["source"] = traced_source(node)
        return
    if node.target in _SIZE_CALLS or node.target in _SIZE_FUNCTIONS:
        return
    raise FrontendError(
        f"{node.target} is not a canonical op",
        where=f"method {method}, {_source(node) or 'unknown source'}",
        fix="write the model in the ops of tmlc.ir.ops.functional (docs/ir.md)",
    )


def _refuse_size_values(node: fx.Node, values: dict[fx.Node, Any], method: str) -> None:
    for source in node.all_input_nodes:
        if source not in values:
            raise FrontendError(
                f"{node.name} computes with a size ({source.name})",
                where=f"method {method}, {_source(node) or 'unknown source'}",
                fix=_NO_SIZES,
            )


def _source(node: fx.Node) -> str:
    return _line_of(node.meta.get("stack_trace") or "")


def _line_of(trace: str) -> str:
    """The innermost `File "x.py", line n` of a stack trace outside torch and the ops, as `x.py:n`."""
    found = re.findall(r'File "([^"]+)", line (\d+)', trace)
    lines = [
        f"{file}:{line}" for file, line in found if not file.endswith("ops/functional.py") and "/torch/" not in file
    ]
    return lines[-1] if lines else ""

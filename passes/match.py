"""What passes look at a graph with: which op a node calls, its arguments by name, the weight behind a node; and the
walk over all calls of an op that most of them are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx

from tmlc.ir.ops import OPS, spec_of
from tmlc.ir.program import Method, Program
from tmlc.pipeline.pass_base import NearMiss, PassResult


def op_of(node: object) -> str | None:
    """Name of the canonical op that a node calls; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    spec = spec_of(node.target)
    return spec.name if spec is not None else None


def arg(node: fx.Node, name: str) -> Any:
    """An argument of a call by its name in the op's schema (absent optional ones are None)."""
    spec = OPS[str(op_of(node))]
    if name in node.kwargs:
        return node.kwargs[name]
    index = spec.args.index(name)
    return node.args[index] if index < len(node.args) else None


def named_args(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, in schema order."""
    return {name: arg(node, name) for name in OPS[str(op_of(node))].args}


def weight_of(node: object) -> str | None:
    """The weight's name when the node is a weight placeholder."""
    if isinstance(node, fx.Node) and node.op == "placeholder" and node.meta["role"][0] == "weight":
        return str(node.meta["role"][1])
    return None


def rewrite_calls(
    program: Program, ops: tuple[str, ...], consider: Callable[[Method, fx.Node], Callable[[], None] | str | None]
) -> PassResult:
    """Looks at every call of some ops and rewrites those that fit; calls that nobody reads any more are removed.

    Args:
        consider: says of a call None (it does not look like a match), why it is none though it looks like one, or what
            rewrites it.
    """
    result = PassResult(program, 0)
    for method in program.methods.values():
        for node in [node for op in ops for node in method.calls(op)]:
            found = consider(method, node)
            if isinstance(found, str):
                result.near_misses.append(NearMiss(method.name, node.name, found))
            elif found is not None:
                found()
                result.matches += 1
        method.sweep()
    return result


def weight_users(program: Program, name: str) -> Iterator[tuple[str, fx.Node]]:
    """(method, call) of every use of a weight in any method."""
    for method in program.methods.values():
        for node in method.graph.nodes:
            if weight_of(node) == name:
                for user in node.users:
                    yield method.name, user


def why_not_own(program: Program, operands: Iterable[fx.Node]) -> str:
    """Why a call cannot have other weights in the place of these operands ("" where it can): one is computed, or
    something else reads it too."""
    for node in operands:
        name = weight_of(node)
        if name is None:
            return f"{node.name} is computed, not a weight"
        if len(list(weight_users(program, name))) != 1:
            return f"the weight {name} is used elsewhere too"
    return ""


def fresh_name(program: Program, wanted: str) -> str:
    """`wanted`, or with the first number behind it that makes it a new weight name."""
    name, number = wanted, 2
    while name in program.weights:
        name, number = f"{wanted}.{number}", number + 1
    return name


def common_name(names: list[str], tail: str) -> str:
    """A name for what several weights became: their common dotted beginning, then `tail`."""
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join([*shared, tail])

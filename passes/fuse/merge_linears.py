"""fuse.merge_linears: projections of one input become one projection and views of its columns."""

from __future__ import annotations

from torch import fx

from tmlc.ir.program import Fact, Method, Program, call, replace, type_of
from tmlc.passes.match import arg, common_name, fresh_name, op_of, weight_of, weight_users
from tmlc.pipeline.pass_base import NearMiss, Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

#: The weights (and biases, or none) of the linears that are to become one: the same tuple gives the same merged weight.
_Key = tuple[tuple[str, ...], tuple[str, ...]]


@register_pass("fuse.merge_linears")
class MergeLinears(Pass):
    """Merges linears that share their input (query, key, value and bias ranks; gate and up): the input is read
    once, and one long product keeps all threads busy where several short ones would meet at a barrier each."""

    provides = frozenset({Fact.LINEARS_MERGED})

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, 0)
        groups = _refined(
            [(method, group) for method in program.methods.values() for group in _groups(method, result.near_misses)]
        )
        keys = {node: _key(group) for _, group in groups for node in group}
        merged: dict[_Key, list[str]] = {}
        for method, group in groups:
            key = _key(group)
            stranger = _used_outside(program, key, keys)
            if stranger:
                result.near_misses.append(NearMiss(method.name, group[0].name, stranger))
                continue
            if key not in merged:
                merged[key] = [_concat(program, list(names)) for names in key if names]
            _merge(program, method, group, merged[key])
            result.matches += 1
        return result


def _groups(method: Method, near_misses: list[NearMiss]) -> list[list[fx.Node]]:
    """Linears of one input, one weight dtype, all with a bias or all without, that may be merged; at least two each."""
    found: dict[tuple[fx.Node, str, bool], list[fx.Node]] = {}
    for node in method.calls("linear"):
        bias = arg(node, "bias")
        found.setdefault((arg(node, "x"), type_of(arg(node, "weight")).dtype, bias is not None), []).append(node)
    groups = []
    for candidates in found.values():
        if len(candidates) < 2:
            continue
        group = []
        for node in candidates:
            reason = ""
            if any(op_of(user) == "reshape" for user in node.users):
                reason = "its result is reshaped, which columns of a longer row cannot be"
            elif any(op_of(user) == "topk_router" for user in node.users):
                reason = "it decides a routing, so it keeps its own precision"
            elif weight_of(arg(node, "weight")) is None or (arg(node, "bias") and weight_of(arg(node, "bias")) is None):
                reason = "its weight is computed"
            if reason:
                near_misses.append(NearMiss(method.name, node.name, reason))
            else:
                group.append(node)
        if len(group) > 1:
            groups.append(group)
    return groups


def _refined(groups: list[tuple[Method, list[fx.Node]]]) -> list[tuple[Method, list[fx.Node]]]:
    """The groups, taken apart where a weight of one is in another group without its neighbours (a looped layer reads
    one input for queries and keys in its first pass, and two later): what is always together can be merged in all."""
    places: dict[str, set[int]] = {}
    for number, (_, group) in enumerate(groups):
        for node in group:
            places.setdefault(str(weight_of(arg(node, "weight"))), set()).add(number)
    made = []
    for method, group in groups:
        together: dict[frozenset[int], list[fx.Node]] = {}
        for node in group:
            together.setdefault(frozenset(places[str(weight_of(arg(node, "weight")))]), []).append(node)
        made += [(method, part) for part in together.values() if len(part) > 1]
    return made


def _key(group: list[fx.Node]) -> _Key:
    weights = tuple(str(weight_of(arg(node, "weight"))) for node in group)
    biases = tuple(str(weight_of(arg(node, "bias"))) for node in group if arg(node, "bias") is not None)
    return weights, biases


def _used_outside(program: Program, key: _Key, keys: dict[fx.Node, _Key]) -> str:
    """Why merging would leave a second copy of a weight in the package ("" when it would not)."""
    if any(len(set(names)) != len(names) for names in key):
        return "two of these linears have the same weight"
    for names in key:
        for name in names:
            for where, user in weight_users(program, name):
                if keys.get(user) != key:
                    return f"the weight {name} is used by {where}/{user.name} too"
    return ""


def _concat(program: Program, names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    depth = next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), 0)
    tags = [part[depth].removesuffix("_proj") for part in parts]
    tail = "_".join(tags) if len(set(tags)) == len(tags) <= 4 else "merged"
    return program.weights.concat(fresh_name(program, common_name(names, f"{tail}.{parts[0][-1]}")), names, axis=0)


def _merge(program: Program, method: Method, group: list[fx.Node], names: list[str]) -> None:
    graph, first = method.graph, group[0]
    weight = program.add_weight_input(method.name, names[0])
    bias = program.add_weight_input(method.name, names[1]) if len(names) > 1 else None
    with graph.inserting_before(first):
        whole = call(graph, "linear", (arg(first, "x"), weight, bias))
        start = 0
        views = []
        for node in group:
            width = type_of(node).cols
            views.append(call(graph, "columns", (whole, start, start + width)))
            start += width
    for node, view in zip(group, views, strict=True):
        replace(node, view)
    method.sweep()

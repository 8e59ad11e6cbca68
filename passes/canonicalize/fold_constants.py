"""canonicalize.fold_constants: what is computed from weights alone is made when the model is compiled."""

from __future__ import annotations

from typing import Any

from torch import fx

from tmlc.ir.program import Method, Program, replace
from tmlc.passes.match import arg, fresh_name, op_of, weight_of
from tmlc.pipeline.pass_base import NearMiss, Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("canonicalize.fold_constants")
class FoldConstants(Pass):
    """Turns calls that read weights only into entries of the weight map, so that no tick computes them again.

    An entry of the map moves numbers and changes none (concat, slice, reshape, …), so that it is data, streamed and
    exact: `columns` and `reshape` of a weight are such entries. Arithmetic on weights (`add`, `mul`, `linear`, …) has
    no entry to become; it is told as a near miss and stays a call.
    """

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, 0)
        for method in program.methods.values():
            returned = method.outputs
            for node in method.calls():
                if not node.all_input_nodes or not all(weight_of(source) for source in node.all_input_nodes):
                    continue
                name = None if node in returned else _entry(program, node)
                if name is None:
                    what = f"the weight map has no entry for {op_of(node)}"
                    reason = "the method returns it" if node in returned else what
                    result.near_misses.append(NearMiss(method.name, node.name, reason))
                    continue
                _fold(program, method, node, name)
                result.matches += 1
            method.sweep()
        return result


def _entry(program: Program, node: fx.Node) -> str | None:
    """The weight that the call computes, added to the map once; None when it cannot be said as data."""
    op, source = op_of(node), weight_of(node.all_input_nodes[0])
    shape = program.weights[str(source)].shape
    if op not in ("columns", "reshape") or len(shape) != 2:
        return None
    if op == "columns":
        start, stop = int(arg(node, "start")), int(arg(node, "stop"))
        wanted = f"{source}.columns_{start}_{stop}"
        args: dict[str, Any] = {"axis": 1, "start": start, "stop": stop}
    else:
        cols = int(arg(node, "cols"))
        rows = shape[0] * shape[1] // cols
        wanted, args = f"{source}.reshape_{rows}_{cols}", {"shape": [rows, cols]}
    kind = "slice" if op == "columns" else "reshape"
    if wanted in program.weights:
        there = program.weights[wanted]
        if (there.op, there.srcs, there.args) == (kind, (source,), args):
            return wanted
    return program.weights.add(fresh_name(program, wanted), kind, [str(source)], args)


def _fold(program: Program, method: Method, node: fx.Node, name: str) -> None:
    replace(node, program.add_weight_input(method, name))

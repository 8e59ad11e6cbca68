"""fuse.flow_times: linears of one weight, one for each time of a flow, become one over all times."""

from __future__ import annotations

from torch import fx

from tmlc.ir.program import Method, Program, call, replace, type_of
from tmlc.passes.match import arg, op_of
from tmlc.pipeline.pass_base import NearMiss, Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("fuse.flow_times")
class FuseFlowTimes(Pass):
    """Turns linears of one weight over `silu(add_row(x, rows, i))`, which differ in i only (the modulations of each
    Euler step), into one linear of all their rows: its weight is read once, and no step waits for it."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, 0)
        for method in program.methods.values():
            groups: dict[tuple[fx.Node | None, ...], list[fx.Node]] = {}
            for node in method.calls("linear"):
                condition = arg(node, "x")
                if op_of(condition) == "silu" and op_of(arg(condition, "x")) == "add_row":
                    row = arg(condition, "x")
                    key = (arg(row, "x"), arg(row, "rows"), arg(node, "weight"), arg(node, "bias"))
                    groups.setdefault(key, []).append(node)
            for linears in groups.values():
                if len(linears) > 1:
                    _fuse(method, linears)
                    result.matches += 1
                else:
                    reason = "no other linear of its weight reads another row of the table"
                    result.near_misses.append(NearMiss(method.name, linears[0].name, reason))
            method.sweep()
        return result


def _fuse(method: Method, linears: list[fx.Node]) -> None:
    rows = [arg(arg(linear, "x"), "x") for linear in linears]
    x, table, first = arg(rows[0], "x"), arg(rows[0], "rows"), linears[0]
    graph, cols = method.graph, type_of(first).cols
    with graph.inserting_before(first):
        wide = call(graph, "silu_add_rows", (x, table, [arg(row, "index") for row in rows]))
        tall = call(graph, "reshape", (wide, type_of(x).cols))
        product = call(graph, "linear", (tall, arg(first, "weight"), arg(first, "bias")))
        flat = call(graph, "reshape", (product, len(linears) * cols))
        parts = [call(graph, "columns", (flat, at * cols, (at + 1) * cols)) for at in range(len(linears))]
    if "source" in first.meta:
        product.meta["source"] = first.meta["source"]
    for linear, part in zip(linears, parts, strict=True):
        replace(linear, part)

"""fuse.norm_pair: the norms of queries and of keys become one op."""

from __future__ import annotations

from torch import fx

from tmlc.ir.program import Method, Program, call, items, replace, type_of
from tmlc.passes.match import arg, op_of
from tmlc.pipeline.pass_base import NearMiss, Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("fuse.norm_pair")
class FuseNormPair(Pass):
    """Turns two `rms_norm` of columns of one product, over groups of one width, into `rms_norm_pair`: neither waits for
    the other, so they need not be two launches."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, 0)
        for method in program.methods.values():
            waiting: dict[fx.Node, fx.Node] = {}
            for node in method.calls("rms_norm"):
                if op_of(arg(node, "x")) != "columns":
                    continue
                source = arg(arg(node, "x"), "x")
                first = waiting.pop(source, None)
                if first is None:
                    waiting[source] = node
                    continue
                widths = {type_of(arg(norm, "weight")).cols for norm in (first, node)}
                if len(widths) > 1 or arg(first, "eps") != arg(node, "eps"):
                    reason = f"{first.name} norms columns of the same product with another width or eps"
                    result.near_misses.append(NearMiss(method.name, node.name, reason))
                else:
                    _fuse(method, first, node)
                    result.matches += 1
            method.sweep()
        return result


def _fuse(method: Method, first: fx.Node, second: fx.Node) -> None:
    view, graph = arg(second, "x"), method.graph
    with graph.inserting_before(first):  # the other columns may be cut out behind the first norm
        other = call(graph, "columns", (arg(view, "x"), arg(view, "start"), arg(view, "stop")))
        args = (arg(first, "x"), arg(first, "weight"), other, arg(second, "weight"), arg(first, "eps"))
        pair = call(graph, "rms_norm_pair", args)
    for old, new in zip((first, second), items(pair), strict=True):
        replace(old, new)

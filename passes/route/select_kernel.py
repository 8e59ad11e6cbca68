"""route.select_kernel: from how many new positions on the rows of a call are grouped by expert."""

from __future__ import annotations

from pydantic import Field
from torch import fx

from tmlc.ir.program import Program, call, replace
from tmlc.passes.match import named_args
from tmlc.pipeline.pass_base import NearMiss, Pass, PassConfig, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("route.select_kernel")
class SelectKernel(Pass):
    """Sets on each `moe` from how many rows on an engine groups them by expert, to read each touched expert once;
    with fewer rows it runs each pair of row and expert by itself, without the sorting.

    The bits of a result do not depend on the choice. The default is the CPU's (docs/passes.md): one row has distinct
    experts, so there is nothing to group, and from two rows on reading an expert once is worth the sorting.
    """

    class Config(PassConfig):
        grouped_from: int = Field(default=2, ge=0, le=1 << 20)

    config: Config

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result, wanted = PassResult(program, 0), self.config.grouped_from
        for method in program.methods.values():
            for node in method.calls("moe"):
                chosen = named_args(node)["grouped_from"]
                if chosen not in (0, wanted):
                    reason = f"it is grouped from {chosen} rows on already"
                    result.near_misses.append(NearMiss(method.name, node.name, reason))
                    continue
                if chosen != wanted:
                    _set(method.graph, node, wanted)
                result.matches += 1
        return result


def _set(graph: fx.Graph, node: fx.Node, grouped_from: int) -> None:
    args = named_args(node) | {"grouped_from": grouped_from}
    with graph.inserting_before(node):
        chosen = call(graph, "moe", tuple(args.values()))
    replace(node, chosen)

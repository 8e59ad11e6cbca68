"""fuse.head_logits: the head's scaling, its product and its soft cap become one op where a method returns logits."""

from __future__ import annotations

from tmlc.ir.program import Program, call, replace
from tmlc.passes.fuse.head import find_head
from tmlc.passes.match import arg, op_of
from tmlc.pipeline.pass_base import NearMiss, Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("fuse.head_logits")
class FuseHeadLogits(Pass):
    """Turns `scale` + `linear` + `softcap` + `columns` that a method returns into `head_logits`: one launch writes the
    result itself, and rows beyond the vocabulary are never computed."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, 0)
        for method in program.methods.values():
            for node in dict.fromkeys(method.outputs):
                if op_of(node) not in ("columns", "softcap", "linear"):
                    continue
                found = find_head(node)
                if isinstance(found, str):
                    result.near_misses.append(NearMiss(method.name, node.name, found))
                    continue
                linear, x, alpha, cap, entries = found
                if linear is node and x is arg(linear, "x"):
                    continue  # nothing stands around the product
                given = (x, arg(linear, "weight"), arg(linear, "bias"), alpha, cap, entries)
                with method.graph.inserting_before(node):
                    fused = call(method.graph, "head_logits", given)
                replace(node, fused)
                result.matches += 1
            method.sweep()
        return result

"""memory.overlap: kernels of a GPU that begin before the one before them has ended."""

from __future__ import annotations

from tmlc.ir.program import Program
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("memory.overlap")
class Overlap(Pass):
    """Lets each kernel be in place, with the weights that it needs on the way, while those before it still run
    (programmatic dependent launch; architectures from sm90 on). No bit depends on it.

    Before memory.buckets, in a pipeline of one's own: no preset has it, for it has not run on a GPU. Writes
    `program.meta["overlap"]`.
    """

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        program.meta["overlap"] = True
        return PassResult(program, 1)

"""quantize.int8: weights of linears and experts as 8-bit codes."""

from __future__ import annotations

from tmlc.ir.program import Program
from tmlc.passes.quantize.groups import GroupConfig, run_groups
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("quantize.int8")
class Int8(Pass):
    """Gives linears and experts 8-bit codes with a scale for each 32 inputs, so that a tick reads half the bytes that
    it reads in bf16; routers, norms, convolutions, bias tables and embeddings keep their numbers."""

    Config = GroupConfig
    config: GroupConfig

    @property
    def lossy(self) -> bool:
        return True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return run_groups(program, ctx, self.config, {}, "i8g32", {})

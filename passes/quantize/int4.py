"""quantize.int4: weights of the decoder's linears and experts as 4-bit codes."""

from __future__ import annotations

from typing import Literal

from tmlc.ir.program import Program
from tmlc.passes.quantize.groups import GroupConfig, run_groups
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

#: Methods whose weights are read for every position; the others (stems, unembedding, speech) are small or heard.
_BACKBONE = ("decode",)


class Int4Config(GroupConfig):
    """`group`: inputs that share a scale and a zero point."""

    group: Literal[32, 64] = 32


@register_pass("quantize.int4")
class Int4(Pass):
    """Gives the decoder's linears and experts 4-bit codes whose scales and zero points are searched for the least
    squared error (all other linears 8-bit codes), so that a tick reads a quarter of the bytes that it reads in bf16."""

    Config = Int4Config
    config: Int4Config

    @property
    def lossy(self) -> bool:
        return True

    @property
    def tolerance(self) -> float | None:
        return 0.5  # a model of random weights moves by the rounding of each layer, about 8 %, and by changed routes

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        scheme = f"i4g{self.config.group}"
        backbone = dict.fromkeys(_BACKBONE, scheme)
        return run_groups(program, ctx, self.config, backbone, "i8g32", {scheme: "i8g32"})

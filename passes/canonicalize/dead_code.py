"""canonicalize.dead_code: what nothing uses is removed."""

from __future__ import annotations

from tmlc.ir.program import Fact, Program
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("canonicalize.dead_code")
class DeadCode(Pass):
    """Removes calls, weight inputs and weight entries that no output and no state depends on: no bytes, no time."""

    provides = frozenset({Fact.CANONICAL})

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        removed = sum(method.sweep() for method in program.methods.values())
        entries = len(program.weights)
        program.weights.prune(program.used_weights())
        return PassResult(program, removed + entries - len(program.weights))

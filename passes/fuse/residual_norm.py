"""fuse.residual_norm: a residual addition and the norm of its sum become one op."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.program import Fact, Method, Program, call, items, replace, type_of
from tmlc.passes.match import arg, op_of, rewrite_calls
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("fuse.residual_norm")
class ResidualNorm(Pass):
    """Turns `add` + `rms_norm` into `add_rms_norm`: the sum is read while it is still in registers."""

    provides = frozenset({Fact.NORMS_FUSED})

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("rms_norm",), _consider)


def _consider(method: Method, norm: fx.Node) -> Callable[[], None] | str | None:
    total = arg(norm, "x")
    if total.target is operator.getitem and op_of(total.args[0]) == "add_rms_norm":
        return "the sum is normed by another norm already"
    if op_of(total) != "add":
        return None
    if type_of(arg(norm, "weight")).cols != type_of(total).cols:
        return "it norms groups of columns, not whole rows"
    return partial(_fuse, method.graph, total, norm)


def _fuse(graph: fx.Graph, total: fx.Node, norm: fx.Node) -> None:
    with graph.inserting_before(total):
        fused = call(graph, "add_rms_norm", (arg(total, "a"), arg(total, "b"), arg(norm, "weight"), arg(norm, "eps")))
    whole, normed = items(fused)
    replace(norm, normed)
    replace(total, whole)

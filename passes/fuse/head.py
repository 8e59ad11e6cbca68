"""fuse.head: the head's scaling, its product, its soft cap and the draw of a token become one op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx

from tmlc.ir.program import Fact, Method, Program, call, replace, type_of
from tmlc.passes.match import arg, op_of, rewrite_calls, weight_of
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("fuse.head")
class FuseHead(Pass):
    """Turns `scale` + `linear` + `softcap` + `columns` + `sample` into `head_sample`: a token is drawn while the logits
    are in registers, so that they are never written, and rows beyond the vocabulary are never computed."""

    provides = frozenset({Fact.HEAD_FUSED})

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = rewrite_calls(program, ("sample",), _consider)
        if result.near_misses:
            result.provides = frozenset()
        return result


def _consider(method: Method, node: fx.Node) -> Callable[[], None] | str:
    found = find_head(arg(node, "logits"))
    return found if isinstance(found, str) else partial(_fuse, method, node, found)


def _fuse(method: Method, node: fx.Node, found: tuple[fx.Node, fx.Node, float, float, int]) -> None:
    linear, x, alpha, cap, entries = found
    given = (x, arg(linear, "weight"), arg(linear, "bias"), arg(node, "key"), arg(node, "temperature"))
    with method.graph.inserting_before(node):
        fused = call(method.graph, "head_sample", (*given, alpha, cap, entries))
    replace(node, fused)


def find_head(here: fx.Node) -> tuple[fx.Node, fx.Node, float, float, int] | str:
    """(linear, its unscaled input, alpha, cap, entries) of logits, or why they cannot be fused."""
    settings: dict[str, Any] = {}
    entries = type_of(here).cols
    while True:
        op = op_of(here)
        if op not in ("linear", "softcap", "columns"):
            return f"its logits come from {op or here.op}, not from a linear"
        if len(here.users) != 1:
            return f"its logits ({op}) have {len(here.users)} readers"
        if op == "linear":
            break
        if op in settings:
            return f"its logits go through {op} twice"
        if op == "columns" and arg(here, "start"):
            return f"its logits begin at column {arg(here, 'start')}"
        settings[op] = arg(here, "cap") if op == "softcap" else arg(here, "stop")
        here = arg(here, "x")
    given = [node for node in (arg(here, "weight"), arg(here, "bias")) if node is not None]
    if not all(weight_of(node) for node in given):
        return "the weight of its logits is computed"
    x, alpha = arg(here, "x"), 1.0
    if op_of(x) == "scale":
        x, alpha = arg(x, "x"), float(arg(x, "alpha"))
    return here, x, alpha, float(settings.get("softcap", 0.0)), entries

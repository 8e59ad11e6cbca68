"""route.fuse_router: the router's projection and its choice become one op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.program import Fact, Method, Program, call, replace
from tmlc.passes.match import arg, op_of, rewrite_calls
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("route.fuse_router")
class FuseRouter(Pass):
    """Turns `linear` + `sink_router` into `router`: the logits never leave the kernel, and stay float32."""

    provides = frozenset({Fact.ROUTER_FUSED})

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("sink_router",), _consider)


def _consider(method: Method, node: fx.Node) -> Callable[[], None] | str:
    return _why_not(node) or partial(_fuse, method.graph, node)


def _why_not(node: fx.Node) -> str:
    logits = arg(node, "logits")
    if op_of(logits) != "linear":
        return f"its logits come from {op_of(logits) or logits.op}, not from a linear"
    if arg(logits, "bias") is not None:
        return "the projection of its logits has a bias"
    if len(logits.users) != 1:
        return f"its logits have {len(logits.users)} users"
    return ""


def _fuse(graph: fx.Graph, node: fx.Node) -> None:
    logits = arg(node, "logits")
    settings = [arg(node, name) for name in ("bias", "scale", "top_k", "n_shared", "route_scale")]
    with graph.inserting_before(node):
        fused = call(graph, "router", (arg(logits, "x"), arg(logits, "weight"), *settings))
    replace(node, fused)
    graph.erase_node(logits)

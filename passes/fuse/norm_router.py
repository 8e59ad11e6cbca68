"""fuse.norm_router: the norm before a router becomes part of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.program import Method, Program, call, items, replace, type_of
from tmlc.passes.match import arg, named_args, op_of, rewrite_calls, weight_of
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("fuse.norm_router")
class FuseNormRouter(Pass):
    """Turns the `rms_norm` of whole rows that a `router` reads into `norm_router`: each program of the logits reads the
    whole row anyway. The normed rows are a result of it, which the experts and whatever else reads them take."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("router",), _consider)


def _consider(method: Method, router: fx.Node) -> Callable[[], None] | str | None:
    norm = arg(router, "x")
    if op_of(norm) != "rms_norm":
        return None
    return _why_not(norm, router) or partial(_fuse, method, norm, router)


def _why_not(norm: fx.Node, router: fx.Node) -> str:
    if type_of(arg(norm, "weight")).cols != type_of(norm).cols:
        return f"{norm.name} norms groups of columns, not whole rows"
    for other in norm.users:
        if op_of(other) == "router" and other is not router:
            return f"{other.name} reads {norm.name} too"
    given = [value for value in named_args(router).values() if isinstance(value, fx.Node) and value is not norm]
    computed = [value.name for value in given if weight_of(value) is None]
    return f"its operand {computed[0]} is computed" if computed else ""


def _fuse(method: Method, norm: fx.Node, router: fx.Node) -> None:
    _, *settings = named_args(router).values()
    with method.graph.inserting_before(norm):  # others may read the normed rows before the router does
        fused = call(method.graph, "norm_router", (arg(norm, "x"), arg(norm, "weight"), arg(norm, "eps"), *settings))
    if "source" in router.meta:
        fused.meta["source"] = router.meta["source"]
    weights, experts, normed = items(fused)
    for old, new in zip(items(router), (weights, experts), strict=True):
        replace(old, new)
    method.graph.erase_node(router)
    replace(norm, normed)

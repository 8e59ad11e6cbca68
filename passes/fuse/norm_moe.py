"""fuse.norm_moe: a router that norms rows becomes part of the experts that alone read it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.program import Method, Program, call, items, replace
from tmlc.passes.match import named_args, op_of, rewrite_calls
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

#: By router: experts that it can become part of, and what both are then.
_EXPERTS = {
    "norm_router": (("moe_conv_state",), "norm_moe_conv_state"),
    "norm_topk_router": (("moe", "moe_add"), "norm_topk_moe"),
}


@register_pass("fuse.norm_moe")
class FuseNormMoe(Pass):
    """Turns a `norm_router` and the `moe_conv_state` that alone reads its weights, its experts and its rows into
    `norm_moe_conv_state`, and a `norm_topk_router` and its `moe` or `moe_add` into `norm_topk_moe`: of few rows each
    program of the experts chooses its own."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, tuple(_EXPERTS), _consider)


def _consider(method: Method, router: fx.Node) -> Callable[[], None] | str | None:
    readers = {user for item in items(router) for user in item.users}
    found = [user for user in readers if op_of(user) in _EXPERTS[str(op_of(router))][0]]
    if not found:
        return None
    if len(readers) > 1:
        return f"it has {len(readers)} readers"
    given = named_args(found[0])
    read = [name for name, value in given.items() if isinstance(value, fx.Node) and value in items(router)]
    if [given[name] for name in ("weights", "experts", "x")] != list(items(router)) or len(read) != 3:
        return f"{found[0].name} reads its results otherwise"
    return partial(_fuse, method, router, found[0])


def _fuse(method: Method, router: fx.Node, experts: fx.Node) -> None:
    made = _EXPERTS[str(op_of(router))][1]
    given = {name: value for name, value in named_args(experts).items() if name not in ("x", "weights", "experts")}
    if op_of(experts) == "moe":
        given = {"addend": None} | given
    with method.graph.inserting_before(experts):
        fused = call(method.graph, made, (*named_args(router).values(), *given.values()))
    replace(experts, fused)
    for item in items(router):
        method.graph.erase_node(item)
    method.graph.erase_node(router)

"""fuse.norm_moe: a norm_router becomes part of the experts that alone read it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.program import Method, Program, call, items, replace
from tmlc.passes.match import arg, named_args, op_of, rewrite_calls
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("fuse.norm_moe")
class FuseNormMoe(Pass):
    """Turns a `norm_router` and the `moe_conv_state` that alone reads its weights, its experts and its rows into
    `norm_moe_conv_state`: of few rows each program of the experts chooses its own."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("norm_router",), _consider)


def _consider(method: Method, router: fx.Node) -> Callable[[], None] | str | None:
    readers = {user for item in items(router) for user in item.users}
    found = [user for user in readers if op_of(user) == "moe_conv_state"]
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
    given = {name: value for name, value in named_args(experts).items() if name not in ("x", "weights", "experts")}
    x = arg(router, "x")
    with method.graph.inserting_before(experts):
        fused = call(method.graph, "norm_moe_conv_state", (*named_args(router).values(), *given.values()))
    assert arg(fused, "x") is x
    replace(experts, fused)
    for item in items(router):
        method.graph.erase_node(item)
    method.graph.erase_node(router)

"""fuse.swiglu: gates and ups of one product are multiplied by the product itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.program import Method, Program, call, replace, type_of
from tmlc.passes.match import arg, named_args, op_of, rewrite_calls
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("fuse.swiglu")
class FuseSwiglu(Pass):
    """Turns a `linear` and the `swiglu` of the two halves of its columns into `linear_swiglu`: whoever makes a column
    of gates makes the column of ups that belongs to it."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("swiglu",), _consider)


def _consider(method: Method, product: fx.Node) -> Callable[[], None] | str | None:
    halves = arg(product, "gate"), arg(product, "up")
    if any(op_of(half) != "columns" for half in halves):
        return None
    linear = arg(halves[0], "x")
    if op_of(linear) != "linear" or arg(halves[1], "x") is not linear:
        return None
    return _why_not(linear, product, halves) or partial(_fuse, method, linear, product)


def _why_not(linear: fx.Node, product: fx.Node, halves: tuple[fx.Node, fx.Node]) -> str:
    width = type_of(product).cols
    places = [(arg(half, "start"), arg(half, "stop")) for half in halves]
    if places != [(0, width), (width, 2 * width)] or type_of(linear).cols != 2 * width:
        return f"its operands are not the first and the second half of {linear.name}"
    for node in (linear, *halves):
        readers = [user for user in node.users if user not in (product, *halves)]
        if readers:
            return f"{readers[0].name} reads {node.name} too"
    return ""


def _fuse(method: Method, linear: fx.Node, product: fx.Node) -> None:
    with method.graph.inserting_before(product):
        fused = call(method.graph, "linear_swiglu", tuple(named_args(linear).values()))
    if "source" in linear.meta:
        fused.meta["source"] = linear.meta["source"]
    replace(product, fused)

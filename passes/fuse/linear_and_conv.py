"""fuse.linear_and_conv: a product that is read beside its convolution too makes both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.ops.fused import MAX_TAPS
from tmlc.ir.program import Method, Program, call, items, replace, type_of
from tmlc.passes.match import arg, named_args, op_of, rewrite_calls
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

_PRODUCTS = ("linear", "linear_add")


@register_pass("fuse.linear_and_conv")
class FuseLinearAndConv(Pass):
    """Turns `linear` or `linear_add` and the `short_conv_state` that reads its result, as others do, into
    `linear_and_conv_state`: who has made a column convolves it at once. The blocks of a vocoder are of this kind: what
    is convolved is also what the next residual is added to."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("short_conv_state",), _consider)


def _consider(method: Method, conv: fx.Node) -> Callable[[], None] | str | None:
    product = arg(conv, "x")
    if op_of(product) not in _PRODUCTS:
        return None
    if type_of(arg(conv, "weight")).cols > MAX_TAPS:
        return f"it has more than {MAX_TAPS} taps"
    if sum(op_of(user) == "short_conv_state" for user in product.users) > 1:
        return f"{product.name} is convolved twice"
    return partial(_fuse, method, product, conv)


def _fuse(method: Method, product: fx.Node, conv: fx.Node) -> None:
    given = {"scale": None, "addend": None} | named_args(product)
    operands = tuple(given[name] for name in ("x", "weight", "bias", "scale", "addend"))
    with method.graph.inserting_before(product):
        after = (arg(conv, "weight"), arg(conv, "tail"), arg(conv, "residual"))
        fused = call(method.graph, "linear_and_conv_state", (*operands, *after))
    if "source" in product.meta:
        fused.meta["source"] = product.meta["source"]
    whole, mixed = items(fused)
    replace(conv, mixed)
    replace(product, whole)

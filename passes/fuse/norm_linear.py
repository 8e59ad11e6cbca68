"""fuse.norm_linear: the norm of a row becomes part of the product that alone reads it."""

from __future__ import annotations

from torch import fx

from tmlc.ir.program import Method, Program, call, replace, type_of
from tmlc.passes.match import arg, named_args, op_of
from tmlc.pipeline.pass_base import NearMiss, Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

_PRODUCTS = ("linear", "linear_steps", "linear_conv_state")


@register_pass("fuse.norm_linear")
class FuseNormLinear(Pass):
    """Turns `rms_norm` of whole rows and the `linear`, `linear_steps` or `linear_conv_state` that is its only reader
    into one op: the product sums the squares of what it reads anyway, and is scaled by their root at the end."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, 0)
        for method in program.methods.values():
            for norm in method.calls("rms_norm"):
                products = [user for user in norm.users if op_of(user) in _PRODUCTS and arg(user, "x") is norm]
                if not products:
                    continue
                reason = _why_not(norm, products)
                if reason:
                    result.near_misses.append(NearMiss(method.name, norm.name, reason))
                    continue
                _fuse(method, norm, products[0])
                result.matches += 1
            method.sweep()
        return result


def _why_not(norm: fx.Node, products: list[fx.Node]) -> str:
    if type_of(arg(norm, "weight")).cols != type_of(norm).cols:
        return "it norms groups of columns, not whole rows"
    if len(norm.users) > 1:
        return f"{products[0].name} is one of its {len(norm.users)} readers"
    if [value for value in named_args(products[0]).values() if value is norm] != [norm]:
        return f"{products[0].name} reads it twice"
    return ""


def _fuse(method: Method, norm: fx.Node, product: fx.Node) -> None:
    _, *args = named_args(product).values()
    given = (arg(norm, "x"), arg(norm, "weight"), arg(norm, "eps"), *args)
    with method.graph.inserting_before(product):
        fused = call(method.graph, f"norm_{op_of(product)}", given)
    replace(product, fused)

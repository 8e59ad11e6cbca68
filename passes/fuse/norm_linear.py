"""fuse.norm_linear: the norm of a row, and its modulation, become part of the product that alone reads it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.program import Method, Program, call, replace, type_of
from tmlc.ir.steps import read_steps
from tmlc.passes.match import arg, named_args, op_of, rewrite_calls
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

_PRODUCTS = ("linear", "linear_steps", "linear_swiglu", "linear_conv_state")
_MODULATED = {"linear": "modulated_linear", "linear_steps": "modulated_linear_steps"}
#: Forms of weights whose kernels have no registers left for squares: with 16 rows they spilled.
FULL = ("i4g32",)


@register_pass("fuse.norm_linear")
class FuseNormLinear(Pass):
    """Turns `rms_norm` of whole rows and the product (one of _PRODUCTS) that is its only reader into one op: that sums
    the squares of what it reads anyway, and is scaled by their root at the end. A norm that is modulated
    (`rms_norm_steps` of an adaptive norm) becomes part of a `linear` or `linear_steps`: the shift has a product of its
    own, with weights that are there."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("rms_norm", "rms_norm_steps"), _consider)


def _consider(method: Method, norm: fx.Node) -> Callable[[], None] | str | None:
    products = [user for user in norm.users if op_of(user) in _PRODUCTS and arg(user, "x") is norm]
    if not products:
        return None
    return _why_not(norm, products) or partial(_fuse, method, norm, products[0])


def _why_not(norm: fx.Node, products: list[fx.Node]) -> str:
    if op_of(norm) == "rms_norm_steps":
        if _modulation(norm) is None:
            return f"the steps behind it are not a modulation: {arg(norm, 'steps')}"
        if op_of(products[0]) not in _MODULATED:
            return f"{op_of(products[0])} takes no modulated rows"
    if type_of(arg(norm, "weight")).cols != type_of(norm).cols:
        return "it norms groups of columns, not whole rows"
    if len(norm.users) > 1:
        return f"{products[0].name} is one of its {len(norm.users)} readers"
    if [value for value in named_args(products[0]).values() if value is norm] != [norm]:
        return f"{products[0].name} reads it twice"
    if type_of(arg(products[0], "weight")).dtype in FULL:
        return f"a product with weights of {type_of(arg(products[0], 'weight')).dtype} has no registers left for it"
    return ""


def _modulation(norm: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(gain, shift) where the steps behind a norm are no more than a modulation of what it normed."""
    (first, *more) = read_steps(arg(norm, "steps"), arg(norm, "numbers"))
    if more or first.op != "modulate" or first.operands[0] != "v" or "v" in first.operands[1:]:
        return None
    gain, shift = (arg(norm, letter) for letter in first.operands[1:])
    return gain, shift


def _fuse(method: Method, norm: fx.Node, product: fx.Node) -> None:
    _, *args = named_args(product).values()
    name, modulation = f"norm_{op_of(product)}", None
    if op_of(norm) == "rms_norm_steps":
        name, modulation = _MODULATED[str(op_of(product))], _modulation(norm)
    given = (arg(norm, "x"), arg(norm, "weight"), arg(norm, "eps"), *(modulation or ()), *args)
    with method.graph.inserting_before(product):
        fused = call(method.graph, name, given)
    replace(product, fused)

"""fuse.norm_topk_router: the norm before the logits of a top-k router, and their product, become part of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.program import Method, Program, call, items, replace, type_of
from tmlc.passes.match import arg, named_args, op_of, rewrite_calls, weight_of
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("fuse.norm_topk_router")
class FuseNormTopkRouter(Pass):
    """Turns a `topk_router`, the `linear` in float32 that makes its logits and the `rms_norm` of whole rows before that
    into `norm_topk_router`: two launches in the place of three. The normed rows are a result of it, which the experts
    and whatever else reads them take. An `append_experts` that alone reads the router becomes part of it too."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("topk_router",), _consider)


def _consider(method: Method, router: fx.Node) -> Callable[[], None] | str | None:
    product = arg(router, "logits")
    if op_of(product) != "linear" or op_of(arg(product, "x")) != "rms_norm":
        return None
    norm = arg(product, "x")
    return _why_not(norm, product, router) or partial(_fuse, method, norm, product, router)


def _why_not(norm: fx.Node, product: fx.Node, router: fx.Node) -> str:
    if len(product.users) > 1:
        return f"it is one of {len(product.users)} readers of {product.name}"
    if type_of(arg(product, "weight")).dtype != "f32":
        return f"the weight of {product.name} is {type_of(arg(product, 'weight')).dtype}, not f32"
    if type_of(arg(norm, "weight")).cols != type_of(norm).cols:
        return f"{norm.name} norms groups of columns, not whole rows"
    for other in norm.users:
        if other is not product and any(op_of(reader) == "topk_router" for reader in other.users):
            return f"{other.name} makes logits of {norm.name} too"
    given = (*named_args(product).values(), *named_args(router).values())
    computed = [value.name for value in given if isinstance(value, fx.Node) and value not in (norm, product)
                and weight_of(value) is None]  # fmt: skip
    return f"its operand {computed[0]} is computed" if computed else ""


def _fuse(method: Method, norm: fx.Node, product: fx.Node, router: fx.Node) -> None:
    _, *settings = named_args(router).values()
    row = (arg(norm, "x"), arg(norm, "weight"), arg(norm, "eps"))
    appended = _appended(product, router)
    shared = 0 if appended is None else arg(appended, "count")
    given = (*row, arg(product, "weight"), arg(product, "bias"), *settings, shared)
    with method.graph.inserting_before(norm):  # others may read the normed rows before the router does
        fused = call(method.graph, "norm_topk_router", given)
    if "source" in router.meta:
        fused.meta["source"] = router.meta["source"]
    weights, experts, normed = items(fused)
    for old, new in zip(items(router if appended is None else appended), (weights, experts), strict=True):
        replace(old, new)
    if appended is not None:
        method.graph.erase_node(appended)
        for item in items(router):
            method.graph.erase_node(item)
    method.graph.erase_node(router)
    method.graph.erase_node(product)
    replace(norm, normed)


def _appended(product: fx.Node, router: fx.Node) -> fx.Node | None:
    """The append_experts that alone reads a router's results and goes on where its experts end."""
    readers = {user for item in items(router) for user in item.users}
    found = readers.pop() if len(readers) == 1 else None
    if op_of(found) != "append_experts":
        return None
    assert found is not None
    whole = [arg(found, "weights"), arg(found, "experts")] == list(items(router))
    return found if whole and arg(found, "first") == type_of(product).cols else None

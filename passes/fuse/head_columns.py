"""fuse.head_columns: the parts of heads that a product makes become columns of it that follow each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from torch import fx

from tmlc.ir.program import Method, Program, call, replace, type_of
from tmlc.passes.match import arg, fresh_name, op_of, rewrite_calls, weight_of, why_not_own
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("fuse.head_columns")
class FuseHeadColumns(Pass):
    """Sorts the rows of a weight by the parts that heads of its product are cut into (keys and values of latent
    attention), so that each `head_columns` is `columns`, which copies nothing."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("linear",), partial(_consider, program))


def _consider(program: Program, method: Method, product: fx.Node) -> Callable[[], None] | str | None:
    parts = [user for user in product.users if op_of(user) == "head_columns"]
    if not parts:
        return None
    parts.sort(key=lambda part: int(arg(part, "start")))
    return _why_not(program, product, parts) or partial(_fuse, program, method, product, parts)


def _why_not(program: Program, product: fx.Node, parts: list[fx.Node]) -> str:
    if len(product.users) > len(parts):
        return f"it has {len(product.users) - len(parts)} readers that take no part of its heads"
    heads = {arg(part, "num_heads") for part in parts}
    if len(heads) > 1:
        return f"it is cut into {' and into '.join(map(str, sorted(heads)))} heads"
    width = type_of(product).cols // arg(parts[0], "num_heads")
    edges = [0, *(edge for part in parts for edge in (arg(part, "start"), arg(part, "stop"))), width]
    if any(end != begin for end, begin in list(pairwise(edges))[::2]):
        return f"its parts are not the columns of heads of {width}, one after the other"
    operands = (arg(product, "weight"), arg(product, "bias"))
    return why_not_own(program, (operand for operand in operands if operand is not None))


def _fuse(program: Program, method: Method, product: fx.Node, parts: list[fx.Node]) -> None:
    heads = int(arg(parts[0], "num_heads"))
    ranges = [(int(arg(part, "start")), int(arg(part, "stop"))) for part in parts]
    operands = [
        None if operand is None else program.add_weight_input(method.name, _sorted(program, operand, heads, ranges))
        for operand in (arg(product, "weight"), arg(product, "bias"))
    ]
    at = 0
    with method.graph.inserting_before(product):
        whole = call(method.graph, "linear", (arg(product, "x"), *operands))
        if "source" in product.meta:
            whole.meta["source"] = product.meta["source"]
        views = []
        for start, stop in ranges:
            views.append(call(method.graph, "columns", (whole, at, at + heads * (stop - start))))
            at += heads * (stop - start)
    for part, view in zip(parts, views, strict=True):
        replace(part, view)


def _sorted(program: Program, operand: fx.Node, heads: int, ranges: list[tuple[int, int]]) -> str:
    """The weight, or the bias, with the rows of all heads' first parts before those of their second ones."""
    name, shape, weights = str(weight_of(operand)), type_of(operand).shape, program.weights
    bias = len(shape) == 1 or shape[0] == 1
    rows, tail = (shape[-1], ()) if bias else (shape[0], tuple(shape[1:]))
    cut = weights.reshape(fresh_name(program, f"{name}.heads"), name, (heads, rows // heads, *tail))
    flat = []
    for start, stop in ranges:
        part = weights.slice(fresh_name(program, f"{name}.{start}-{stop}"), cut, 1, start, stop)
        of_part = (heads * (stop - start), *tail)
        flat.append(weights.reshape(fresh_name(program, f"{part}.rows"), part, of_part))
    whole = weights.concat(fresh_name(program, f"{name}.by_part"), flat, axis=0)
    if tuple(shape) == (rows, *tail):
        return whole
    return weights.reshape(fresh_name(program, f"{whole}.row"), whole, tuple(shape))

"""fuse.attention_epilogue: output projections and experts add the residual to what they have just computed."""

from __future__ import annotations

from typing import Any

from torch import fx

from tmlc.ir.program import Fact, Method, Program, call, items, replace
from tmlc.passes.match import arg, named_args, op_of
from tmlc.pipeline.pass_base import NearMiss, Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

_PRODUCTS = ("linear", "linear_conv_state", "moe", "moe_conv_state")
_ADDITIONS = ("linear_add", "moe_add")


@register_pass("fuse.attention_epilogue")
class FuseAttentionEpilogue(Pass):
    """Turns a product (the output projection of attention, a down-projection, experts, with the convolution that
    fuse.conv gave them) and the residual addition behind it into one op: the sum is made while the columns are in the
    cache. An `add_rms_norm` becomes the addition in the product and an `rms_norm`."""

    requires = frozenset({Fact.STATEFUL})

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, 0)
        for method in program.methods.values():
            for node in method.calls():
                op = op_of(node)
                if op not in ("add", "add_rms_norm"):
                    continue
                one, two = (arg(node, name) for name in (("a", "b") if op == "add" else ("x", "residual")))
                product, reason = _product(method, one, two)
                if reason:
                    result.near_misses.append(NearMiss(method.name, node.name, reason))
                elif product is not None:
                    _fuse(method, node, product, two if product is one else one)
                    result.matches += 1
            method.sweep()
        return result


def _product(method: Method, one: fx.Node, two: fx.Node) -> tuple[fx.Node | None, str]:
    """The operand of an addition that is a product (the later one of two), or why none can take the addition."""
    reasons = []
    found = []
    for operand in (one, two):
        reason = _why_not(operand)
        if reason == "" and one is not two:
            found.append(operand)
        elif reason:
            reasons.append(reason)
    if found:
        order = {node: number for number, node in enumerate(method.graph.nodes)}
        return max(found, key=order.__getitem__), ""
    return None, reasons[0] if reasons else ""


def _why_not(operand: fx.Node) -> str | None:
    """None: no product; "": one that can take an addition; else why it cannot."""
    source = arg(operand, "x") if op_of(operand) == "scale_by" else operand
    op = op_of(source)
    if op in _ADDITIONS:
        return f"{source.name} adds something already"
    if op not in _PRODUCTS or (source is not operand and op != "linear"):
        return None
    for node in {operand, source}:
        if len(node.users) != 1:
            return f"{node.name} has {len(node.users)} readers"
    if "conv" in op and arg(source, "addend") is not None:
        return f"{source.name} adds something already"
    return ""


def _fuse(method: Method, node: fx.Node, operand: fx.Node, addend: fx.Node) -> None:
    scaled = op_of(operand) == "scale_by"
    product = arg(operand, "x") if scaled else operand
    args: dict[str, Any] = named_args(product)
    with method.graph.inserting_before(node):
        if op_of(product) == "linear":
            scale = arg(operand, "s") if scaled else None
            fused = call(method.graph, "linear_add", (*args.values(), scale, addend))
        elif op_of(product) == "moe":
            fused = call(method.graph, "moe_add", (addend, *args.values()))
        else:
            fused = call(method.graph, str(op_of(product)), tuple((args | {"addend": addend}).values()))
        if op_of(node) == "add_rms_norm":
            norm = call(method.graph, "rms_norm", (fused, arg(node, "weight"), arg(node, "eps")))
    if "source" in product.meta:
        fused.meta["source"] = product.meta["source"]
    if op_of(node) == "add":
        replace(node, fused)
    else:
        whole, normed = items(node)
        replace(normed, norm)
        replace(whole, fused)
        method.graph.erase_node(node)
    for gone in dict.fromkeys((operand, product)):
        method.graph.erase_node(gone)  # a call that changes a state is not swept

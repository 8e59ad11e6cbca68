"""fuse.conv: short convolutions become part of the product that feeds them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tmlc.ir.ops.fused import MAX_TAPS
from tmlc.ir.program import Fact, Method, Program, StateSpec, call, replace, role, type_of
from tmlc.passes.match import arg, common_name, fresh_name, named_args, op_of, weight_of
from tmlc.pipeline.pass_base import NearMiss, Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

_PRODUCTS = ("linear", "moe")


@register_pass("fuse.conv")
class FuseConv(Pass):
    """Turns `linear` (+ `scale_by`) or `moe` and the `short_conv_state` (+ `scale`) behind it into one op: whoever has
    made a column convolves it at once, with no barrier and no call between.

    Convolutions of neighbouring columns of one linear (keys and values) become one, with one filter and one tail.
    """

    requires = frozenset({Fact.STATEFUL})

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, 0)
        filters: dict[tuple[str, ...], str] = {}
        for method in program.methods.values():
            groups: dict[fx.Node, list[_Conv]] = {}
            for node in method.calls("short_conv_state"):
                found = _conv(node)
                if isinstance(found, str):
                    result.near_misses.append(NearMiss(method.name, node.name, found))
                elif found is not None:
                    groups.setdefault(found.product, []).append(found)
            for product, convs in groups.items():
                kept = _run_of_columns(convs)
                for conv in convs:
                    if conv not in kept:
                        reason = "another convolution of this product was fused, and its columns are not behind those"
                        result.near_misses.append(NearMiss(method.name, conv.node.name, reason))
                _fuse(program, method, product, kept, filters)
                result.matches += len(kept)
            method.sweep()
        return result


@dataclass(frozen=True)
class _Conv:
    """A convolution of columns start.. of a product, the factor between them, and what is done with its result."""

    node: fx.Node
    product: fx.Node
    start: int
    scale: fx.Node | None
    level: float
    last: fx.Node  # the convolution, or the scaling behind it

    @property
    def stop(self) -> int:
        return self.start + type_of(self.node).cols

    @property
    def kind(self) -> tuple[int, bool, float, fx.Node | None]:
        return type_of(arg(self.node, "weight")).cols, arg(self.node, "residual"), self.level, self.scale


def _conv(node: fx.Node) -> _Conv | str | None:
    """What a convolution is of; None when it follows no product, or why it cannot be a part of it."""
    source, start, scale = arg(node, "x"), 0, None
    if len(source.users) != 1:
        reason = f"what it convolves has {len(source.users)} readers"
    else:
        reason = ""
    if op_of(source) == "columns":
        view, source, start = source, arg(source, "x"), arg(source, "start")
        if op_of(source) == "linear" and not reason:
            reason = _why_not_columns(source, view)
    elif op_of(source) == "scale_by":
        scale, source = arg(source, "s"), arg(source, "x")
        if op_of(source) == "linear" and not reason and len(source.users) != 1:
            reason = f"what it convolves has {len(source.users)} readers"
    if op_of(source) not in _PRODUCTS or (scale is not None and op_of(source) != "linear"):
        return None
    if type_of(arg(node, "weight")).cols > MAX_TAPS:
        reason = f"it has more than {MAX_TAPS} taps"
    if reason:
        return reason
    last, level = node, 1.0
    if len(node.users) == 1:
        (user,) = node.users
        if op_of(user) == "scale":
            last, level = user, float(arg(user, "alpha"))
    return _Conv(node, source, start, scale, level, last)


def _why_not_columns(linear: fx.Node, view: fx.Node) -> str:
    """Why columns of a linear cannot be convolved in place ("" when they can)."""
    for user in linear.users:
        if user is view:
            continue
        if op_of(user) != "columns":
            return f"{user.name} reads the whole product"
        if arg(user, "start") < arg(view, "stop") and arg(view, "start") < arg(user, "stop"):
            return f"{user.name} reads the same columns"
    return ""


def _run_of_columns(convs: list[_Conv]) -> list[_Conv]:
    """The first convolutions of one kind whose columns follow each other, of weights that can be put together."""
    ordered = sorted(convs, key=lambda conv: conv.start)
    kept = ordered[:1]
    for conv in ordered[1:]:
        weights = [arg(one.node, "weight") for one in (kept[0], conv)]
        alike = conv.kind == kept[0].kind and len({len(type_of(weight).shape) for weight in weights}) == 1
        if conv.start != kept[-1].stop or not alike or not all(weight_of(weight) for weight in weights):
            break
        kept.append(conv)
    return kept


def _fuse(
    program: Program, method: Method, product: fx.Node, convs: list[_Conv], filters: dict[tuple[str, ...], str]
) -> None:
    taps, tail = _filter(program, method, convs, filters), _tail(program, method, convs)
    first, args = convs[0], named_args(product)
    residual = arg(first.node, "residual")
    with method.graph.inserting_before(product):
        if op_of(product) == "moe":
            fused = call(method.graph, "moe_conv_state", (taps, tail, residual, first.level, None, *args.values()))
        else:
            after = (first.scale, taps, tail, first.start, residual, first.level, None)
            fused = call(method.graph, "linear_conv_state", (args["x"], args["weight"], args["bias"], *after))
    old = [role(arg(conv.node, "tail"))[1] for conv in convs]
    views = [arg(conv.node, "x") for conv in convs]
    whole = op_of(views[0]) != "columns"
    for conv, view in zip(convs, views, strict=True):
        replace(conv.last, fused if whole else view)
        if conv.node is not conv.last:
            method.graph.erase_node(conv.node)
    if not whole:
        replace(product, fused)
    elif "source" in product.meta:
        fused.meta["source"] = product.meta["source"]
    if len(convs) > 1:
        _forget(program, method, old)


def _filter(program: Program, method: Method, convs: list[_Conv], filters: dict[tuple[str, ...], str]) -> fx.Node:
    weights = [arg(conv.node, "weight") for conv in convs]
    if len(convs) == 1:
        return weights[0]
    names = tuple(str(weight_of(weight)) for weight in weights)
    if names not in filters:
        wanted = common_name(list(names), "convolutions.weight")
        filters[names] = program.weights.concat(fresh_name(program, wanted), list(names), axis=0)
    return program.add_weight_input(method, filters[names])


def _tail(program: Program, method: Method, convs: list[_Conv]) -> fx.Node:
    tails = [arg(conv.node, "tail") for conv in convs]
    if len(tails) == 1:
        return tails[0]
    names = [role(tail)[1] for tail in tails]
    parts = [name.rpartition(".")[2].removesuffix("_tail") for name in names]
    wanted = f"{names[0].rpartition('.')[0]}.{'_'.join(parts)}_tail"
    name, number = wanted, 2
    while name in program.states:
        name, number = f"{wanted}.{number}", number + 1
    rows, cols = type_of(tails[0]).shape[0], sum(type_of(tail).cols for tail in tails)
    return program.add_state_input(method, StateSpec(name, "conv_tail", (rows, cols), "f32", method.name))


def _forget(program: Program, method: Method, states: list[str]) -> None:
    """Removes states that nothing reads any more."""
    for node in method.placeholders("state"):
        if role(node)[1] in states:
            method.graph.erase_node(node)
            del program.states[role(node)[1]]

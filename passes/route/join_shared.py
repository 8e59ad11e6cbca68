"""route.join_shared: a shared expert that is written as a dense layer beside the routed ones becomes one of them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.program import Method, Program, call, items, replace, type_of
from tmlc.passes.match import arg, common_name, fresh_name, op_of, rewrite_calls, weight_of, why_not_own
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

#: Choices of a row that the kernels of few rows take.
MOST_CHOICES = 16


@register_pass("route.join_shared")
class JoinShared(Pass):
    """Turns `moe` + a SwiGLU layer of the same rows + `add` into one `moe` over a stack with the layer at its end, cut
    into experts as wide as the routed ones, which `append_experts` gives to every row with weight 1."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("moe",), partial(_consider, program))


def _consider(program: Program, method: Method, moe: fx.Node) -> Callable[[], None] | str | None:
    total = next(iter(moe.users)) if len(moe.users) == 1 else None
    if op_of(total) != "add":
        return None
    assert total is not None
    down = arg(total, "b") if arg(total, "a") is moe else arg(total, "a")
    if op_of(down) != "linear" or op_of(arg(down, "x")) != "swiglu":
        return None
    both = arg(down, "x")
    layer = [arg(both, "gate"), arg(both, "up"), down]
    if any(op_of(node) != "linear" or arg(node, "x") is not arg(moe, "x") for node in layer[:2]):
        return None
    return _why_not(program, moe, both, layer) or partial(_fuse, program, method, moe, total, layer)


def _why_not(program: Program, moe: fx.Node, both: fx.Node, layer: list[fx.Node]) -> str:
    """`layer`: the linears of gates, of ups, and the one behind them."""
    for node in (both, *layer):
        if len(node.users) > 1:
            return f"{node.name} has {len(node.users)} readers"
    if any(arg(node, "bias") is not None for node in layer):
        return "the shared expert has a bias"
    if any(arg(moe, name) is not None for name in ("gate_up_bias", "down_bias")):
        return "the routed experts have biases"
    if any(arg(moe, name) for name in ("alpha", "limit", "gate_cap", "up_cap")):
        return "the routed experts have another activation"
    routes = [arg(moe, "weights"), arg(moe, "experts")]
    routers = {route.args[0] for route in routes if route.target is operator.getitem}
    if any(route.target is not operator.getitem for route in routes) or len(routers) > 1:
        return "weights and experts do not come from one router"
    router = routers.pop()
    if op_of(router) != "topk_router" or [route.args[1] for route in routes] != [0, 1]:
        return "weights and experts are not those of a topk_router"
    experts, wide, _ = type_of(arg(moe, "gate_up")).shape
    if type_of(arg(router, "logits")).cols != experts:
        return f"the router chooses among {type_of(arg(router, 'logits')).cols} experts, the stack has {experts}"
    inner = type_of(both).cols
    if inner % (wide // 2):
        return f"the shared expert is {inner} wide, no multiple of {wide // 2}"
    choices = arg(router, "top_k") + inner // (wide // 2)
    if choices > MOST_CHOICES:
        return f"a row would have {choices} choices, more than {MOST_CHOICES}"
    stacks = [arg(moe, "gate_up"), arg(moe, "down"), *(arg(node, "weight") for node in layer)]
    if len({type_of(node).dtype for node in stacks}) > 1:
        return "routed and shared experts differ in dtype"
    return why_not_own(program, stacks)


def _fuse(program: Program, method: Method, moe: fx.Node, total: fx.Node, layer: list[fx.Node]) -> None:
    weights = program.weights
    gate_up, down = (str(weight_of(arg(moe, name))) for name in ("gate_up", "down"))
    gate, up, last = (str(weight_of(arg(node, "weight"))) for node in layer)
    experts, wide, d = type_of(arg(moe, "gate_up")).shape
    f = wide // 2
    count = type_of(layer[0]).cols // f

    def named(tail: str, *of: str) -> str:
        return fresh_name(program, common_name(list(of), tail))

    cut = [weights.reshape(fresh_name(program, f"{name}.cut"), name, (count, f, d)) for name in (gate, up)]
    both = weights.concat(named("gate_up", gate, up), cut, axis=1)
    columns = weights.reshape(fresh_name(program, f"{last}.cut"), last, (d, count, f))
    rows = weights.transpose(fresh_name(program, f"{last}.experts"), columns, (1, 0, 2))
    stacked = weights.concat(named("stacked.gate_up", gate_up, gate), [gate_up, both], axis=0)
    stacked_down = weights.concat(named("stacked.down", down, last), [down, rows], axis=0)
    inputs = [program.add_weight_input(method.name, name) for name in (stacked, stacked_down)]
    with method.graph.inserting_before(total):
        routes = call(method.graph, "append_experts", (arg(moe, "weights"), arg(moe, "experts"), experts, count))
    if "source" in moe.meta:
        routes.meta["source"] = moe.meta["source"]
    chosen = items(routes)
    with method.graph.inserting_before(total):
        fused = call(method.graph, "moe", (arg(moe, "x"), *chosen, *inputs))
    replace(total, fused)

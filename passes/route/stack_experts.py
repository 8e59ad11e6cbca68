"""route.stack_experts: routed and shared experts become one stack, run by one op."""

from __future__ import annotations

import operator

from torch import fx

from tmlc.ir.program import Fact, Method, Program, call, replace, type_of
from tmlc.passes.match import arg, common_name, fresh_name, op_of, weight_of, why_not_own
from tmlc.pipeline.pass_base import NearMiss, Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

_ROUTERS = ("router", "sink_router")


@register_pass("route.stack_experts")
class StackExperts(Pass):
    """Appends the shared experts to the routed stack, so that `moe` + `shared_experts` + `add` is one `moe` of
    top_k + S experts: one pass over the positions, one schedule for the threads, every expert read once."""

    provides = frozenset({Fact.EXPERTS_STACKED})

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, 0)
        for method in program.methods.values():
            for shared in method.calls("shared_experts"):
                reason = self._why_not(program, shared)
                if reason:
                    result.near_misses.append(NearMiss(method.name, shared.name, reason))
                    continue
                _stack(program, method, shared)
                result.matches += 1
        if result.near_misses:
            result.provides = frozenset()
        return result

    def _why_not(self, program: Program, shared: fx.Node) -> str:
        total, moe = _neighbours(shared)
        if total is None:
            return "its result is not only added to something"
        if moe is None or len(moe.users) != 1:
            return "what its result is added to is not a moe that is used only there"
        if arg(moe, "x") is not arg(shared, "x"):
            return "routed and shared experts see different inputs"
        reason = _why_not_one_router(shared, moe)
        if reason:
            return reason
        gate_up, gate = type_of(arg(moe, "gate_up")), type_of(arg(shared, "gate"))
        if gate_up.shape[1] != 2 * gate.shape[1]:
            return f"routed experts are {gate_up.shape[1] // 2} wide, shared ones {gate.shape[1]}"
        if len({type_of(node).dtype for node in _stacks(shared, moe)}) != 1:
            return "routed and shared experts differ in dtype"
        return why_not_own(program, _stacks(shared, moe))


def _neighbours(shared: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """(the add, the moe) around a call of shared_experts."""
    if len(shared.users) != 1:
        return None, None
    (total,) = shared.users
    if op_of(total) != "add":
        return None, None
    other = arg(total, "b") if arg(total, "a") is shared else arg(total, "a")
    return total, other if op_of(other) == "moe" else None


def _stacks(shared: fx.Node, moe: fx.Node) -> list[fx.Node]:
    names = ((moe, "gate_up"), (moe, "down"), (shared, "gate"), (shared, "up"), (shared, "down"))
    return [arg(node, name) for node, name in names]


def _why_not_one_router(shared: fx.Node, moe: fx.Node) -> str:
    """All routing must be columns of one router's results, the shared experts being the last of them."""
    parts = {
        "moe's weights": arg(moe, "weights"),
        "moe's experts": arg(moe, "experts"),
        "weights": arg(shared, "weights"),
    }
    sources = {}
    for what, node in parts.items():
        if op_of(node) != "columns" or arg(node, "x").target is not operator.getitem:
            return f"{what} are not columns of a router's result"
        sources[what] = arg(node, "x")
    routers = {source.args[0] for source in sources.values()}
    router = routers.pop()
    if routers or op_of(router) not in _ROUTERS:
        return "routed and shared weights do not come from one router"
    top_k, n_shared = arg(router, "top_k"), arg(router, "n_shared")
    wanted = {"moe's weights": (0, 0, top_k), "moe's experts": (1, 0, top_k), "weights": (0, top_k, top_k + n_shared)}
    for what, node in parts.items():
        have = (sources[what].args[1], arg(node, "start"), arg(node, "stop"))
        if have != wanted[what]:
            return f"{what} are columns {have[1]}..{have[2]} of result {have[0]}, not the router's own split"
    routed = type_of(arg(router, "bias")).cols
    if type_of(arg(moe, "gate_up")).shape[0] != routed:
        return f"the router chooses among {routed} experts, the stack has {type_of(arg(moe, 'gate_up')).shape[0]}"
    return ""


def _stack(program: Program, method: Method, shared: fx.Node) -> None:
    total, moe = _neighbours(shared)
    assert total is not None and moe is not None
    names = [str(weight_of(node)) for node in _stacks(shared, moe)]
    gate_up, down, gate, up, shared_down = names
    weights = program.weights
    both = weights.concat(fresh_name(program, common_name([gate, up], "gate_up")), [gate, up], axis=1)
    stacked = weights.concat(fresh_name(program, common_name(names, "stacked.gate_up")), [gate_up, both], axis=0)
    stacked_down = weights.concat(fresh_name(program, common_name(names, "stacked.down")), [down, shared_down], axis=0)
    inputs = [program.add_weight_input(method.name, name) for name in (stacked, stacked_down)]
    with method.graph.inserting_before(total):
        routes = (arg(arg(moe, "weights"), "x"), arg(arg(moe, "experts"), "x"))
        fused = call(method.graph, "moe", (arg(moe, "x"), *routes, *inputs))
    replace(total, fused)
    method.sweep()

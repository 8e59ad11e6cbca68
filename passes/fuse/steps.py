"""fuse.steps: elementwise ops become part of the product or norm that they follow, or one op with each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from tmlc.ir.program import Method, Program, call, items, replace, type_of
from tmlc.ir.steps import MOST_NUMBERS, MOST_STEPS, OPERANDS, STEP_OPS, ElementStep, write_steps
from tmlc.passes.match import arg, named_args, op_of, weight_of
from tmlc.pipeline.pass_base import NearMiss, Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

#: What chains begin with. Products come first: they take residuals out of `add_rms_norm`, which leaves norms alone.
_HEADS = (("linear",), ("rms_norm",), tuple(STEP_OPS))


@register_pass("fuse.steps")
class FuseSteps(Pass):
    """Turns a linear or `rms_norm` and the elementwise ops behind it (activation, gate, residual, modulation, Euler
    step) into `linear_steps` or `rms_norm_steps`, and elementwise ops that follow each other into `element_steps`: what
    was a launch each is done while the value is in registers. An `add_rms_norm` behind a product becomes the addition
    in the product and an `rms_norm`."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program, 0)
        for method in program.methods.values():
            for heads in _HEADS:
                gone: set[fx.Node] = set()
                for node in method.calls():
                    if op_of(node) not in heads or node in gone:
                        continue
                    chain = _chain(node)
                    if chain.reason:
                        result.near_misses.append(NearMiss(method.name, node.name, chain.reason))
                    if len(chain.steps) > (op_of(node) in STEP_OPS):
                        gone |= set(chain.nodes)
                        _fuse(method, chain)
                        result.matches += 1
            method.sweep()
        return result


@dataclass
class _Chain:
    """Ops of which each has the one before as its only reader, and what they read beside it."""

    head: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    steps: list[ElementStep] = field(default_factory=list)
    operands: list[fx.Node] = field(default_factory=list)
    reason: str = ""

    def take(self, node: fx.Node, op: str, value: fx.Node) -> bool:
        """Adds `node`, which does `op` to `value`; False, and the reason, where a kernel could not."""
        tensors, kinds = STEP_OPS[op]
        values = list(named_args(node).values())
        given, numbers = values[:tensors], tuple(values[tensors : tensors + len(kinds)])
        operands = list(self.operands)
        letters = ""
        for at, operand in enumerate(given):
            if operand is value:
                letters += "v"
                continue
            table = op == "add_row" and at == 1
            if bool(weight_of(operand)) != table:
                self.reason = f"{node.name} reads the weight {weight_of(operand)}" if not table else ""
                return False
            if operand not in operands or table:
                operands.append(operand)
            letters += (*OPERANDS, "?")[min(len(OPERANDS), len(operands) - 1 if table else operands.index(operand))]
        count = sum(len(step.numbers) for step in self.steps) + len(numbers)
        if len(operands) > len(OPERANDS) or len(self.steps) == MOST_STEPS or count > MOST_NUMBERS:
            self.reason = f"{node.name} is more than the steps of one op"
            return False
        self.nodes.append(node)
        self.operands = operands
        self.steps.append(ElementStep(op, letters, numbers))
        return True


def _chain(head: fx.Node) -> _Chain:
    """The longest chain from a head on; an elementwise head is its first step, on its first operand."""
    chain, value = _Chain(head), head
    op = str(op_of(head))
    if op in STEP_OPS:
        x = head.args[0]
        if not isinstance(x, fx.Node) or weight_of(x) or not chain.take(head, op, x):
            return chain
    while len(value.users) == 1:
        (user,) = value.users
        op = str(op_of(user))
        residual = op == "add_rms_norm" and op_of(head) == "linear"
        if residual and arg(user, "x") is not arg(user, "residual"):
            op = "add"
        if op not in STEP_OPS or type_of(value) != (user.meta["type"][0] if residual else type_of(user)):
            break
        if not chain.take(user, op, value) or residual:
            break
        value = user
    return chain


def _fuse(method: Method, chain: _Chain) -> None:
    head, last = chain.head, chain.nodes[-1]
    text, numbers = write_steps(chain.steps)
    operands = (*chain.operands, None, None, None)[: len(OPERANDS)]
    with method.graph.inserting_before(last):
        if op_of(head) in STEP_OPS:
            fused = call(method.graph, "element_steps", (head.args[0], *operands, text, numbers))
        else:
            name = f"{op_of(head)}_steps"
            fused = call(method.graph, name, (*named_args(head).values(), *operands, text, numbers))
        if op_of(last) == "add_rms_norm":
            norm = call(method.graph, "rms_norm", (fused, arg(last, "weight"), arg(last, "eps")))
    if "source" in head.meta:
        fused.meta["source"] = head.meta["source"]
    if op_of(last) == "add_rms_norm":
        whole, normed = items(last)
        replace(normed, norm)
        replace(whole, fused)
        method.graph.erase_node(last)
    else:
        replace(last, fused)

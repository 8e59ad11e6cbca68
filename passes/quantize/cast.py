"""quantize.cast: every weight gets the dtype in which the engine reads it."""

from __future__ import annotations

from typing import Literal

from torch import fx

from tmlc.ir.ops import OPS
from tmlc.ir.program import Fact, Program, replace, role
from tmlc.ir.types import QUANTISED
from tmlc.passes.match import arg, fresh_name, op_of
from tmlc.pipeline.pass_base import Pass, PassConfig, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

#: The operands that are large and read once a call: these carry the precision. All others stay float32: norms,
#: convolutions, biases, relative-bias tables, windows, and whatever decides a routing.
_HEAVY = {
    ("linear", "weight"),
    ("moe", "gate_up"),
    ("moe", "down"),
    ("shared_experts", "gate"),
    ("shared_experts", "up"),
    ("shared_experts", "down"),
    ("embedding", "table"),
    ("bag_embedding", "table"),
}
_DTYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


@register_pass("quantize.cast")
class Cast(Pass):
    """Casts linears, experts and embeddings to the precision and everything else to float32, so that an engine reads
    half the bytes where the bytes are, and a checkpoint's own dtype does not decide what the engine computes in."""

    class Config(PassConfig):
        precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    provides = frozenset({Fact.WEIGHTS_CAST})
    config: Config

    @property
    def lossy(self) -> bool:
        return self.config.precision != "fp32"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        heavy = _DTYPES[self.config.precision]
        result = PassResult(program, 0)
        placeholders: dict[str, list[tuple[str, fx.Node]]] = {}
        for method in program.methods.values():
            for node in method.placeholders("weight"):
                placeholders.setdefault(role(node)[1], []).append((method.name, node))
        for name, nodes in placeholders.items():
            everywhere_heavy = all(_is_heavy(node) for _, node in nodes)
            wanted = heavy if everywhere_heavy else "f32"
            if program.weights[name].dtype in (wanted, "i64", "i32", "u8", *QUANTISED):
                continue
            entry = program.weights[name]
            if entry.op == "cast" and program.weights[entry.srcs[0]].dtype == wanted:
                cast = entry.srcs[0]
            else:
                cast = program.weights.cast(fresh_name(program, f"{name}.{wanted}"), name, wanted)
            for method_name, node in nodes:
                replacement = program.add_weight_input(method_name, cast)
                node.meta["type"] = replacement.meta["type"]
                replace(node, replacement)
            result.matches += 1
        return result


def _is_heavy(node: fx.Node) -> bool:
    for user in node.users:
        op = op_of(user)
        if op is None:
            return False
        if op == "linear" and any(op_of(reader) in ("sink_router", "topk_router") for reader in user.users):
            return False
        if not all((op, name) in _HEAVY for name in _operands(user, node)):
            return False
    return True


def _operands(call: fx.Node, node: fx.Node) -> list[str]:
    """Names of the arguments of a call that are `node`."""
    return [name for name in OPS[str(op_of(call))].args if arg(call, name) is node]

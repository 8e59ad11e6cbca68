"""fuse.norm_attention: the norms of queries and of keys become part of the attention that alone reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.program import Method, Program, call, replace, type_of
from tmlc.passes.match import arg, named_args, op_of, rewrite_calls
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass


@register_pass("fuse.norm_attention")
class FuseNormAttention(Pass):
    """Turns the `rms_norm` of each head of queries, that of keys, and the `attention_state` that alone reads them into
    `norm_attention_state`: keys are normed while they are written to the cache, queries beside them. A
    `rope_attention_state` gets the norms: it turns what it has normed."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("attention_state", "rope_attention_state"), _consider)


def _consider(method: Method, attention: fx.Node) -> Callable[[], None] | str | None:
    norms = [node for node in (arg(attention, "q"), arg(attention, "k")) if op_of(node) == "rms_norm"]
    if not norms:
        return None
    return _why_not(norms, attention) or partial(_fuse, method, norms, attention)


def _why_not(norms: list[fx.Node], attention: fx.Node) -> str:
    if len(norms) < 2:
        return f"{norms[0].name} norms queries or keys alone"
    width = type_of(arg(attention, "q")).cols // arg(attention, "num_heads")
    for norm in norms:
        if type_of(arg(norm, "weight")).cols != width:
            return f"{norm.name} norms no heads of {width} columns"
        if len(norm.users) > 1:
            return f"it is one of {len(norm.users)} readers of {norm.name}"
        if [value for value in named_args(attention).values() if value is norm] != [norm]:
            return f"it reads {norm.name} twice"
    if arg(norms[0], "eps") != arg(norms[1], "eps"):
        return f"{norms[0].name} and {norms[1].name} have another eps"
    return ""


def _fuse(method: Method, norms: list[fx.Node], attention: fx.Node) -> None:
    """`norms`: of queries, of keys."""
    (q, q_norm), (k, k_norm) = ((arg(norm, "x"), arg(norm, "weight")) for norm in norms)
    heads = {"q": q, "q_norm": q_norm, "k": k, "k_norm": k_norm, "eps": arg(norms[0], "eps")}
    op = "rope_attention_state" if op_of(attention) == "rope_attention_state" else "norm_attention_state"
    behind = {name: value for name, value in named_args(attention).items() if name not in heads}
    with method.graph.inserting_before(attention):
        fused = call(method.graph, op, (*heads.values(), *behind.values()))
    replace(attention, fused)

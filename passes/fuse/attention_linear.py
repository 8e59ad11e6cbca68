"""fuse.attention_linear: attention and the output projection that alone reads it become one op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.program import Method, Program, call, replace
from tmlc.passes.match import arg, named_args, op_of, rewrite_calls
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

_ATTENTION = ("attention_state", "norm_attention_state", "rope_attention_state")
_PRODUCTS = ("linear", "linear_add", "linear_conv_state")
#: Arguments of attention before its values, where it neither norms nor turns heads.
_BARE = {"q_norm": None, "k_norm": None, "eps": 0.0, "table": None, "offset": 0, "interleaved": False,
         "shared": None}  # fmt: skip
#: Arguments of the product behind its weight, where it has none of them.
_ABSENT = {
    "bias": None, "scale": None, "taps": None, "tail": None, "start": 0, "residual": False, "level": 1.0,
    "addend": None,
}  # fmt: skip


@register_pass("fuse.attention_linear")
class FuseAttentionLinear(Pass):
    """Turns `attention_state`, `norm_attention_state` or `rope_attention_state` and the linear (`linear`, `linear_add`,
    `linear_conv_state`) that alone reads it into `attention_linear_state`: a product of one row adds up what the splits
    of the cache gave, which takes a launch else."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, _PRODUCTS, _consider)


def _consider(method: Method, product: fx.Node) -> Callable[[], None] | str | None:
    attention = arg(product, "x")
    if op_of(attention) not in _ATTENTION:
        return None
    if len(attention.users) > 1:
        return f"it is one of {len(attention.users)} readers of {attention.name}"
    if [value for value in named_args(product).values() if value is attention] != [attention]:
        return f"it reads {attention.name} twice"
    return partial(_fuse, method, attention, product)


def _fuse(method: Method, attention: fx.Node, product: fx.Node) -> None:
    heads = _BARE | named_args(attention)
    order = ("q", "q_norm", "k", "k_norm", "eps", "table", "offset", "interleaved", "shared", "v")
    behind = [value for name, value in heads.items() if name not in order]
    after = _ABSENT | {name: value for name, value in named_args(product).items() if name in _ABSENT}
    with method.graph.inserting_before(product):
        given = (*(heads[name] for name in order), *behind, arg(product, "weight"), *after.values())
        fused = call(method.graph, "attention_linear_state", given)
    if "source" in product.meta:
        fused.meta["source"] = product.meta["source"]
    replace(product, fused)
    method.graph.erase_node(attention)  # a call that changes a state is not swept

"""fuse.rope_attention: the rotation of queries and of keys becomes part of the attention that alone reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from tmlc.ir.dims import Dim
from tmlc.ir.program import Method, Program, call, replace, type_of
from tmlc.passes.match import arg, named_args, op_of, rewrite_calls
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

#: What queries and keys must be turned by alike, and of that what decides the cosines and sines.
_ALIKE = ("position", "inv_freq", "offset", "interleaved", "scaling")
_TABLE = ("position", "inv_freq", "scaling")

#: `rope_table_state` calls by their method and what decides their numbers.
_Tables = dict[tuple[object, ...], fx.Node]


@register_pass("fuse.rope_attention")
class FuseRopeAttention(Pass):
    """Turns the `rope_state` of queries, that of keys, and the `attention_state` that alone reads them into
    `rope_attention_state`, which turns them while it reads them. Cosines and sines come from one `rope_table_state`
    for all layers that turn alike."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("attention_state",), partial(_consider, {}))


def _consider(tables: _Tables, method: Method, attention: fx.Node) -> Callable[[], None] | str | None:
    ropes = [node for node in (arg(attention, "q"), arg(attention, "k")) if op_of(node) == "rope_state"]
    if not ropes:
        return None
    rows = next((node for node in method.inputs if (type_of(node).dtype, type_of(node).rows) == ("f32", Dim(1))), None)
    if rows is None:
        return "no input has a float32 row for each position"
    return _why_not(ropes, attention) or partial(_fuse, method, rows, tables, ropes, attention)


def _why_not(ropes: list[fx.Node], attention: fx.Node) -> str:
    if len(ropes) < 2:
        return f"{ropes[0].name} turns queries or keys alone"
    for rope, heads in zip(ropes, ("num_heads", "num_kv_heads"), strict=True):
        if arg(rope, "num_heads") != arg(attention, heads):
            return f"{rope.name} turns {arg(rope, 'num_heads')} heads, not {arg(attention, heads)}"
        if len(rope.users) > 1:
            return f"it is one of {len(rope.users)} readers of {rope.name}"
        if [value for value in named_args(attention).values() if value is rope] != [rope]:
            return f"it reads {rope.name} twice"
    for name in _ALIKE:
        if arg(ropes[0], name) != arg(ropes[1], name):
            return f"{ropes[0].name} and {ropes[1].name} have another {name}"
    return ""


def _fuse(method: Method, rows: fx.Node, tables: _Tables, ropes: list[fx.Node], attention: fx.Node) -> None:
    """`ropes`: of queries, of keys; `rows`: an input with a row for each position; `tables`: those that there are."""
    graph, settings = method.graph, tuple(arg(ropes[0], name) for name in _TABLE)
    key = (method.name, *settings)
    if key not in tables:  # calls come in the order of the graph: later ones may read it
        with graph.inserting_before(attention):
            tables[key] = call(graph, "rope_table_state", (rows, *settings))
    q, k = (arg(rope, "x") for rope in ropes)
    _, _, *args = named_args(attention).values()
    turned = (tables[key], arg(ropes[0], "offset"), arg(ropes[0], "interleaved"))
    with graph.inserting_before(attention):
        fused = call(graph, "rope_attention_state", (q, None, k, None, 0.0, *turned, *args))
    replace(attention, fused)

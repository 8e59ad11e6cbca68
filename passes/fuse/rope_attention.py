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
    for all layers that turn alike. Of latent attention, whose keys a `concat_heads` joins from columns of their own and
    a turned part that all heads share, it takes both parts."""

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return rewrite_calls(program, ("attention_state",), partial(_consider, {}))


def _consider(tables: _Tables, method: Method, attention: fx.Node) -> Callable[[], None] | str | None:
    joined = arg(attention, "k") if op_of(arg(attention, "k")) == "concat_heads" else None
    keys = arg(attention, "k") if joined is None else arg(joined, "b")
    ropes = [node for node in (arg(attention, "q"), keys) if op_of(node) == "rope_state"]
    if not ropes:
        return None
    rows = next((node for node in method.inputs if (type_of(node).dtype, type_of(node).rows) == ("f32", Dim(1))), None)
    if rows is None:
        return "no input has a float32 row for each position"
    return _why_not(ropes, joined, attention) or partial(_fuse, method, rows, tables, ropes, joined, attention)


def _why_not(ropes: list[fx.Node], joined: fx.Node | None, attention: fx.Node) -> str:
    """`ropes`: of queries, of keys; `joined`: what joins the keys from two parts."""
    if len(ropes) < 2:
        return f"{ropes[0].name} turns queries or keys alone"
    heads, alike = [arg(attention, "num_heads"), arg(attention, "num_kv_heads")], list(_ALIKE)
    if joined is not None:
        if (arg(joined, "num_heads"), arg(joined, "shared")) != (heads[1], 2):
            return f"{joined.name} joins no part that all heads of keys share"
        own = type_of(arg(joined, "a")).cols // heads[1]
        if (arg(ropes[0], "offset"), arg(ropes[1], "offset")) != (own, 0):
            return f"{ropes[0].name} turns other columns than the shared ones"
        heads, alike = [heads[0], 1], [name for name in _ALIKE if name != "offset"]
    for rope, count, reader in zip(ropes, heads, (attention, joined or attention), strict=True):
        if arg(rope, "num_heads") != count:
            return f"{rope.name} turns {arg(rope, 'num_heads')} heads, not {count}"
        if reason := _read_otherwise(rope, reader):
            return reason
    if joined is not None and (reason := _read_otherwise(joined, attention)):
        return reason
    for name in alike:
        if arg(ropes[0], name) != arg(ropes[1], name):
            return f"{ropes[0].name} and {ropes[1].name} have another {name}"
    return ""


def _read_otherwise(value: fx.Node, reader: fx.Node) -> str:
    if len(value.users) > 1:
        return f"it is one of {len(value.users)} readers of {value.name}"
    twice = [one for one in named_args(reader).values() if one is value] != [value]
    return f"it reads {value.name} twice" if twice else ""


def _fuse(
    method: Method, rows: fx.Node, tables: _Tables, ropes: list[fx.Node], joined: fx.Node | None, attention: fx.Node
) -> None:
    """`rows`: an input with a row for each position; `tables`: those that there are."""
    graph, settings = method.graph, tuple(arg(ropes[0], name) for name in _TABLE)
    key = (method.name, *settings)
    if key not in tables:  # calls come in the order of the graph: later ones may read it
        with graph.inserting_before(attention):
            tables[key] = call(graph, "rope_table_state", (rows, *settings))
    q, k = (arg(rope, "x") for rope in ropes)
    shared = None
    if joined is not None:
        k, shared = arg(joined, "a"), k
    _, _, *args = named_args(attention).values()
    turned = (tables[key], arg(ropes[0], "offset"), arg(ropes[0], "interleaved"), shared)
    with graph.inserting_before(attention):
        fused = call(graph, "rope_attention_state", (q, None, k, None, 0.0, *turned, *args))
    replace(attention, fused)

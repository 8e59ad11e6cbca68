"""One broken program for each rule of the verifier (some rules have several ways to break)."""

import operator

import pytest
import torch

from tmlc.errors import IRError
from tmlc.ir.dims import Dim
from tmlc.ir.program import Fact, Method, call, items
from tmlc.ir.text import parse_program
from tmlc.ir.types import TensorType
from tmlc.ir.verify import RULES, verify

# rule -> (old text, new text) of the stateful program
BROKEN_TEXT = {
    "weights": [
        ('weight "kv" = concat("k", "v", axis=0)', 'weight "kv" = concat("k", "down", axis=0)'),
        ('weight "kv" = concat("k", "v", axis=0) : f32[8, 8]', 'weight "kv" = concat("k", "v", axis=0) : f32[8, 9]'),
        ('concat("k", "v", axis=0)', 'concat("k", "v", axis=1)'),
        ('concat("k", "v", axis=0)', 'weave("k", "v")'),
    ],
    "method": [
        ("method decode(max_n=4)", "method decode(max_n=0)"),
        ("i64[n, 1]", "i64[3, 1]"),
        ("i64[n, 1]", "i64[3, n]"),
    ],
    "role": [
        ('%norm = weight "norm"', '%norm = weight "nrm"'),
        ('%norm = weight "norm" : f32[8]', '%norm = weight "norm" : f32[1, 8]'),
        ('%q_w = weight "q"', '%q_w = weight "kv"'),
        ('%tail = state "tail" : f32[2, 8]', '%tail = state "tail" : f32[3, 8]'),
        ('%tail = state "tail"', '%tail = state "head"'),
    ],
    "schema": [
        ("top_k=2", "top_k=true"),
        ("residual=true", "residual=1"),
        ("moe(%mixed, %weights,", "moe(%mixed, %routes,"),
        ("linear(%normed, %q_w, none)", "linear(%normed, none, none)"),
        ("linear(%normed, %q_w, none)", "linear(%normed, 3, none)"),
        ("item(%routes, 1)", "item(%routes, 2)"),
        ("item(%routes, 1)", "item(%x, 1)"),
    ],
    "type": [
        ("%k = columns(%kv, start=0, stop=4) : f32[n, 4]", "%k = columns(%kv, start=0, stop=4) : f32[4n, 4]"),
        ("columns(%kv, start=0, stop=4)", "columns(%kv, start=0, stop=9)"),
        ("item(%routes, 1) : i64[n, 3]", "item(%routes, 1) : f32[n, 3]"),
        ("moe(%mixed, %weights, %experts,", "moe(%mixed, %weights, %weights,"),
    ],
    "output": [("return %out, %experts", "return %norm"), ("return %out, %experts", "return %routes")],
    "state": [
        ("kind=kv_ring", "kind=kv_rang"),
        ("kind=conv_tail method=decode", "kind=conv_tail method=speak"),
        ("init=zeros", "init=ones"),
        ("%position, %k_cache, %v_cache", "%position, %k_cache, %k_cache"),
        ('state "tail" :', 'state "spare" : f32[1, 1] kind=overlap method=decode init=zeros\nstate "tail" :'),
        ("%end = advance", "%more = columns(%tail, start=0, stop=1)\n  %end = advance"),
        ("  %end = advance", "  %again = advance(%position, %x, limit=32) : ()\n  %end = advance"),
        ("  %end = advance(%position, %x, limit=32) : ()\n", ""),
    ],
    "position": [
        ("%end = advance(%position, %x,", "%end = advance(%position, %doubled,"),
        ("limit=32) : ()\n", "limit=32) : ()\n  %late = silu(%out) : f32[n, 8]\n"),
    ],
    "cache": [("window=3", "window=5"), ("window=3", "window=0"), ("max_n=4", "max_n=6")],
    "fact": [
        ("facts canonical stateful", "facts canonical"),
        ("facts canonical stateful", "facts canonical stateful memory_planned"),
        ("%out = moe", "%conv2 = short_conv(%mixed, %conv, residual=true)\n  %out = moe"),
    ],
}  # fmt: skip


def cases():
    return [(rule, old, new) for rule, pairs in BROKEN_TEXT.items() for old, new in pairs]


@pytest.mark.parametrize("rule, old, new", cases())
def test_broken_text(stateful_text, rule, old, new):
    assert old in stateful_text
    text = stateful_text.replace(old, new, 1)
    if "%doubled" in new:
        text = text.replace("  %normed = ", "  %doubled = reshape(%x, cols=4) : f32[2n, 4]\n  %normed = ", 1)
    with pytest.raises(IRError) as caught:
        verify(parse_program(text))
    assert caught.value.where.endswith(rule), str(caught.value)


def test_attention_with_its_projection_is_held_to_its_cache_too(stateful_text):
    """Its tail may be absent: then it is no state."""
    text = stateful_text.replace(
        "attention_state(%q, %k, %v, %position, %k_cache, %v_cache, none, none,",
        "attention_linear_state(%q, none, %k, none, eps=0.0, table=none, offset=0, interleaved=false, shared=none,"
        " v=%v, position=%position, k_cache=%k_cache, v_cache=%v_cache, rel=none, rel_table=none,",
    ).replace(
        "log_alpha=0.0)",
        "log_alpha=0.0, sink_logits=none, softcap=0.0, weight=%project, bias=none, factor=none, taps=none, tail=none,"
        " start=0, residual=false, level=1.0, addend=none)",
    )  # fmt: skip
    text = text.replace('state "position"', 'weight "project" = source("project") : f32[8, 8]\nstate "position"', 1)
    text = text.replace("  %position =", '  %project = weight "project" : f32[8, 8]\n  %position =')
    verify(parse_program(text))
    with pytest.raises(IRError, match="a ring of 8 rows cannot hold"):
        verify(parse_program(text.replace("window=3", "window=5")))


def test_attention_that_norms_is_held_to_its_cache_too(stateful_text):
    text = stateful_text.replace(
        "attention_state(%q, %k, %v, %position, %k_cache, %v_cache, none, none,",
        "norm_attention_state(%q, %head, %k, %head, eps=1e-06, v=%v, position=%position, k_cache=%k_cache,"
        " v_cache=%v_cache, rel=none, rel_table=none,",
    ).replace("log_alpha=0.0)", "log_alpha=0.0, sink_logits=none, softcap=0.0)")
    text = text.replace('state "position"', 'weight "head" = source("head") : f32[2]\nstate "position"', 1)
    text = text.replace("  %position =", '  %head = weight "head" : f32[2]\n  %position =')
    verify(parse_program(text))
    with pytest.raises(IRError, match="a ring of 8 rows cannot hold"):
        verify(parse_program(text.replace("window=3", "window=5")))


def test_attention_that_turns_is_held_to_its_cache_too(stateful_text):
    text = stateful_text.replace(
        "attention_state(%q, %k, %v, %position, %k_cache, %v_cache, none, none,",
        "rope_attention_state(%q, none, %k, none, eps=0.0, table=%turns, offset=0, interleaved=false, shared=none,"
        " v=%v, position=%position, k_cache=%k_cache, v_cache=%v_cache, rel=none, rel_table=none,",
    ).replace("log_alpha=0.0)", "log_alpha=0.0, sink_logits=none, softcap=0.0)")
    text = text.replace('state "position"', 'weight "freq" = source("freq") : f32[1, 1]\nstate "position"', 1)
    text = text.replace("  %position =", '  %freq = weight "freq" : f32[1, 1]\n  %position =')
    turns = "  %turns = rope_table_state(%x, %position, %freq, scaling=1.0)\n"
    at = text.rindex("\n", 0, text.index("rope_attention_state")) + 1
    text = text[:at] + turns + text[at:]
    verify(parse_program(text))
    with pytest.raises(IRError, match="a ring of 8 rows cannot hold"):
        verify(parse_program(text.replace("window=3", "window=5")))


def test_the_programs_themselves_are_fine(stateless, stateful):
    verify(stateless)
    verify(stateful)


def broken(program, rule):
    with pytest.raises(IRError) as caught:
        verify(program)
    assert caught.value.where.endswith(f": {rule}"), str(caught.value)
    return caught.value


def test_order_a_node_must_come_before_its_readers(stateless):
    method = stateless.methods["decode"]
    first, second = method.calls()[:2]
    second.append(first)
    assert broken(stateless, "order").where == "decode/normed: order"


def test_node_kinds_and_places(stateless):
    graph = stateless.methods["decode"].graph
    node = stateless.methods["decode"].calls()[0]
    with graph.inserting_after(node):
        graph.placeholder("late")
    broken(stateless, "node")


def test_node_only_canonical_ops(stateless):
    node = stateless.methods["decode"].calls()[1]
    node.target = torch.ops.aten.relu.default
    assert "aten.relu" in broken(stateless, "node").what


def test_node_a_graph_has_one_output(stateless):
    graph = stateless.methods["decode"].graph
    graph.erase_node(stateless.methods["decode"].output_node)
    broken(stateless, "node")


def test_schema_no_keyword_arguments(stateless):
    node = stateless.methods["decode"].calls("rms_norm")[0]
    node.args, node.kwargs = node.args[:2], {"eps": 1e-6}
    broken(stateless, "schema")


def test_role_every_placeholder_has_one(stateless):
    del stateless.methods["decode"].inputs[0].meta["role"]
    broken(stateless, "role")


def test_method_is_stored_under_its_name(stateless):
    stateless.methods["encode"] = stateless.methods.pop("decode")
    broken(stateless, "method")


def test_method_returns_something(stateless):
    stateless.methods["decode"].output_node.args = ((),)
    broken(stateless, "method")


def test_type_must_be_there(stateless):
    node = stateless.methods["decode"].calls()[1]
    node.meta["type"] = TensorType("f32", (Dim(1), 9))
    assert "rms_norm gives f32[n, 8], the node says f32[n, 9]" in broken(stateless, "type").what


def test_state_belongs_to_one_method(stateful):
    twin = stateful.methods["decode"].clone()
    stateful.methods["again"] = Method("again", twin.graph, twin.max_n)
    broken(stateful, "state")


def test_state_a_weight_is_not_one(stateful):
    weight = stateful.weights.source("still", "f32", (2, 8))
    node = stateful.methods["decode"].calls("short_conv_state")[0]
    node.update_arg(2, stateful.add_weight_input("decode", weight))
    assert "tail must be a state" in broken(stateful, "state").what


def test_fact_stacked_experts_leave_no_shared_experts(stateless):
    method = stateless.methods["decode"]
    stack = stateless.weights.slice("gate", stateless.weights.slice("one_expert", "gate_up", 0, 0, 1), 1, 0, 6)
    down = stateless.weights.slice("shared_down", "down", 0, 0, 1)
    gate, down = stateless.add_weight_input(method, stack), stateless.add_weight_input(method, down)
    mixed, weights = method.calls("short_conv")[0], items(method.calls("sink_router")[0])[0]
    with method.graph.inserting_before(method.output_node):
        one = call(method.graph, "columns", (weights, 0, 1))
        call(method.graph, "shared_experts", (mixed, one, gate, gate, down))
    verify(stateless)
    stateless.facts |= {Fact.EXPERTS_STACKED}
    broken(stateless, "fact")


def test_getitem_of_a_plain_value(stateless):
    method = stateless.methods["decode"]
    with method.graph.inserting_before(method.output_node):
        made = method.graph.call_function(operator.getitem, (method.calls()[0], 0))
    made.meta["type"] = TensorType("f32", (8,))
    broken(stateless, "schema")


def test_every_rule_is_broken_here():
    assert {rule for rule, _, _ in cases()} | {"order", "node"} == set(RULES)

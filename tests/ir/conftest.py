"""One small model as text, before and after state.insert, with random weights."""

import pytest
import torch

from tmlc.ir.text import parse_program

WEIGHTS = """
weight "table" = source("model.table") : f32[9, 8]
weight "norm" = source("model.norm") : f32[8]
weight "q" = source("q") : f32[8, 8]
weight "k" = source("k") : f32[4, 8]
weight "v" = source("v") : f32[4, 8]
weight "kv" = concat("k", "v", axis=0) : f32[8, 8]
weight "conv" = source("conv") : f32[8, 1, 3]
weight "router" = source("router") : f32[5, 8]
weight "bias" = source("bias") : f32[4]
weight "one" = source("one") : f32[1]
weight "gate_up" = source("gate_up") : f32[5, 12, 8]
weight "down" = source("down") : f32[5, 8, 6]
"""
HEAD = """tmlc-ir 1
meta {"kind": "tokens", "name": "tiny"}
"""
BODY = """
  %ids = input "ids" : i64[n, 1]
  %table = weight "table" : f32[9, 8]
  %norm = weight "norm" : f32[8]
  %q_w = weight "q" : f32[8, 8]
  %kv_w = weight "kv" : f32[8, 8]
  %conv = weight "conv" : f32[8, 1, 3]
  %router_w = weight "router" : f32[5, 8]
  %bias = weight "bias" : f32[4]
  %one = weight "one" : f32[1]
  %gate_up = weight "gate_up" : f32[5, 12, 8]
  %down = weight "down" : f32[5, 8, 6]
STATES
  %x = embedding(%table, %ids) : f32[n, 8]
  %normed = rms_norm(%x, %norm, eps=1e-06) : f32[n, 8]
  %q = linear(%normed, %q_w, none) : f32[n, 8]
  %kv = linear(%normed, %kv_w, none) : f32[n, 8]
  %k = columns(%kv, start=0, stop=4) : f32[n, 4]
  %v = columns(%kv, start=4, stop=8) : f32[n, 4]
ATTENTION
  %logits = linear(%mixed, %router_w, none) : f32[n, 5]
  %routes = sink_router(%logits, %bias, %one, top_k=2, n_shared=1, route_scale=2.5) : (f32[n, 3], i64[n, 3])
  %weights = item(%routes, 0) : f32[n, 3]
  %experts = item(%routes, 1) : i64[n, 3]
  %out = moe(%mixed, %weights, %experts, %gate_up, %down) : f32[n, 8]
END
  return %out, %experts
}
"""
STATELESS = (
    HEAD + "facts canonical\n" + WEIGHTS + "method decode(max_n=4) {"
    + BODY.replace("STATES\n", "").replace("END\n", "").replace("ATTENTION", """\
  %a = attention(%q, %k, %v, none, none, num_heads=4, num_kv_heads=2, scale=0.5, window=3, sinks=1, \
log_floor=0.0, log_alpha=0.0) : f32[n, 8]
  %mixed = short_conv(%a, %conv, residual=true) : f32[n, 8]""")
)  # fmt: skip
STATEFUL = (
    HEAD + "facts canonical stateful\n"
    + 'record {"pass": "state.insert", "config": {"context": 32}, "matches": 2, "near_misses": [], "notes": [],'
    ' "ms": 1.5, "ops_before": 11, "ops_after": 12, "error": null}' + WEIGHTS + """\
state "position" : i64[1, 1] kind=position method=decode init=zeros
state "k_cache" : f32[8, 4] kind=kv_ring method=decode init=zeros
state "v_cache" : f32[8, 4] kind=kv_ring method=decode init=zeros
state "tail" : f32[2, 8] kind=conv_tail method=decode init=zeros
method decode(max_n=4) {"""
    + BODY.replace("STATES", """\
  %position = state "position" : i64[1, 1]
  %k_cache = state "k_cache" : f32[8, 4]
  %v_cache = state "v_cache" : f32[8, 4]
  %tail = state "tail" : f32[2, 8]""")
    .replace("END", "  %end = advance(%position, %x, limit=32) : ()")
    .replace("ATTENTION", """\
  %a = attention_state(%q, %k, %v, %position, %k_cache, %v_cache, none, none, num_heads=4, num_kv_heads=2, \
scale=0.5, window=3, sinks=1, log_floor=0.0, log_alpha=0.0) : f32[n, 8]
  %mixed = short_conv_state(%a, %conv, %tail, residual=true) : f32[n, 8]""")
)  # fmt: skip


@pytest.fixture
def stateless_text():
    return STATELESS


@pytest.fixture
def stateful_text():
    return STATEFUL


@pytest.fixture
def stateless():
    return parse_program(STATELESS)


@pytest.fixture
def stateful():
    return parse_program(STATEFUL)


@pytest.fixture
def checkpoint(stateless):
    """Random tensors of the shapes that the program's sources declare."""
    made = {}
    for i, (_, entry) in enumerate(stateless.weights.items()):
        if entry.op == "source":
            made[entry.srcs[0]] = torch.randn(entry.shape, generator=torch.Generator().manual_seed(i))
    return made

"""Layers of the open decoders in miniature: the kernels compute what their programs mean, streamed over rings that wrap."""

from torch import fx

from tmlc.emit.cpu import emit
from tmlc.ir.program import Fact

from .conftest import Builder
from .test_cpu import calls, check_against_reference


def start(cols: int) -> tuple[Builder, fx.Node, fx.Node]:
    b = Builder().method("decode")
    return b, b.input("x", cols), b.state("position", "position", 1, 1, dtype="i64")


def finish(b: Builder, position: fx.Node, hidden: fx.Node, limit: int = 0) -> Builder:
    b.op("advance", position, hidden, limit)
    b.output(hidden)
    b.program.facts = frozenset({Fact.STATEFUL, Fact.MEMORY_PLANNED})
    return b


def project(b: Builder, name: str, x: fx.Node, rows: int, cols: int) -> fx.Node:
    return b.op("linear", x, b.weight(name, rows, cols), b.weight(f"{name}_bias", rows))


def latent() -> Builder:
    """Latent attention: one rotated key for all heads, narrow values; grouped sigmoid routing with a bias."""
    b, x, position = start(20)
    freq = b.weight("freq", 2)
    q = b.op("rope_state", project(b, "q", x, 3 * 9, 20), position, freq, 3, 5, True, 1.2)
    shared = b.op("rope_state", project(b, "k_rope", x, 4, 20), position, freq, 1, 0, True, 1.2)
    both = project(b, "kv_b", x, 3 * 11, 20)
    k = b.op("concat_heads", b.op("head_columns", both, 3, 0, 5), shared, 3, 2)
    v = b.op("head_columns", both, 3, 5, 11)
    caches = [b.state("k_cache", "kv", 48, 27), b.state("v_cache", "kv", 48, 18)]
    out = b.op("attention_state", q, k, v, position, *caches, None, None, 3, 3, 0.3, 0, 0, 0.0, 0.0, None, 0.0)
    hidden = b.op("add", x, project(b, "o", out, 20, 18))
    logits = b.op("linear", hidden, b.weight("gate", 12, 20), None)
    weights, experts = b.two("topk_router", logits, b.weight("correction", 12), 1, 3, True, 4, 2, 2.5)
    stacks = b.weight("up", 12, 10, 20), b.weight("down", 12, 20, 5)
    mixed = b.op("moe", hidden, weights, experts, *stacks, None, None, 0.0, 0.0)
    return finish(b, position, b.op("add", hidden, mixed), 48)


def sinking() -> Builder:
    """A sliding layer with sink logits and a soft cap; experts with biases and a clamped gate."""
    b, x, position = start(24)
    freq = b.weight("freq", 1, 4)
    q = b.op("rope_state", project(b, "q", x, 4 * 10, 24), position, freq, 4, 0, False, 1.0)
    k = b.op("rope_state", project(b, "k", x, 2 * 10, 24), position, freq, 2, 0, False, 1.0)
    v = project(b, "v", x, 2 * 10, 24)
    caches = [b.state(f"{c}_cache", "kv_ring", 32, 20) for c in "kv"]
    sinks = b.weight("sinks", 4)
    out = b.op("attention_state", q, k, v, position, *caches, None, None, 4, 2, 0.3, 20, 0, 0.0, 0.0, sinks, 3.0)
    hidden = b.op("add", x, project(b, "o", out, 24, 40))
    logits = b.op("linear", hidden, b.weight("gate", 5, 24), b.weight("gate_bias", 5))
    weights, experts = b.two("topk_router", logits, None, 2, 2, False, 1, 1, 1.0)
    stacks = b.weight("up", 5, 14, 24), b.weight("down", 5, 24, 7)
    biases = b.weight("up_bias", 5, 14), b.weight("down_bias", 5, 24)
    mixed = b.op("moe", hidden, weights, experts, *stacks, *biases, 1.702, 0.7)
    return finish(b, position, b.op("add", hidden, mixed))


def test_latent_attention_and_grouped_routing() -> None:
    check_against_reference(latent(), {"decode": [3, 8, 1, 8, 8, 5, 8, 7]})


def test_sink_logits_soft_caps_and_clamped_experts() -> None:
    check_against_reference(sinking(), {"decode": [3, 8, 1, 8, 8, 5, 8, 8, 8, 2]})


def test_optional_operands_are_announced_by_flags() -> None:
    attention = [c for c in emit(sinking().program).plan["methods"][0]["code"] if c["op"] == "attention"]
    assert [(len(c["t"]), c["i"][-1], c["f"][-1]) for c in attention] == [(8, 2, 3.0)]
    operands = dict(calls(emit(sinking().program)))
    assert (operands["attention"][-1]["rows"], operands["attention"][-1]["cols"]) == ([0, 1], 4)
    moe = [c for c in emit(sinking().program).plan["methods"][0]["code"] if c["op"] == "moe"]
    assert [(len(c["t"]), c["i"], c["f"]) for c in moe] == [(8, [5, 7, 1], [1.702, 0.7])]
    plain = [c for c in emit(latent().program).plan["methods"][0]["code"] if c["op"] == "moe"]
    assert [(len(c["t"]), c["i"], c["f"]) for c in plain] == [(6, [12, 5], [])]
    values = dict(calls(emit(latent().program)))["attention"][6]
    assert (values["rows"], values["cols"]) == ([0, 3 * 48], 6)

"""A layer of Inkling-2 in miniature: the kernels compute what its program means, streamed over rings that wrap."""

import pytest

from tmlc.emit.cpu import emit
from tmlc.ir.program import Fact

from .conftest import Builder
from .test_cpu import check_against_reference


def layer(d: int, head: int, inner: int) -> Builder:
    """Mixed blocks, dynamic convolutions, clips, computed sinks, a gate, and soft-capped experts."""
    b = Builder().method("decode")
    x, position = b.input("x", 2 * d), b.state("position", "position", 1, 1, dtype="i64")
    mixed = b.op("mix_blocks", x, b.weight("query", 3, d), 1e-6)
    source = [b.op("columns", mixed, i * d, (i + 1) * d) for i in range(3)]
    q = b.op("linear", source[0], b.weight("q", 4 * head, d), None)
    q = b.op("l2_clip", q, b.weight("q_scale", 4 * head), 4, 1.5)
    streams = []
    for name, given in (("k", source[1]), ("v", source[2])):
        y = b.op("linear", given, b.weight(name, 2 * head, d), None)
        taps = b.op("linear", given, b.weight(f"{name}_taps", 2 * 3, d), None)
        tail = b.state(f"{name}_tail", "conv_tail", 2, 2 * head)
        streams.append(b.op("dynamic_conv_state", y, b.weight(f"{name}_static", 3, 2 * head), taps, tail, True))
    k, v = b.op("l2_clip", streams[0], None, 2, 2.0), streams[1]
    caches = [b.state(f"{c}_cache", "kv_ring", 32, 2 * head) for c in "kv"]
    sinks = b.op("linear", source[0], b.weight("sinks", 4, d), None)
    out = b.op("attention_state", q, k, v, position, *caches, None, None, 4, 2, 0.5, 20, 0, 0.0, 0.0, sinks, 0.0)
    gate = b.op("sigmoid", b.op("linear", source[0], b.weight("g", 4 * head, d), None))
    hidden = b.op("linear", b.op("mul", out, gate), b.weight("o", d, 4 * head), None)
    logits = b.op("linear", hidden, b.weight("router", 6, d), None)
    weights, experts = b.two("topk_router", logits, b.weight("bias", 6), 1, 2, True, 1, 1, 2.0)
    stacks = b.weight("up", 6, 2 * inner, d), b.weight("down", 6, d, inner)
    made = b.op("moe", hidden, weights, experts, *stacks, None, None, 0.0, 0.0, 0.7, 1.1)
    b.op("advance", position, x, 0)
    b.output(b.op("softcap", b.op("concat_columns", b.op("add", hidden, made), hidden), 2.5))
    b.program.facts = frozenset({Fact.STATEFUL, Fact.MEMORY_PLANNED})
    return b


@pytest.mark.parametrize("sizes", [(20, 5, 7), (48, 16, 33), (70, 9, 16)])
def test_a_layer_streams_as_its_program_means(sizes: tuple[int, int, int]) -> None:
    check_against_reference(layer(*sizes), {"decode": [3, 8, 1, 8, 8, 5, 8, 1, 8, 8, 2]})


def test_caps_of_experts_are_announced_by_a_flag() -> None:
    code = emit(layer(20, 5, 7).program).plan["methods"][0]["code"]
    assert [(c["i"], c["f"]) for c in code if c["op"] == "moe"] == [([6, 7, 2], [0.0, 0.0, 0.7, 1.1])]

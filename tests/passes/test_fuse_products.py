"""fuse.conv and fuse.attention_epilogue: before and after, near misses, and the same numbers in any cut of a stream."""

import pytest
import torch

from tmlc.ir.run import ProgramRunner

PASSES = ["fuse.conv", "fuse.attention_epilogue"]
KV = """
facts stateful
weight "l.0.qkv.weight" = source("qkv") : f32[14, 8]
weight "l.0.k_sconv.weight" = source("kc") : f32[4, 1, 3]
weight "l.0.v_sconv.weight" = source("vc") : f32[4, 1, 3]
state "decode.0.k_sconv_tail" : f32[2, 4] kind=conv_tail method=decode init=zeros
state "decode.0.v_sconv_tail" : f32[2, 4] kind=conv_tail method=decode init=zeros
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %w = weight "l.0.qkv.weight"
  %kc = weight "l.0.k_sconv.weight"
  %vc = weight "l.0.v_sconv.weight"
  %kt = state "decode.0.k_sconv_tail"
  %vt = state "decode.0.v_sconv_tail"
  %all = linear(%x, %w, none)
  %q = columns(%all, start=0, stop=6)
  %k = columns(%all, start=6, stop=10)
  %v = columns(%all, start=10, stop=14)
  %k2 = short_conv_state(%k, %kc, %kt, residual=true)
  %v2 = short_conv_state(%v, %vc, %vt, residual=true)
  %kn = silu(%k2)
  %vn = silu(%v2)
  %qn = silu(%q)
  return %qn, %kn, %vn
}
"""
LAYER = """
facts stateful
weight "l.0.down.weight" = source("down") : f32[8, 6]
weight "l.0.down.bias" = source("bias") : f32[8]
weight "l.0.scale" = source("scale") : f32[1]
weight "l.0.sconv.weight" = source("conv") : f32[8, 1, 4]
weight "l.0.norm" = source("norm") : f32[8]
state "decode.0.sconv_tail" : f32[3, 8] kind=conv_tail method=decode init=zeros
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %h = input "h" : f32[n, 6]
  %w = weight "l.0.down.weight"
  %b = weight "l.0.down.bias"
  %s = weight "l.0.scale"
  %c = weight "l.0.sconv.weight"
  %norm = weight "l.0.norm"
  %t = state "decode.0.sconv_tail"
  %down = linear(%h, %w, %b)
  %scaled = scale_by(%down, %s)
  %conv = short_conv_state(%scaled, %c, %t, residual=true)
  %level = scale(%conv, alpha=0.5)
  %both = add_rms_norm(%x, %level, %norm, eps=1e-06)
  %sum = item(%both, 0)
  %normed = item(%both, 1)
  return %sum, %normed
}
"""
EXPERTS = """
facts stateful
weight "gate_up" = source("gu") : f32[3, 10, 8]
weight "down" = source("dn") : f32[3, 8, 5]
weight "logits" = source("lw") : f32[3, 8]
weight "sconv" = source("conv") : f32[8, 4]
state "decode.tail" : f32[3, 8] kind=conv_tail method=decode init=zeros
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %gu = weight "gate_up"
  %dn = weight "down"
  %lw = weight "logits"
  %c = weight "sconv"
  %t = state "decode.tail"
  %l = linear(%x, %lw, none)
  %r = topk_router(%l, none, scores=0, top_k=2, normalise=true, groups=1, top_groups=1, scale=1.0)
  %weights = item(%r, 0)
  %chosen = item(%r, 1)
  %y = moe(%x, %weights, %chosen, %gu, %dn)
  %conv = short_conv_state(%y, %c, %t, residual=true)
  %out = add(%conv, %x)
  return %out
}
"""


def conv_free(text):
    """Without convolutions: the same with plain products."""
    drop = ("sconv", "%c =", "%t =", "tail")
    lines = [line for line in text.splitlines() if not any(word in line for word in drop) or "_state(" in line]
    text = "\n".join(line for line in lines if "_state(" not in line)
    return text.replace("%level = scale(%conv, alpha=0.5)", "").replace("%level", "%scaled").replace("%conv", "%y")


def ops(program, method="decode"):
    return [node.target._schema.name.removeprefix("tmlc::") for node in program.methods[method].calls()]


def streamed(program, weights, seed=3, cuts=(1, 4, 2, 8, 1, 5)):
    session, generator, parts = ProgramRunner(program, weights).session(), torch.Generator().manual_seed(seed), []
    for n in cuts:
        given = [torch.randn(n, int(node.meta["type"].cols), generator=generator)
                 for node in program.methods["decode"].inputs]  # fmt: skip
        parts.append(torch.cat(session.call("decode", *given), 1))
    return torch.cat(parts)


def test_convolutions_of_neighbouring_columns_become_one_inside_the_product(run_pass, same_structure):
    after = run_pass("fuse.conv", KV)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (2, [])
    same_structure(
        after,
        """
facts stateful
weight "l.0.qkv.weight" = source("qkv") : f32[14, 8]
weight "l.0.k_sconv.weight" = source("kc") : f32[4, 1, 3]
weight "l.0.v_sconv.weight" = source("vc") : f32[4, 1, 3]
weight "l.0.convolutions.weight" = concat("l.0.k_sconv.weight", "l.0.v_sconv.weight", axis=0)
state "decode.0.k_sconv_v_sconv_tail" : f32[2, 8] kind=conv_tail method=decode init=zeros
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %w = weight "l.0.qkv.weight"
  %c = weight "l.0.convolutions.weight"
  %t = state "decode.0.k_sconv_v_sconv_tail"
  %all = linear_conv_state(%x, %w, none, none, %c, %t, start=6, residual=true, level=1.0, addend=none)
  %q = columns(%all, start=0, stop=6)
  %k = columns(%all, start=6, stop=10)
  %v = columns(%all, start=10, stop=14)
  %kn = silu(%k)
  %vn = silu(%v)
  %qn = silu(%q)
  return %qn, %kn, %vn
}
""",
    )


def test_a_scale_before_and_a_level_behind_go_along(run_pass, same_structure):
    after = run_pass("fuse.conv", LAYER)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    assert ops(after) == ["linear_conv_state", "add_rms_norm"]
    args = after.methods["decode"].calls("linear_conv_state")[0].args
    assert args[3].meta["role"][1] == "l.0.scale" and args[6:] == (0, True, 0.5, None)


def test_the_addition_is_made_in_the_product_and_the_norm_stands_alone(run_pass, same_structure):
    after = run_pass("fuse.attention_epilogue", run_pass("fuse.conv", LAYER))
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    fused = """
  %sum = linear_conv_state(%h, %w, %b, %s, %c, %t, start=0, residual=true, level=0.5, addend=%x)
  %normed = rms_norm(%sum, %norm, eps=1e-06)
  return %sum, %normed
}
"""
    same_structure(after, LAYER[: LAYER.index("\n  %down")] + fused)


def test_experts_take_convolution_and_addition(run_pass):
    conv = run_pass("fuse.conv", EXPERTS)
    assert ops(conv) == ["linear", "topk_router", "moe_conv_state", "add"]
    both = run_pass("fuse.attention_epilogue", conv)
    assert ops(both) == ["linear", "topk_router", "moe_conv_state"] and both.record[-1].matches == 1


@pytest.mark.parametrize(("text", "op"), [(LAYER, "linear_add"), (EXPERTS, "moe_add")])
def test_products_without_a_convolution_take_the_addition(run_pass, program_of, weights_for, text, op):
    before = program_of(conv_free(text))
    after = run_pass("fuse.attention_epilogue", before)
    assert after.record[-1].matches == 1 and op in ops(after) and not {"add", "add_rms_norm"} & set(ops(after))
    weights = weights_for(before)
    assert torch.equal(streamed(before, weights), streamed(after, weights))


@pytest.mark.parametrize("text", [KV, LAYER, EXPERTS])
@pytest.mark.parametrize("passes", [PASSES[:1], PASSES[1:], PASSES])
def test_a_stream_in_uneven_cuts_says_the_same(text, passes, run_pass, program_of, weights_for):
    before = after = program_of(text)
    for name in passes:
        after = run_pass(name, after)
    weights = weights_for(before)
    want, got = streamed(before, weights), streamed(after, weights)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert torch.equal(got, streamed(after, weights))


@pytest.mark.parametrize(
    ("text", "old", "new", "reason"),
    [
        (KV, "%qn = silu(%q)", "%qn = silu(%all)", "reads the whole product"),
        (KV, "%qn = silu(%q)", "%q2 = columns(%all, start=3, stop=8)\n  %qn = silu(%q2)", "reads the same columns"),
        (KV, "%qn = silu(%q)", "%qn = silu(%k)", "has 2 readers"),
        (LAYER, "return %sum", "return %scaled, %sum", "has 2 readers"),
        (LAYER, "return %sum", "return %down, %sum", "has 2 readers"),
        (EXPERTS, "return %out", "return %out, %y", "has 2 readers"),
    ],
)
def test_what_something_else_reads_is_not_convolved_in_place(run_pass, text, old, new, reason):
    assert old in text
    record = run_pass("fuse.conv", text.replace(old, new)).record[-1]
    assert record.matches < 2 and reason in record.near_misses[0]


@pytest.mark.parametrize(
    "text",
    [
        KV.replace("%vc, %vt, residual=true", "%vc, %vt, residual=false"),
        KV.replace("start=10, stop=14", "start=0, stop=4").replace("%q = columns(%all, start=0, stop=6)",
                                                                  "%q = columns(%all, start=10, stop=14)"),
    ],
)  # fmt: skip
def test_a_second_convolution_of_another_kind_or_place_stays_a_call(run_pass, text, program_of, weights_for):
    before = program_of(text)
    after = run_pass("fuse.conv", before)
    assert after.record[-1].matches == 1 and "another convolution" in after.record[-1].near_misses[0]
    assert ops(after).count("short_conv_state") == 1
    weights = weights_for(before)
    assert (streamed(after, weights) - streamed(before, weights)).abs().max() < 1e-5


def test_a_convolution_of_no_product_is_not_a_candidate(run_pass):
    text = LAYER.replace("scale_by(%down, %s)", "silu(%down)")
    record = run_pass("fuse.conv", text).record[-1]
    assert (record.matches, record.near_misses) == (0, [])


def test_near_misses_of_additions(run_pass):
    twice = EXPERTS.replace("%out = add(%conv, %x)", "%sum = add(%conv, %x)\n  %out = add(%sum, %x)")
    record = run_pass("fuse.attention_epilogue", run_pass("fuse.conv", twice)).record[-1]
    assert record.matches == 1 and "adds something already" in record.near_misses[0]
    read = conv_free(EXPERTS).replace("return %out", "return %out, %y")
    record = run_pass("fuse.attention_epilogue", read).record[-1]
    assert record.matches == 0 and "readers" in record.near_misses[0]
    none = EXPERTS.replace("add(%conv, %x)", "add(%x, %x)").replace("return %out", "return %out, %conv")
    record = run_pass("fuse.attention_epilogue", none).record[-1]
    assert (record.matches, record.near_misses) == (0, [])


def test_of_two_products_the_later_one_adds_the_other(run_pass):
    text = conv_free(EXPERTS).replace("add(%y, %x)", "add(%y, %z)").replace(
        "%y = moe", "%z = linear(%x, %zw, none)\n  %y = moe").replace(
        'method', 'weight "z" = source("z") : f32[8, 8]\nmethod', 1).replace(
        '%dn = weight', '%zw = weight "z"\n  %dn = weight')  # fmt: skip
    assert ops(run_pass("fuse.attention_epilogue", text)) == ["linear", "topk_router", "linear", "moe_add"]

"""fuse.steps, fuse.flow_times and fuse.norm_pair: before and after, near misses, and the same numbers."""

import pytest

from tmlc.errors import EmitError
from tmlc.ir.ops import OPS
from tmlc.ir.replaced import TRITON_PASSES
from tmlc.pipeline.pipeline import load_pipeline

FLOW = """
weight "in" = source("in") : f32[6, 6]
weight "times" = source("times") : f32[4, 6]
weight "mod" = source("mod") : f32[18, 6]
weight "bias" = source("bias") : f32[18]
weight "norm" = source("norm") : f32[6]
weight "last" = source("last") : f32[6]
weight "up" = source("up") : f32[6, 6]
method speak(max_n=8) {
  %x = input "x" : f32[n, 6]
  %in = weight "in"
  %times = weight "times"
  %mod = weight "mod"
  %bias = weight "bias"
  %norm = weight "norm"
  %last = weight "last"
  %up = weight "up"
  %base = linear(%x, %in, none)
  %r0 = add_row(%base, %times, index=0)
  %c0 = silu(%r0)
  %m0 = linear(%c0, %mod, %bias)
  %s0 = columns(%m0, start=0, stop=6)
  %t0 = columns(%m0, start=6, stop=12)
  %g0 = columns(%m0, start=12, stop=18)
  %n0 = rms_norm(%base, %norm, eps=1e-06)
  %d0 = modulate(%n0, %t0, %s0)
  %u0 = linear(%d0, %up, none)
  %a0 = gelu(%u0)
  %w0 = linear(%a0, %in, none)
  %p0 = mul(%g0, %w0)
  %both = add_rms_norm(%base, %p0, %last, eps=1e-06)
  %sum = item(%both, 0)
  %normed = item(%both, 1)
  %r1 = add_row(%base, %times, index=3)
  %c1 = silu(%r1)
  %m1 = linear(%c1, %mod, %bias)
  %s1 = columns(%m1, start=0, stop=6)
  %t1 = columns(%m1, start=6, stop=12)
  %d1 = modulate(%normed, %t1, %s1)
  %e = linear(%d1, %up, none)
  %v = add_scaled(%e, %x, alpha=-1.0)
  %y = add_scaled(%x, %v, alpha=0.5)
  return %y, %sum
}
"""
TIMES = """
weight "times" = source("times") : f32[4, 6]
weight "mod" = source("mod") : f32[18, 6]
weight "bias" = source("bias") : f32[18]
method speak(max_n=8) {
  %x = input "x" : f32[n, 6]
  %times = weight "times"
  %mod = weight "mod"
  %bias = weight "bias"
"""
NORMS = """
weight "qk" = source("qk") : f32[9, 6]
weight "qn" = source("qn") : f32[3]
weight "kn" = source("kn") : f32[3]
method decode(max_n=8) {
  %x = input "x" : f32[n, 6]
  %qk = weight "qk"
  %qn = weight "qn"
  %kn = weight "kn"
  %all = linear(%x, %qk, none)
  %q = columns(%all, start=0, stop=6)
  %q2 = rms_norm(%q, %qn, eps=1e-06)
  %q3 = silu(%q2)
  %k = columns(%all, start=6, stop=9)
  %k2 = rms_norm(%k, %kn, eps=1e-06)
  return %q3, %k2
}
"""
PASSES = ("fuse.flow_times", "fuse.norm_pair", "fuse.steps")
#: In test_fuse_norms.py.
NORM_PASSES = {"fuse.norm_router", "fuse.norm_topk_router", "fuse.norm_linear", "fuse.norm_attention", "fuse.norm_moe"}
HEAD_PASS = "fuse.head_logits"  # test_fuse_head.py
# in files of their own
OTHER_PASSES = {
    "fuse.attention_linear", "fuse.linear_and_conv", "fuse.rope_attention", "fuse.swiglu", "route.join_shared",
}  # fmt: skip


def ops(program, method="speak"):
    return [node.target._schema.name.removeprefix("tmlc::") for node in program.methods[method].calls()]


def steps(program):
    return [node.args[-2] for node in program.methods["speak"].calls() if node.target._schema.name.endswith("_steps")]


def test_what_follows_products_and_norms_becomes_their_steps(run_pass):
    after = run_pass("fuse.steps", FLOW)
    assert after.record[-1].matches == 7
    assert steps(after) == [
        "add_row:va silu:v", "modulate:vab", "gelu:v", "mul:av add:bv", "add_row:va silu:v", "modulate:vab",
        "add_scaled:va add_scaled:av",
    ]  # fmt: skip
    euler = after.methods["speak"].calls("linear_steps")[-1]
    assert euler.args[-1] == [-1.0, 0.5]
    left = set(ops(after))
    assert left == {"linear", "element_steps", "columns", "rms_norm_steps", "linear_steps"}


def test_the_addition_before_a_norm_is_made_in_the_product_and_its_sum_keeps_its_readers(run_pass):
    after = run_pass("fuse.steps", FLOW)
    gated, norm = after.methods["speak"].calls("linear_steps")[1], after.methods["speak"].calls("rms_norm_steps")[1]
    assert norm.args[0] is gated and after.methods["speak"].outputs[1] is gated


def test_linears_of_all_flow_times_become_one(run_pass, same_structure):
    after = run_pass("fuse.flow_times", TIMES + """  %r0 = add_row(%x, %times, index=0)
  %c0 = silu(%r0)
  %m0 = linear(%c0, %mod, %bias)
  %r1 = add_row(%x, %times, index=3)
  %c1 = silu(%r1)
  %m1 = linear(%c1, %mod, %bias)
  return %m0, %m1
}
""")
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    same_structure(after, TIMES + """  %wide = silu_add_rows(%x, %times, index=[0, 3])
  %tall = reshape(%wide, cols=6)
  %product = linear(%tall, %mod, %bias)
  %flat = reshape(%product, cols=36)
  %m0 = columns(%flat, start=0, stop=18)
  %m1 = columns(%flat, start=18, stop=36)
  return %m0, %m1
}
""")


def test_a_flow_of_one_step_is_told_as_a_near_miss(run_pass):
    text = FLOW.replace("%m1 = linear(%c1, %mod, %bias)", "%m1 = linear(%c1, %mod, none)")
    record = run_pass("fuse.flow_times", text).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 2


def test_norms_of_queries_and_keys_become_one(run_pass, same_structure):
    after = run_pass("fuse.norm_pair", NORMS)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    assert ops(after, "decode") == ["linear", "columns", "columns", "rms_norm_pair", "silu"]


def test_norms_with_another_eps_stay_alone(run_pass):
    text = NORMS.replace("%k2 = rms_norm(%k, %kn, eps=1e-06)", "%k2 = rms_norm(%k, %kn, eps=1e-05)")
    record = run_pass("fuse.norm_pair", text).record[-1]
    assert record.matches == 0 and "another width or eps" in record.near_misses[0]


def test_a_value_with_two_readers_ends_the_steps(run_pass):
    text = FLOW.replace("return %y, %sum", "return %y, %sum, %a0")
    assert "gelu:v" in steps(run_pass("fuse.steps", text))
    text = FLOW.replace("return %y, %sum", "return %y, %sum, %u0")
    after = run_pass("fuse.steps", text)
    assert "gelu" in ops(after) and "gelu:v" not in steps(after)


def test_a_value_may_meet_itself_and_too_many_operands_end_the_steps(run_pass):
    text = """
weight "w" = source("w") : f32[6, 6]
method speak(max_n=8) {
  %x = input "x" : f32[n, 6]
  %y = input "y" : f32[n, 6]
  %z = input "z" : f32[n, 6]
  %u = input "u" : f32[n, 6]
  %v = input "v" : f32[n, 6]
  %w = weight "w"
  %a = linear(%x, %w, none)
  %b = add(%a, %y)
  %c = add(%b, %z)
  %d = add(%c, %u)
  %e = add(%d, %v)
  return %e
}
"""
    after = run_pass("fuse.steps", text)
    assert steps(after) == ["add:va add:vb add:vc"] and ops(after) == ["linear_steps", "add"]
    assert "more than the steps of one op" in after.record[-1].near_misses[0]
    after = run_pass("fuse.steps", FLOW.replace("%p0 = mul(%g0, %w0)", "%p0 = mul(%w0, %w0)"))
    assert "mul:vv add:av" in steps(after)


@pytest.mark.parametrize("text", [FLOW, NORMS])
@pytest.mark.parametrize("names", [*((name,) for name in PASSES), PASSES])
def test_numbers_stay_the_same(text, names, run_pass, program_of, weights_for, equivalent):
    before = after = program_of(text)
    for name in names:
        after = run_pass(name, after)
    assert equivalent(before, after, weights_for(before)) < 1e-6


def test_only_the_pipeline_of_the_triton_target_has_these_passes():
    assert {*PASSES, *NORM_PASSES, *OTHER_PASSES, HEAD_PASS} == set(TRITON_PASSES.values())
    assert set(TRITON_PASSES.values()) <= {step.name for step in load_pipeline("triton").steps}
    for name in ("cpu", "onnx", "tensorrt"):
        assert not set(TRITON_PASSES.values()) & {step.name for step in load_pipeline(name).steps}
    assert all(OPS[op].from_pass for op in TRITON_PASSES)


def test_other_targets_refuse_the_ops_and_say_which_pass_to_leave_out(run_pass):
    from tmlc.emit.targets import find_target

    after = run_pass("memory.plan", run_pass("fuse.steps", FLOW))
    with pytest.raises(EmitError, match=r"only the Triton target runs it, leave out fuse\.steps"):
        find_target("cpu").emit(after, {}, lambda *_: None)

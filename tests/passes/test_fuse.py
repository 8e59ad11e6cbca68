"""fuse.merge_linears and fuse.residual_norm: before and after, near misses, and unchanged numbers."""

import pytest

QKV = """
weight "l.0.q_proj.weight" = source("q") : f32[6, 8]
weight "l.0.k_proj.weight" = source("k") : f32[4, 8]
weight "l.0.v_proj.weight" = source("v") : f32[4, 8]
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %qw = weight "l.0.q_proj.weight"
  %kw = weight "l.0.k_proj.weight"
  %vw = weight "l.0.v_proj.weight"
  %q = linear(%x, %qw, none)
  %k = linear(%x, %kw, none)
  %ks = silu(%k)
  %v = linear(%x, %vw, none)
  return %q, %ks, %v
}
"""

STEPS = """
weight "a.weight" = source("a") : f32[4, 4]
weight "b.weight" = source("b") : f32[2, 4]
weight "a.bias" = source("ab") : f32[4]
weight "b.bias" = source("bb") : f32[2]
method speak(max_n=8) {
  %x = input "x" : f32[n, 4]
  %aw = weight "a.weight"
  %bw = weight "b.weight"
  %ab = weight "a.bias"
  %bb = weight "b.bias"
  %a1 = linear(%x, %aw, %ab)
  %b1 = linear(%x, %bw, %bb)
  %y = silu(%a1)
  %a2 = linear(%y, %aw, %ab)
  %b2 = linear(%y, %bw, %bb)
  %z = add(%a2, %a1)
  %w = add(%b1, %b2)
  return %z, %w
}
"""

NORM = """
weight "w" = source("w") : f32[8]
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %w = weight "w"
  %y = silu(%x)
  %sum = add(%x, %y)
  %normed = rms_norm(%sum, %w, eps=1e-06)
  %out = add(%normed, %sum)
  return %out
}
"""


def test_linears_of_one_input_become_one_linear_and_columns(run_pass, same_structure):
    after = run_pass("fuse.merge_linears", QKV)
    assert after.record[-1].matches == 1
    same_structure(
        after,
        """
weight "l.0.q_proj.weight" = source("q") : f32[6, 8]
weight "l.0.k_proj.weight" = source("k") : f32[4, 8]
weight "l.0.v_proj.weight" = source("v") : f32[4, 8]
weight "l.0.q_k_v.weight" = concat("l.0.q_proj.weight", "l.0.k_proj.weight", "l.0.v_proj.weight", axis=0)
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %w = weight "l.0.q_k_v.weight"
  %all = linear(%x, %w, none)
  %q = columns(%all, start=0, stop=6)
  %k = columns(%all, start=6, stop=10)
  %v = columns(%all, start=10, stop=14)
  %ks = silu(%k)
  return %q, %ks, %v
}
""",
    )


def test_a_group_that_repeats_with_the_same_weights_shares_one_merged_weight_and_bias(run_pass, program_of):
    after = run_pass("fuse.merge_linears", STEPS)
    assert after.record[-1].matches == 2
    used = after.used_weights()
    assert len(used) == 2 and {after.weights[name].shape for name in used} == {(6, 4), (6,)}


@pytest.mark.parametrize("text", [QKV, STEPS])
def test_merged_linears_compute_the_same(text, run_pass, program_of, weights_for, equivalent):
    before = program_of(text)
    assert equivalent(before, run_pass("fuse.merge_linears", before), weights_for(before)) < 1e-6


def test_a_weight_that_another_method_reads_is_not_copied(run_pass):
    other = """
method other(max_n=8) {
  %x = input "x" : f32[n, 8]
  %kw = weight "l.0.k_proj.weight"
  %k = linear(%x, %kw, none)
  return %k
}
"""
    record = run_pass("fuse.merge_linears", QKV + other).record[-1]
    assert record.matches == 0
    assert "l.0.k_proj.weight is used by other/" in record.near_misses[0]


def test_a_linear_whose_result_is_reshaped_stays_alone(run_pass):
    text = QKV.replace("%ks = silu(%k)", "%ks = reshape(%k, cols=2)")
    record = run_pass("fuse.merge_linears", text).record[-1]
    assert record.matches == 1 and "reshaped" in record.near_misses[0]


def test_linears_of_different_inputs_and_a_linear_with_a_bias_are_not_candidates(run_pass):
    text = STEPS.replace("%b1 = linear(%x, %bw, %bb)", "%b1 = linear(%x, %bw, none)").replace(
        "%b2 = linear(%y, %bw, %bb)", "%b2 = linear(%x, %bw, none)"
    )
    record = run_pass("fuse.merge_linears", text).record[-1]
    assert record.matches == 0
    assert all("same weight" in miss for miss in record.near_misses)


def test_a_residual_and_its_norm_become_one_op_with_two_results(run_pass, same_structure):
    after = run_pass("fuse.residual_norm", NORM)
    assert after.record[-1].matches == 1
    same_structure(
        after,
        """
weight "w" = source("w") : f32[8]
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %w = weight "w"
  %y = silu(%x)
  %both = add_rms_norm(%x, %y, %w, eps=1e-06)
  %sum = item(%both, 0)
  %normed = item(%both, 1)
  %out = add(%normed, %sum)
  return %out
}
""",
    )


def test_a_sum_that_only_the_norm_reads_leaves_no_item_behind(run_pass):
    after = run_pass("fuse.residual_norm", NORM.replace("%out = add(%normed, %sum)", "%out = silu(%normed)"))
    assert [str(node.target).count("getitem") for node in after.methods["decode"].graph.nodes].count(1) == 1


def test_the_fused_norm_computes_the_same(run_pass, program_of, weights_for, equivalent):
    before = program_of(NORM)
    assert equivalent(before, run_pass("fuse.residual_norm", before), weights_for(before)) == 0


def test_a_norm_over_groups_and_a_second_norm_of_one_sum_are_near_misses(run_pass):
    grouped = NORM.replace("f32[8]", "f32[4]")
    record = run_pass("fuse.residual_norm", grouped).record[-1]
    assert record.matches == 0 and "groups of columns" in record.near_misses[0]
    twice = NORM.replace("%out = add(%normed, %sum)", "%out = rms_norm(%sum, %w, eps=1e-05)").replace(
        "return %out", "return %out, %normed"
    )
    record = run_pass("fuse.residual_norm", twice).record[-1]
    assert record.matches == 1 and "another norm already" in record.near_misses[0]


def test_a_norm_of_something_that_is_no_sum_is_not_a_candidate(run_pass):
    record = run_pass("fuse.residual_norm", NORM.replace("add(%x, %y)", "mul(%x, %y)")).record[-1]
    assert (record.matches, record.near_misses) == (0, [])

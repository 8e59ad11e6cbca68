"""route.join_shared: what it rewrites, what it must leave with the reason, and that the numbers stay."""

import pytest
import torch

WEIGHTS = """
weight "l.gate" = source("w") : f32[4, 8]
weight "l.experts.gate_up_proj" = source("gu") : f32[4, 10, 8]
weight "l.experts.down_proj" = source("d") : f32[4, 8, 5]
weight "l.shared.gate_proj" = source("sg") : f32[10, 8]
weight "l.shared.up_proj" = source("su") : f32[10, 8]
weight "l.shared.down_proj" = source("sd") : f32[8, 10]
"""
ROUTES = """method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %w = weight "l.gate"
  %gu = weight "l.experts.gate_up_proj"
  %d = weight "l.experts.down_proj"
  %sg = weight "l.shared.gate_proj"
  %su = weight "l.shared.up_proj"
  %sd = weight "l.shared.down_proj"
  %l = linear(%x, %w, none)
  %r = topk_router(%l, none, scores=1, top_k=2, normalise=true, groups=1, top_groups=1, scale=2.5)
  %weights = item(%r, 0)
  %experts = item(%r, 1)
"""
BEFORE = (
    WEIGHTS
    + ROUTES
    + """  %routed = moe(%x, %weights, %experts, %gu, %d)
  %gates = linear(%x, %sg, none)
  %ups = linear(%x, %su, none)
  %both = swiglu(%gates, %ups)
  %shared = linear(%both, %sd, none)
  %sum = add(%routed, %shared)
  return %sum
}
"""
)
AFTER = (
    WEIGHTS
    + """weight "l.shared.gate_proj.cut" = reshape("l.shared.gate_proj", shape=[2, 5, 8])
weight "l.shared.up_proj.cut" = reshape("l.shared.up_proj", shape=[2, 5, 8])
weight "l.shared.gate_up" = concat("l.shared.gate_proj.cut", "l.shared.up_proj.cut", axis=1)
weight "l.shared.down_proj.cut" = reshape("l.shared.down_proj", shape=[8, 2, 5])
weight "l.shared.down_proj.experts" = transpose("l.shared.down_proj.cut", axes=[1, 0, 2])
weight "l.stacked.gate_up" = concat("l.experts.gate_up_proj", "l.shared.gate_up", axis=0)
weight "l.stacked.down" = concat("l.experts.down_proj", "l.shared.down_proj.experts", axis=0)
"""
    + "".join(f"{line}\n" for line in ROUTES.splitlines() if not line.startswith(("  %sg =", "  %su =", "  %sd =")))
    .replace("l.experts.gate_up_proj", "l.stacked.gate_up")
    .replace("l.experts.down_proj", "l.stacked.down")
    + """  %more = append_experts(%weights, %experts, first=4, count=2)
  %shares = item(%more, 0)
  %chosen = item(%more, 1)
  %sum = moe(%x, %shares, %chosen, %gu, %d)
  return %sum
}
"""
)


def test_a_shared_expert_joins_the_stack_in_pieces_as_wide_as_the_others(run_pass, same_structure):
    after = run_pass("route.join_shared", BEFORE)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    same_structure(after, AFTER)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("w", [None, torch.zeros(4, 8), torch.full((4, 8), 40.0)])
def test_the_stack_computes_the_same(swapped, w, run_pass, program_of, weights_for, equivalent):
    before = program_of(BEFORE.replace("add(%routed, %shared)", "add(%shared, %routed)") if swapped else BEFORE)
    after = run_pass("route.join_shared", before)
    assert after.record[-1].matches == 1
    assert equivalent(before, after, weights_for(before, **({} if w is None else {"w": w}))) < 1e-5


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("return %sum", "return %sum, %both", "both has 2 readers"),
        ("return %sum", "%again = linear(%x, %sd2, none)\n  return %sum, %again", "used elsewhere too"),
        ("top_k=2", "top_k=15", "a row would have 17 choices"),
        ("%l = linear(%x, %w, none)", "%l = linear(%x, %sd, none)", "chooses among 8 experts, the stack has 4"),
        ("moe(%x, %weights, %experts", "moe(%x, %weights, %experts2", "do not come from one router"),
        ("%gu, %d)", "%gu, %d, none, none, alpha=1.5, limit=7.0, gate_cap=0.0, up_cap=0.0, grouped_from=0)",
         "another activation"),
        ('("sg") : f32[10, 8]', '("sg") : f32[7, 8]', "7 wide, no multiple of 5"),
    ],
)  # fmt: skip
def test_what_only_looks_like_a_shared_expert_is_left_and_explained(old, new, reason, run_pass):
    text = BEFORE.replace(old, new)
    if "7, 8" in new:
        text = text.replace('("su") : f32[10, 8]', '("su") : f32[7, 8]').replace("f32[8, 10]", "f32[8, 7]")
    if "%sd2" in new:
        text = text.replace("%sd2", "%sg")
    if "%experts2" in new:
        text = text.replace("  %routed", "  %r2 = topk_router(%l, none, scores=0, top_k=2, normalise=true, groups=1,"
                            " top_groups=1, scale=1.0)\n  %experts2 = item(%r2, 1)\n  %routed")  # fmt: skip
    if "%l = linear(%x, %sd" in new:
        text = text.replace("%l = linear(%x, %sd, none)", "%l = concat_columns(%l0, %l0)")
        text = text.replace("  %l =", "  %l0 = linear(%x, %w, none)\n  %l =")
    if "top_k=15" in new:
        text = text.replace("f32[4, ", "f32[15, ")
    record = run_pass("route.join_shared", text).record[-1]
    assert record.matches == 0 and reason in record.near_misses[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("add(%routed, %shared)", "mul(%routed, %shared)"),
        ("swiglu(%gates, %ups)", "mul(%gates, %ups)"),
        ("%ups = linear(%x, ", "%x2 = scale(%x, alpha=2.0)\n  %ups = linear(%x2, "),
    ],
)
def test_other_layers_beside_experts_are_no_near_miss(old, new, run_pass):
    record = run_pass("route.join_shared", BEFORE.replace(old, new)).record[-1]
    assert (record.matches, record.near_misses) == (0, [])

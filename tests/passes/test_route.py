"""route.fuse_router and route.stack_experts: what they rewrite, what they must leave, and that routing is untouched."""

import pytest
import torch

from tmlc.errors import PipelineError

ROUTER = """
weight "w" = source("w") : f32[6, 8]
weight "b" = source("b") : f32[4]
weight "s" = source("s") : f32[1]
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %w = weight "w"
  %b = weight "b"
  %s = weight "s"
  %l = linear(%x, %w, none)
  %r = sink_router(%l, %b, %s, top_k=2, n_shared=2, route_scale=2.0)
  %weights = item(%r, 0)
  %experts = item(%r, 1)
  return %weights, %experts
}
"""

MOE_WEIGHTS = """
weight "w" = source("w") : f32[6, 8]
weight "b" = source("b") : f32[4]
weight "s" = source("s") : f32[1]
weight "l.experts.gate_up_proj" = source("gu") : f32[4, 10, 8]
weight "l.experts.down_proj" = source("d") : f32[4, 8, 5]
weight "l.shared.gate" = source("sg") : f32[2, 5, 8]
weight "l.shared.up" = source("su") : f32[2, 5, 8]
weight "l.shared.down" = source("sd") : f32[2, 8, 5]
"""
MOE = (
    MOE_WEIGHTS
    + """
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %w = weight "w"
  %b = weight "b"
  %s = weight "s"
  %gu = weight "l.experts.gate_up_proj"
  %d = weight "l.experts.down_proj"
  %sg = weight "l.shared.gate"
  %su = weight "l.shared.up"
  %sd = weight "l.shared.down"
  %r = router(%x, %w, %b, %s, top_k=2, n_shared=2, route_scale=2.0)
  %weights = item(%r, 0)
  %experts = item(%r, 1)
  %w0 = columns(%weights, start=0, stop=2)
  %e0 = columns(%experts, start=0, stop=2)
  %routed = moe(%x, %w0, %e0, %gu, %d)
  %w1 = columns(%weights, start=2, stop=4)
  %shared = shared_experts(%x, %w1, %sg, %su, %sd)
  %sum = add(%routed, %shared)
  return %sum
}
"""
)

# Router weights and biases that send positions where an optimisation might not look.
ADVERSARIAL = {
    "all to one expert": {"w": torch.zeros(6, 8), "b": torch.tensor([0.0, 5.0, 1.0, 0.0])},
    "every score a tie": {"w": torch.zeros(6, 8), "b": torch.zeros(4)},
    "two experts never used": {"b": torch.tensor([-9.0, 3.0, -9.0, 3.0])},
    "logits that saturate": {"w": torch.full((6, 8), 40.0)},
    "random": {},
}


def test_linear_and_sink_router_become_one_router(run_pass, same_structure):
    after = run_pass("route.fuse_router", ROUTER)
    assert after.record[-1].matches == 1
    expected = ROUTER.replace("  %l = linear(%x, %w, none)\n", "").replace("sink_router(%l, ", "router(%x, %w, ")
    same_structure(after, expected)


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_the_fused_router_chooses_and_weighs_the_same(case, run_pass, program_of, weights_for, equivalent):
    before = program_of(ROUTER)
    assert equivalent(before, run_pass("route.fuse_router", before), weights_for(before, **ADVERSARIAL[case])) == 0


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("%r = sink_router(%l", "%l2 = scale(%l, alpha=2.0)\n  %r = sink_router(%l2", "come from scale"),
        ("return %weights, %experts", "return %weights, %experts, %l", "2 users"),
        ("linear(%x, %w, none)", "linear(%x, %w, %wb)", "has a bias"),
    ],
)
def test_routers_that_only_look_alike_are_left_and_explained(old, new, reason, run_pass):
    text = ROUTER.replace(old, new)
    if "%wb" in new:
        text = text.replace("method", 'weight "wb" = source("wb") : f32[6]\nmethod', 1).replace(
            '%s = weight "s"', '%s = weight "s"\n  %wb = weight "wb"'
        )
    record = run_pass("route.fuse_router", text).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 1
    assert reason in record.near_misses[0]


def test_shared_experts_join_the_routed_stack(run_pass, same_structure):
    after = run_pass("route.stack_experts", MOE)
    assert after.record[-1].matches == 1
    assert "experts_stacked" in after.facts
    same_structure(
        after,
        MOE_WEIGHTS
        + """
weight "l.shared.gate_up" = concat("l.shared.gate", "l.shared.up", axis=1)
weight "l.stacked.gate_up" = concat("l.experts.gate_up_proj", "l.shared.gate_up", axis=0)
weight "l.stacked.down" = concat("l.experts.down_proj", "l.shared.down", axis=0)
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %w = weight "w"
  %b = weight "b"
  %s = weight "s"
  %gu = weight "l.stacked.gate_up"
  %d = weight "l.stacked.down"
  %r = router(%x, %w, %b, %s, top_k=2, n_shared=2, route_scale=2.0)
  %weights = item(%r, 0)
  %experts = item(%r, 1)
  %sum = moe(%x, %weights, %experts, %gu, %d)
  return %sum
}
""",
    )


@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_stack_computes_the_same(case, swapped, run_pass, program_of, weights_for, equivalent):
    before = program_of(MOE.replace("add(%routed, %shared)", "add(%shared, %routed)") if swapped else MOE)
    after = run_pass("route.stack_experts", before)
    assert after.record[-1].matches == 1
    assert equivalent(before, after, weights_for(before, **ADVERSARIAL[case])) < 1e-5


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("add(%routed, %shared)", "mul(%routed, %shared)", "only added"),
        ("add(%routed, %shared)", "add(%x, %shared)", "not a moe"),
        ("return %sum", "return %sum, %routed", "used only there"),
        ("%w1 = columns(%weights, start=2, stop=4)", "%w1 = columns(%weights, start=1, stop=3)", "columns 1..3"),
        ("%w1 = columns(%weights, start=2, stop=4)\n", "%ww = scale(%weights, alpha=2.0)\n"
         "  %w1 = columns(%ww, start=2, stop=4)\n", "not columns of a router"),
        ("shared_experts(%x, ", "shared_experts(%x2, ", "different inputs"),
        ("return %sum", "%again = shared_experts(%x, %w0, %sg, %su, %sd)\n  return %sum, %again", "used elsewhere"),
    ],
)  # fmt: skip
def test_experts_that_only_look_alike_are_left_and_explained(old, new, reason, run_pass):
    text = MOE.replace(old, new)
    if "%x2," in new:
        text = text.replace("  %r = ", "  %x2 = scale(%x, alpha=2.0)\n  %r = ")
    after = run_pass("route.stack_experts", text)
    record = after.record[-1]
    assert record.matches == 0
    assert reason in record.near_misses[0]
    assert "experts_stacked" not in after.facts


def test_experts_of_other_width_are_left(run_pass):
    text = MOE.replace('("gu") : f32[4, 10, 8]', '("gu") : f32[4, 12, 8]').replace(
        '("d") : f32[4, 8, 5]', '("d") : f32[4, 8, 6]'
    )
    assert "6 wide, shared ones 5" in run_pass("route.stack_experts", text).record[-1].near_misses[0]


def test_a_program_without_experts_is_no_near_miss(run_pass):
    text = """
weight "w" = source("w") : f32[8, 8]
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %w = weight "w"
  %y = linear(%x, %w, none)
  return %y
}
"""
    for name in ("route.fuse_router", "route.stack_experts"):
        record = run_pass(name, text).record[-1]
        assert (record.matches, record.near_misses) == (0, [])


CHOOSE = """
weight "gate_up" = source("gu") : f32[3, 10, 8]
weight "down" = source("dn") : f32[3, 8, 5]
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %weights = input "weights" : f32[n, 2]
  %experts = input "experts" : i64[n, 2]
  %gu = weight "gate_up"
  %dn = weight "down"
  %y = moe(%x, %weights, %experts, %gu, %dn)
  return %y
}
"""


def test_the_number_of_rows_from_which_experts_are_grouped_is_written_into_the_call(run_pass, same_structure):
    after = run_pass("route.select_kernel", CHOOSE, grouped_from=5)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    rest = "none, none, alpha=0.0, limit=0.0, gate_cap=0.0, up_cap=0.0, grouped_from=5"
    same_structure(after, CHOOSE.replace("%gu, %dn)", f"%gu, %dn, {rest})"))
    assert run_pass("route.select_kernel", CHOOSE).methods["decode"].calls("moe")[0].args[-1] == 2


def test_a_choice_that_was_made_is_kept_and_told(run_pass):
    record = run_pass("route.select_kernel", run_pass("route.select_kernel", CHOOSE, grouped_from=5)).record[-1]
    assert record.matches == 0 and "grouped from 5 rows on already" in record.near_misses[0]


@pytest.mark.parametrize("value", [-1, 2**40, "many"])
def test_a_number_of_rows_that_is_none_is_refused(run_pass, value):
    with pytest.raises(PipelineError, match="grouped_from"):
        run_pass("route.select_kernel", CHOOSE, grouped_from=value)

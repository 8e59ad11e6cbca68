"""fuse.head: before and after, near misses, and the same tokens at every temperature."""

import pytest
import torch

from tmlc.ir.run import ProgramRunner

HEAD = """
weight "head" = source("head") : f32[12, 8]
weight "head.bias" = source("bias") : f32[12]
method next_token(max_n=4) {
  %hidden = input "hidden" : f32[n, 8]
  %key = input "key" : i64[n, 3]
  %temperature = input "temperature" : f32[n, 1]
  %w = weight "head"
  %b = weight "head.bias"
  %scaled = scale(%hidden, alpha=0.5)
  %logits = linear(%scaled, %w, %b)
  %capped = softcap(%logits, cap=3.0)
  %kept = columns(%capped, start=0, stop=10)
  %ids = sample(%kept, %key, %temperature)
  return %ids
}
"""
BARE = HEAD.replace("  %scaled = scale(%hidden, alpha=0.5)\n", "").replace("%scaled, %w, %b", "%hidden, %w, none")
BARE = BARE.replace("  %capped = softcap(%logits, cap=3.0)\n  %kept = columns(%capped, start=0, stop=10)\n", "")
BARE = BARE.replace("sample(%kept", "sample(%logits").replace('  %b = weight "head.bias"\n', "")


def test_scale_product_cap_and_draw_become_one_op(run_pass, same_structure):
    after = run_pass("fuse.head", HEAD)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    same_structure(
        after,
        """
weight "head" = source("head") : f32[12, 8]
weight "head.bias" = source("bias") : f32[12]
method next_token(max_n=4) {
  %hidden = input "hidden" : f32[n, 8]
  %key = input "key" : i64[n, 3]
  %temperature = input "temperature" : f32[n, 1]
  %w = weight "head"
  %b = weight "head.bias"
  %ids = head_sample(%hidden, %w, %b, %key, %temperature, alpha=0.5, cap=3.0, entries=10)
  return %ids
}
""",
    )


def test_a_head_without_scaling_cap_or_bias(run_pass):
    after = run_pass("fuse.head", BARE)
    (node,) = after.methods["next_token"].calls()
    assert after.record[-1].matches == 1 and node.args[2] is None and node.args[5:] == (1.0, 0.0, 12)


def test_a_method_that_returns_logits_keeps_them(run_pass):
    both = HEAD.replace("return %ids", "return %ids, %kept")
    record = run_pass("fuse.head", both).record[-1]
    assert record.matches == 0 and "readers" in record.near_misses[0]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("columns(%capped, start=0, stop=10)", "columns(%capped, start=2, stop=12)", "begin at column 2"),
        ("%kept = columns(%capped, start=0, stop=10)", "%kept = silu(%capped)", "come from silu"),
        ("columns(%capped, start=0, stop=10)", "softcap(%capped, cap=2.0)", "softcap twice"),
        ("  %scaled = scale(%hidden, alpha=0.5)\n  %logits = linear(%scaled, %w, %b)\n",
         "  %w2 = add(%w, %w)\n  %logits = linear(%hidden, %w2, %b)\n", "is computed"),
    ],
)  # fmt: skip
def test_near_misses_have_reasons(run_pass, old, new, reason):
    assert old in HEAD
    record = run_pass("fuse.head", HEAD.replace(old, new)).record[-1]
    assert record.matches == 0 and reason in record.near_misses[0]


@pytest.mark.parametrize("text", [HEAD, BARE])
@pytest.mark.parametrize("heat", [0.0, 0.7, 5.0])
def test_the_tokens_are_the_same(text, heat, run_pass, program_of, weights_for):
    before = program_of(text)
    after, weights = run_pass("fuse.head", before), weights_for(before)
    rows = 50
    key = torch.stack([torch.full((rows,), 5), torch.arange(rows), torch.arange(rows) % 4], 1)
    given = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1)), key, torch.full((rows, 1), heat)
    tokens = [ProgramRunner(p, weights).session().call("next_token", *given)[0] for p in (before, after)]
    assert torch.equal(*tokens) and tokens[0].unique().numel() > 3

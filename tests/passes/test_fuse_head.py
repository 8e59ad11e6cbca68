"""fuse.head and fuse.head_logits: before and after, near misses, and the same tokens at every temperature."""

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


# fuse.head_logits.

LOGITS = HEAD.replace("next_token", "unembed").replace("  %ids = sample(%kept, %key, %temperature)\n", "")
LOGITS = LOGITS.replace('  %key = input "key" : i64[n, 3]\n  %temperature = input "temperature" : f32[n, 1]\n', "")
LOGITS = LOGITS.replace("return %ids", "return %kept")


def without(*lines, text=LOGITS, result="%kept"):
    for line in lines:
        assert line in text
        text = "\n".join(kept for kept in text.splitlines() if line not in kept)
    return text.replace("return %kept", f"return {result}") + "\n"


def test_logits_that_a_method_returns_are_one_op(run_pass, same_structure):
    after = run_pass("fuse.head_logits", LOGITS)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    same_structure(
        after,
        """
weight "head" = source("head") : f32[12, 8]
weight "head.bias" = source("bias") : f32[12]
method unembed(max_n=4) {
  %hidden = input "hidden" : f32[n, 8]
  %w = weight "head"
  %b = weight "head.bias"
  %logits = head_logits(%hidden, %w, %b, alpha=0.5, cap=3.0, entries=10)
  return %logits
}
""",
    )


@pytest.mark.parametrize(
    ("text", "args"),
    [
        (without("%kept =", "%capped =", result="%logits"), (0.5, 0.0, 12)),
        (without("%capped =").replace("columns(%capped", "columns(%logits"), (0.5, 0.0, 10)),
        (without("%scaled =").replace("linear(%scaled", "linear(%hidden"), (1.0, 3.0, 10)),
    ],
)
def test_logits_without_scaling_cap_or_padding(run_pass, text, args):
    after = run_pass("fuse.head_logits", text)
    (node,) = after.methods["unembed"].calls()
    assert after.record[-1].matches == 1 and node.args[3:] == args


def test_a_product_alone_and_what_is_sampled_are_left_to_others(run_pass):
    plain = without("%kept =", "%capped =", "%scaled =", result="%logits").replace("linear(%scaled", "linear(%hidden")
    for text in (plain, HEAD):
        record = run_pass("fuse.head_logits", text).record[-1]
        assert (record.matches, record.near_misses) == (0, [])


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("columns(%capped, start=0, stop=10)", "columns(%capped, start=2, stop=12)", "begin at column 2"),
        ("columns(%capped, start=0, stop=10)", "softcap(%capped, cap=2.0)", "softcap twice"),
        ("linear(%scaled, %w, %b)", "silu(%scaled)", "come from silu"),
        ("return %kept", "return %kept, %capped", "readers"),
    ],
)
def test_near_misses_of_logits_have_reasons(run_pass, old, new, reason):
    text = LOGITS.replace(old, new)
    if "silu" in new:
        text = text.replace("stop=10", "stop=6")
    record = run_pass("fuse.head_logits", text).record[-1]
    assert record.matches == 0 and reason in record.near_misses[0]


@pytest.mark.parametrize("text", [LOGITS, without("%kept =", "%capped =", result="%logits")])
def test_the_logits_are_the_same(text, run_pass, program_of, weights_for):
    before = program_of(text)
    after, weights = run_pass("fuse.head_logits", before), weights_for(before)
    given = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    logits = [ProgramRunner(p, weights).session().call("unembed", given)[0] for p in (before, after)]
    assert torch.equal(*logits)

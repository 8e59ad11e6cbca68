"""fuse.head_columns: before and after, what it leaves with the reason, and that the numbers stay."""

import pytest

HEAD = """
weight "w" = source("w") : f32[15, 4]
weight "b" = source("b") : f32[1, 15]
"""
BEFORE = """method decode(max_n=8) {
  %x = input "x" : f32[n, 4]
  %w = weight "w"
  %b = weight "b"
  %y = linear(%x, %w, %b)
  %v = head_columns(%y, num_heads=3, start=2, stop=5)
  %k = head_columns(%y, num_heads=3, start=0, stop=2)
  %k2 = silu(%k)
  return %k2, %v
}
"""


def bare(text):
    """Without the bias."""
    kept = [line for line in text.splitlines() if not line.startswith(('weight "b', "  %b ="))]
    return "\n".join(kept).replace("%w, %b)", "%w, none)") + "\n"


AFTER = """weight "w.heads" = reshape("w", shape=[3, 5, 4])
weight "w.0-2" = slice("w.heads", axis=1, start=0, stop=2)
weight "w.0-2.rows" = reshape("w.0-2", shape=[6, 4])
weight "w.2-5" = slice("w.heads", axis=1, start=2, stop=5)
weight "w.2-5.rows" = reshape("w.2-5", shape=[9, 4])
weight "w.by_part" = concat("w.0-2.rows", "w.2-5.rows", axis=0)
method decode(max_n=8) {
  %x = input "x" : f32[n, 4]
  %w = weight "w.by_part"
  %y = linear(%x, %w, none)
  %k = columns(%y, start=0, stop=6)
  %v = columns(%y, start=6, stop=15)
  %k2 = silu(%k)
  return %k2, %v
}
"""


def test_parts_of_heads_become_columns_of_sorted_rows(run_pass, same_structure):
    after = run_pass("fuse.head_columns", bare(HEAD + BEFORE))
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    same_structure(after, bare(HEAD) + AFTER)


@pytest.mark.parametrize("text", [HEAD + BEFORE, bare(HEAD + BEFORE), HEAD.replace("[1, 15]", "[15]") + BEFORE])
def test_the_numbers_stay_the_same(text, run_pass, program_of, weights_for, equivalent):
    before = program_of(text)
    after = run_pass("fuse.head_columns", before)
    assert after.record[-1].matches == 1
    assert not after.methods["decode"].calls("head_columns")
    assert equivalent(before, after, weights_for(before)) < 1e-6


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("return %k2, %v", "return %k2, %v, %y", "1 readers that take no part"),
        ("%y, num_heads=3, start=2, stop=5", "%y, num_heads=5, start=2, stop=3", "cut into 3 and into 5 heads"),
        ("start=2, stop=5", "start=2, stop=4", "its parts are not the columns of heads of 5"),
        ("start=2, stop=5", "start=1, stop=5", "its parts are not the columns of heads of 5"),
        ("%y = linear(%x, %w, %b)", "%more = linear(%x, %w, none)\n  %y = linear(%x, %w, %b)", "used elsewhere too"),
        ("%y = linear(%x, %w, %b)", "%twice = scale(%w, alpha=2.0)\n  %y = linear(%x, %twice, %b)", "is computed"),
    ],
)
def test_what_cannot_be_sorted_is_left_and_explained(old, new, reason, run_pass):
    text = (HEAD + BEFORE).replace(old, new)
    if "%more" in new:
        text = text.replace("return %k2, %v", "return %k2, %v, %more")
    record = run_pass("fuse.head_columns", text).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 1 and reason in record.near_misses[0]


def test_a_product_whose_heads_nobody_cuts_is_no_near_miss(run_pass):
    text = (HEAD + BEFORE).replace("head_columns(%y, num_heads=3, start=2, stop=5)", "columns(%y, start=6, stop=15)")
    text = text.replace("head_columns(%y, num_heads=3, start=0, stop=2)", "columns(%y, start=0, stop=6)")
    record = run_pass("fuse.head_columns", text).record[-1]
    assert (record.matches, record.near_misses) == (0, [])

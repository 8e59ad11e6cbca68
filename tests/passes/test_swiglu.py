"""fuse.swiglu: before and after, near misses, and the same numbers."""

import pytest

HEAD = """weight "norm" = source("norm") : f32[6]
weight "w" = source("w") : f32[10, 6]
weight "b" = source("b") : f32[10]
method decode(max_n=8) {
  %x = input "x" : f32[n, 6]
  %norm = weight "norm"
  %w = weight "w"
  %b = weight "b"
  %h = rms_norm(%x, %norm, eps=1e-06)
"""
TAIL = "  return %y\n}\n"
MLP = HEAD + """  %both = linear(%h, %w, %b)
  %gate = columns(%both, start=0, stop=5)
  %up = columns(%both, start=5, stop=10)
  %y = swiglu(%gate, %up)
""" + TAIL


def test_gates_and_ups_of_one_product_are_multiplied_by_it(run_pass, same_structure):
    after = run_pass("fuse.swiglu", MLP)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    same_structure(after, f"{HEAD}  %y = linear_swiglu(%h, %w, %b)\n{TAIL}")


def test_the_norm_before_them_becomes_part_of_it_too(run_pass, same_structure):
    after = run_pass("fuse.norm_linear", run_pass("fuse.swiglu", MLP))
    assert after.record[-1].matches == 1
    head = HEAD.partition("  %h =")[0]
    same_structure(after, f"{head}  %y = norm_linear_swiglu(%x, %norm, eps=1e-06, weight=%w, bias=%b)\n{TAIL}")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [("swiglu(%gate, %up)", "swiglu(%up, %gate)", "not the first and the second half of both"),
     ("start=5, stop=10", "start=4, stop=9", "not the first and the second half of both"),
     ("return %y", "return %y, %both", "reads both too"),
     ("return %y", "%z = silu(%gate)\n  return %y, %z", "z reads gate too"),
     ("return %y", "%z = columns(%both, start=2, stop=4)\n  %u = silu(%z)\n  return %y, %u", "z reads both too")],
)  # fmt: skip
def test_halves_that_are_none_or_have_other_readers_stay_apart(old, new, reason, run_pass):
    record = run_pass("fuse.swiglu", MLP.replace(old, new)).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 1 and reason in record.near_misses[0]


def test_gates_and_ups_of_two_products_are_no_near_miss(run_pass):
    text = MLP.replace("%up = columns(%both,", "%other = linear(%x, %w, %b)\n  %up = columns(%other,")
    record = run_pass("fuse.swiglu", text).record[-1]
    assert (record.matches, record.near_misses) == (0, [])


def test_numbers_stay_the_same(run_pass, program_of, weights_for, equivalent):
    before = program_of(MLP)
    after = run_pass("fuse.swiglu", before)
    assert equivalent(before, after, weights_for(before)) < 1e-6
    assert equivalent(before, run_pass("fuse.norm_linear", after), weights_for(before)) < 1e-6

"""fuse.linear_and_conv: before and after, near misses, and the same numbers."""

import pytest

HEAD = """meta {"context": {"limit": 32, "policy": "end", "sinks": 0, "max_append": 4}}
facts stateful
weight "w" = source("w") : f32[6, 6]
weight "b" = source("b") : f32[6]
weight "taps" = source("taps") : f32[6, 3]
state "tail" : f32[2, 6] kind=conv_tail method=decode init=zeros
method decode(max_n=4) {
  %x = input "x" : f32[n, 6]
  %w = weight "w"
  %b = weight "b"
  %taps = weight "taps"
  %tail = state "tail"
"""
CONV = "  %z = short_conv_state(%y, %taps, %tail, residual={})\n"
#: A block of a vocoder: what is convolved is also what the next sum is added to.
BEHIND = """  %late = silu(%z)
  %sum = add(%late, %y)
  return %sum
}
"""
PRODUCTS = {
    "linear(%x, %w, %b)": "linear_and_conv_state(%x, %w, %b, none, none, %taps, %tail, residual={})",
    "linear_add(%x, %w, %b, none, %x)": "linear_and_conv_state(%x, %w, %b, none, %x, %taps, %tail, residual={})",
}


def block(product, residual="false", behind=BEHIND):
    return f"{HEAD}  %y = {product}\n{CONV.format(residual)}{behind}"


@pytest.mark.parametrize("residual", ["false", "true"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_makes_its_convolution_too(product, residual, run_pass, same_structure):
    after = run_pass("fuse.linear_and_conv", block(product, residual))
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    fused = f"  %r = {PRODUCTS[product].format(residual)}\n  %y = item(%r, 0)\n  %z = item(%r, 1)\n"
    same_structure(after, f"{HEAD}{fused}{BEHIND}")


def test_readers_before_the_convolution_read_the_product_still(run_pass, same_structure):
    product = "linear(%x, %w, %b)"
    early = block(product).replace(CONV.format("false"), f"  %early = silu(%y)\n{CONV.format('false')}")
    early = early.replace("return %sum", "return %sum, %early")
    after = run_pass("fuse.linear_and_conv", early)
    fused = f"  %r = {PRODUCTS[product].format('false')}\n  %y = item(%r, 0)\n  %z = item(%r, 1)\n  %early = silu(%y)\n"
    same_structure(after, f"{HEAD}{fused}{BEHIND}".replace("return %sum", "return %sum, %early"))


def test_a_product_that_is_convolved_twice_stays(run_pass):
    second = CONV.format("true").replace("%z", "%u").replace("%tail", "%other")
    text = block("linear(%x, %w, %b)").replace(BEHIND, second + BEHIND)
    state = 'state "other" : f32[2, 6] kind=conv_tail method=decode init=zeros\n'
    text = text.replace("method decode", f"{state}method decode")
    text = text.replace('  %tail = state "tail"', '  %tail = state "tail"\n  %other = state "other"')
    record = run_pass("fuse.linear_and_conv", text.replace("return %sum", "return %sum, %u")).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 2 and "convolved twice" in record.near_misses[0]


def test_more_taps_than_an_op_may_have_are_a_near_miss(run_pass):
    text = block("linear(%x, %w, %b)").replace("f32[6, 3]", "f32[6, 65]").replace("f32[2, 6]", "f32[64, 6]")
    record = run_pass("fuse.linear_and_conv", text).record[-1]
    assert record.matches == 0 and "more than 64 taps" in record.near_misses[0]


def test_a_convolution_of_something_else_is_no_near_miss(run_pass):
    text = block("silu(%x)").replace('weight "w" = source("w") : f32[6, 6]\n', "").replace('  %w = weight "w"\n', "")
    text = text.replace('weight "b" = source("b") : f32[6]\n', "").replace('  %b = weight "b"\n', "")
    record = run_pass("fuse.linear_and_conv", text).record[-1]
    assert (record.matches, record.near_misses) == (0, [])


@pytest.mark.parametrize("product", PRODUCTS)
def test_numbers_stay_the_same(product, run_pass, program_of, weights_for, equivalent):
    before = program_of(block(product))
    after = run_pass("fuse.linear_and_conv", before)
    assert after.record[-1].matches == 1
    assert equivalent(before, after, weights_for(before)) < 1e-6

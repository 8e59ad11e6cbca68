"""fuse.norm_router and fuse.norm_linear: before and after, near misses, and the same numbers."""

import pytest

WEIGHTS = """
weight "norm" = source("norm") : f32[6]
weight "half" = source("half") : f32[3]
weight "route" = source("route") : f32[5, 6]
weight "bias" = source("bias") : f32[1, 4]
weight "scale" = source("scale") : f32[1, 1]
weight "gate_up" = source("gate_up") : f32[5, 8, 6]
weight "down" = source("down") : f32[5, 6, 4]
weight "w" = source("w") : f32[9, 6]
weight "b" = source("b") : f32[9]
weight "taps" = source("taps") : f32[3, 4]
"""
BEGIN = """method decode(max_n=8) {
  %x = input "x" : f32[n, 6]
  %norm = weight "norm"
"""
ROUTED = WEIGHTS + BEGIN + """  %route = weight "route"
  %bias = weight "bias"
  %scale = weight "scale"
  %gate_up = weight "gate_up"
  %down = weight "down"
"""
ROUTER = "router({}, %route, %bias, %scale, top_k=2, n_shared=1, route_scale=2.5)"
NORMED = "router(%x, %norm, eps=1e-06, weight=%route, bias=%bias, scale=%scale, top_k=2, n_shared=1, route_scale=2.5)"
MOE = ("%y = moe(%h, %shares, %experts, %gate_up, %down, none, none, alpha=0.0, limit=0.0, gate_cap=0.0, up_cap=0.0,"
       " grouped_from=0)")  # fmt: skip
BEFORE_EXPERTS = ROUTED + f"""  %h = rms_norm(%x, %norm, eps=1e-06)
  %early = silu(%h)
  %r = {ROUTER.format("%h")}
  %shares = item(%r, 0)
  %experts = item(%r, 1)
  {MOE}
  return %y, %early
}}
"""
PRODUCTS = WEIGHTS + BEGIN + """  %w = weight "w"
  %b = weight "b"
  %h = rms_norm(%x, %norm, eps=1e-06)
  %y = linear(%h, %w, %b)
  return %y
}
"""
STEPS = PRODUCTS.replace("linear(%h, %w, %b)", 'linear_steps(%h, %w, %b, none, none, none, steps="silu:v", numbers=[])')
CONV = 'facts stateful\nstate "decode.tail" : f32[3, 3] kind=conv_tail method=decode init=zeros' + PRODUCTS
CONV = CONV.replace('weight "b"\n', 'weight "b"\n  %taps = weight "taps"\n  %tail = state "decode.tail"\n').replace(
    "linear(%h, %w, %b)",
    "linear_conv_state(%h, %w, %b, none, %taps, %tail, start=3, residual=true, level=0.5, addend=none)",
)
#: An adaptive norm, as fuse.steps leaves it.
GIVEN = '  %g = input "g" : f32[n, 6]\n  %s = input "s" : f32[n, 6]\n'
ADAPTIVE = PRODUCTS.replace("  %norm =", f"{GIVEN}  %norm =").replace(
    "rms_norm(%x, %norm, eps=1e-06)",
    'rms_norm_steps(%x, %norm, eps=1e-06, a=%g, b=%s, c=none, steps="modulate:vab", numbers=[])',
)
PASSES = ("fuse.norm_router", "fuse.norm_linear")


def ops(program):
    return [node.target._schema.name.removeprefix("tmlc::") for node in program.methods["decode"].calls()]


def test_a_router_norms_the_rows_and_gives_them_to_the_experts(run_pass, same_structure):
    after = run_pass("fuse.norm_router", BEFORE_EXPERTS)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    same_structure(after, ROUTED + f"""  %r = norm_{NORMED}
  %shares = item(%r, 0)
  %experts = item(%r, 1)
  %h = item(%r, 2)
  %early = silu(%h)
  {MOE}
  return %y, %early
}}
""")


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (PRODUCTS, ""),
        (STEPS, ', a=none, b=none, c=none, steps="silu:v", numbers=[]'),
        (CONV, ", scale=none, taps=%taps, tail=%tail, start=3, residual=true, level=0.5, addend=none"),
    ],
)
def test_a_product_norms_the_rows_that_it_alone_reads(text, arguments, run_pass, same_structure):
    after = run_pass("fuse.norm_linear", text)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    head, _, tail = text.partition("  %h = rms_norm(%x, %norm, eps=1e-06)\n")
    op = tail.partition(" = ")[2].partition("(")[0]
    fused = f"  %y = norm_{op}(%x, %norm, eps=1e-06, weight=%w, bias=%b{arguments})\n"
    same_structure(after, f"{head}{fused}  return %y\n}}\n")


@pytest.mark.parametrize(
    ("product", "fused"),
    [
        ("linear(%h, %w, %b)", "modulated_linear(%x, %norm, eps=1e-06, gain={}, shift={}, weight=%w, bias=%b)"),
        ('linear_steps(%h, %w, %b, none, none, none, steps="silu:v", numbers=[])',
         "modulated_linear_steps(%x, %norm, eps=1e-06, gain={}, shift={}, weight=%w, bias=%b, a=none, b=none, c=none,"
         ' steps="silu:v", numbers=[])'),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("steps", "gain", "shift"), [("modulate:vab", "%g", "%s"), ("modulate:vba", "%s", "%g")])
def test_a_product_modulates_the_rows_that_it_alone_reads(product, fused, steps, gain, shift, run_pass, same_structure):
    text = ADAPTIVE.replace("linear(%h, %w, %b)", product).replace("modulate:vab", steps)
    after = run_pass("fuse.norm_linear", text)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    head = text.partition("  %h = ")[0]
    same_structure(after, f"{head}  %y = {fused.format(gain, shift)}\n  return %y\n}}\n")


@pytest.mark.parametrize("steps", ["mul:va add:vb", "modulate:vab silu:v", "modulate:avb", "modulate:vva"])
def test_other_steps_behind_a_norm_stay_with_it(steps, run_pass):
    text = ADAPTIVE.replace("modulate:vab", steps)
    if "b" not in steps:
        text = text.replace("b=%s", "b=none")
    record = run_pass("fuse.norm_linear", text).record[-1]
    assert record.matches == 0 and f"not a modulation: {steps}" in record.near_misses[0]


def test_a_convolution_takes_no_modulated_rows(run_pass):
    norm = 'rms_norm_steps(%x, %norm, eps=1e-06, a=%x, b=%x, c=none, steps="modulate:vab", numbers=[])'
    text = CONV.replace("rms_norm(%x, %norm, eps=1e-06)", norm)
    record = run_pass("fuse.norm_linear", text).record[-1]
    assert record.matches == 0 and "linear_conv_state takes no modulated rows" in record.near_misses[0]


def test_rows_with_other_readers_keep_their_norm(run_pass):
    text = PRODUCTS.replace("return %y", "return %y, %h")
    record = run_pass("fuse.norm_linear", text).record[-1]
    assert record.matches == 0 and "is one of its 2 readers" in record.near_misses[0]
    text = PRODUCTS.replace("return %y", "%z = linear(%h, %w, %b)\n  return %y, %z")
    record = run_pass("fuse.norm_linear", text).record[-1]
    assert record.matches == 0 and "is one of its 2 readers" in record.near_misses[0]


def test_a_product_that_adds_the_normed_row_keeps_it_apart(run_pass):
    text = STEPS.replace("f32[9, 6]", "f32[6, 6]").replace("f32[9]", "f32[6]")
    text = text.replace("none, none, none", "%h, none, none").replace("silu:v", "add:va")
    record = run_pass("fuse.norm_linear", text).record[-1]
    assert record.matches == 0 and "reads it twice" in record.near_misses[0]


def test_what_reads_a_norm_otherwise_is_no_match(run_pass):
    text = PRODUCTS.replace("linear(%h, %w, %b)", "silu(%h)")
    assert run_pass("fuse.norm_linear", text).record[-1].near_misses == []
    text = PRODUCTS.replace("%h = rms_norm(%x, %norm, eps=1e-06)", "%h = silu(%x)")
    assert run_pass("fuse.norm_linear", text).record[-1].matches == 0


def test_a_product_whose_codes_leave_no_registers_keeps_its_norm_apart(run_pass, monkeypatch):
    monkeypatch.setattr("tmlc.passes.fuse.norm_linear.FULL", ("f32",))
    record = run_pass("fuse.norm_linear", PRODUCTS).record[-1]
    assert record.matches == 0 and "weights of f32 has no registers left" in record.near_misses[0]


def test_norms_of_groups_of_columns_are_left_alone(run_pass):
    for name, text in zip(PASSES, (BEFORE_EXPERTS, PRODUCTS), strict=True):
        record = run_pass(name, text.replace('%norm = weight "norm"', '%norm = weight "half"')).record[-1]
        assert record.matches == 0 and "groups of columns, not whole rows" in record.near_misses[0]


def test_two_routers_of_one_row_keep_its_norm(run_pass):
    second = f"  %s = {ROUTER.format('%h')}\n  %other = item(%s, 0)\n  return %other, %y"
    text = BEFORE_EXPERTS.replace("  return %y", second)
    record = run_pass("fuse.norm_router", text).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 2


def test_a_router_with_a_computed_operand_keeps_its_norm(run_pass):
    text = BEFORE_EXPERTS.replace('%scale = weight "scale"', '%scale0 = weight "scale"')
    text = text.replace("  %h = rms", "  %scale = silu(%scale0)\n  %h = rms")
    record = run_pass("fuse.norm_router", text).record[-1]
    assert record.matches == 0 and "is computed" in record.near_misses[0]


@pytest.mark.parametrize("text", [BEFORE_EXPERTS, PRODUCTS, STEPS, CONV])
def test_numbers_stay_the_same(text, run_pass, program_of, weights_for, equivalent):
    before = after = program_of(text)
    for name in PASSES:
        after = run_pass(name, after)
    assert sum(record.matches for record in after.record) == 1
    assert equivalent(before, after, weights_for(before)) < 1e-6

"""Passes that put norms into what reads them: before and after, near misses, and the same numbers."""

import pytest
import torch

from tmlc.passes.match import arg

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
#: A top-k router, its logits, and the norm whose rows the experts and others read too.
GATED = WEIGHTS + """weight "five" = source("five") : f32[5]
""" + BEGIN + """  %route = weight "route"
  %five = weight "five"
  %gate_up = weight "gate_up"
  %down = weight "down"
"""
CHOICE = "bias={}, scores=1, top_k=2, normalise=true, groups=1, top_groups=1, scale=2.5)"
TOPK = GATED + f"""  %h = rms_norm(%x, %norm, eps=1e-06)
  %early = silu(%h)
  %l = linear(%h, %route, %five)
  %r = topk_router(%l, {CHOICE.format("%five")}
  %shares = item(%r, 0)
  %experts = item(%r, 1)
  {MOE}
  return %y, %early
}}
"""
HEADS = """meta {"context": {"limit": 32, "policy": "end", "sinks": 0, "max_append": 4}}
facts stateful
weight "qn" = source("qn") : f32[3]
weight "kn" = source("kn") : f32[3]
state "position" : i64[1, 1] kind=position method=decode init=zeros
state "k_cache" : f32[64, 3] kind=kv_ring method=decode init=zeros
state "v_cache" : f32[64, 2] kind=kv_ring method=decode init=zeros
method decode(max_n=4) {
  %all = input "all" : f32[n, 11]
  %qn = weight "qn"
  %kn = weight "kn"
  %position = state "position"
  %k_cache = state "k_cache"
  %v_cache = state "v_cache"
  %q = columns(%all, start=0, stop=6)
  %k = columns(%all, start=6, stop=9)
  %v = columns(%all, start=9, stop=11)
"""
ATTENTION = HEADS + """  %q2 = rms_norm(%q, %qn, eps=1e-06)
  %k2 = rms_norm(%k, %kn, eps=1e-06)
  %y = attention_state(%q2, %k2, %v, %position, %k_cache, %v_cache, none, none, num_heads=2, num_kv_heads=1, \
scale=0.5, window=3, sinks=1, log_floor=0.0, log_alpha=0.0, sink_logits=none, softcap=0.0)
  %end = advance(%position, %all, limit=0)
  return %y
}
"""
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
    assert record.matches == 0 and "with weights of f32 has no registers left" in record.near_misses[0]


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


@pytest.mark.parametrize(("logit_bias", "bias"), [("%five", "none"), ("none", "%five")])
def test_a_top_k_router_norms_the_rows_multiplies_them_and_gives_them_to_the_experts(
    logit_bias, bias, run_pass, same_structure
):
    text = TOPK.replace("%route, %five)", f"%route, {logit_bias})").replace("bias=%five", f"bias={bias}")
    after = run_pass("fuse.norm_topk_router", text)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    row = f"%x, %norm, eps=1e-06, weight=%route, logit_bias={logit_bias}"
    same_structure(after, GATED + f"""  %r = norm_topk_router({row}, {CHOICE.format(bias)[:-1]}, n_shared=0)
  %shares = item(%r, 0)
  %experts = item(%r, 1)
  %h = item(%r, 2)
  %early = silu(%h)
  {MOE}
  return %y, %early
}}
""")


@pytest.mark.parametrize(
    ("old", "new", "absorbed"),
    [("", "", True), ("first=5", "first=6", False), ("return %y", "%z = silu(%shares)\n  return %z, %y", False)],
)
def test_a_top_k_router_appends_the_experts_that_every_row_has(old, new, absorbed, run_pass):
    """Where they stand behind its own, and nothing else reads what it chose."""
    appended = "%a = append_experts(%shares, %experts, first=5, count=2)\n  %s = item(%a, 0)\n  %e = item(%a, 1)\n  "
    text = TOPK.replace(MOE, appended + MOE.replace("%shares, %experts", "%s, %e")).replace(old, new)
    after = run_pass("fuse.norm_topk_router", text)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    method = after.methods["decode"]
    (router,) = method.calls("norm_topk_router")
    assert (arg(router, "n_shared"), len(method.calls("append_experts"))) == ((2, 0) if absorbed else (0, 1))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("return %y", "return %y, %l", "one of 2 readers of l"),
        ('"route") : f32', '"route") : bf16', "the weight of l is bf16, not f32"),
        ('%norm = weight "norm"', '%norm = weight "half"', "h norms groups of columns, not whole rows"),
        ("bias=%five", "bias=%learned", "its operand learned is computed"),
        ("%route, %five)", "%route, %learned)", "its operand learned is computed"),
    ],
)
def test_a_top_k_router_that_cannot_norm_the_rows_keeps_its_parts(old, new, reason, run_pass):
    text = TOPK.replace("  %h = rms", "  %learned = silu(%five)\n  %h = rms").replace("f32[5]", "f32[1, 5]")
    record = run_pass("fuse.norm_topk_router", text.replace(old, new)).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 1 and reason in record.near_misses[0]


def test_two_top_k_routers_of_one_row_keep_its_norm(run_pass):
    second = f"""  %m = linear(%h, %route, none)
  %s = topk_router(%m, {CHOICE.format("none")}
  %other = item(%s, 0)
  return %other, %y"""
    record = run_pass("fuse.norm_topk_router", TOPK.replace("  return %y", second)).record[-1]
    assert record.matches == 0
    for miss, other in zip(record.near_misses, "ml", strict=True):
        assert f"{other} makes logits of h too" in miss


@pytest.mark.parametrize(
    ("old", "new"),
    [("linear(%h, %route, %five)", "columns(%h, start=0, stop=5)"), ("rms_norm(%x, %norm, eps=1e-06)", "silu(%x)")],
)
def test_logits_that_no_product_of_a_norm_makes_are_no_match(old, new, run_pass):
    text = TOPK.replace(old, new)
    record = run_pass("fuse.norm_topk_router", text).record[-1]
    assert (record.matches, record.near_misses) == (0, [])


EXPERTS = ROUTED.replace(
    "method decode", 'state "decode.tail" : f32[2, 6] kind=conv_tail method=decode init=zeros\nmethod decode'
).replace('weight "down" =', 'weight "taps6" = source("taps6") : f32[6, 3]\nweight "down" =')
EXPERTS = "facts stateful\n" + EXPERTS + f"""  %taps = weight "taps6"
  %tail = state "decode.tail"
  %r = norm_{NORMED}
  %shares = item(%r, 0)
  %experts = item(%r, 1)
  %h = item(%r, 2)
"""
CONVOLVED = ("  %y = moe_conv_state(%taps, %tail, residual=true, level=0.5, addend=%x, x=%h, weights=%shares,"
             " experts=%experts, {}\n  return %y\n}}\n")  # fmt: skip
LAST = ("gate_up=%gate_up, down=%down, gate_up_bias=none, down_bias=none, alpha=0.0, limit=0.0, gate_cap=0.0,"
        " up_cap=0.0, grouped_from=0)")  # fmt: skip


def test_experts_choose_themselves_from_the_logits_of_a_router(run_pass, same_structure):
    after = run_pass("fuse.norm_moe", EXPERTS + CONVOLVED.format(LAST))
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    head = EXPERTS[: EXPERTS.index("  %r = ")]
    _, _, settings = NORMED.partition("router(")
    same_structure(after, f"""{head}  %y = norm_moe_conv_state({settings[:-1]}, taps=%taps, tail=%tail, residual=true, \
level=0.5, addend=%x, {LAST}
  return %y
}}
""")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("return %y", "return %y, %h", "2 readers"),
        ("return %y", "%z = silu(%shares)\n  return %y, %z", "2 readers"),
        ("x=%h, weights", "x=%x, weights", "reads its results otherwise"),
        ("addend=%x", "addend=%h", "reads its results otherwise"),
    ],
)
def test_a_router_that_others_read_stays_apart(old, new, reason, run_pass):
    record = run_pass("fuse.norm_moe", (EXPERTS + CONVOLVED.format(LAST)).replace(old, new)).record[-1]
    assert record.matches == 0 and reason in record.near_misses[0]


#: A top-k router that norms rows, and experts that alone read it.
ROW = f"%x, %norm, eps=1e-06, weight=%route, logit_bias=none, {CHOICE.format('%five')[:-1]}, n_shared=0"
CHOSEN = GATED + f"""  %r = norm_topk_router({ROW})
  %shares = item(%r, 0)
  %experts = item(%r, 1)
  %h = item(%r, 2)
"""
BEHIND = "  %y = {}x=%h, weights=%shares, experts=%experts, {}\n  return %y\n}}\n"


@pytest.mark.parametrize(("op", "addend"), [("moe(", "none"), ("moe_add(addend=%x, ", "%x")])
def test_experts_choose_themselves_from_the_logits_of_a_top_k_router(op, addend, run_pass, same_structure):
    after = run_pass("fuse.norm_moe", CHOSEN + BEHIND.format(op, LAST))
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    same_structure(after, f"""{GATED}  %y = norm_topk_moe({ROW}, addend={addend}, {LAST}
  return %y
}}
""")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("return %y", "return %y, %h", "2 readers"),
        ("return %y", "%z = silu(%shares)\n  return %y, %z", "2 readers"),
        ("x=%h, weights", "x=%x, weights", "reads its results otherwise"),
        ("addend=%x", "addend=%h", "reads its results otherwise"),
    ],
)
def test_a_top_k_router_that_others_read_stays_apart(old, new, reason, run_pass):
    text = CHOSEN + BEHIND.format("moe_add(addend=%x, ", LAST)
    record = run_pass("fuse.norm_moe", text.replace(old, new)).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 1 and reason in record.near_misses[0]


def test_attention_norms_the_queries_and_keys_that_it_alone_reads(run_pass, same_structure):
    after = run_pass("fuse.norm_attention", ATTENTION)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    _, _, tail = ATTENTION.partition("attention_state(%q2, %k2, ")
    same_structure(after, f"{HEADS}  %y = norm_attention_state(%q, %qn, %k, %kn, eps=1e-06, v={named(tail)}")


def named(tail):
    """Positional arguments behind a named one, by their names."""
    for name in ("position", "k_cache", "v_cache"):
        tail = tail.replace(f", %{name},", f", {name}=%{name},")
    return tail.replace("none, none, num_heads", "rel=none, rel_table=none, num_heads")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("%k2, %v,", "%k, %v,", "norms queries or keys alone"),
        ("(%q2, %k2", "(%q, %k2", "norms queries or keys alone"),
        ("%kn, eps=1e-06", "%kn, eps=1e-05", "another eps"),
        ("return %y", "return %y, %q2", "one of 2 readers of q2"),
        ("attention_state(%q2, %k2, %v,", "attention_state(%q2, %k2, %k2,", "reads k2 twice"),
        ('weight "qn" = source("qn") : f32[3]', 'weight "qn" = source("qn") : f32[6]', "no heads of 3 columns"),
    ],
)
def test_attention_whose_norms_are_other_ones_keeps_them_apart(old, new, reason, run_pass):
    text = ATTENTION.replace(old, new)
    if "twice" in reason:
        text = text.replace("f32[64, 2]", "f32[64, 3]")
    record = run_pass("fuse.norm_attention", text).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 1 and reason in record.near_misses[0]


def test_heads_that_are_turned_behind_their_norms_are_left_to_the_pass_for_two_norms(run_pass):
    turned = "rope_state({}, %position, %inv_freq, num_heads={}, offset=0, interleaved=false, scaling=1.0)"
    text = ATTENTION.replace("f32[3]", "f32[4]").replace("f32[64, 3]", "f32[64, 4]").replace("f32[n, 11]", "f32[n, 14]")
    text = text.replace("stop=6", "stop=8").replace("start=6, stop=9", "start=8, stop=12")
    text = text.replace("start=9, stop=11", "start=12, stop=14")
    text = text.replace('method decode', 'weight "inv_freq" = source("inv_freq") : f32[2]\nmethod decode')
    text = text.replace('  %position = ', '  %inv_freq = weight "inv_freq"\n  %position = ')
    text = text.replace("  %y =", f"  %q3 = {turned.format('%q2', 2)}\n  %k3 = {turned.format('%k2', 1)}\n  %y =")
    text = text.replace("attention_state(%q2, %k2", "attention_state(%q3, %k3")
    after = run_pass("fuse.norm_attention", text)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (0, [])
    assert run_pass("fuse.norm_pair", after).record[-1].matches == 1


@pytest.mark.parametrize(
    "text",
    [BEFORE_EXPERTS, TOPK, PRODUCTS, STEPS, CONV, ATTENTION, EXPERTS + CONVOLVED.format(LAST),
     CHOSEN + BEHIND.format("moe(", LAST), CHOSEN + BEHIND.format("moe_add(addend=%x, ", LAST)],
)  # fmt: skip
def test_numbers_stay_the_same(text, run_pass, program_of, weights_for, equivalent):
    before = after = program_of(text)
    for name in (*PASSES, "fuse.norm_topk_router", "fuse.norm_attention", "fuse.norm_moe"):
        after = run_pass(name, after)
    assert sum(record.matches for record in after.record) == 1
    assert equivalent(before, after, weights_for(before)) < 2e-6


def test_a_top_k_router_among_equals_keeps_its_choice(run_pass, program_of, weights_for, equivalent):
    """All experts alike: every row goes to the first ones, and the others are unused."""
    before = program_of(TOPK)
    weights = weights_for(before, route=torch.ones(5, 6), five=torch.zeros(5))
    assert equivalent(before, run_pass("fuse.norm_topk_router", before), weights) == 0

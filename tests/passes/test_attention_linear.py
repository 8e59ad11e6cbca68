"""fuse.attention_linear: before and after, near misses, and the same numbers."""

import pytest

HEAD = """meta {"context": {"limit": 32, "policy": "end", "sinks": 0, "max_append": 4}}
facts stateful
weight "w" = source("w") : f32[6, 4]
weight "n" = source("n") : f32[3]
weight "taps" = source("taps") : f32[6, 3]
weight "freq" = source("freq") : f32[1, 1]
state "position" : i64[1, 1] kind=position method=decode init=zeros
state "k_cache" : f32[64, 3] kind=kv_ring method=decode init=zeros
state "v_cache" : f32[64, 2] kind=kv_ring method=decode init=zeros
state "tail" : f32[2, 6] kind=conv_tail method=decode init=zeros
method decode(max_n=4) {
  %q = input "q" : f32[n, 6]
  %k = input "k" : f32[n, 3]
  %v = input "v" : f32[n, 2]
  %w = weight "w"
  %n = weight "n"
  %taps = weight "taps"
  %freq = weight "freq"
  %position = state "position"
  %k_cache = state "k_cache"
  %v_cache = state "v_cache"
  %tail = state "tail"
"""
SETTINGS = (
    "rel=none, rel_table=none, num_heads=2, num_kv_heads=1, scale=0.5, window=3, sinks=1, log_floor=0.0, "
    "log_alpha=0.0, sink_logits=none, softcap=0.0"
)
CACHES = "v=%v, position=%position, k_cache=%k_cache, v_cache=%v_cache"
PLAIN = f"attention_state(%q, %k, {CACHES}, {SETTINGS})"
NORMED = f"norm_attention_state(%q, %n, %k, %n, eps=1e-06, {CACHES}, {SETTINGS})"
TABLE = "%table = rope_table_state(%q, %position, %freq, scaling=1.0)"
BY = "table=%table, offset=1, interleaved=false, shared=none"
TURNED = f"rope_attention_state(%q, %n, %k, %n, eps=1e-06, {BY}, {CACHES}, {SETTINGS})"
PRODUCTS = {
    "linear": ("linear(%y, %w, none)", "bias=none, factor=none, taps=none, tail=none, start=0, residual=false, "
               "level=1.0, addend=none"),
    "linear_add": ("linear_add(%y, %w, none, none, %q)", "bias=none, factor=none, taps=none, tail=none, start=0, "
                   "residual=false, level=1.0, addend=%q"),
    "linear_conv_state": ("linear_conv_state(%y, %w, none, none, %taps, %tail, start=0, residual=true, level=0.5, "
                          "addend=%q)", "bias=none, factor=none, taps=%taps, tail=%tail, start=0, residual=true, "
                          "level=0.5, addend=%q"),
}  # fmt: skip


def program(*lines):
    """A method of these lines that returns %o, without the weights and states that none of them reads."""
    body = "".join(f"  {line}\n" for line in lines)
    names = [name for name in ("w", "n", "taps", "freq", "tail") if f"%{name}" not in body]
    unread = tuple(f'{kind} "{name}"' for kind in ("weight", "state") for name in names)
    unread += tuple(f"  %{name} =" for name in names)
    head = "".join(f"{line}\n" for line in HEAD.splitlines() if not line.startswith(unread))
    return f"{head}{body}  %end = advance(%position, %q, limit=0)\n  return %o\n}}\n"


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("attention", [PLAIN, NORMED, TURNED])
def test_attention_and_the_product_that_alone_reads_it_become_one(attention, product, run_pass, same_structure):
    before, after = PRODUCTS[product]
    table = [TABLE] if attention is TURNED else []
    found = run_pass("fuse.attention_linear", program(*table, f"%y = {attention}", f"%o = {before}"))
    assert (found.record[-1].matches, found.record[-1].near_misses) == (1, [])
    norms = "none, %k, none, eps=0.0" if attention is PLAIN else "%n, %k, %n, eps=1e-06"
    turns = BY if table else "table=none, offset=0, interleaved=false, shared=none"
    fused = f"attention_linear_state(%q, {norms}, {turns}, {CACHES}, {SETTINGS}, weight=%w, {after})"
    same_structure(found, program(*table, f"%o = {fused}"))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [("return %o", "return %o, %y", "one of 2 readers of y"),
     ("linear_add(%y, %w, none, none, %q)", "linear_add(%y, %square, none, none, %y)", "reads y twice")],
)  # fmt: skip
def test_attention_that_others_read_stays_apart(old, new, reason, run_pass):
    text = program(f"%y = {PLAIN}", f"%o = {PRODUCTS['linear_add'][0]}").replace(old, new)
    if "square" in new:
        text = text.replace('weight "w" = source("w") : f32[6, 4]', 'weight "square" = source("square") : f32[4, 4]')
        text = text.replace('%w = weight "w"', '%square = weight "square"')
    record = run_pass("fuse.attention_linear", text).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 1 and reason in record.near_misses[0]


def test_a_product_of_something_else_is_no_near_miss(run_pass):
    text = program(f"%y = {PLAIN}", "%z = silu(%y)", "%o = linear(%z, %w, none)")
    record = run_pass("fuse.attention_linear", text).record[-1]
    assert (record.matches, record.near_misses) == (0, [])


@pytest.mark.parametrize("attention", [NORMED, TURNED])
@pytest.mark.parametrize("product", PRODUCTS)
def test_numbers_stay_the_same(attention, product, run_pass, program_of, weights_for, equivalent):
    table = [TABLE] if attention is TURNED else []
    before = program_of(program(*table, f"%y = {attention}", f"%o = {PRODUCTS[product][0]}"))
    after = run_pass("fuse.attention_linear", before)
    assert after.record[-1].matches == 1
    assert equivalent(before, after, weights_for(before)) < 1e-6

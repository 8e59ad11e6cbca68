"""fuse.rope_attention, and fuse.norm_attention behind it: before and after, near misses, and the same numbers."""

import pytest

HEAD = """meta {"context": {"limit": 32, "policy": "end", "sinks": 0, "max_append": 4}}
facts stateful
weight "freq" = source("freq") : f32[1, 2]
weight "qn" = source("qn") : f32[4]
weight "kn" = source("kn") : f32[4]
state "position" : i64[1, 1] kind=position method=decode init=zeros
state "k_cache" : f32[64, 4] kind=kv_ring method=decode init=zeros
state "v_cache" : f32[64, 2] kind=kv_ring method=decode init=zeros
state "k_cache2" : f32[64, 4] kind=kv_ring method=decode init=zeros
state "v_cache2" : f32[64, 2] kind=kv_ring method=decode init=zeros
method decode(max_n=4) {
  %q = input "q" : f32[n, 8]
  %k = input "k" : f32[n, 4]
  %v = input "v" : f32[n, 2]
  %freq = weight "freq"
  %qn = weight "qn"
  %kn = weight "kn"
  %position = state "position"
  %k_cache = state "k_cache"
  %v_cache = state "v_cache"
  %k_cache2 = state "k_cache2"
  %v_cache2 = state "v_cache2"
"""
SETTINGS = (
    "rel=none, rel_table=none, num_heads=2, num_kv_heads=1, scale=0.5, window=3, sinks=1, log_floor=0.0, "
    "log_alpha=0.0, sink_logits=none, softcap=0.0"
)
CACHES = "v=%v, position=%position, k_cache=%k_cache, v_cache=%v_cache"
CACHES2 = CACHES.replace("_cache", "_cache2").replace("k_cache2=", "k_cache=").replace("v_cache2=", "v_cache=")
BY = "offset=0, interleaved=false, scaling=1.5"
TURN_Q = f"rope_state(%q, %position, %freq, num_heads=2, {BY})"
TURN_K = f"rope_state(%k, %position, %freq, num_heads=1, {BY})"
TABLE = "%table = rope_table_state(%q, %position, %freq, scaling=1.5)"
BEFORE = [f"%q2 = {TURN_Q}", f"%k2 = {TURN_K}", f"%y = attention_state(%q2, %k2, {CACHES}, {SETTINGS})"]
TURNS = "table=%table, offset=0, interleaved=false, shared=none"
AFTER = f"rope_attention_state(%q, none, %k, none, eps=0.0, {TURNS}, {CACHES}, {SETTINGS})"
NORMED = [
    "%qx = rms_norm(%q, %qn, eps=1e-06)", "%kx = rms_norm(%k, %kn, eps=1e-06)", BEFORE[0].replace("%q,", "%qx,"),
    BEFORE[1].replace("%k,", "%kx,"), BEFORE[2],
]  # fmt: skip


def program(*lines):
    """A method of these lines that returns %y, without the weights and states that none of them reads."""
    body = "".join(f"  {line}\n" for line in lines)
    unread = [name for name in ("qn", "kn", "freq", "k_cache2", "v_cache2") if f"%{name}" not in body]
    dropped = tuple(f'{kind} "{name}"' for kind in ("weight", "state") for name in unread)
    dropped += tuple(f"  %{name} =" for name in unread)
    head = "".join(f"{line}\n" for line in HEAD.splitlines() if not line.startswith(dropped))
    return f"{head}{body}  %end = advance(%position, %q, limit=0)\n  return %y\n}}\n"


def test_queries_and_keys_that_attention_alone_reads_are_turned_by_it(run_pass, same_structure):
    found = run_pass("fuse.rope_attention", program(*BEFORE))
    assert (found.record[-1].matches, found.record[-1].near_misses) == (1, [])
    same_structure(found, program(TABLE, f"%y = {AFTER}"))


def test_layers_that_turn_alike_share_their_cosines_and_sines(run_pass, same_structure):
    second = [BEFORE[0].replace("%q2", "%q4"), BEFORE[1].replace("%k2", "%k4"),
              f"%y2 = attention_state(%q4, %k4, {CACHES2}, {SETTINGS})", "%z = add(%y, %y2)"]  # fmt: skip
    other = [line.replace("scaling=1.5", "scaling=2.0") for line in second]
    last = "%z = add(%y, %y2)"

    def text(*lines):
        return program(*lines).replace("return %y", "return %z")

    found = run_pass("fuse.rope_attention", text(*BEFORE, *second))
    again = AFTER.replace(CACHES, CACHES2)
    same_structure(found, text(TABLE, f"%y = {AFTER}", f"%y2 = {again}", last))
    found = run_pass("fuse.rope_attention", text(*BEFORE, *other))
    own = TABLE.replace("%table", "%table2").replace("1.5", "2.0")
    again = again.replace("%table", "%table2")
    same_structure(found, text(TABLE, f"%y = {AFTER}", own, f"%y2 = {again}", last))


def test_norms_before_the_rotation_become_part_of_it_too(run_pass, same_structure):
    found = run_pass("fuse.norm_attention", run_pass("fuse.rope_attention", program(*NORMED)))
    assert [(record.matches, record.near_misses) for record in found.record] == [(1, []), (1, [])]
    normed = AFTER.replace("none, %k, none, eps=0.0", "%qn, %k, %kn, eps=1e-06")
    same_structure(found, program(TABLE, f"%y = {normed}"))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("attention_state(%q2, %k2", "attention_state(%q, %k2", "k2 turns queries or keys alone"),
        ("attention_state(%q2, %k2", "attention_state(%q2, %k", "q2 turns queries or keys alone"),
        ("return %y", "return %y, %k2", "one of 2 readers of k2"),
        (TURN_K, TURN_K.replace("scaling=1.5", "scaling=1.0"), "have another scaling"),
        (TURN_K, TURN_K.replace("interleaved=false", "interleaved=true"), "have another interleaved"),
        (TURN_Q, TURN_Q.replace("num_heads=2", "num_heads=1"), "q2 turns 1 heads, not 2"),
        ("%k2, v=%v", "%k2, v=%k2", "reads k2 twice"),
    ],
)
def test_what_is_turned_otherwise_stays_apart(old, new, reason, run_pass):
    text = program(*BEFORE).replace(old, new)
    if "twice" in reason:
        text = text.replace('"v_cache" : f32[64, 2]', '"v_cache" : f32[64, 4]')
    record = run_pass("fuse.rope_attention", text).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 1 and reason in record.near_misses[0]


LATENT = """meta {"context": {"limit": 32, "policy": "end", "sinks": 0, "max_append": 4}}
facts stateful
weight "freq" = source("freq") : f32[1, 2]
state "position" : i64[1, 1] kind=position method=decode init=zeros
state "k_cache" : f32[64, 12] kind=kv_ring method=decode init=zeros
state "v_cache" : f32[64, 6] kind=kv_ring method=decode init=zeros
method decode(max_n=4) {
  %q = input "q" : f32[n, 24]
  %k = input "k" : f32[n, 4]
  %common = input "common" : f32[n, 4]
  %v = input "v" : f32[n, 6]
  %freq = weight "freq"
  %position = state "position"
  %k_cache = state "k_cache"
  %v_cache = state "v_cache"
  %q2 = rope_state(%q, %position, %freq, num_heads=4, offset=2, interleaved=true, scaling=1.5)
  %c2 = rope_state(%common, %position, %freq, num_heads=1, offset=0, interleaved=true, scaling=1.5)
  %k2 = concat_heads(%k, %c2, num_heads=2, shared=2)
  %y = attention_state(%q2, %k2, CACHES, SETTINGS)
  %end = advance(%position, %q, limit=0)
  return %y
}
""".replace("CACHES", CACHES).replace("SETTINGS", SETTINGS.replace("=2, num_kv_heads=1", "=4, num_kv_heads=2"))


def test_latent_attention_turns_the_part_of_keys_that_heads_share(
    run_pass, same_structure, program_of, weights_for, equivalent
):
    before = program_of(LATENT)
    after = run_pass("fuse.rope_attention", before)
    assert (after.record[-1].matches, after.record[-1].near_misses) == (1, [])
    lines = [line for line in LATENT.splitlines() if not line.startswith(("  %q2 =", "  %c2 =", "  %k2 ="))]
    expected = "\n".join(lines).replace(
        "%y = attention_state(%q2, %k2, ",
        f"{TABLE}\n  %y = rope_attention_state(%q, none, %k, none, eps=0.0, table=%table, offset=2, interleaved=true,"
        " shared=%common, ",
    )  # fmt: skip
    same_structure(after, expected + "\n")
    assert equivalent(before, after, weights_for(before)) < 1e-6


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("num_heads=4, offset=2", "num_heads=4, offset=1", "turns other columns than the shared ones"),
        ("return %y", "return %y, %c2", "one of 2 readers of c2"),
        ("return %y", "return %y, %k2", "one of 2 readers of k2"),
        ("shared=2)", "shared=1)", "joins no part that all heads of keys share"),
    ],
)
def test_latent_attention_that_is_something_else_stays_apart(old, new, reason, run_pass):
    record = run_pass("fuse.rope_attention", LATENT.replace(old, new)).record[-1]
    assert record.matches == 0 and len(record.near_misses) == 1 and reason in record.near_misses[0]


def test_attention_of_what_is_not_turned_is_no_near_miss(run_pass):
    text = program(f"%y = attention_state(%q, %k, {CACHES}, {SETTINGS})")
    record = run_pass("fuse.rope_attention", text).record[-1]
    assert (record.matches, record.near_misses) == (0, [])


@pytest.mark.parametrize("lines", [BEFORE, NORMED])
def test_numbers_stay_the_same(lines, run_pass, program_of, weights_for, equivalent):
    before = program_of(program(*lines))
    after = run_pass("fuse.norm_attention", run_pass("fuse.rope_attention", before))
    assert after.record[-2].matches == 1 and after.record[-1].matches == (lines is NORMED)
    assert equivalent(before, after, weights_for(before)) < 1e-6

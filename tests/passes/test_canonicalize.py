"""canonicalize.dead_code removes what nothing needs, and nothing else."""

TEXT = """
weight "used" = source("used") : f32[8, 8]
weight "unused" = source("unused") : f32[8, 8]
weight "part" = source("part") : f32[8, 8]
weight "whole" = concat("used", "part", axis=0)
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %y = input "never" : f32[n, 8]
  %w = weight "whole"
  %u = weight "unused"
  %a = linear(%x, %w, none)
  %b = linear(%x, %u, none)
  %c = silu(%b)
  return %a
}
"""


def test_dead_calls_weights_and_entries_go_and_inputs_stay(run_pass, same_structure):
    after = run_pass("canonicalize.dead_code", TEXT)
    assert after.record[-1].matches == 4  # two calls, one weight input, one entry
    same_structure(
        after,
        """
weight "used" = source("used") : f32[8, 8]
weight "part" = source("part") : f32[8, 8]
weight "whole" = concat("used", "part", axis=0)
method decode(max_n=8) {
  %x = input "x" : f32[n, 8]
  %y = input "never" : f32[n, 8]
  %w = weight "whole"
  %a = linear(%x, %w, none)
  return %a
}
""",
    )


def test_a_clean_program_is_left_alone_and_calls_that_change_a_state_stay(run_pass):
    meta = 'meta {"context": {"limit": 32, "policy": "end", "sinks": 0, "max_append": 4}}\n'
    text = """
method decode(max_n=4) {
  %x = input "x" : f32[n, 8]
  %a = attention(%x, %x, %x, none, none, num_heads=1, num_kv_heads=1, scale=1.0, window=0, sinks=0, log_floor=0.0, log_alpha=0.0)
  return %a
}
"""  # noqa: E501
    program = run_pass("state.insert", meta + text)
    after = run_pass("canonicalize.dead_code", program)
    assert after.record[-1].matches == 0
    assert len(after.methods["decode"].calls("advance")) == 1


CONSTANTS = """
weight "table" = source("table") : f32[6, 8]
weight "rows" = source("rows") : f32[1, 4]
method decode(max_n=8) {
  %x = input "x" : f32[n, 4]
  %t = weight "table"
  %r = weight "rows"
  %left = columns(%t, start=0, stop=4)
  %again = columns(%t, start=0, stop=4)
  %right = columns(%t, start=4, stop=8)
  %square = reshape(%t, cols=4)
  %total = add(%r, %r)
  %a = linear(%x, %left, none)
  %b = linear(%x, %right, none)
  %c = linear(%x, %again, none)
  %d = linear(%x, %square, none)
  %e = linear(%x, %total, none)
  return %a, %b, %c, %d, %e
}
"""


def test_views_of_weights_become_weights_and_arithmetic_on_weights_is_told(
    run_pass, program_of, weights_for, equivalent
):
    before = program_of(CONSTANTS)
    after = run_pass("canonicalize.fold_constants", before)
    assert after.record[-1].matches == 4
    assert after.record[-1].near_misses == ["decode/total: the weight map has no entry for add"]
    assert [node.name for node in after.methods["decode"].calls() if node.name in ("left", "right", "square")] == []
    made = {name: (entry.op, entry.shape) for name, entry in after.weights.items() if entry.op != "source"}
    assert made == {
        "table.columns_0_4": ("slice", (6, 4)),
        "table.columns_4_8": ("slice", (6, 4)),
        "table.reshape_12_4": ("reshape", (12, 4)),
    }
    assert equivalent(before, after, weights_for(before)) == 0.0


def test_a_constant_that_a_method_returns_is_left_alone(run_pass, program_of):
    text = CONSTANTS.replace("return %a,", "return %left, %a,")
    program = program_of(text)
    after = run_pass("canonicalize.fold_constants", program)
    assert "decode/left: the method returns it" in after.record[-1].near_misses
    assert after.record[-1].matches == 3

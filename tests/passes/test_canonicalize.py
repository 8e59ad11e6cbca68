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

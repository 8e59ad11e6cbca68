"""memory.plan reuses bytes that nobody reads any more; memory.verify, an independent check, catches bad plans."""

import pytest

from tmlc.errors import IRError, PipelineError
from tmlc.passes.memory.verify import verify_memory

CHAIN = """
weight "w" = source("w") : f32[16, 16]
weight "norm" = source("norm") : f32[16]
method decode(max_n=4) {
  %x = input "x" : f32[n, 16]
  %w = weight "w"
  %norm = weight "norm"
  %a = linear(%x, %w, none)
  %b = silu(%a)
  %c = columns(%b, start=0, stop=8)
  %d = gelu(%b)
  %e = silu(%d)
  %f = silu(%c)
  %both = add_rms_norm(%e, %d, %norm, eps=1e-06)
  %sum = item(%both, 0)
  %normed = item(%both, 1)
  %g = add(%normed, %e)
  return %g, %f
}
method other(max_n=2) {
  %x = input "x" : f32[3n, 16]
  %y = silu(%x)
  %z = reshape(%y, cols=48)
  return %z
}
"""


@pytest.fixture
def planned(run_pass):
    return run_pass("memory.plan", CHAIN)


def test_every_result_has_an_aligned_place_and_views_have_none(planned):
    for method in planned.methods.values():
        for call in method.calls():
            if call.name in ("c", "z"):
                assert "arena" not in call.meta
            else:
                spans = call.meta["arena"] if isinstance(call.meta["arena"], list) else [call.meta["arena"]]
                assert all(offset % 64 == 0 for offset, _ in spans)
    assert planned.record[-1].matches == 9
    assert verify_memory(planned) == 9


def test_places_hold_the_largest_call_and_the_arena_is_shared_by_the_methods(planned):
    assert planned.methods["decode"].calls("linear")[0].meta["arena"][1] == 4 * 16 * 4
    assert planned.methods["other"].calls("silu")[0].meta["arena"] == (0, 3 * 2 * 16 * 4)
    assert planned.meta["arena_bytes"] == 4 * 256 + 128


def test_bytes_are_reused_once_the_last_reader_is_through(planned):
    calls = planned.methods["decode"].calls()
    whole = sum(b for c in calls if "arena" in c.meta for _, b in _spans(c))
    assert planned.meta["arena_bytes"] < whole


def _spans(call):
    return call.meta["arena"] if isinstance(call.meta["arena"], list) else [call.meta["arena"]]


def test_max_n_can_be_set_and_wrong_names_are_refused(run_pass):
    assert run_pass("memory.plan", CHAIN, max_n={"other": 20}).meta["arena_bytes"] == 3 * 20 * 64
    for bad in ({"nothing": 4}, {"decode": 0}):
        with pytest.raises(PipelineError, match="max_n"):
            run_pass("memory.plan", CHAIN, max_n=bad)


def corrupt(program, change):
    copy = program.clone()
    change({c.name: c for c in copy.methods["decode"].calls()}, copy)
    with pytest.raises(IRError) as caught:
        verify_memory(copy)
    return str(caught.value)


def test_the_verifier_refuses_a_result_overwritten_before_its_last_reader(planned):
    def view_reader_loses(calls, program):  # f reads b through a view; e, before it, takes b's bytes
        calls["e"].meta["arena"] = calls["b"].meta["arena"]

    assert "reads b, whose bytes were overwritten" in corrupt(planned, view_reader_loses)

    def in_place(calls, program):
        calls["d"].meta["arena"] = calls["b"].meta["arena"]

    assert "writes over b, which it reads" in corrupt(planned, in_place)


def test_the_verifier_refuses_places_that_are_missing_small_unaligned_outside_or_overlapping(planned):
    def put(value):
        return lambda calls, program: calls["a"].meta.__setitem__("arena", value)

    assert "no place" in corrupt(planned, lambda calls, program: calls["a"].meta.pop("arena"))
    assert "no place" in corrupt(planned, put([]))
    assert "has 192 bytes" in corrupt(planned, put((0, 192)))
    assert "lies at" in corrupt(planned, put((4, 256)))
    assert "lies at" in corrupt(planned, put((960, 256)))
    assert "lies at" in corrupt(planned, put((-64, 256)))
    both = [planned.methods["decode"].calls("add_rms_norm")[0].meta["arena"][0]] * 2
    assert "overlap" in corrupt(planned, lambda calls, program: calls["both"].meta.__setitem__("arena", both))
    assert "the arena has" in corrupt(planned, lambda calls, program: program.meta.pop("arena_bytes"))


def test_the_verifier_wants_a_plan_first(run_pass):
    with pytest.raises(PipelineError, match="memory_planned"):
        run_pass("memory.verify", CHAIN)


def test_random_graphs_are_planned_soundly(run_pass, program_of):
    import random

    for seed in range(20):
        rng = random.Random(seed)
        lines, values = ['method decode(max_n=3) {\n  %x = input "x" : f32[n, 32]'], ["%x"]
        for i in range(30):
            kind = rng.choice(["silu", "add", "columns", "mul"])
            a, b = rng.choice(values), rng.choice(values)
            if kind == "silu":
                lines.append(f"  %v{i} = silu({a})")
            elif kind == "columns":
                lines += [f"  %c{i} = columns({a}, start=0, stop=32)", f"  %v{i} = silu(%c{i})"]
            else:
                lines.append(f"  %v{i} = {kind}({a}, {b})")
            values.append(f"%v{i}")
        lines.append(f"  return %v29, {rng.choice(values[1:])}\n}}")
        program = run_pass("memory.plan", program_of("\n".join(lines)))
        assert verify_memory(program) == program.record[-1].matches


EPILOGUE = """
facts stateful
weight "w" = source("w") : f32[16, 16]
weight "taps" = source("taps") : f32[16, 4]
state "decode.tail" : f32[3, 16] kind=conv_tail method=decode init=zeros
method decode(max_n=4) {
  %x = input "x" : f32[n, 16]
  %w = weight "w"
  %c = weight "taps"
  %t = state "decode.tail"
  %a = silu(%x)
  %b = gelu(%x)
  %y = linear_conv_state(%a, %w, none, none, %c, %t, start=0, residual=true, level=1.0, addend=%b)
  return %y
}
"""


@pytest.mark.parametrize("operand", ["a", "b"])
def test_a_fused_product_must_not_lie_on_what_it_reads_or_adds(run_pass, operand):
    planned = run_pass("memory.plan", EPILOGUE)
    assert verify_memory(planned) == 3

    copy = planned.clone()
    calls = {c.name: c for c in copy.methods["decode"].calls()}
    calls["y"].meta["arena"] = calls[operand].meta["arena"]
    with pytest.raises(IRError, match=f"writes over {operand}, which it reads"):
        verify_memory(copy)

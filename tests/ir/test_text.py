"""Programs survive being printed and read; broken text is refused with its line."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tmlc.errors import IRError
from tmlc.ir.program import FIX_CALL, Fact
from tmlc.ir.text import FORMS, HEADER, parse_program, print_program
from tmlc.ir.types import TensorType
from tmlc.ir.verify import verify

WORD = re.compile(r"-?\d+(?:\.\d+)?|\"[^\"]*\"|\[[^\]]*\]|%?\w+")
ODD = ["null", "-1", "[]", "{}", '"x"', "1e999", "9" * 20, "[[1]]", "true", "%", "none", "NaN", '{"a": []}', "0.5"]
#: A call with lists of numbers and a place in the arena, of which the others have none.
PICTURES = """
method embed_video(max_n=1) {
  %video = input "video" : u8[128n, 192]
  %patches = patchify(%video, frames=2, height=64, patch=16, folds=[1, 8, 2, 2], mean=[0.5, 0.5, 0.5], std=[1, 1, 1]) \
: f32[128n, 192] @arena=[0, 393216]
  return %patches
}
"""


@pytest.mark.parametrize("which", ["stateless", "stateful"])
def test_round_trip_keeps_structure_types_weights_states_and_records(which, request):
    program = request.getfixturevalue(which)
    verify(program)
    text = print_program(program)
    again = parse_program(text)
    verify(again)
    assert print_program(again) == text == print_program(program.clone())
    assert again.weights == program.weights
    assert (again.states, again.facts, again.record, again.meta) == (
        program.states,
        program.facts,
        program.record,
        program.meta,
    )
    (before,), (after,) = program.methods.values(), again.methods.values()
    assert after.max_n == before.max_n
    for a, b in zip(before.graph.nodes, after.graph.nodes, strict=True):
        assert (a.op, a.target if a.op == "call_function" else "", a.meta) == (
            b.op,
            b.target if b.op == "call_function" else "",
            b.meta,
        )


def test_arena_places_survive(stateless):
    x, routes = stateless.methods["decode"].calls()[0], stateless.methods["decode"].calls("sink_router")[0]
    x.meta["arena"], routes.meta["arena"] = (64, 128), [(0, 64), (192, 96)]
    again = parse_program(print_program(stateless)).methods["decode"]
    assert again.calls()[0].meta["arena"] == (64, 128)
    assert again.calls("sink_router")[0].meta["arena"] == [(0, 64), (192, 96)]


def test_types_that_can_be_inferred_may_be_left_out(stateless, stateless_text):
    lines = []
    for line in stateless_text.split("\n"):
        keep = "source(" in line or "input" in line
        lines.append(line if keep else line.rsplit(" : ", 1)[0])
    assert print_program(parse_program("\n".join(lines))) == print_program(stateless)


def test_numbered_text_does_not_depend_on_names(stateless, stateless_text):
    renamed = parse_program(stateless_text.replace("%kv ", "%kv_both ").replace("%kv,", "%kv_both,"))
    assert print_program(renamed) != print_program(stateless)
    text = print_program(stateless, numbered=True)
    assert print_program(renamed, numbered=True) == text
    assert print_program(parse_program(text), numbered=True) == text


def test_comments_and_blank_lines_are_skipped(stateless, stateless_text):
    noisy = stateless_text.replace("\n", "\n\n# a remark\n")
    assert print_program(parse_program(noisy)) == print_program(stateless)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("tmlc-ir 1", "tmlc-ir 2", "first line"),
        ("facts canonical", "facts canoncal", "unknown fact 'canoncal'"),
        ("meta {", "meta [", "JSON"),
        ('weight "kv" = concat', 'weight "k" = concat', "declared twice"),
        ("%q = linear(", "%q = liner(", "unknown op 'liner'"),
        ("%q = linear(%normed,", "%q = linear(%nrmed,", "%nrmed is not defined"),
        ("%q = linear(", "%x = linear(", "%x is defined twice"),
        ("eps=1e-06", "epsilon=1e-06", "lacks the argument eps"),
        ("top_k=2", "top_k=", "JSON value"),
        ("f32[n, 8]", "f32[n*, 8]", "not a size"),
        ("f32[n, 8]", "f33[n, 8]", "unknown dtype"),
        ("item(%routes, 0)", "item(%routes)", "item takes"),
        ("return", "retrun", "a value expected"),
        ("max_n=4) {", "max_n=4)", "expected"),
        ("  return %out, %experts\n}", "", "has no end"),
        ("%out, %experts", "%out, %experts %q", "unexpected"),
        ("method decode", "methd decode", "unknown statement 'methd'"),
    ],
)
def test_broken_text_names_the_line(stateless_text, old, new, message):
    assert old in stateless_text
    with pytest.raises(IRError, match=message) as caught:
        parse_program(stateless_text.replace(old, new, 1))
    assert caught.value.where.startswith("line ") and caught.value.fix


@pytest.mark.parametrize("place", ["5", "null", '{"a": 1}', "[1]", "[-64, 8]", "[0.5, 8]", "[[0, 64], 7]", "[true, 1]"])
def test_a_place_in_the_arena_is_two_numbers(stateless_text, place):
    line = "%normed = rms_norm(%x, %norm, eps=1e-06) : f32[n, 8]"
    with pytest.raises(IRError, match="no place in the arena") as caught:
        parse_program(stateless_text.replace(line, f"{line} @arena={place}", 1))
    assert caught.value.where.startswith("line ") and "@arena=[offset, bytes]" in caught.value.fix


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_an_error_of_the_text_or_still_a_program(stateful_text, data):
    """One word of one line is left out, written twice, or becomes another one."""
    verify(parse_program(stateful_text + PICTURES))
    lines = (stateful_text + PICTURES).split("\n")
    number = data.draw(st.sampled_from([k for k, line in enumerate(lines) if WORD.search(line)]))
    word = data.draw(st.sampled_from(list(WORD.finditer(lines[number]))))
    other = data.draw(st.sampled_from(["", word.group() * 2, *ODD, *WORD.findall(lines[number])]))
    lines[number] = lines[number][: word.start()] + other + lines[number][word.end() :]
    try:
        program = parse_program("\n".join(lines))
        verify(program)
    except IRError as error:
        assert error.what and error.fix
    else:
        assert print_program(parse_program(print_program(program))) == print_program(program)


def test_a_statement_that_cannot_be_read_is_shown_its_form(stateless_text):
    with pytest.raises(IRError) as caught:
        parse_program(stateless_text.replace("max_n=4) {", "max_n=4)", 1))
    assert caught.value.fix == f"write it as `{'`, `'.join(FORMS['method'].splitlines())}`, a line each"
    with pytest.raises(IRError) as caught:
        parse_program(stateless_text.replace("meta {", "meta [", 1))
    assert caught.value.fix == 'write it as `meta {"kind": "tokens"}`'
    program = parse_program("\n".join([HEADER, *FORMS.values()]))  # the forms themselves can be read
    assert print_program(parse_program(print_program(program))) == print_program(program)
    assert list(program.methods) == ["decode"] and list(program.states) == ["position"] and len(program.record) == 1


def test_a_graph_with_a_call_of_something_else_has_no_text(stateless):
    method = stateless.methods["decode"]
    with method.graph.inserting_before(method.output_node):
        method.graph.call_function(torch.relu, (method.inputs[0],)).meta["type"] = TensorType("f32", (1, 1))
    with pytest.raises(IRError, match="not a canonical op") as caught:
        print_program(stateless)
    assert caught.value.fix == FIX_CALL


def test_facts_are_read(stateful):
    assert stateful.facts == {Fact.CANONICAL, Fact.STATEFUL}
    assert stateful.record[0].name == "state.insert" and stateful.record[0].config == {"context": 32}

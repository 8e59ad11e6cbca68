"""Sizes, graph edits, and the eager runner."""

import pytest
import torch

from tmlc.errors import ContextFullError, InputError, IRError
from tmlc.ir.dims import Dim, at, parse_size
from tmlc.ir.ops import OPS
from tmlc.ir.program import StateSpec, call, items, positional, replace, role, type_of, uses
from tmlc.ir.run import ProgramRunner
from tmlc.ir.text import print_program
from tmlc.ir.types import TensorType, parse_type
from tmlc.ir.verify import verify


@pytest.mark.parametrize("compare", [lambda d: d < 8, lambda d: d <= 8, lambda d: d > Dim(2), lambda d: d >= 0])
def test_sizes_that_depend_on_n_have_no_order(compare):
    with pytest.raises(IRError, match="depends on n") as caught:
        compare(Dim(1, 2))
    assert "does not depend on n" in caught.value.fix


@pytest.mark.parametrize("folds", [[1, 8, 2.5], [1, [8], 2], [1, None, 2], [1, "8", 2]])
def test_a_list_of_numbers_holds_numbers(folds):
    given = {"frames": 2, "height": 64, "patch": 16, "folds": folds, "mean": [0, 0.5, 1], "std": [1, 1, 1]}
    with pytest.raises(IRError, match="folds of patchify is a list of int, not") as caught:
        positional(OPS["patchify"], ("video",), given)
    assert "folds" in caught.value.fix
    values = positional(OPS["patchify"], ("video",), {**given, "folds": [1, 8]})
    assert values[-2:] == ([0.0, 0.5, 1.0], [1.0, 1.0, 1.0]) and all(type(v) is float for v in values[-1])


def test_sizes_are_affine_in_n():
    n = Dim(1)
    assert 4 * n + 2 - n == Dim(3, 2) and (4 * n + 2).at(5) == 22
    assert 4 * n * 3 // 6 == 2 * n and (4 * n + 2) % 4 == 2 and 8 - n == Dim(-1, 8)
    assert n - n == 0 and isinstance(n - n, int) and Dim(0, 3) == 3 and hash(Dim(0, 3)) == hash(3)
    assert at(7, 3) == 7 and at(n + 1, 3) == 4
    for wrong in (lambda: n * n, lambda: (n + 1) // 2, lambda: n % 2, lambda: n // 0, lambda: n + 1.5):
        with pytest.raises(IRError) as caught:
            wrong()
        assert "a·n + b" in caught.value.fix


@pytest.mark.parametrize("size", [3, 0, Dim(1), Dim(4), Dim(4, 1), Dim(1, -2), Dim(-1, 8)])
def test_sizes_and_types_read_what_they_print(size):
    assert parse_size(str(size)) == size
    assert parse_type(str(TensorType("f32", (size, 8)))) == TensorType("f32", (size, 8))


def test_type_bytes():
    assert TensorType("bf16", (Dim(4), 8)).nbytes(3) == 4 * 3 * 8 * 2
    assert TensorType("f32", (8,)).rows == 1 and parse_type("f32[]").cols == 1


def test_call_infers_the_type_and_fills_in_absent_arguments(stateless):
    method = stateless.methods["decode"]
    weight = stateless.add_weight_input("decode", "q")
    assert weight is stateless.add_weight_input(method, "q")  # one placeholder for each weight
    new = stateless.add_weight_input(method, "k")
    x = method.calls("rms_norm")[0]
    with method.graph.inserting_after(x):
        node = call(method.graph, "linear", (x,), {"weight": new})
    assert node.args == (x, new, None) and node.meta["type"] == TensorType("f32", (Dim(1), 4))
    verify(stateless)
    assert method.sweep() == 2  # the call and its weight
    with pytest.raises(IRError, match="unknown op"):
        call(method.graph, "linaer", (x, weight))
    with pytest.raises(IRError, match="lacks the argument weight") as caught:
        call(method.graph, "linear", (x,))
    assert caught.value.fix == "its arguments: x, weight, bias (docs/ir.md)"
    with pytest.raises(IRError, match="does not take wieght"):
        call(method.graph, "linear", (x, weight), {"wieght": weight})
    stateless.weights.source("bad", "f32", (3, 7))
    with pytest.raises(IRError, match="weight must have 8 columns") as caught:
        call(method.graph, "linear", (x, stateless.add_weight_input(method, "bad")))
    assert (caught.value.where, caught.value.fix) == ("linear", "see docs/ir.md for the op")
    with pytest.raises(IRError, match="no weight 'zz'"):
        stateless.add_weight_input(method, "zz")


def test_items_and_replace_rewrite_a_call_with_two_results(stateless):
    method = stateless.methods["decode"]
    logits, routes = method.calls("linear")[-1], method.calls("sink_router")[0]
    x, weight, _ = logits.args
    with method.graph.inserting_before(routes):
        fused = call(method.graph, "router", (x, weight, *routes.args[1:]))
    for old, new in zip(items(routes), items(fused), strict=True):
        replace(old, new)
    assert method.sweep() == 2 and uses(x) != []
    verify(stateless)
    assert [n.target.name() for n in method.calls()].count("tmlc::router") == 1
    with pytest.raises(IRError, match="cannot stand for") as caught:
        replace(items(fused)[0], items(fused)[1])
    assert caught.value.fix == "replace a value by one of the same shape and dtype"
    with pytest.raises(IRError, match="no tensor type") as caught:
        type_of(fused)
    assert "`items`" in caught.value.fix


def test_a_clone_shares_nothing_that_changes(stateful):
    text = print_program(stateful)
    twin = stateful.clone()
    twin.weights.cast("low", "q", "bf16")
    twin.states.clear()
    twin.meta["name"] = "other"
    twin.record[0].matches = 99
    for node in list(twin.methods["decode"].graph.nodes)[-1:]:
        twin.methods["decode"].graph.erase_node(node)
    assert print_program(stateful) == text


def test_states_are_declared_once(stateful):
    spec = StateSpec(name="tail", kind="conv_tail", shape=(2, 8), dtype="f32", method="decode")
    assert stateful.add_state_input("decode", spec) in stateful.methods["decode"].placeholders("state")
    with pytest.raises(IRError, match="declared differently") as caught:
        stateful.add_state_input("decode", StateSpec("tail", "conv_tail", (3, 8), "f32", "decode"))
    assert "another name" in caught.value.fix


def test_streaming_the_stateful_program_equals_the_stateless_one(stateless, stateful, checkpoint):
    ids = torch.randint(0, 9, (29, 1), generator=torch.Generator().manual_seed(1))
    whole, experts = ProgramRunner(stateless, checkpoint).session().call("decode", ids)
    runner = ProgramRunner(stateful, checkpoint)
    session, other = runner.session(), runner.session()
    done = []
    for cut in torch.split(ids, [1, 4, 2, 3, 4, 4, 4, 4, 3]):
        other.call("decode", (cut + 1) % 9)  # a neighbour that must not bleed
        done.append(session.call("decode", cut))
    torch.testing.assert_close(torch.cat([d[0] for d in done]), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([d[1] for d in done]), experts)


def test_the_context_limit_stops_before_anything_changes(stateful, checkpoint):
    session = ProgramRunner(stateful, checkpoint).session()
    for _ in range(8):
        session.call("decode", torch.zeros(4, 1, dtype=torch.long))
    before = {name: state.clone() for name, state in session.states.items()}
    with pytest.raises(ContextFullError, match="context of 32"):
        session.call("decode", torch.zeros(1, 1, dtype=torch.long))
    assert all(torch.equal(before[name], state) for name, state in session.states.items())


@pytest.mark.parametrize("wrong", [torch.zeros(3, 2).long(), torch.zeros(3, 1), torch.zeros(0, 1).long()])
def test_inputs_that_do_not_fit_are_refused(stateless, checkpoint, wrong):
    session = ProgramRunner(stateless, checkpoint).session()
    with pytest.raises(InputError, match=r"is not i64\[n, 1\]") as caught:
        session.call("decode", wrong)
    assert "dtype and shape" in caught.value.fix
    with pytest.raises(InputError, match="0 inputs") as caught:
        session.call("decode")
    assert caught.value.fix == f"give {role(stateless.methods['decode'].inputs[0])[1]}, in this order"

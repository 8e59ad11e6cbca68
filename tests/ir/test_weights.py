"""Weight maps: inference, evaluation against plain torch, and what they refuse."""

import json

import pytest
import torch

from tmlc.errors import CheckpointError, IRError
from tmlc.ir.weights import WeightMap


@pytest.fixture
def tensors():
    return {
        "a": torch.randn(4, 6),
        "b": torch.randn(2, 6),
        "c": torch.randn(4, 6),
        "e": torch.randn(3, 2, 6).bfloat16(),
    }


@pytest.fixture
def weights(tensors):
    made = WeightMap()
    for name, t in tensors.items():
        made.source(name, "bf16" if t.dtype == torch.bfloat16 else "f32", t.shape)
    return made


def test_every_op_evaluates_to_what_torch_says(weights, tensors):
    a, b, c, e = (tensors[k] for k in "abce")
    weights.concat("ab", ["a", "b"])
    weights.concat("ac", ["a", "c"], axis=1)
    weights.stack("s", ["a", "c"])
    weights.transpose("t", "s", [2, 0, 1])
    weights.slice("cut", "t", 0, 1, 3)
    weights.reshape("flat", "cut", [16])
    weights.cast("low", "s", "bf16")
    weights.cast("up", "e", "f32")
    want = {
        "ab": torch.cat([a, b]),
        "ac": torch.cat([a, c], 1),
        "s": torch.stack([a, c]),
        "t": torch.stack([a, c]).permute(2, 0, 1),
        "cut": torch.stack([a, c]).permute(2, 0, 1)[1:3],
        "flat": torch.stack([a, c]).permute(2, 0, 1)[1:3].reshape(16),
        "low": torch.stack([a, c]).bfloat16(),
        "up": e.float(),
    }
    for name, value in want.items():
        got = weights.evaluate(name, tensors)
        assert torch.equal(got, value) and got.dtype == value.dtype, name
        assert weights[name].shape == tuple(value.shape)


def test_a_chain_fills_its_output_through_views(weights, tensors):
    """A stack of concats of transposes, cast: what expert stacking and merging produce together."""
    weights.transpose("at", "a", [1, 0])
    weights.transpose("ct", "c", [1, 0])
    weights.concat("m", ["at", "ct"], axis=0)
    weights.concat("m2", ["ct", "at"], axis=0)
    weights.stack("all", ["m", "m2"])
    weights.cast("low", "all", "bf16")
    m, m2 = torch.cat([tensors["a"].T, tensors["c"].T]), torch.cat([tensors["c"].T, tensors["a"].T])
    assert torch.equal(weights.evaluate("low", tensors), torch.stack([m, m2]).bfloat16())


def test_casting_down_and_up_again_rounds(weights, tensors):
    weights.cast("low", "a", "bf16")
    weights.cast("back", "low", "f32")
    weights.concat("both", ["back", "c"])
    assert torch.equal(weights.evaluate("both", tensors)[:4], tensors["a"].bfloat16().float())


def test_a_constant_holds_its_values_and_survives_the_text_form(weights, tensors):
    values = torch.randn(3, 5, dtype=torch.float64).float()
    weights.constant("k", values)
    weights.transpose("kt", "k", [1, 0])
    assert weights["k"].srcs == () and weights.tensors(["kt"]) == []
    entry = json.loads(json.dumps(weights["k"].args))
    again = WeightMap()
    again.add("k", "constant", [], entry)
    assert torch.equal(again.evaluate("k", {}), values) and torch.equal(weights.evaluate("kt", tensors), values.T)


@pytest.mark.parametrize("data", ["", "!", "eJwDAAAAAAE="])
def test_a_constant_whose_data_does_not_fit_is_refused(weights, data):
    weights.add("k", "constant", [], {"dtype": "f32", "shape": [1 << 20, 4], "data": data})
    with pytest.raises(IRError, match="the data of the constant is not 16777216 bytes"):
        weights.evaluate("k", {})


def test_interleaved_rows_are_taken_apart(weights, tensors):
    """Reshape, then slice or transpose, then reshape: a step of two, without a copy beside the stored tensor."""
    weights.reshape("pairs", "a", [2, 2, 6])
    weights.slice("odd3", "pairs", 1, 1, 2)
    weights.reshape("odd", "odd3", [2, 6])
    assert torch.equal(weights.evaluate("odd", tensors), tensors["a"][1::2])
    weights.transpose("halves3", "pairs", [1, 0, 2])
    weights.reshape("halves", "halves3", [4, 6])
    assert torch.equal(weights.evaluate("halves", tensors), torch.cat([tensors["a"][::2], tensors["a"][1::2]]))


def test_only_what_is_needed_is_kept_and_read(weights):
    weights.concat("ab", ["a", "b"])
    assert weights.tensors(["ab"]) == ["a", "b"]
    weights.prune(["ab"])
    assert list(weights) == ["a", "b", "ab"]


def test_a_missing_or_different_checkpoint_tensor_is_named(weights, tensors):
    weights.concat("ab", ["a", "b"])
    with pytest.raises(CheckpointError, match="missing") as caught:
        weights.evaluate("ab", {"a": tensors["a"]})
    assert caught.value.where == "b" and "compile the one that is there now" in caught.value.fix
    with pytest.raises(CheckpointError, match=r"f32\[4, 6\], the program needs f32\[2, 6\]") as other:
        weights.evaluate("ab", {**tensors, "b": tensors["a"]})
    assert other.value.fix == caught.value.fix
    with pytest.raises(CheckpointError, match="bf16"):
        weights.evaluate("a", {"a": tensors["a"].bfloat16()})


@pytest.mark.parametrize(
    "op, srcs, args, message",
    [
        ("concat", ["a", "b"], {"axis": 1}, "cannot concatenate"),
        ("concat", ["a", "e"], {"axis": 0}, "cannot concatenate"),
        ("concat", ["a", "b"], {"axis": 2}, "axis 2"),
        ("concat", [], {"axis": 0}, "needs sources"),
        ("constant", ["a"], {"dtype": "f32", "shape": [1], "data": ""}, "no sources"),
        ("stack", ["a", "b"], {}, "cannot stack"),
        ("transpose", ["a"], {"axes": [0, 0]}, "not an order"),
        ("slice", ["a"], {"axis": 0, "start": 2, "stop": 5}, "not inside"),
        ("slice", ["a", "c"], {"axis": 0, "start": 0, "stop": 1}, "one source"),
        ("reshape", ["a"], {"shape": [5, 5]}, "no shape"),
        ("cast", ["a"], {"dtype": "f8"}, "unknown dtype"),
        ("cast", ["a"], {"to": "bf16"}, "wrong arguments"),
        ("weave", ["a"], {}, "unknown weight op"),
        ("cast", ["zz"], {"dtype": "bf16"}, "no weight 'zz'"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(weights, op, srcs, args, message):
    with pytest.raises(IRError, match=message) as caught:
        weights.add("new", op, srcs, args)
    assert "new" not in weights
    other = {"unknown dtype": "use one of f32", "unknown weight op": "use one of source", "no weight 'zz'": "add it to"}
    assert caught.value.fix.startswith(other.get(message, f"{op} takes "))


def test_a_name_is_taken_once(weights):
    with pytest.raises(IRError, match="exists already") as caught:
        weights.source("a", "f32", (4, 6))
    with pytest.raises(IRError, match="exists already") as again:
        weights.cast("a", "b", "bf16")
    assert caught.value.fix == again.value.fix == "give it a name that is not in program.weights"

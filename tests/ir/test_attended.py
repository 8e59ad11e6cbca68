"""attention_linear_state: attention, and then the product that reads it."""

import numpy as np
import pytest
import torch

from tmlc.errors import IRError
from tmlc.ir.ops import OPS
from tmlc.ir.types import TensorType

HEADS = (None, None, 2, 1, 0.5, 0, 0, 0.0, 0.0, None, 0.0)  # of attention, behind its caches


def rand(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def op(name, *args):
    return getattr(torch.ops.tmlc, name).default(*args)


Q, K, V = rand(3, 6), rand(3, 3, seed=1), rand(3, 2, seed=2)
NORMS = rand(3, seed=3), rand(3, seed=4)
WEIGHT, BIAS, FACTOR, ADDEND = rand(5, 4, seed=5), rand(5, seed=6), rand(1, 1, seed=7), rand(3, 5, seed=8)
TAPS = rand(2, 3, seed=9)
TABLE, TURNS = rand(3, 2, seed=11), (1, False, None)  # cosines, sines; offset, interleaved, a shared part
UNTURNED = (None, 0, False, None)


def states():
    return torch.tensor([[2]]), torch.zeros(6, 3), torch.zeros(6, 2), rand(2, 2, seed=10)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_it_is_attention_and_then_the_product(turned, normed, conv):
    here, there = states(), states()
    q_norm, k_norm = NORMS if normed else (None, None)
    after = (1, True, 0.5) if conv else (0, False, 1.0)
    taps, tail = (TAPS, here[3]) if conv else (None, None)
    by = (TABLE, *TURNS) if turned else UNTURNED
    found = op("attention_linear_state", Q, q_norm, K, k_norm, 1e-5, *by, V, *here[:3], *HEADS, WEIGHT, BIAS, FACTOR,
               taps, tail, *after, ADDEND)  # fmt: skip
    if turned:
        heads = op("rope_attention_state", Q, q_norm, K, k_norm, 1e-5, *by, V, *there[:3], *HEADS)
    elif normed:
        heads = op("norm_attention_state", Q, q_norm, K, k_norm, 1e-5, V, *there[:3], *HEADS)
    else:
        heads = op("attention_state", Q, K, V, *there[:3], *HEADS)
    if conv:
        wanted = op("linear_conv_state", heads, WEIGHT, BIAS, FACTOR, TAPS, there[3], *after, ADDEND)
    else:
        wanted = op("linear_add", heads, WEIGHT, BIAS, FACTOR, ADDEND)
    assert torch.equal(found, wanted)
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True)) and here[1].any()


def test_without_bias_factor_and_addend_it_is_the_plain_product():
    here, there = states(), states()
    absent = (None, None, None, None, 0, False, 1.0, None)
    found = op("attention_linear_state", Q, None, K, None, 0.0, *UNTURNED, V, *here[:3], *HEADS, WEIGHT,
               *absent)  # fmt: skip
    heads = op("attention_state", Q, K, V, *there[:3], *HEADS)
    assert torch.equal(found, op("linear", heads, WEIGHT, None))


def test_its_caches_and_its_tail_are_states_of_which_the_tail_may_be_absent():
    spec = OPS["attention_linear_state"]
    assert spec.mutates == ("k_cache", "v_cache", "tail")
    assert spec.optional >= {"q_norm", "k_norm", "table", "bias", "factor", "taps", "tail", "addend"}
    assert not spec.optional & {"q", "k", "v", "k_cache", "v_cache", "position", "weight"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"weight": (5, 6)}, "must have 4"), ({"q_norm": (3,)}, "q_norm and k_norm"), ({"tail": (2, 2)}, "taps and tail"),
     ({"addend": (3, 4)}, "3, 4"), ({"table": (2, 2)}, "table has 2 rows"),
     ({"shared": (3, 1)}, "turned by a table")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changed, reason):
    spec = OPS["attention_linear_state"]
    given = dict.fromkeys(spec.args) | {
        "q": (3, 6), "k": (3, 3), "v": (3, 2), "k_cache": (6, 3), "v_cache": (6, 2), "weight": (5, 4), **changed,
    }  # fmt: skip
    types = {name: TensorType("f32", shape) for name, shape in given.items() if shape is not None}
    first = spec.args.index("num_heads")
    numbers = dict(zip(spec.args[first : first + 7], HEADS[2:9], strict=True)) | {"eps": 0.0, "softcap": 0.0}
    numbers |= {"offset": 0, "interleaved": False}
    numbers |= {"start": 0, "residual": False, "level": 1.0, "position": TensorType("i64", (1, 1))}
    with pytest.raises(IRError, match=reason):
        spec.shapes(*((given | types | numbers)[name] for name in spec.args))

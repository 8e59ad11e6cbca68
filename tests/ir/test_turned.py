"""rope_table_state and rope_attention_state: cosines and sines of new positions, and attention that turns by them."""

import pytest
import torch
from numpy.random import default_rng

from tmlc.errors import IRError
from tmlc.ir.ops import OPS
from tmlc.ir.types import TensorType


def rand(*shape, seed=0):
    return torch.from_numpy(default_rng(seed).standard_normal(shape).astype("float32"))


def op(name, *args):
    return getattr(torch.ops.tmlc, name).default(*args)


Q, K, V = rand(4, 12), rand(4, 6, seed=1), rand(4, 2, seed=2)  # two heads of queries, one of keys, of six columns
NORMS = rand(6, seed=3), rand(6, seed=4)
INV_FREQ = rand(1, 2, seed=5).abs()
HEADS = (None, None, 2, 1, 0.5, 0, 0, 0.0, 0.0, None, 0.0)


def states():
    return torch.tensor([[7]]), torch.zeros(12, 6), torch.zeros(12, 2)


def test_the_table_has_the_cosines_and_sines_of_new_positions():
    found = op("rope_table_state", rand(3, 5), torch.tensor([[7]]), INV_FREQ, 1.5)
    angle = torch.arange(7, 10)[:, None] * INV_FREQ
    torch.testing.assert_close(found, 1.5 * torch.cat([angle.cos(), angle.sin()], 1))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 2])
def test_attention_norms_and_then_turns_heads(normed, interleaved, offset):
    here, there = states(), states()
    norms = NORMS if normed else (None, None)
    table = op("rope_table_state", Q, here[0], INV_FREQ, 1.2)
    found = op("rope_attention_state", Q, norms[0], K, norms[1], 1e-5, table, offset, interleaved, V, *here, *HEADS)
    heads = []
    for x, norm, count in ((Q, norms[0], 2), (K, norms[1], 1)):
        x = x if norm is None else op("rms_norm", x, norm, 1e-5)
        heads.append(op("rope_state", x, there[0], INV_FREQ, count, offset, interleaved, 1.2))
    assert torch.equal(found, op("attention_state", *heads, V, *there, *HEADS))
    assert OPS["rope_attention_state"].mutates == ("k_cache", "v_cache")
    assert torch.equal(here[1], there[1]) and torch.equal(here[2], there[2]) and here[1].any()


@pytest.mark.parametrize(
    ("table", "offset", "norms", "reason"),
    [((4, 3), 0, (None, None), "as many sines"), ((3, 4), 0, (None, None), "has 3 rows"),
     ((4, 4), 3, (None, None), "4 columns from 3"), ((4, 8), 0, (None, None), "heads of 6"),
     ((4, 4), 0, ((6,), None), "come together"), ((4, 4), 0, ((5,), (6,)), "q_norm must have")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(table, offset, norms, reason):
    q, k, v = (TensorType("f32", tuple(x.shape)) for x in (Q, K, V))
    here = TensorType("i64", (1, 1)), TensorType("f32", (12, 6)), TensorType("f32", (12, 2))
    q_norm, k_norm = (None if shape is None else TensorType("f32", shape) for shape in norms)
    with pytest.raises(IRError, match=reason):
        OPS["rope_attention_state"].shapes(
            q, q_norm, k, k_norm, 1e-5, TensorType("f32", table), offset, False, v, *here, *HEADS
        )


def test_a_table_wants_a_position():
    x, freq = TensorType("f32", (4, 6)), TensorType("f32", (1, 2))
    with pytest.raises(IRError, match=r"position must be i64\[1, 1\]"):
        OPS["rope_table_state"].shapes(x, TensorType("f32", (1, 1)), freq, 1.0)

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
    found = op("rope_attention_state", Q, norms[0], K, norms[1], 1e-5, table, offset, interleaved, None, V, *here,
               *HEADS)  # fmt: skip
    heads = []
    for x, norm, count in ((Q, norms[0], 2), (K, norms[1], 1)):
        x = x if norm is None else op("rms_norm", x, norm, 1e-5)
        heads.append(op("rope_state", x, there[0], INV_FREQ, count, offset, interleaved, 1.2))
    assert torch.equal(found, op("attention_state", *heads, V, *there, *HEADS))
    assert OPS["rope_attention_state"].mutates == ("k_cache", "v_cache")
    assert torch.equal(here[1], there[1]) and torch.equal(here[2], there[2]) and here[1].any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_may_have_a_turned_part_that_all_heads_share(interleaved):
    """Two heads of keys of two columns and four shared ones, three queries each."""
    q, k, shared, v = rand(4, 36), rand(4, 4, seed=1), rand(4, 4, seed=2), rand(4, 4, seed=3)
    heads = (None, None, 6, 2, *HEADS[4:])
    here, there = ((torch.tensor([[7]]), torch.zeros(12, 12), torch.zeros(12, 4)) for _ in range(2))
    table = op("rope_table_state", q, here[0], INV_FREQ, 1.2)
    found = op("rope_attention_state", q, None, k, None, 0.0, table, 2, interleaved, shared, v, *here, *heads)
    turned = op("rope_state", shared, there[0], INV_FREQ, 1, 0, interleaved, 1.2)
    queries = op("rope_state", q, there[0], INV_FREQ, 6, 2, interleaved, 1.2)
    keys = op("concat_heads", k, turned, 2, 2)
    assert torch.equal(found, op("attention_state", queries, keys, v, *there, *heads))
    assert torch.equal(here[1], there[1]) and here[1].any()


def test_a_shared_part_is_turned_whole_and_not_normed():
    q, k, shared, v = (TensorType("f32", shape) for shape in ((4, 12), (4, 2), (4, 4), (4, 2)))
    here = TensorType("i64", (1, 1)), TensorType("f32", (12, 6)), TensorType("f32", (12, 2))
    table, norm = TensorType("f32", (4, 4)), TensorType("f32", (6,))
    for norms, offset, reason in (((norm, norm), 2, "is not normed"), ((None, None), 1, "not in their shared part")):
        with pytest.raises(IRError, match=reason):
            OPS["rope_attention_state"].shapes(
                q, norms[0], k, norms[1], 1e-5, table, offset, False, shared, v, *here, *HEADS
            )


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
            q, q_norm, k, k_norm, 1e-5, TensorType("f32", table), offset, False, None, v, *here, *HEADS
        )


def test_a_table_wants_a_position():
    x, freq = TensorType("f32", (4, 6)), TensorType("f32", (1, 2))
    with pytest.raises(IRError, match=r"position must be i64\[1, 1\]"):
        OPS["rope_table_state"].shapes(x, TensorType("f32", (1, 1)), freq, 1.0)

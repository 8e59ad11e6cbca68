"""The ops of the open decoders: rotary positions, head columns, top-k routers, sink logits, soft caps, experts."""

import pytest
import torch

from tmlc.errors import IRError
from tmlc.ir.ops import OPS
from tmlc.ir.ops import functional as F
from tmlc.ir.types import TensorType


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_pairs_of_columns_as_complex_numbers(interleaved):
    n, heads, width, offset, half, scaling = 7, 3, 9, 2, 3, 1.25
    x, inv_freq = rand(n, heads * width), torch.tensor([[1.0, 0.3, 0.01]])
    got = F.rope(x, inv_freq, heads, offset, interleaved, scaling).reshape(n, heads, width)
    old = x.reshape(n, heads, width)
    kept = [0, 1, 8]
    assert torch.equal(got[..., kept], old[..., kept])
    for j in range(half):
        a, b = (offset + 2 * j, offset + 2 * j + 1) if interleaved else (offset + j, offset + j + half)
        turn = torch.polar(torch.full((n,), scaling), torch.arange(n) * inv_freq[0, j])[:, None]
        want = torch.complex(old[..., a], old[..., b]) * turn
        torch.testing.assert_close(torch.complex(got[..., a], got[..., b]), want)


def test_rope_state_continues_at_the_position():
    x, inv_freq = rand(12, 8), rand(1, 2).abs()
    whole, position = F.rope(x, inv_freq, 2), torch.zeros(1, 1, dtype=torch.long)
    for cut in (slice(0, 5), slice(5, 6), slice(6, 12)):
        got = OPS["rope_state"].reference(x[cut], position, inv_freq, 2, 0, False, 1.0)
        assert torch.equal(got, whole[cut])
        OPS["advance"].reference(position, x[cut], 0)


def test_heads_are_cut_and_joined():
    x, one = rand(4, 6), rand(4, 2)
    first, rest = F.head_columns(x, 2, 0, 1), F.head_columns(x, 2, 1, 3)
    assert torch.equal(first, x[:, [0, 3]]) and torch.equal(rest, x[:, [1, 2, 4, 5]])
    assert torch.equal(F.concat_heads(first, rest, 2), x)
    joined = F.concat_heads(first, one, 2, 2).reshape(4, 2, 3)
    assert torch.equal(joined[..., 0], first) and all(torch.equal(joined[:, h, 1:], one) for h in range(2))
    assert torch.equal(F.concat_heads(one, first, 2, 1).reshape(4, 2, 3)[:, 1, :2], one)


def test_values_may_be_narrower_than_keys_and_sinks_and_caps_act():
    n, heads, kv, width, v_width = 6, 4, 2, 5, 3
    q, k, v = rand(n, heads * width), rand(n, kv * width, seed=1), rand(n, kv * v_width, seed=2)
    sink = rand(1, heads)
    got = F.attention(q, k, v, None, None, heads, kv, 0.7, sink_logits=sink, softcap=1.5)
    assert got.shape == (n, heads * v_width)
    for h in range(heads):
        g = h // 2
        keys, values = k[:, g * width : (g + 1) * width], v[:, g * v_width : (g + 1) * v_width]
        for p in range(n):
            scores = 1.5 * torch.tanh(0.7 * keys[: p + 1] @ q[p, h * width : (h + 1) * width] / 1.5)
            share = scores.exp() / (scores.exp().sum() + sink[0, h].exp())
            torch.testing.assert_close(got[p, h * v_width : (h + 1) * v_width], share @ values[: p + 1])


def test_attention_state_with_sinks_and_narrow_values_equals_the_whole():
    n, heads, kv, window = 23, 2, 1, 5
    q, k, v, sink = rand(n, heads * 4), rand(n, kv * 4, seed=1), rand(n, kv * 3), rand(1, heads)
    rest = (heads, kv, 0.5, window, 0, 0.0, 0.0, sink, 2.0)
    whole = F.attention(q, k, v, None, None, *rest)
    caches, position = (torch.zeros(window + 3, 4), torch.zeros(window + 3, 3)), torch.zeros(1, 1, dtype=torch.long)
    for start in range(0, n, 4):
        cut = slice(start, start + 4)
        got = OPS["attention_state"].reference(q[cut], k[cut], v[cut], position, *caches, None, None, *rest)
        OPS["advance"].reference(position, q[cut], 0)
        torch.testing.assert_close(got, whole[cut])


def test_softmax_and_raw_routers():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    weights, experts = F.topk_router(logits, None, 0, 3)
    assert experts.tolist() == [[1, 3, 2], [0, 1, 2]], "ties: the lower index first"
    torch.testing.assert_close(weights, torch.softmax(logits, 1).gather(1, experts))
    torch.testing.assert_close(F.topk_router(logits, None, 0, 3, True, scale=2.0)[0].sum(1), torch.full((2,), 2.0))
    raw, same = F.topk_router(logits, None, 2, 3)
    assert torch.equal(same, experts)
    torch.testing.assert_close(raw, torch.softmax(logits.gather(1, experts), 1))


def test_the_bias_of_a_sigmoid_router_decides_and_does_not_weigh():
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[0.0, 0.0, 5.0, 0.0]])
    weights, experts = F.topk_router(logits, bias, 1, 2, True)
    assert experts.tolist() == [[2, 0]]
    score = torch.sigmoid(torch.tensor([[0.0, 2.0]]))
    torch.testing.assert_close(weights, score / score.sum())


def test_only_experts_of_the_best_groups_are_chosen():
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.6, 0.5, 0.55, 0.05, 0.8, 0.1]])
    logits = torch.log(scores / (1 - scores))
    _, experts = F.topk_router(logits, None, 1, 3, groups=3, top_groups=1)
    assert experts.tolist() == [[3, 5, 4]], "0.6 + 0.55 beats 0.9 + 0.2 and 0.8 + 0.1"
    _, experts = F.topk_router(logits, None, 1, 4, groups=3, top_groups=2)
    assert experts.tolist() == [[0, 3, 5, 4]]


def test_experts_that_every_row_has_come_last_with_weight_1():
    weights, experts = rand(3, 2), torch.tensor([[0, 3], [2, 1], [3, 0]])
    shares, chosen = OPS["append_experts"].reference(weights, experts, 4, 2)
    assert torch.equal(shares, torch.cat([weights, torch.ones(3, 2)], 1))
    assert chosen.tolist() == [[0, 3, 4, 5], [2, 1, 4, 5], [3, 0, 4, 5]]


def test_experts_with_biases_and_a_clamped_gate():
    n, d, f, count = 5, 4, 3, 3
    x, gate_up, down = 4 * rand(n, d), rand(count, 2 * f, d), rand(count, d, f)
    gate_up_bias, down_bias = rand(count, 2 * f), rand(count, d)
    weights, experts = rand(n, 2), torch.tensor([[0, 2]] * n)
    got = F.moe(x, weights, experts, gate_up, down, gate_up_bias, down_bias, 1.7, 2.0)
    want = torch.zeros(n, d)
    for j, e in enumerate((0, 2)):
        both = x @ gate_up[e].T + gate_up_bias[e]
        gate, up = both[:, :f].clamp(max=2.0), both[:, f:].clamp(-2.0, 2.0)
        hidden = (up + 1) * gate * torch.sigmoid(1.7 * gate)
        want += weights[:, j : j + 1] * (hidden @ down[e].T + down_bias[e])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "op, args, complaint",
    [
        ("rope", (TensorType("f32", (5, 12)), TensorType("f32", (1, 4)), 2, 0, False, 1.0), "not inside heads of 6"),
        ("head_columns", (TensorType("f32", (5, 12)), 2, 2, 7), "not inside heads of 6"),
        ("concat_heads", (TensorType("f32", (5, 12)), TensorType("f32", (4, 12)), 2, 0), "a has 5 rows"),
        ("topk_router", (TensorType("f32", (5, 12)), None, 1, 5, True, 3, 1, 1.0), "hold 4 experts"),
        ("topk_router", (TensorType("f32", (5, 12)), None, 3, 5, True, 1, 1, 1.0), "scores is 3"),
        ("append_experts", (TensorType("f32", (5, 2)), TensorType("i64", (5, 3)), 4, 1), "experts must be i64"),
        ("append_experts", (TensorType("f32", (5, 2)), TensorType("i64", (5, 2)), 4, 0), "both are positive"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(op, args, complaint):
    with pytest.raises(IRError, match=complaint):
        OPS[op].shapes(*args)

"""The ops of Inkling-2: L2 clips, soft caps, mixing of blocks, convolutions with computed taps, computed sinks."""

import pytest
import torch

from tmlc.errors import IRError
from tmlc.ir.ops import OPS
from tmlc.ir.ops import functional as F
from tmlc.ir.types import TensorType


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_long_heads_are_shortened_and_short_ones_kept():
    x = torch.tensor([[3.0, 4.0, 0.3, 0.4]])
    torch.testing.assert_close(F.l2_clip(x, None, 2, 1.0), torch.tensor([[0.6, 0.8, 0.3, 0.4]]), atol=1e-6, rtol=0)
    scale = torch.tensor([[1.0, 0.0, 10.0, 0.0]])
    torch.testing.assert_close(F.l2_clip(x, scale, 2, 1.0), torch.tensor([[1.0, 0.0, 1.0, 0.0]]), atol=1e-6, rtol=0)
    assert not F.l2_clip(torch.zeros(2, 4), None, 2, 1.0).any()


def test_softcap_bounds_and_keeps_small_numbers():
    x = torch.tensor([[-1e6, 1e-3, 1e6]])
    torch.testing.assert_close(F.softcap(x, 5.0), torch.tensor([[-5.0, 1e-3, 5.0]]), atol=1e-9, rtol=1e-6)


def test_each_query_mixes_the_normalised_blocks():
    x, queries = rand(4, 15), rand(2, 5)
    got = F.mix_blocks(x, queries, 1e-6).reshape(4, 2, 5)
    for row in range(4):
        blocks = x[row].reshape(3, 5)
        blocks = blocks / (blocks.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        for q in range(2):
            shares = torch.softmax(blocks @ queries[q] / 5**0.5, 0)
            torch.testing.assert_close(got[row, q], shares @ blocks)


@pytest.mark.parametrize("residual", [False, True])
def test_taps_of_a_dynamic_convolution_count_backwards_and_differ_by_head(residual):
    n, heads, width, kernel = 6, 2, 3, 3
    x, weight, taps = rand(n, heads * width), rand(kernel, heads * width), rand(n, heads * kernel)
    got = F.dynamic_conv(x, weight, taps, residual)
    for t in range(n):
        for c in range(heads * width):
            seen = range(min(kernel, t + 1))
            want = sum((weight[j, c] + taps[t, c // width * kernel + j]) * x[t - j, c] for j in seen)
            torch.testing.assert_close(got[t, c], want + x[t, c] * residual)


def test_a_dynamic_convolution_continues_after_its_tail():
    x, weight, taps = rand(9, 4), rand(3, 4), rand(9, 6)
    whole, tail = F.dynamic_conv(x, weight, taps, True), torch.zeros(2, 4)
    for cut in (slice(0, 1), slice(1, 2), slice(2, 6), slice(6, 9)):
        assert torch.equal(OPS["dynamic_conv_state"].reference(x[cut], weight, taps[cut], tail, True), whole[cut])
    assert torch.equal(tail, x[-2:])


def test_a_sink_may_differ_from_row_to_row():
    n, heads = 5, 2
    q, k, v, sinks = rand(n, 8), rand(n, 8, seed=1), rand(n, 8, seed=2), rand(n, heads)
    got = F.attention(q, k, v, None, None, heads, heads, 0.5, sink_logits=sinks)
    for t in range(n):
        row = F.attention(q, k, v, None, None, heads, heads, 0.5, sink_logits=sinks[t : t + 1])[t]
        torch.testing.assert_close(got[t], row)


def test_softcapped_experts():
    x, weights, experts = rand(3, 4), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long)
    up, down = 3 * rand(1, 10, 4), rand(1, 4, 5)
    gate, value = (x @ up[0].T).chunk(2, 1)
    hidden = 2 * torch.tanh(gate / 2) * torch.sigmoid(gate) * 3 * torch.tanh(value / 3)
    got = F.moe(x, weights, experts, up, down, None, None, 0.0, 0.0, 2.0, 3.0)
    torch.testing.assert_close(got, hidden @ down[0].T)


X, N = TensorType("f32", (5, 12)), TensorType("f32", (5, 2))


@pytest.mark.parametrize(
    ("op", "args", "what"),
    [
        ("softcap", (X, 0.0), "must be positive"),
        ("l2_clip", (X, None, 5, 1.0), "not a multiple of 5"),
        ("l2_clip", (X, TensorType("f32", (1, 11)), 3, 1.0), "12 numbers"),
        ("concat_columns", (X, TensorType("f32", (4, 12))), "differ in rows"),
        ("mix_blocks", (X, TensorType("f32", (1, 5)), 1e-6), "not a multiple of 5"),
        ("mix_blocks", (X, TensorType("f32", (9, 4)), 1e-6), "too many"),
        ("dynamic_conv", (X, TensorType("f32", (3, 11)), TensorType("f32", (5, 6)), True), "does not fit"),
        ("dynamic_conv", (X, TensorType("f32", (3, 12)), TensorType("f32", (5, 5)), True), "not a multiple of 3"),
        (
            "moe",
            (X, N, TensorType("i64", (5, 2)), TensorType("f32", (4, 6, 12)), TensorType("f32", (4, 12, 3)), None, None,
             1.0, 1.0, 2.0, 3.0, 0),
            "with alpha 0",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(op, args, what):
    with pytest.raises(IRError, match=what):
        OPS[op].shapes(*args)

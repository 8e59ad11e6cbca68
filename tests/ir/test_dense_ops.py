"""Dense, routing and media ops against independent float64 numpy."""

import math

import numpy as np
import pytest
import torch

from tmlc.errors import IRError
from tmlc.ir.ops import OPS
from tmlc.ir.ops import functional as F
from tmlc.ir.types import TensorType


def rng(seed=0):
    return np.random.default_rng(seed)


def f32(*shape, seed=0):
    return torch.from_numpy(rng(seed).standard_normal(shape).astype(np.float32))


def close(got, want, tol=1e-5):
    np.testing.assert_allclose(got.double().numpy(), want, rtol=tol, atol=tol)


def wide(t):
    return t.double().numpy()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def test_clamp():
    x = torch.tensor([[-3.0, -0.5, 0.0, 2.0, float("inf")]])
    assert F.clamp(x, -0.5, 1.5).tolist() == [[-0.5, -0.5, 0.0, 1.5, 1.5]]
    assert F.clamp(x * float("nan"), -1.0, 1.0).isnan().all()
    for lo, hi in ((1.0, 0.5), (-math.inf, 0.0), (0.0, 1e39)):
        with pytest.raises(IRError, match="no range of float32"):
            OPS["clamp"].shapes(TensorType("f32", (1, 5)), lo, hi)


def test_rms_norm_works_per_group_of_the_weights_length():
    x, w = f32(3, 12), f32(4, seed=1)
    groups = wide(x).reshape(3, 3, 4)
    want = groups / np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-3) * wide(w)
    close(F.rms_norm(x, w, 1e-3), want.reshape(3, 12))
    close(F.rms_norm(x, w[None], 1e-3), want.reshape(3, 12))


def test_linear_takes_bfloat16_weights_and_accumulates_in_float32():
    x, w, b = f32(3, 40), f32(7, 40, seed=1), f32(1, 7, seed=2)
    close(F.linear(x, w, b), wide(x) @ wide(w).T + wide(b))
    low = w.bfloat16()
    got = F.linear(x, low)
    assert got.dtype == torch.float32
    close(got, wide(x) @ wide(low).T)


def test_embeddings():
    table, levels = f32(12, 5), torch.tensor([[0, 3, 1], [2, 2, 0]])
    close(F.embedding(table.bfloat16(), torch.tensor([[7], [0]])), wide(table.bfloat16())[[7, 0]])
    for outside in (-1, 12):
        with pytest.raises(IndexError):
            F.embedding(table, torch.tensor([[outside]]))
    want = sum(wide(table)[4 * b + levels[:, b].numpy()] for b in range(3))
    close(F.bag_embedding(table, levels, 4), want)
    with pytest.raises(IndexError, match=r"0\.\.3"):
        F.bag_embedding(table, levels + 2, 4)


def test_elementwise():
    a, b, c = f32(3, 6), f32(3, 6, seed=1), f32(3, 6, seed=2)
    x, y, z = wide(a), wide(b), wide(c)
    close(F.swiglu(a, b), silu(x) * y)
    close(F.gelu(a), x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))
    close(F.modulate(a, b, c), x * (1 + y) + z)
    close(F.add_scaled(a, b, 0.3), x + 0.3 * y)
    close(F.add_row(a, b, 2), x + y[2])
    close(F.scale_by(a, torch.tensor([[2.5]])), 2.5 * x)
    assert torch.equal(F.reshape(F.columns(a, 1, 5), 2), a[:, 1:5].reshape(-1, 2))


def test_short_conv_is_causal_with_the_newest_tap_last():
    x, w = f32(5, 3), f32(3, 1, 4, seed=1)
    want = wide(x).copy()
    for t in range(5):
        for j in range(4):
            if t - 3 + j >= 0:
                want[t] += wide(w)[:, 0, j] * wide(x)[t - 3 + j]
    close(F.short_conv(x, w, True), want)
    close(F.short_conv(x, w[:, 0], False), want - wide(x))


def attention_numpy(q, k, v, rel, table, heads, kv_heads, scale, window, sinks, floor, alpha):
    n, d, ranks = q.shape[0], q.shape[1] // heads, table.shape[0]
    out = np.zeros_like(q)
    for h in range(heads):
        g = h // (heads // kv_heads)
        for p in range(n):
            tau = 1 + alpha * math.log(max(1.0, (p + 1) / floor)) if floor > 0 else 1.0
            seen, scores = [], []
            for j in range(p + 1):
                if window == 0 or j > p - window or j < sinks:
                    s = scale * tau * q[p, h * d : h * d + d] @ k[j, g * d : g * d + d]
                    if p - j < table.shape[1]:
                        s += tau * rel[p, h * ranks : h * ranks + ranks] @ table[:, p - j]
                    seen.append(j)
                    scores.append(s)
            weights = np.exp(np.array(scores) - max(scores))
            out[p, h * d : h * d + d] = weights / weights.sum() @ v[seen, g * d : g * d + d]
    return out


@pytest.mark.parametrize(
    "window, sinks, floor, alpha", [(0, 0, 0.0, 0.0), (0, 0, 4.0, 0.1), (3, 0, 0.0, 0.0), (4, 2, 5.0, 0.3)]
)
def test_attention(window, sinks, floor, alpha):
    q, k, v = f32(11, 4 * 6), f32(11, 2 * 6, seed=1), f32(11, 2 * 6, seed=2)
    rel, table = f32(11, 4 * 3, seed=3), f32(3, 5, seed=4)
    args = (4, 2, 0.2, window, sinks, floor, alpha)
    want = attention_numpy(*(wide(t) for t in (q, k, v, rel, table)), *args)
    close(F.attention(q, k, v, rel, table, *args), want)
    none = attention_numpy(wide(q), wide(k), wide(v), wide(rel), np.zeros((3, 1)), *args)
    close(F.attention(q, k, v, None, None, *args), none)


def test_router_weights_are_a_softmax_over_chosen_and_shared():
    logits, bias = f32(6, 10), f32(8, seed=1) * 0.2
    weights, experts = F.sink_router(logits, bias, torch.tensor([0.7]), 3, 2, 8.0)
    x = wide(logits)
    for row in range(6):
        score = sigmoid(x[row, :8]) + wide(bias)
        chosen = [*sorted(range(8), key=lambda e: -score[e])[:3], 8, 9]
        logs = np.log(sigmoid(x[row, chosen]))
        want = np.exp(logs) / np.exp(logs).sum() * 8.0 * 0.7
        assert experts[row].tolist() == chosen
        close(weights[row], want)


def test_router_ties_go_to_the_lowest_expert():
    weights, experts = F.sink_router(torch.zeros(1, 40), torch.zeros(1, 39), torch.ones(1, 1), 4, 1, 1.0)
    assert experts.tolist() == [[0, 1, 2, 3, 39]]
    close(weights, np.full((1, 5), 0.2))


@pytest.mark.parametrize("routes", ["spread", "one expert", "twice the same"])
def test_moe(routes):
    x, weights = f32(5, 6), f32(5, 2, seed=1)
    gate_up, down = f32(4, 10, 6, seed=2), f32(4, 6, 5, seed=3)
    experts = {
        "spread": torch.tensor([[0, 3], [1, 2], [3, 0], [2, 1], [0, 1]]),
        "one expert": torch.full((5, 2), 2) - torch.tensor([0, 1]),
        "twice the same": torch.full((5, 2), 3),
    }[routes]
    want = np.zeros((5, 6))
    for i in range(5):
        for j in range(2):
            e = experts[i, j]
            both = wide(gate_up)[e] @ wide(x)[i]
            want[i] += wide(weights)[i, j] * (wide(down)[e] @ (silu(both[:5]) * both[5:]))
    close(F.moe(x, weights, experts, gate_up, down), want)
    with pytest.raises(IndexError, match="expert 4"):
        F.moe(x, weights, experts * 0 + 4, gate_up, down)


def test_shared_experts():
    x, weights = f32(3, 6), f32(3, 2, seed=1)
    gate, up, down = f32(2, 5, 6, seed=2), f32(2, 5, 6, seed=3), f32(2, 6, 5, seed=4)
    want = sum(
        wide(weights)[:, s : s + 1] * ((silu(wide(x) @ wide(gate)[s].T) * (wide(x) @ wide(up)[s].T)) @ wide(down)[s].T)
        for s in range(2)
    )
    close(F.shared_experts(x, weights, gate, up, down), want)


def test_dmel_levels_are_the_nearest_centres():
    hop, width, levels, lo, hi = 16, 48, 16, -7.0, 2.0
    pcm = f32(7, hop) * 0.3
    window = torch.hann_window(width, periodic=True)
    filters = torch.from_numpy(np.abs(rng(3).standard_normal((5, width // 2 + 1))).astype(np.float32)) * 0.1
    signal = np.concatenate([np.zeros(width - hop), wide(pcm).reshape(-1)])
    centres = np.linspace(lo, hi, levels).astype(np.float32).astype(np.float64)
    got = F.dmel(pcm, window, filters, lo, hi, levels)
    for i in range(7):
        frame = signal[i * hop : i * hop + width] * wide(window)
        turns = np.exp(-2j * np.pi * np.outer(np.arange(width // 2 + 1), np.arange(width)) / width)
        magnitude = np.sqrt(np.maximum(np.abs(turns @ frame) ** 2, 1e-10))
        mel = np.clip(np.log10(np.maximum(wide(filters) @ magnitude, 1e-10)), lo, hi)
        assert got[i].tolist() == np.abs(mel[:, None] - centres).argmin(1).tolist()


def test_dmel_of_silence_and_of_loud_sound_stays_in_range():
    window, filters = torch.ones(8), torch.ones(2, 5)
    assert F.dmel(torch.zeros(1, 4), window, filters * 1e-5, -7.0, 2.0, 16).tolist() == [[0, 0]]
    assert F.dmel(torch.full((1, 4), 1e6), window, filters, -7.0, 2.0, 16).tolist() == [[15, 15]]


def test_patchify_makes_every_fold_a_reshape():
    frames, height, width, patch, folds = 2, 12, 18, 6, [1, 3, 2, 2]
    video = torch.randint(0, 256, (2 * frames * height, width * 3), dtype=torch.uint8)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
    got = F.patchify(video, frames, height, patch, folds, mean, std)
    pixels = (wide(video).reshape(2, frames, height, width, 3) / 255 - mean) / std
    rows = []
    for clip in range(2):
        for py in range(height // patch):
            for px in range(width // patch):
                block = pixels[clip, :, py * patch : (py + 1) * patch, px * patch : (px + 1) * patch]
                for t in range(2):  # the second fold: 2 frames x (2 x 2) blocks of 1 x (3 x 3)
                    for y in range(2):
                        for x in range(2):
                            leaf = block[t : t + 1, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3]
                            rows.append(leaf.reshape(-1))
    close(got, np.array(rows))


@pytest.mark.parametrize("width, hop", [(12, 4), (10, 4), (4, 4)])
def test_overlap_add(width, hop):
    frames, window = f32(6, width), f32(1, width, seed=1)
    line = np.zeros(6 * hop + width)
    for i in range(6):
        line[i * hop : i * hop + width] += wide(frames)[i] * wide(window)[0]
    close(F.overlap_add(frames, window, hop), line[: 6 * hop].reshape(6, hop))

"""State ops, fed any chunking of a sequence, give what the stateless op gives on the whole of it."""

import random

import pytest
import torch

from tmlc.errors import ContextFullError
from tmlc.ir.ops import OPS
from tmlc.ir.ops import functional as F


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chunks(total, largest, seed):
    draw, at = random.Random(seed), 0
    while at < total:
        size = min(draw.randint(1, largest), total - at)
        yield slice(at, at + size)
        at += size


def state_op(name, *args):
    return OPS[name].reference(*args)


H, G, D, R, EXTENT, TOTAL, MOST = 4, 2, 4, 3, 6, 61, 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window, sinks, floor", [(0, 0, 9.0), (5, 0, 0.0), (7, 3, 4.0), (1, 2, 0.0)])
def test_attention_over_linear_and_ring_caches(window, sinks, floor, seed):
    q, k, v = rand(TOTAL, H * D), rand(TOTAL, G * D, seed=1), rand(TOTAL, G * D, seed=2)
    rel, table = rand(TOTAL, H * R, seed=3), rand(R, EXTENT, seed=4)
    rest = (H, G, 1 / D, window, sinks, floor, 0.1)
    whole = F.attention(q, k, v, rel, table, *rest)
    capacity = TOTAL if window == 0 else sinks + window - 1 + MOST  # the ring wraps several times
    k_cache, v_cache = torch.zeros(capacity, G * D), torch.zeros(capacity, G * D)
    position = torch.zeros(1, 1, dtype=torch.long)
    for cut in chunks(TOTAL, MOST, seed):
        got = state_op("attention_state", q[cut], k[cut], v[cut], position, k_cache, v_cache, rel[cut], table, *rest)
        state_op("advance", position, q[cut], 0)
        torch.testing.assert_close(got, whole[cut], rtol=1e-5, atol=1e-5)
    assert int(position) == TOTAL


def test_a_full_cache_and_a_passed_limit_are_errors_that_change_nothing():
    cache = torch.zeros(4, D), torch.zeros(4, D)
    position = torch.tensor([[3]])
    x = torch.ones(2, D)
    with pytest.raises(ContextFullError, match="cache of 4 rows"):
        state_op("attention_state", x, x, x, position, *cache, None, None, 1, 1, 1.0, 0, 0, 0.0, 0.0)
    assert not cache[0].any()
    with pytest.raises(ContextFullError, match="context of 4"):
        state_op("advance", position, x, 4)
    assert int(position) == 3


def test_a_ring_refuses_more_positions_than_it_can_keep_visible():
    cache, x = (torch.zeros(6, D), torch.zeros(6, D)), torch.ones(4, D)
    at = torch.tensor([[9]])
    with pytest.raises(ContextFullError, match="window 4"):
        state_op("attention_state", x, x, x, at, *cache, None, None, 1, 1, 1.0, 4, 0, 0.0, 0.0)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("seed", range(2))
def test_short_conv(taps, seed):
    x, w = rand(30, 6), rand(6, 1, taps, seed=1)
    tail = torch.zeros(taps - 1, 6)
    got = [state_op("short_conv_state", x[cut], w, tail, True) for cut in chunks(30, 5, seed)]
    assert torch.equal(torch.cat(got), F.short_conv(x, w, True))
    assert torch.equal(tail, x[30 - (taps - 1) :])


@pytest.mark.parametrize("hop, width", [(8, 16), (8, 40), (16, 16)])
def test_dmel(hop, width):
    pcm, window, filters = rand(20, hop), torch.hann_window(width), rand(3, width // 2 + 1, seed=1).abs()
    tail = torch.zeros(1, width - hop)
    got = [state_op("dmel_state", pcm[cut], window, filters, tail, -7.0, 2.0, 16) for cut in chunks(20, 4, width)]
    assert torch.equal(torch.cat(got), F.dmel(pcm, window, filters, -7.0, 2.0, 16))


@pytest.mark.parametrize("width, hop", [(12, 4), (10, 4), (5, 4), (4, 4)])
def test_overlap_add(width, hop):
    frames, window = rand(25, width), rand(1, width, seed=1)
    overlap = torch.zeros(1, width - hop)
    got = [state_op("overlap_add_state", frames[c], window, overlap, hop) for c in chunks(25, 4, width)]
    assert torch.equal(torch.cat(got), F.overlap_add(frames, window, hop))


def test_fused_ops_equal_their_parts():
    x, r, w = rand(4, 6), rand(4, 6, seed=1), rand(6, seed=2)
    total, normed = state_op("add_rms_norm", x, r, w, 1e-6)
    assert torch.equal(total, x + r) and torch.equal(normed, F.rms_norm(x + r, w, 1e-6))
    weight, bias = rand(7, 6, seed=3), rand(5, seed=4)
    fused = state_op("router", x, weight, bias, torch.ones(1), 2, 2, 1.5)
    parts = F.sink_router(F.linear(x, weight), bias, torch.ones(1), 2, 2, 1.5)
    assert all(torch.equal(a, b) for a, b in zip(fused, parts, strict=True))

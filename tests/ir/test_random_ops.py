"""Philox against the published vectors, and what is drawn from it against its definition."""

import math

import numpy as np
import pytest
import torch

from tmlc.ir.ops import functional as F
from tmlc.ir.ops.random import philox

# Random123's known answers for philox4x32-10: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_python(counter, key):
    c, (k0, k1), mask = list(counter), key, 2**32 - 1
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & mask, (a >> 32) ^ c[3] ^ k1, a & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c


@pytest.mark.parametrize("counter, key, want", VECTORS)
def test_philox_gives_the_known_answers(counter, key, want):
    words = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == want == tuple(philox_python(counter, key))


SEED, TICK, POSITION = -(2**40) - 5, 2**35 + 3, 2**32 + 9  # every half of the key matters, signs too


def words(count, stream):
    mask = 2**32 - 1
    out = []
    for block in range((count + 3) // 4):
        counter = (block, (POSITION & mask) | stream, TICK & mask, TICK >> 32 & mask)
        out += philox_python(counter, (SEED & mask, SEED >> 32 & mask))
    return (np.array(out, dtype=np.float64) + 0.5) * 2.0**-32


def test_normals_are_box_muller_pairs_in_order():
    u = words(12, 0)
    radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * math.pi * u[1::2]
    want = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:10]
    got = F.philox_normal(torch.tensor([[SEED, TICK, POSITION], [1, 2, 3]]), 10)
    np.testing.assert_allclose(got[0].numpy(), want, rtol=1e-6)
    assert got.dtype == torch.float32 and not torch.equal(got[0], got[1])


def test_normals_have_mean_zero_and_variance_one():
    keys = torch.stack([torch.full((64,), 5), torch.arange(64), torch.zeros(64, dtype=torch.long)], 1)
    drawn = F.philox_normal(keys, 256)
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02


def test_sample_adds_gumbel_noise_of_its_own_stream():
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 23)).astype(np.float32))
    gumbel = -np.log(-np.log(words(23, 0x80000000)[:23]))
    want = int((logits.double().numpy()[0] / float(np.float32(0.7)) + gumbel).argmax())
    got = F.sample(logits, torch.tensor([[SEED, TICK, POSITION]]), torch.tensor([[0.7]]))
    assert got.tolist() == [[want]]


def test_temperature_zero_takes_the_first_maximum():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    got = F.sample(logits, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 1))
    assert got.tolist() == [[1], [0]]


def test_samples_follow_the_softmax():
    keys = torch.stack([torch.full((4000,), 1), torch.arange(4000), torch.zeros(4000, dtype=torch.long)], 1)
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, 3)
    drawn = torch.bincount(F.sample(logits, keys, torch.ones(4000, 1))[:, 0], minlength=3) / 4000
    assert (drawn - torch.softmax(logits[0], 0)).abs().max() < 0.03

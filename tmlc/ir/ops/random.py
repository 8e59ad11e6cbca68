"""Counter-based random numbers (Philox4x32-10) and sampling: the same key always gives the same bits.

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tmlc.ir.ops.registry import matrix, need, op
from tmlc.ir.types import TensorType

MASK = 0xFFFFFFFF
GUMBEL_STREAM = 0x80000000  # keeps the words of `sample` apart from those of `philox_normal`


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words (as int64) for each counter of four words under a key of two; all broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _multiply(c0, 0xD2511F53)
        hi1, lo1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 × 32 bit product, by 16-bit halves so that no int64 overflows."""
    low = (x & 0xFFFF) * constant
    upper = (x >> 16) * constant + (low >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (low & 0xFFFF)


def _words(key: Tensor, count: int, stream: int) -> Tensor:
    """[n, count] words for key rows (seed, tick, position): word v is word v mod 4 of block v div 4."""
    seed, tick, position = (key[:, i : i + 1] for i in range(3))
    block = torch.arange((count + 3) // 4, device=key.device)[None, :]
    counter = (block, (position & MASK) | stream, tick & MASK, (tick >> 32) & MASK)
    words = philox(counter, (seed & MASK, (seed >> 32) & MASK))
    return torch.stack(words, -1).reshape(key.shape[0], -1)[:, :count]


def _uniform(words: Tensor) -> Tensor:
    """Words to float64 in the open interval (0, 1)."""
    return (words.double() + 0.5) * 2.0**-32


def _key(key: TensorType) -> int:
    n, cols = matrix(key, "key", ("i64",))
    need(cols == 3, f"key must be (seed, tick, position) rows, not {key}")
    return n


def _philox_normal(key: TensorType, size: int) -> TensorType:
    need(size > 0, f"size {size} must be positive")
    return TensorType("f32", (_key(key), size))


@op("philox_normal(Tensor key, int size) -> Tensor", _philox_normal)
def philox_normal(key: Tensor, size: int) -> Tensor:
    """Standard normals for key rows (seed, tick, position), by Box-Muller in float64."""
    u = _uniform(_words(key, 4 * ((size + 3) // 4), 0)).reshape(key.shape[0], -1, 2)
    radius, angle = torch.sqrt(-2 * torch.log(u[..., 0])), 2 * math.pi * u[..., 1]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
    return pairs.reshape(key.shape[0], -1)[:, :size].float()


def sample_type(logits: TensorType, key: TensorType, temperature: TensorType) -> TensorType:
    n, _ = matrix(logits, "logits")
    need(_key(key) == n, f"key must have {n} rows, not {key}")
    need(matrix(temperature, "temperature") == (n, 1), f"temperature must be f32[{n}, 1], not {temperature}")
    return TensorType("i64", (n, 1))


@op("sample(Tensor logits, Tensor key, Tensor temperature) -> Tensor", sample_type)
def sample(logits: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
    """Arg-max of logits/T + Gumbel(key) in float64; of the logits where T = 0. Ties: the lowest index."""
    gumbel = -torch.log(-torch.log(_uniform(_words(key, logits.shape[1], GUMBEL_STREAM))))
    t = temperature.double()
    noisy = logits.double() / torch.where(t > 0, t, 1.0) + gumbel
    scores = torch.where(t > 0, noisy, logits.double())
    index = torch.arange(logits.shape[1], device=logits.device).expand_as(scores)
    best = scores == scores.amax(1, keepdim=True)
    return torch.where(best, index, logits.shape[1] - 1).amin(1, keepdim=True)

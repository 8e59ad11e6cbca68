"""The random numbers of docs/plan-format.md ("Philox"), made on the host: engines get them as inputs.

Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
GUMBEL_STREAM = 0x80000000


def _words(key: np.ndarray, count: int, stream: int) -> np.ndarray:
    """uint64 [n, count] of 32-bit words for key rows (seed, tick, position): word v is word v mod 4 of block v//4."""
    rows = key.astype(np.int64).view(np.uint64)
    seed, tick, position = (rows[:, k : k + 1] for k in range(3))
    blocks = np.arange(-(-count // 4), dtype=np.uint64)[None]
    shape = (len(rows), blocks.shape[1])
    c0 = np.broadcast_to(blocks, shape)
    c1 = np.broadcast_to((position & _LOW) | np.uint64(stream), shape)
    c2, c3 = np.broadcast_to(tick & _LOW, shape), np.broadcast_to(tick >> _HALF, shape)
    k0, k1 = seed & _LOW, seed >> _HALF
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (second >> _HALF) ^ c1 ^ k0, second & _LOW, (first >> _HALF) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return np.stack([c0, c1, c2, c3], -1).reshape(len(rows), -1)[:, :count]


def _uniform(words: np.ndarray) -> np.ndarray:
    """float64 in the open interval (0, 1)."""
    return np.asarray((words.astype(np.float64) + 0.5) * 2.0**-32)


def normal(key: np.ndarray, size: int) -> np.ndarray:
    """float32 [n, size] of standard normals for int64 key rows [n, 3], by Box-Muller in float64."""
    u = _uniform(_words(key, -(-size // 4) * 4, 0)).reshape(len(key), -1, 2)
    radius, angle = np.sqrt(-2 * np.log(u[..., 0])), 2 * np.pi * u[..., 1]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return pairs.reshape(len(key), -1)[:, :size].astype(np.float32)


def gumbel(key: np.ndarray, size: int) -> np.ndarray:
    """float32 [n, size] of Gumbel noise, one number for each vocabulary entry."""
    return (-np.log(-np.log(_uniform(_words(key, size, GUMBEL_STREAM))))).astype(np.float32)

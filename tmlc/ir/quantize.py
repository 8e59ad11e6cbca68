"""Group-wise weight-only quantisation: what a quantised weight means, and how its codes are chosen.

A quantised dtype of the IR names a scheme. Each row of a weight is cut along its last axis into groups, which share a
float16 scale s (and a zero point z in sixteenths):

    i8g32        w ≈ s·(code - 128)        codes 1..255, symmetric
    i4g32 i4g64  w ≈ s·(code - z/16)       codes 0..15, z 0..255

The value of such a weight in eager PyTorch is the right-hand side, in float32; engines ask for the codes
(`quantise`). Every group is rounded on its own, so the codes do not depend on how a tensor is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tmlc.errors import CheckpointError

__all__ = ["SCHEMES", "Codes", "Scheme", "dequantised", "quantise", "row_chunks"]

_CHUNK = 1 << 19  # elements rounded at a time: what the search works on stays in the cache
_SHARES = (1.0, 0.92, 0.84, 0.76)  # of a group's range: what the search tries
_REFITS = 4
_LARGEST = 65504.0  # of float16
_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Scheme:
    """One quantised dtype: bits of a code, values that share a scale, bytes beside the codes of a group."""

    dtype: str
    precision: str
    bits: int
    group: int
    side_bytes: int

    def groups(self, k: int) -> int:
        return -(-k // self.group)

    def nbytes(self, rows: int, k: int) -> int:
        """What the bits predict for rows × k values, without any padding."""
        return rows * (-(-k * self.bits // 8) + self.groups(k) * self.side_bytes)


SCHEMES: dict[str, Scheme] = {
    "i8g32": Scheme("i8g32", "int8", 8, 32, 2),
    "i4g32": Scheme("i4g32", "int4", 4, 32, 3),
    "i4g64": Scheme("i4g64", "int4", 4, 64, 3),
}


@dataclass(frozen=True)
class Codes:
    """Quantised rows: codes uint8 [rows, groups, group], scales float16 [rows, groups], zeros uint8 or None.

    Where K ends inside a group the codes behind it stand for about zero; they meet no input.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def values(self, k: int) -> Tensor:
        """float32 [rows, k]: what the codes stand for."""
        below = 128.0 if self.zeros is None else self.zeros.float()[..., None] / 16
        wide = (self.codes.float() - below) * self.scales.float()[..., None]
        return wide.reshape(len(wide), -1)[:, :k]


def quantise(rows: Tensor, scheme: Scheme) -> Codes:
    """The codes of a matrix [rows, k] of any float dtype.

    Raises:
        CheckpointError: values beyond what a float16 scale reaches (about 8 million for int8).
    """
    k = rows.shape[1]
    groups = scheme.groups(k)
    padded = torch.zeros(len(rows), groups * scheme.group)
    padded[:, :k] = rows
    w = padded.reshape(len(rows), groups, scheme.group)
    return _int8(w, scheme) if scheme.bits == 8 else _int4(w, k, scheme)


def row_chunks(rows: int, k: int) -> Iterator[slice]:
    """Pieces of a matrix small enough to quantise one after the other in little memory."""
    step = max(16, _CHUNK // max(k, 1) // 16 * 16)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def dequantised(weight: Tensor, scheme: Scheme, out: Tensor) -> None:
    """Writes what the quantised `weight` [..., k] stands for into `out` (same shape, float)."""
    flat = weight.reshape(-1, weight.shape[-1])
    filled = out if out.dim() == 2 else out.reshape(-1, out.shape[-1])
    for part in row_chunks(*flat.shape):
        filled[part] = quantise(flat[part], scheme).values(flat.shape[1]).to(out.dtype)
    if filled.data_ptr() != out.data_ptr():
        out.copy_(filled.reshape(out.shape))


def _half(scale: Tensor) -> Tensor:
    """The scale as float16, never rounded down to zero where it is not zero."""
    if bool((scale > _LARGEST).any()):
        raise CheckpointError(
            f"a weight of {float(scale.max()):.3g} steps cannot have a float16 scale",
            where="weights",
            fix="Compile with --precision bf16, or exclude the weight in the settings of the quantize pass.",
        )
    return torch.where(scale > 0, scale.clamp_min(_SMALLEST), scale).half()


def _int8(w: Tensor, scheme: Scheme) -> Codes:
    scales = _half(w.abs().amax(-1) / 127)
    wide = scales.float()
    codes = torch.round(w / torch.where(wide > 0, wide, 1.0)[..., None]).clamp_(-127, 127)
    return Codes(scheme, (codes + 128).to(torch.uint8), scales, None)


def _int4(w: Tensor, k: int, scheme: Scheme) -> Codes:
    """Scale and zero point of each group with the least squared error: several shares of its range are tried, then the
    best is fitted to its own codes by least squares as long as that helps."""
    real = torch.ones(w.shape[1] * scheme.group)
    real[k:] = 0
    real = real.reshape(w.shape[1], scheme.group)
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    best = _Fit(w, real, (high - low) / 15, low)
    for share in _SHARES[1:]:
        best.take_better(_Fit(w, real, (high - low) * (share / 15), low * share))
    count = real.sum(-1)
    mean_w = w.sum(-1) / count
    for _ in range(_REFITS):
        mean_q = (best.codes * real).sum(-1) / count
        q = (best.codes - mean_q[..., None]) * real
        spread = (q * q).sum(-1)
        scale = torch.where(spread > 0, (q * w).sum(-1) / spread.clamp_min(1e-20), best.scale)
        scale = torch.where(scale > 0, scale, best.scale)
        best.take_better(_Fit(w, real, scale, mean_w - scale * mean_q))
    return Codes(scheme, best.codes.to(torch.uint8), best.scale.half(), (best.zero * 16).to(torch.uint8))


class _Fit:
    """Codes for a scale and a lowest value (that of code 0), and their squared error in each group."""

    def __init__(self, w: Tensor, real: Tensor, scale: Tensor, lowest: Tensor) -> None:
        self.scale = _half(scale).float()
        safe = torch.where(self.scale > 0, self.scale, 1.0)
        self.zero = torch.round(-16 * lowest / safe).clamp_(0, 255) / 16
        self.codes = torch.round(w / safe[..., None] + self.zero[..., None]).clamp_(0, 15)
        miss = ((self.codes - self.zero[..., None]) * self.scale[..., None] - w) * real
        self.error = miss.square_().sum(-1)

    def take_better(self, other: _Fit) -> None:
        """Keeps the other's numbers in every group where its error is less."""
        better = other.error < self.error
        self.scale = torch.where(better, other.scale, self.scale)
        self.zero = torch.where(better, other.zero, self.zero)
        self.error = torch.where(better, other.error, self.error)
        self.codes = torch.where(better[..., None], other.codes, self.codes)

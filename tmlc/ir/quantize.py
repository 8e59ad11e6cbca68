"""Group-wise weight-only quantisation: what a quantised weight means, and how its codes are chosen.

A quantised dtype of the IR names a scheme. Each row of a weight is cut along its last axis into groups, which share a
scale s (and a zero point z in sixteenths):

    i8g32        w ≈ s·(code - 128)        codes 1..255, symmetric; s float16
    i4g32 i4g64  w ≈ s·(code - z/16)       codes 0..15, z 0..255; s float16
    f8g128       w ≈ s·e4m3(code)          codes of FP8 E4M3 (no infinities, NaN never made); s float32

The value of such a weight in eager PyTorch is the right-hand side, in float32; engines ask for the codes
(`quantise`). Every group is rounded on its own, so the codes do not depend on how a tensor is cut into pieces.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tmlc.errors import CheckpointError

__all__ = ["SCHEMES", "Codes", "Scheme", "dequantised", "quantise", "row_chunks"]

_CHUNK = 1 << 18  # elements rounded at a time: what the search works on stays in the cache
_REFITS = 4
_NONE = torch.empty(0)
_kept = threading.local()
_LARGEST = 65504.0  # of float16
_SMALLEST = 2.0**-24
_LARGEST_FP8 = 448.0  # of e4m3


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
    "f8g128": Scheme("f8g128", "fp8", 8, 128, 4),
}


@dataclass(frozen=True)
class Codes:
    """Quantised rows: codes uint8 [rows, groups, group], scales float16 (fp8: float32) [rows, groups], zeros uint8 or
    None.

    Where K ends inside a group the codes behind it stand for about zero; they meet no input.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def values(self, k: int) -> Tensor:
        """float32 [rows, k]: what the codes stand for."""
        if self.scheme.precision == "fp8":
            plain = self.codes.view(torch.float8_e4m3fn).float()
        else:
            plain = self.codes.float() - (128.0 if self.zeros is None else self.zeros.float()[..., None] / 16)
        wide = plain * self.scales.float()[..., None]
        return wide.reshape(len(wide), -1)[:, :k]


def quantise(rows: Tensor, scheme: Scheme) -> Codes:
    """The codes of a matrix [rows, k] of any float dtype.

    Raises:
        CheckpointError: values beyond what a float16 scale reaches (about 8 million for int8).
    """
    return {"int8": _int8, "int4": _int4, "fp8": _fp8}[scheme.precision](rows, scheme)


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


def _int8(rows: Tensor, scheme: Scheme) -> Codes:
    k, groups = rows.shape[1], scheme.groups(rows.shape[1])
    padded = torch.zeros(len(rows), groups * scheme.group)
    padded[:, :k] = rows
    w = padded.view(len(rows), groups, scheme.group)
    scales = _half(w.abs().amax(-1) / 127)
    wide = scales.float()
    codes = torch.round(w / torch.where(wide > 0, wide, 1.0)[..., None]).clamp_(-127, 127)
    return Codes(scheme, (codes + 128).to(torch.uint8), scales, None)


def _fp8(rows: Tensor, scheme: Scheme) -> Codes:
    """The largest of a group becomes 448; every code is the nearest to w/s, ties to even.

    The quotient is taken in float64: a float32 one that rounds to the middle between two codes may lie beside it, and
    then the wrong one would be taken. (That of two float32 numbers is the middle itself or at least 2^-30 of it away.)
    """
    k, groups = rows.shape[1], scheme.groups(rows.shape[1])
    padded = torch.zeros(len(rows), groups * scheme.group, dtype=torch.float64)
    padded[:, :k] = rows
    w = padded.view(len(rows), groups, scheme.group)
    scales = w.abs().amax(-1).div_(_LARGEST_FP8).float()
    sizes = w.abs().div_(torch.where(scales > 0, scales, 1.0).double()[..., None]).clamp_(max=_LARGEST_FP8)
    # A code without its sign is 8·(e + 6) + m for m·2^(e-3), where 8 ≤ m < 16, or e = -6: m = 16 is the next e's 8.
    exponent = torch.frexp(sizes.clamp(min=2.0**-6)).exponent.sub_(1)
    mantissa = torch.ldexp(sizes, 3 - exponent).round_()
    codes = mantissa.add_(8 * (exponent + 6)).add_(torch.where(w < 0, 128.0, 0.0))
    return Codes(scheme, codes.to(torch.uint8), scales, None)


def _int4(rows: Tensor, scheme: Scheme) -> Codes:
    """Scale and zero point of each group by least squares: first those of its whole range, then again and again those
    that fit the codes just made, as long as the squared error falls."""
    search = _Search(rows, scheme)
    low, high = search.w.amin(0).clamp_max_(0), search.w.amax(0).clamp_min_(0)
    step = _half(high.sub_(low).mul_(1 / 15)).float()
    search.attempt(step, low)
    for _ in range(_REFITS):
        search.refit()
    return Codes(scheme, *search.found())


def _buffers(size: int) -> Tensor:
    """float32 [3, size], kept by the thread for its next search: fresh pages would cost as much as the search."""
    if size > 2 * _CHUNK:
        return torch.empty(3, size)
    if getattr(_kept, "buffers", _NONE).numel() < 3 * size:
        _kept.buffers = torch.empty(3 * size)
    return _kept.buffers[: 3 * size].view(3, size)


class _Search:
    """Tries scales and zero points for all groups at once and keeps the best of each.

    Groups are columns, so that what belongs to a group is added by whole rows. What decides is sums over the group of
    q, q² (whole numbers, exact) and q·w (added in one order); with them the squared error and the best fit to the codes
    are closed forms, and neither dequantised values nor the codes of the best are kept. A trial that comes out as NaN
    is never the best.
    """

    def __init__(self, matrix: Tensor, scheme: Scheme) -> None:
        rows, k = matrix.shape
        groups, group = scheme.groups(k), scheme.group
        self.shape = rows, groups, group
        columns = (rows * groups + 15) // 16 * 16 | 16  # no power of two: its rows would share cache sets
        first, second, third = _buffers(columns * group)
        wide = first.view(columns, group)
        wide[rows * groups :] = 0
        padded = wide[: rows * groups].view(rows, -1)
        padded[:, :k], padded[:, k:] = matrix, 0
        self.w = second.view(group, columns).copy_(wide.t())
        self.codes, self.work = first.view(group, columns), third.view(group, columns)
        behind = groups * group - k
        last = slice(groups - 1, rows * groups, groups)
        self.behind = self.codes[group - behind :, last]  # no input meets these codes
        self.count = torch.full((columns,), float(group))
        self.count[last] -= behind
        self.sum_w = self._sum(self.work.copy_(self.w)).clone()
        self.trial = torch.empty(6, columns)
        self.best = torch.full_like(self.trial, torch.inf)

    def attempt(self, scale: Tensor, lowest: Tensor) -> None:
        """Makes codes for a scale and a value of code 0, and keeps these in every group where the error is less."""
        error, s, z, q, qq, qw = self.trial
        s.copy_(scale).clamp_(_SMALLEST, _LARGEST).copy_(s.half())
        inverse = s.reciprocal()
        torch.mul(lowest, inverse, out=z).mul_(-16).round_().clamp_(0, 255).mul_(1 / 16)
        codes = self._rounded(inverse, z)
        self.behind.zero_()
        torch.sum(codes, 0, out=q)
        qw.copy_(self._sum(torch.mul(codes, self.w, out=self.work)))
        torch.sum(torch.mul(codes, codes, out=self.work), 0, out=qq)
        # Σ(s(q - z) - w)² without Σw²: s²(Σq² - 2zΣq + nz²) - 2s(Σqw - zΣw)
        spread = qq - (2 * q - self.count * z).mul_(z)
        torch.mul(spread.mul_(s).sub_((qw - z * self.sum_w).mul_(2)), s, out=error)
        torch.where(error < self.best[0], self.trial, self.best, out=self.best)

    def refit(self) -> None:
        """Tries the line through the best codes: the scale and lowest value of least squares."""
        q, qq, qw = self.best[3:]
        mean = q / self.count
        scale = (qw - mean * self.sum_w).div_(qq - mean * q)
        self.attempt(scale, self.sum_w.div(self.count).sub_(mean.mul_(scale)))

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [rows, groups, group], scales float16 and zero points uint8 in sixteenths [rows, groups]."""
        rows, groups, _ = self.shape
        _, s, z = self.best[:3]
        plain = self._rounded(s.reciprocal(), z).numpy().astype(np.uint8)  # several times as fast as torch's
        codes = torch.from_numpy(plain[:, : rows * groups].T.copy()).view(self.shape)
        s, z = (part[: rows * groups].view(rows, groups) for part in (s, z * 16))
        return codes, s.half(), z.to(torch.uint8)

    def _rounded(self, inverse: Tensor, z: Tensor) -> Tensor:
        return torch.mul(self.w, inverse, out=self.codes).add_(z).round_().clamp_(0, 15)

    @staticmethod
    def _sum(values: Tensor) -> Tensor:
        """Halves on halves: the same order for every column. `values` is used up, and the result lies in it."""
        while len(values) > 1:
            half = len(values) // 2
            values = values[:half].add_(values[half:])
        return values[0]

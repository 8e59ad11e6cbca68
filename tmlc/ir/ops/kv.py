"""Keys and values in one byte each: how the reference ops round them into a cache, and read them back.

A row of an int8 cache is uint8 [G · (D4 + 4)], D4 = D in whole fours: for each of G heads D codes, padding, and the
four bytes of a float32 scale. x ≈ (code - 128) · scale, code = round(x · 127/peak) + 128, scale = peak / 127, peak =
the head's largest magnitude; a head below 1e-30 is zero (scale 0), one with an infinity or NaN has the scale NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4


def int8_columns(d: int) -> int:
    """Bytes of one head of d columns in a row of an int8 cache."""
    return -(-d // 4) * 4 + SCALE_BYTES


def to_int8_rows(x: Tensor, groups: int) -> Tensor:
    """float32 [n, G·D] → uint8 [n, G·(D4 + 4)]."""
    heads = x.reshape(x.shape[0], groups, -1).float()
    d = heads.shape[2]
    peak = heads.abs().amax(-1, keepdim=True)
    usable = torch.isfinite(peak)
    flat = ~usable | (peak < 1e-30)
    codes = torch.where(flat, 128.0, torch.round(heads * (127.0 / peak)) + 128.0).nan_to_num(128.0).to(torch.uint8)
    scale = torch.where(usable, torch.where(flat, 0.0, peak / 127.0), torch.nan)
    padding = codes.new_zeros(*codes.shape[:2], int8_columns(d) - SCALE_BYTES - d)
    rows = torch.cat([codes, padding, scale.contiguous().view(torch.uint8)], -1)
    return rows.reshape(x.shape[0], -1)


def from_int8_rows(rows: Tensor, groups: int, d: int) -> Tensor:
    """uint8 [n, G·(D4 + 4)] → float32 [n, G·D]."""
    heads = rows.reshape(rows.shape[0], groups, int8_columns(d))
    scale = heads[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return ((heads[..., :d].float() - 128.0) * scale).reshape(rows.shape[0], -1)

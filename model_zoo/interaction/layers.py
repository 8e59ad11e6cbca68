"""The parameter holders that the backbone, the stems and the speech modules are built of.

Parameters have the names and shapes of transformers' Inkling; every computation is one canonical op. Norm weights
start at one and all others at zero: `init.py` gives a model its random weights, a checkpoint its trained ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tmlc.ir.ops import functional as F


class Linear(nn.Module):
    """x[n, k] → x · weightᵀ (+ bias) [n, m]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x[n, g·size] → each group of `size` columns divided by its root mean square, times weight[size]."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight, self.eps)


class Weight(nn.Module):
    """One parameter called `weight`, for names with a level that computes nothing (`conv1d.weight`)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape))


class ShortConv(nn.Module):
    """x[n, c] → causal depthwise convolution over rows, plus x when `residual`. The weight is [c, 1, kernel]."""

    def __init__(self, channels: int, kernel: int, residual: bool = True) -> None:
        super().__init__()
        self.conv1d = Weight(channels, 1, kernel)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return F.short_conv(x, self.conv1d.weight, self.residual)

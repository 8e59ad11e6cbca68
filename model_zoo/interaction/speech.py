"""Speech out: a flow-matching head (hidden state → mel frames) and a causal vocoder (mel frames → samples).

The head follows straight paths from noise to mel (Lipman et al., "Flow Matching for Generative Modeling", 2022; Liu
et al., "Flow Straight and Fast", 2022). Its network is a residual MLP whose layers are modulated by the hidden state
and the flow time (adaptive layer norm as in DiT, Peebles and Xie, 2022), and it predicts the path's end, from which
the velocity follows: (end - x) / (1 - t). So a width below that of the frames need not carry the noise through, and
none is left in the result. The vocoder is a stack of causal ConvNeXt-like blocks that predicts windowed frames,
which overlap-add joins without a seam.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tmlc.ir.ops import functional as F

from .config import SpeechConfig
from .features import synthesis_window
from .layers import Linear, RMSNorm, ShortConv


class FlowBlock(nn.Module):
    """h + gate · MLP(norm(h)·(1 + scale) + shift), with shift, scale and gate taken from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.norm = RMSNorm(width)
        self.modulation = Linear(width, 3 * width, bias=True)
        self.up_proj = Linear(width, 2 * width, bias=True)
        self.down_proj = Linear(2 * width, width, bias=True)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        width, mod = self.width, self.modulation(condition)
        shift, scale = F.columns(mod, 0, width), F.columns(mod, width, 2 * width)
        inner = self.down_proj(F.silu(self.up_proj(F.modulate(self.norm(h), scale, shift))))
        return F.add(h, F.mul(F.columns(mod, 2 * width, 3 * width), inner))


class FlowHead(nn.Module):
    """hidden[n, d], key[n, 3] → mel [n·frames_per_position, n_mel_bins], by `flow_steps` Euler steps from noise.

    `times` holds one row for each of the `flow_times` grid points t = 0, 1/T, … (T-1)/T of the flow.
    """

    def __init__(self, config: SpeechConfig, size: int) -> None:
        super().__init__()
        self.config = config
        width, outputs = config.flow_width, config.frames_per_position * config.n_mel_bins
        self.outputs = outputs
        self.condition = Linear(size, width, bias=True)
        self.times = nn.Parameter(torch.zeros(config.flow_times, width))
        self.input = Linear(outputs, width, bias=True)
        self.blocks = nn.ModuleList([FlowBlock(width) for _ in range(config.flow_layers)])
        self.norm = RMSNorm(width)
        self.modulation = Linear(width, 2 * width, bias=True)
        self.output = Linear(width, outputs, bias=True)

    def path_end(self, x: Tensor, condition: Tensor) -> Tensor:
        """x[n, outputs] on the path and condition[n, width] (hidden and time, after SiLU) → its end [n, outputs]."""
        h = self.input(x)
        for block in self.blocks:
            h = block(h, condition)
        width, mod = self.config.flow_width, self.modulation(condition)
        shift, scale = F.columns(mod, 0, width), F.columns(mod, width, 2 * width)
        return self.output(F.modulate(self.norm(h), scale, shift))

    def forward(self, hidden: Tensor, key: Tensor) -> Tensor:
        steps, times = self.config.flow_steps, self.config.flow_times
        x = F.philox_normal(key, self.outputs)
        base = self.condition(hidden)
        for step in range(steps):
            end = self.path_end(x, F.silu(F.add_row(base, self.times, step * times // steps)))
            # An Euler step of 1/steps along (end - x) / (1 - step/steps); the last one arrives.
            left = steps - step
            x = end if left == 1 else F.add_scaled(x, F.add_scaled(end, x, -1.0), 1.0 / left)
        return F.reshape(x, self.config.n_mel_bins)

    def loss(self, hidden: Tensor, mel: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Flow-matching loss, for training: hidden[n, d], mel[n·frames_per_position, n_mel_bins] → scalar.

        One noise and one grid time is drawn for each position. The loss is the mean squared error of the velocity,
        with the time that is left bounded below by one Euler step, the least that `forward` divides by.
        """
        target = mel.reshape(-1, self.outputs)
        index = torch.randint(self.config.flow_times, (len(target), 1), generator=generator, device=mel.device)
        noise = torch.randn(target.shape, generator=generator, device=mel.device)
        t = index / self.config.flow_times
        condition = F.silu(F.add(self.condition(hidden), F.embedding(self.times, index)))
        end = self.path_end((1 - t) * noise + t * target, condition)
        return ((end - target) / (1 - t).clamp(min=1.0 / self.config.flow_steps)).square().mean()


class VocoderBlock(nn.Module):
    """x + MLP(norm(conv(x))), the convolution causal and a channel alone."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = ShortConv(width, kernel, residual=False)
        self.norm = RMSNorm(width)
        self.up_proj = Linear(width, 2 * width, bias=True)
        self.down_proj = Linear(2 * width, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.add(x, self.down_proj(F.gelu(self.up_proj(self.norm(self.conv(x))))))


class Vocoder(nn.Module):
    """mel[n·frames_per_position, n_mel_bins] → pcm [n, samples_per_position], one row for each position.

    Frame r writes to samples r·hop … r·hop + vocoder_window - 1 (`features.speech_mel` analyses the same span). A
    gated layer before the frames lets silence be exactly quiet whatever the norms before it do.
    """

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.config = config
        width = config.vocoder_width
        self.input = Linear(config.n_mel_bins, width, bias=True)
        self.blocks = nn.ModuleList([VocoderBlock(width, config.vocoder_kernel) for _ in range(config.vocoder_layers)])
        self.norm = RMSNorm(width)
        self.gate_proj = Linear(width, width, bias=True)
        self.up_proj = Linear(width, width, bias=True)
        self.frames = Linear(width, config.vocoder_window)
        self.register_buffer("window", torch.from_numpy(synthesis_window(config)))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.input(mel)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        frames = self.frames(F.swiglu(self.gate_proj(x), self.up_proj(x)))
        pcm = F.overlap_add(frames, self.get_buffer("window"), self.config.hop_length)
        return F.reshape(pcm, self.config.samples_per_position)

"""Training of the vocoder: log-mel of the model's voice → the samples it was taken from.

A waveform and a spectral loss together: the words of the model are few and begin on the grid of ticks, so their very
samples can be learned (a spectral loss alone leaves phases to chance, which is heard as a buzz), and the spectral loss
at three resolutions keeps what is not met in training (other offsets, mel frames that the flow head gets slightly
wrong) close in sound. Multi-resolution spectral losses are those of Yamamoto et al., "Parallel WaveGAN", 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..config import InteractionConfig
from ..features import speech_mel
from ..speech import Vocoder, VocoderBlock
from ..tasks import SpeechBank
from .parallel import rms_norm, short_conv

RESOLUTIONS = (256, 512, 1024)
"""Lengths of the transforms of the spectral loss; each hops a quarter of its length."""
FLOOR = 1e-3
"""Magnitude below which the spectral loss does not look: about that of -80 dB noise in the shortest transform."""


def synthesise(vocoder: Vocoder, mel: Tensor) -> Tensor:
    """mel[batch, frames, bins] → samples [batch, frames · hop]: `Vocoder.forward` for a batch, from rest."""
    config = vocoder.config
    x = vocoder.input(mel)
    for block in (cast(VocoderBlock, block) for block in vocoder.blocks):
        inner = rms_norm(block.norm, short_conv(block.conv, x))
        x = x + block.down_proj(nnf.gelu(block.up_proj(inner)))
    x = rms_norm(vocoder.norm, x)
    frames = vocoder.frames(nnf.silu(vocoder.gate_proj(x)) * vocoder.up_proj(x)) * vocoder.get_buffer("window")
    pieces, hop = config.vocoder_window // config.hop_length, config.hop_length
    parts = frames.unflatten(-1, (pieces, hop))
    length = mel.shape[1]
    # Piece j of frame r lies on hop r + j; what reaches past the last frame is cut off.
    laid = [nnf.pad(parts[:, : length - j, j], (0, 0, j, 0)) for j in range(pieces)]
    return torch.stack(laid).sum(0).flatten(1)


def spectral_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean distance of log magnitudes plus relative distance of magnitudes, over `RESOLUTIONS`; [batch, samples]."""
    total = made.new_zeros(())
    for size in RESOLUTIONS:
        window = torch.hann_window(size, device=made.device)
        a, b = (_magnitudes(pcm, size, window) for pcm in (made, wanted))
        total = total + (a.log() - b.log()).abs().mean() + (a - b).norm() / b.norm()
    return total / len(RESOLUTIONS)


def _magnitudes(pcm: Tensor, size: int, window: Tensor) -> Tensor:
    spectrum = torch.stft(pcm, size, size // 4, window=window, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square() + FLOOR**2).sqrt()


def vocoder_loss(vocoder: Vocoder, mel: Tensor, pcm: Tensor, on_grid: Tensor) -> tuple[Tensor, dict[str, float]]:
    """mel[batch, frames, bins], the samples [batch, frames · hop] that it stands for, and which pieces have samples
    that can be known (bool[batch]) → the loss, and its parts: relative error of samples, spectral distance."""
    made = synthesise(vocoder, mel)
    spectral = spectral_loss(made, pcm)
    parts = {"spectral": float(spectral.detach())}
    if not bool(on_grid.any()):
        return spectral, parts
    made, pcm = made[on_grid], pcm[on_grid]
    wave = ((made - pcm).square().mean(1) / pcm.square().mean(1)).sqrt().mean()
    return 2.0 * wave + spectral, {**parts, "wave": float(wave.detach())}


@dataclass(frozen=True)
class VoiceClips:
    """Draws pieces of the model's speech for the vocoder: words on the grid of ticks, cut words, words off the grid.

    Attributes:
        seconds: of every piece.
        off_grid: part of the pieces whose words begin anywhere, in any of the bank's speeds.
        noise: greatest standard deviation of what is added to the mel frames (in their normalised units).
    """

    config: InteractionConfig
    bank: SpeechBank
    seconds: float = 1.6
    off_grid: float = 0.1
    noise: float = 0.15

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(mel[size, frames, bins], samples[size, frames · hop], whether the words are on the grid bool[size])."""
        free = rng.random(size) < self.off_grid
        pieces = [self._piece(rng, bool(off)) for off in free]
        speech, rate = self.config.speech_config, self.config.audio_config.sample_rate
        mel = np.stack([speech_mel(pcm, speech, rate) for pcm in pieces])
        spread = rng.uniform(0.0, self.noise, (size, 1, 1))
        mel += (spread * rng.standard_normal(mel.shape)).astype(np.float32)
        return torch.from_numpy(mel), torch.from_numpy(np.stack(pieces)), torch.from_numpy(~free)

    def _piece(self, rng: np.random.Generator, free: bool) -> np.ndarray:
        tick = self.config.tick_samples
        length = round(self.seconds * self.config.audio_config.sample_rate) // tick * tick
        pcm = np.zeros(length, np.float32)
        at = int(rng.integers(2 * tick)) if free else tick * int(rng.integers(2))
        words: Sequence[str] = sorted(self.bank.model)
        while at < length - tick:
            clips = self.bank.model[words[int(rng.integers(len(words)))]]
            clip = clips[int(rng.integers(len(clips)))] if free else clips[0]
            if rng.random() < 0.15:  # the model is cut short at the end of a tick
                clip = _cut(clip, tick * int(rng.integers(1, 1 + max(1, len(clip) // tick))))
            pcm[at : at + len(clip)] += clip[: length - at]
            at += -(-len(clip) // tick) * tick if not free else len(clip) + int(rng.integers(tick))
            at += tick * int(rng.integers(3)) * (rng.random() < 0.3)
        return pcm


def _cut(clip: np.ndarray, at: int, tail: int = 600) -> np.ndarray:
    """The clip until sample `at`, fading over `tail` samples, as episodes cut it."""
    short = clip[: at + tail].copy()
    if len(short) > at:
        short[at:] *= np.linspace(1.0, 0.0, len(short) - at, dtype=np.float32)
    return short

"""Inkling in canonical ops: text, audio and images in, text out.

The backbone and the stems are those of the interaction model, which has them from Inkling; the parameter names are the
interaction model's (`model.`, `audio_tower.`, `vision_tower.`, `lm_head.`), and the frontend knows where a checkpoint
keeps each.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tmlc.ir.ops import functional as F
from tmlc.model_zoo.interaction.config import AudioConfig
from tmlc.model_zoo.interaction.features import Floats, hann_window, mel_filters
from tmlc.model_zoo.interaction.modeling import MethodDef, TokenModel, embed_audio, embed_video
from tmlc.model_zoo.interaction.stems import AudioTower, VisionTower

from .config import InklingConfig


class InklingAudioTower(AudioTower):
    """pcm[n, hop] → positions [n, d]: the processor may make fewer levels than the table has rows for a mel bin."""

    def __init__(self, config: AudioConfig, levels: int, size: int) -> None:
        super().__init__(config, size)
        self.level_count = levels

    def levels(self, pcm: Tensor) -> Tensor:
        config = self.config
        return F.dmel(pcm, self.get_buffer("window"), self.get_buffer("mel_filters"),
                      config.dmel_min, config.dmel_max, self.level_count)  # fmt: skip


class InklingModel(TokenModel):
    """A token model with stems for audio and video frames."""

    def __init__(self, config: InklingConfig) -> None:
        super().__init__(config.text)
        self.config = config
        size = config.text.hidden_size
        self.audio_tower = InklingAudioTower(config.audio, config.levels, size)
        self.vision_tower = VisionTower(config.vision, size)

    def methods(self) -> dict[str, MethodDef]:
        text = super().methods()
        heard, seen = embed_audio(self.audio_tower), embed_video(self.vision_tower)
        return {"embed_text": text.pop("embed_text"), "embed_audio": heard, "embed_video": seen, **text}


def audio_constants(config: InklingConfig) -> dict[str, Tensor]:
    """What the audio stem holds and no checkpoint does: the window, padded to the transform, and the mel filters."""
    window: Floats = np.zeros((1, config.audio.window_length), np.float32)
    left = (config.audio.window_length - config.analysis) // 2
    window[0, left : left + config.analysis] = hann_window(config.analysis)
    filters = mel_filters(config.audio.n_mel_bins, config.audio.window_length, config.audio.sample_rate)
    return {"audio_tower.window": torch.from_numpy(window), "audio_tower.mel_filters": torch.from_numpy(filters)}

"""The frontend of our own interaction model (`model_type: tmlc_interaction`)."""

from __future__ import annotations

from typing import Any

import torch

from tmlc.frontend.checkpoint import Checkpoint
from tmlc.frontend.model import Frontend, Traceable
from tmlc.model_zoo.interaction.config import InteractionConfig
from tmlc.model_zoo.interaction.modeling import InteractionModel


def interaction(checkpoint: Checkpoint) -> Frontend:
    """The model on the meta device and what the runtime must know of it.

    Raises:
        CheckpointError: config.json is not an interaction model's, or contradicts itself.
    """
    config = InteractionConfig.from_dict(checkpoint.config, str(checkpoint.folder / "config.json"))
    with torch.device("meta"):
        model = InteractionModel(config)
    runtime = config.runtime_config
    return Frontend(
        kind="interaction",
        name=config.name,
        model=model,
        methods={name: Traceable.of(method) for name, method in model.methods().items()},
        context={
            "limit": runtime.context,
            "policy": runtime.context_policy,
            "sinks": runtime.sinks,
            "max_append": runtime.max_append,
        },
        tick=_tick(config),
        ignore=lambda name: False,
    )


def _tick(config: InteractionConfig) -> dict[str, Any]:
    """The layout of a tick, and the sizes of audio, video and speech that a driver needs."""
    audio, vision, speech = config.audio_config, config.vision_config, config.speech_config
    return {
        **config.tick_config.model_dump(),
        "sample_rate": audio.sample_rate,
        "hop": audio.hop_length,
        "frame_height": vision.height,
        "frame_width": vision.width,
        "video_frames": vision.temporal_patch_size,
        "video_positions": vision.positions,
        "out_sample_rate": audio.sample_rate,
        "samples_per_position": speech.samples_per_position,
        "frames_per_position": speech.frames_per_position,
        "n_mel": speech.n_mel_bins,
        "silence_level": speech.silence_level,
        "eos": [],
    }

"""Random weights of a fresh model, one tensor at a time: the same bits for the same (seed, name) on any machine.

Scales are chosen so that a random model behaves like one worth measuring. Branches add little to the residual
stream, so that positions stay different from each other and the router spreads them over the experts (a plain
initialisation lets all positions drift together and a third of the experts do all the work); norms and gates differ
from one, so that a compiler that mixes them up is seen; and speech comes out at a modest level.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .config import InteractionConfig

# Of the last layer of the vocoder: samples of a random model have a root mean square of about 0.05.
_SPEECH_GAIN = 0.15
_RESIDUAL_BRANCHES = ("o_proj.weight", "down_proj.weight", "down_proj")


def initial_tensor(name: str, shape: tuple[int, ...], config: InteractionConfig, seed: int) -> npt.NDArray[np.float32]:
    """float32 values of a parameter or of the router's correction buffer, by its state_dict name."""
    mean, std = _distribution(name, shape, config)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    stream = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    values = stream.standard_normal(shape, dtype=np.float32)
    values *= np.float32(std)
    values += np.float32(mean)
    return values


def _distribution(name: str, shape: tuple[int, ...], config: InteractionConfig) -> tuple[float, float]:
    """(mean, standard deviation) of a tensor's values."""
    text, leaf = config.text_config, name.rpartition(".")[2]
    if leaf == "e_score_correction_bias":
        return 0.0, 0.01
    if leaf == "global_scale":
        return 1.0, 0.05
    if leaf == "bias":
        return 0.0, 0.02
    if "q_norm" in name or "k_norm" in name:
        # Scores are q·k / head_dim with unit entries: this makes their spread about one, so attention chooses.
        return shape[0] ** 0.25, 0.05 * shape[0] ** 0.25
    if "embed_norm" in name or name == "audio_tower.norm.weight" or "final_norm" in name:
        return 2.0, 0.1
    if "norm" in name:
        return 1.0, 0.1
    if leaf == "proj":
        return 0.0, 0.5 / math.sqrt(shape[0])
    if "conv" in name:
        return 0.0, (1.0 if name.startswith("vocoder.") else 0.3) / math.sqrt(shape[-1])
    if "embed" in name or leaf in ("self_voice", "times"):
        return 0.0, 1.0
    if name == "lm_head.weight":
        return 0.0, 2.0 * text.logits_mup_width_multiplier / math.sqrt(shape[-1])
    return 0.0, _linear_gain(name, config) / math.sqrt(shape[-1])


def _linear_gain(name: str, config: InteractionConfig) -> float:
    """Gain of a linear layer over the variance-preserving scale."""
    text = config.text_config
    if name == "vocoder.frames.weight":
        return _SPEECH_GAIN
    if name.startswith(("speech.", "vocoder.")):
        return 0.5 if "modulation" in name or "down_proj" in name else 1.0
    if name.startswith("model.") and name.endswith(_RESIDUAL_BRANCHES):
        branch = 1.0 / math.sqrt(2.0 * text.num_hidden_layers)
        return branch / text.route_scale if "experts" in name else branch
    return 1.0


@torch.no_grad()
def initialise(model: nn.Module, config: InteractionConfig, seed: int) -> None:
    """Fills a model's parameters (not its constant windows and filters) with `initial_tensor`."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_random(name, tensor):
            tensor.copy_(torch.from_numpy(initial_tensor(name, tuple(tensor.shape), config, seed)))


def is_random(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor of the state_dict is drawn, not computed (windows and mel filters are computed)."""
    return isinstance(tensor, nn.Parameter) or name.endswith("e_score_correction_bias")

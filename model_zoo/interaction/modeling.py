"""The reference interaction model: stateless, over whole sequences, in canonical ops.

A method is one entry point of the model (`embed_audio`, `decode`, `speak`, …): a small module over [rows, cols]
tensors that shares the model's parameters under their checkpoint names, so that a traced method's weights name the
tensors of the checkpoint. The compiler turns the methods stateful; no cached twin is written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tmlc.ir.ops import functional as F

from .backbone import Backbone, unembed
from .config import InteractionConfig, TextConfig
from .init import initialise
from .layers import Linear
from .speech import FlowHead, Vocoder
from .stems import AudioTower, VisionTower


@dataclass(frozen=True)
class MethodInput:
    """One argument of a method: [a·n + b, cols] for n new positions, and how to draw an example of it."""

    name: str
    dtype: torch.dtype
    rows: tuple[int, int]
    cols: int
    draw: Callable[[tuple[int, int], torch.Generator], Tensor]

    def example(self, n: int, generator: torch.Generator) -> Tensor:
        return self.draw((self.rows[0] * n + self.rows[1], self.cols), generator)


@dataclass(frozen=True)
class MethodDef:
    """A method, its arguments in the order of `module.forward`, and the names of its results."""

    module: nn.Module
    inputs: tuple[MethodInput, ...]
    outputs: tuple[str, ...]

    @property
    def n_rule(self) -> tuple[tuple[int, int], ...]:
        """(a, b) of each argument: it has a·n + b rows."""
        return tuple(item.rows for item in self.inputs)

    def example_inputs(self, n: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Arguments for n new positions, deterministic in the seed."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(item.example(n, generator) for item in self.inputs)


def _normal(shape: tuple[int, int], generator: torch.Generator, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator) * std


def _pcm(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Noise whose level changes from row to row, so that mel levels vary."""
    return _normal(shape, generator, 0.1) * torch.rand(shape[0], 1, generator=generator)


def _whole(limit: int, dtype: torch.dtype = torch.int64) -> Callable[[tuple[int, int], torch.Generator], Tensor]:
    return lambda shape, generator: torch.randint(limit, shape, generator=generator).to(dtype)


def _greedy(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


class _EmbedText(nn.Module):
    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed_tokens": model.embed_tokens})

    def forward(self, ids: Tensor) -> Tensor:
        return self.model["embed_tokens"](ids)


class _EmbedAudio(nn.Module):
    def __init__(self, audio_tower: AudioTower) -> None:
        super().__init__()
        self.audio_tower = audio_tower

    def forward(self, pcm: Tensor) -> Tensor:
        return self.audio_tower(pcm)


class _EmbedSpeech(nn.Module):
    """The model's own voice: the audio stem, and a row that says who spoke."""

    def __init__(self, audio_tower: AudioTower, self_voice: nn.Parameter) -> None:
        super().__init__()
        self.audio_tower = audio_tower
        self.self_voice = self_voice

    def forward(self, pcm: Tensor) -> Tensor:
        return F.add_row(self.audio_tower(pcm), self.self_voice, 0)


class _EmbedVideo(nn.Module):
    def __init__(self, vision_tower: VisionTower) -> None:
        super().__init__()
        self.vision_tower = vision_tower

    def forward(self, video: Tensor) -> Tensor:
        return self.vision_tower(video)


class _Decode(nn.Module):
    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": model.layers, "norm": model.norm})

    def forward(self, x: Tensor) -> Tensor:
        for layer in cast(nn.ModuleList, self.model["layers"]):
            x = layer(x)
        return self.model["norm"](x)


class _Unembed(nn.Module):
    def __init__(self, lm_head: Linear, config: TextConfig) -> None:
        super().__init__()
        self.lm_head, self.config = lm_head, config

    def forward(self, hidden: Tensor) -> Tensor:
        return unembed(hidden, self.lm_head.weight, self.config)


class _NextToken(_Unembed):
    def forward(self, hidden: Tensor, key: Tensor, temperature: Tensor) -> Tensor:  # type: ignore[override]
        return F.sample(unembed(hidden, self.lm_head.weight, self.config), key, temperature)


class _Speak(nn.Module):
    def __init__(self, speech: FlowHead) -> None:
        super().__init__()
        self.speech = speech

    def forward(self, hidden: Tensor, key: Tensor) -> Tensor:
        return self.speech(hidden, key)


class _Vocode(nn.Module):
    def __init__(self, vocoder: Vocoder) -> None:
        super().__init__()
        self.vocoder = vocoder

    def forward(self, mel: Tensor) -> Tensor:
        return self.vocoder(mel)


def embed_audio(tower: AudioTower) -> MethodDef:
    """The method that turns samples [n, hop] into positions."""
    pcm = MethodInput("pcm", torch.float32, (1, 0), tower.config.hop_length, _pcm)
    return MethodDef(_EmbedAudio(tower), (pcm,), ("x",))


def embed_video(tower: VisionTower) -> MethodDef:
    """The method that turns clips of whole frames into positions, one for each patch."""
    vision = tower.config
    rows = (vision.temporal_patch_size * vision.height, 0)
    video = MethodInput("video", torch.uint8, rows, vision.width * 3, _whole(256, torch.uint8))
    return MethodDef(_EmbedVideo(tower), (video,), ("x",))


class TokenModel(nn.Module):
    """Text in, text out: an Inkling backbone with its head, under the names of `InklingForCausalLM`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.text_config = config
        # Other backbones are called, and embed text, like this one.
        self.model = cast(Backbone, self._backbone(config))
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def _backbone(self, config: TextConfig) -> nn.Module:
        return Backbone(config)

    def _decode(self) -> nn.Module:
        return _Decode(self.model)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64[n, 1] → logits [n, logits_size] of the whole sequence."""
        hidden = self.model(self.model.embed_tokens(ids))
        return unembed(hidden, self.lm_head.weight, self.text_config)

    def methods(self) -> dict[str, MethodDef]:
        """The entry points; their modules share this model's parameters."""
        text = self.text_config
        ids = MethodInput("ids", torch.int64, (1, 0), 1, _whole(text.logits_size))
        x = MethodInput("x", torch.float32, (1, 0), text.hidden_size, _normal)
        hidden = MethodInput("hidden", torch.float32, (1, 0), text.hidden_size, _normal)
        key = MethodInput("key", torch.int64, (1, 0), 3, _whole(1 << 30))
        temperature = MethodInput("temperature", torch.float32, (1, 0), 1, _greedy)
        return {
            "embed_text": MethodDef(_EmbedText(self.model), (ids,), ("x",)),
            "decode": MethodDef(self._decode(), (x,), ("hidden",)),
            "unembed": MethodDef(_Unembed(self.lm_head, text), (hidden,), ("logits",)),
            "next_token": MethodDef(_NextToken(self.lm_head, text), (hidden, key, temperature), ("ids",)),
        }


class InteractionModel(TokenModel):
    """Hears, sees, reads, speaks and writes: the token model with stems for audio and video, and a voice.

    Parameters are zero (norms one) until `initialise` or a checkpoint fills them; `load_model` does the latter.
    """

    def __init__(self, config: InteractionConfig) -> None:
        super().__init__(config.text_config)
        self.config = config
        size = config.text_config.hidden_size
        self.audio_tower = AudioTower(config.audio_config, size)
        self.vision_tower = VisionTower(config.vision_config, size)
        self.self_voice = nn.Parameter(torch.zeros(1, size))
        self.speech = FlowHead(config.speech_config, size)
        self.vocoder = Vocoder(config.speech_config)

    @classmethod
    def random(cls, config: InteractionConfig, seed: int = 0) -> InteractionModel:
        """A model with the weights that `create_checkpoint(config, seed)` writes."""
        model = cls(config)
        initialise(model, config, seed)
        return model

    def methods(self) -> dict[str, MethodDef]:
        text, speech = super().methods(), self.config.speech_config
        heard = embed_audio(self.audio_tower)
        (pcm,) = heard.inputs
        hidden, key, _ = text["next_token"].inputs
        mel = MethodInput("mel", torch.float32, (speech.frames_per_position, 0), speech.n_mel_bins, _normal)
        return {
            "embed_text": text["embed_text"],
            "embed_audio": heard,
            "embed_speech": MethodDef(_EmbedSpeech(self.audio_tower, self.self_voice), (pcm,), ("x",)),
            "embed_video": embed_video(self.vision_tower),
            "decode": text["decode"],
            "unembed": text["unembed"],
            "next_token": text["next_token"],
            "speak": MethodDef(_Speak(self.speech), (hidden, key), ("mel",)),
            "vocode": MethodDef(_Vocode(self.vocoder), (mel,), ("pcm",)),
        }


def token_model(config: TextConfig) -> TokenModel:
    """The model of an Inkling text checkpoint (`TextConfig.from_inkling` reads its config)."""
    return TokenModel(config)


def count_parameters(config: InteractionConfig) -> tuple[int, int]:
    """(all parameters, those that one position of `decode` and `unembed` uses), from shapes alone.

    Of the embedding table one row is used, of the routed experts `num_experts_per_tok`; the stems and the speech
    modules run for some positions only and are not counted as active.
    """
    text = config.text_config
    with torch.device("meta"):
        model = InteractionModel(config)
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if name == "model.embed_tokens.weight":
            active += text.hidden_size
        elif ".mlp.experts." in name:
            active += parameter.numel() // text.n_routed_experts * text.num_experts_per_tok
        elif name.startswith(("model.", "lm_head.")):
            active += parameter.numel()
    return total, active

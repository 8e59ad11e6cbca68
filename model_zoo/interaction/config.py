"""The configuration of an interaction model: the `config.json` of a checkpoint, checked field by field.

`text_config` uses the field names of transformers' `InklingTextConfig`, so that the backbone of an Inkling checkpoint
and ours are described in the same words. Everything that TML has not published (speech head, vocoder, tick layout,
context policy) is a parameter of ours.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tmlc.errors import CheckpointError, UsageError

PRESETS = ("nano", "small", "tml-small-276b")

MOST_LAYERS = 4096
"""Of one kind, and steps of a flow head: modules are made for each before a checkpoint's tensors are looked at."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are never coerced."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _has_an_end(cls, value: Any) -> Any:
        if type(value) is int and abs(value) >= 2**31:
            raise ValueError("no number of a config is as large as 2^31")
        return value


S = TypeVar("S", bound=Section)


class TextConfig(Section):
    """The Mixture-of-Experts backbone, in `InklingTextConfig`'s field names."""

    vocab_size: int = Field(gt=0)
    unpadded_vocab_size: int | None = Field(default=None, gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0, le=MOST_LAYERS)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    swa_num_attention_heads: int = Field(gt=0)
    swa_num_key_value_heads: int = Field(gt=0)
    swa_head_dim: int = Field(gt=0)
    sliding_window_size: int = Field(default=512, gt=0)
    d_rel: int = Field(default=16, gt=0)
    rel_extent: int = Field(default=1024, gt=0)
    log_scaling_n_floor: int | None = Field(default=None, gt=0)
    log_scaling_alpha: float = 0.1
    layer_types: list[Literal["hybrid", "hybrid_sliding"]]
    max_position_embeddings: int = Field(default=131072, gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    conv_kernel_size: int = Field(default=4, gt=1)
    mlp_layer_types: list[Literal["dense", "sparse"]]
    intermediate_size: int = Field(gt=0)
    hidden_act: Literal["silu"] = "silu"
    moe_intermediate_size: int = Field(gt=0)
    n_routed_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    n_shared_experts: int = Field(gt=0)
    shared_expert_sink: Literal[True] = True
    route_scale: float = 8.0
    logits_mup_width_multiplier: float = Field(default=24.0, gt=0)
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @model_validator(mode="after")
    def _shapes_fit(self) -> TextConfig:
        for name in ("layer_types", "mlp_layer_types"):
            if len(getattr(self, name)) != self.num_hidden_layers:
                raise ValueError(f"{name} must name {self.num_hidden_layers} layers, not {len(getattr(self, name))}")
        for heads, kv in (("num_attention_heads", "num_key_value_heads"),
                          ("swa_num_attention_heads", "swa_num_key_value_heads")):
            if getattr(self, heads) % getattr(self, kv):
                raise ValueError(f"{heads} must be a multiple of {kv}")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError("num_experts_per_tok is larger than n_routed_experts")
        if self.unpadded_vocab_size is not None and self.unpadded_vocab_size > self.vocab_size:
            raise ValueError("unpadded_vocab_size is larger than vocab_size")
        return self

    @property
    def logits_size(self) -> int:
        """Columns of the logits: the vocabulary without its padding."""
        return self.unpadded_vocab_size or self.vocab_size

    @property
    def logit_cap(self) -> float:
        """Soft cap of the logits; 0 for none."""
        return 0.0

    def is_sliding(self, layer: int) -> bool:
        return self.layer_types[layer] == "hybrid_sliding"

    def heads(self, layer: int) -> tuple[int, int, int]:
        """(query heads, key/value heads, head dimension) of a layer."""
        if self.is_sliding(layer):
            return self.swa_num_attention_heads, self.swa_num_key_value_heads, self.swa_head_dim
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    def extent(self, layer: int) -> int:
        """How far back the relative bias of a layer reaches; it is zero beyond."""
        return self.sliding_window_size if self.is_sliding(layer) else self.rel_extent

    @classmethod
    def from_inkling(cls, raw: dict[str, Any]) -> TextConfig:
        """From an Inkling `config.json`: all of `inkling_text`, or the `text_config` of `inkling_mm_model`.

        Applies that format's aliases and defaults, and drops its keys that do not concern inference (token
        metadata, initialisation, dropout, multi-token prediction).

        Raises:
            CheckpointError: a field is missing or describes something that this backbone does not have.
        """
        values = {**INKLING_DEFAULTS, **{_ALIASES.get(key, key): value for key, value in raw.items()}}
        layers = values.get("num_hidden_layers")
        if isinstance(layers, int):
            if values.get("layer_types") is None:
                local = values.get("local_layer_ids")
                sliding = {i for i in range(layers) if (i + 1) % 6} if local is None else set(local)
                values["layer_types"] = ["hybrid_sliding" if i in sliding else "hybrid" for i in range(layers)]
            if values.get("mlp_layer_types") is None:
                dense = values.get("dense_mlp_idx") or 0
                values["mlp_layer_types"] = ["dense" if i < dense else "sparse" for i in range(layers)]
        if values.get("dense_intermediate_size") is not None:
            values["moe_intermediate_size"] = values["intermediate_size"]
            values["intermediate_size"] = values["dense_intermediate_size"]
        known = {key: value for key, value in values.items() if key in cls.model_fields}
        return _validate(cls, known, "config.json: text_config")


INKLING_DEFAULTS: dict[str, Any] = {
    "vocab_size": 201024, "hidden_size": 6144, "num_hidden_layers": 66, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "swa_num_attention_heads": 64, "swa_num_key_value_heads": 16,
    "swa_head_dim": 128, "intermediate_size": 24576, "moe_intermediate_size": 3072, "n_routed_experts": 256,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ALIASES = {
    "embedding_multiplier": "logits_mup_width_multiplier",
    "sliding_window": "sliding_window_size",
    "num_local_experts": "n_routed_experts",
    "sconv_kernel_size": "conv_kernel_size",
    "model_max_length": "max_position_embeddings",
}


class AudioConfig(Section):
    """dMel audio in: levels of `n_mel_bins` mel filters, one position each `hop_length` samples."""

    sample_rate: int = Field(default=16000, gt=0)
    hop_length: int = Field(default=800, gt=0)
    window_length: int = Field(default=1600, gt=0)
    n_mel_bins: int = Field(default=80, gt=0)
    mel_vocab_size: int = Field(default=16, gt=1)
    dmel_min: float = -7.0
    dmel_max: float = 2.0

    @model_validator(mode="after")
    def _window_covers_hop(self) -> AudioConfig:
        if self.window_length <= self.hop_length or self.window_length % 2:
            raise ValueError("window_length must be even and longer than hop_length")
        if self.dmel_min >= self.dmel_max:
            raise ValueError("dmel_min must be below dmel_max")
        return self


class VisionConfig(Section):
    """hMLP video in: one position for each patch of `temporal_patch_size` frames, `patch_size` pixels square."""

    patch_size: int = Field(default=40, gt=1)
    temporal_patch_size: int = Field(default=2, gt=1)
    num_channels: Literal[3] = 3
    num_hidden_layers: int = Field(default=4, gt=0, le=MOST_LAYERS)
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    image_mean: list[float] = Field(default=list(CLIP_MEAN), min_length=3, max_length=3)
    image_std: list[float] = Field(default=list(CLIP_STD), min_length=3, max_length=3)

    @model_validator(mode="after")
    def _whole_patches(self) -> VisionConfig:
        if self.height % self.patch_size or self.width % self.patch_size:
            raise ValueError("height and width must be multiples of patch_size")
        if min(self.image_std) <= 0:
            raise ValueError("image_std must be positive")
        return self

    @property
    def positions(self) -> int:
        """Positions that one clip of `temporal_patch_size` frames becomes."""
        return (self.height // self.patch_size) * (self.width // self.patch_size)


class SpeechConfig(Section):
    """The flow-matching head (hidden state → mel frames) and the vocoder (mel frames → samples).

    Mel values are log10 magnitudes, floored at `mel_floor` and then normalised: `(log10(m) - mel_mean) / mel_std`.
    `flow_times` is the grid of flow times that the head knows (it is trained on all of them and integrates over
    every `flow_times / flow_steps`-th). `silence_level` is the normalised mel value that stands for silence.
    """

    n_mel_bins: int = Field(default=80, gt=0)
    frames_per_position: int = Field(default=4, gt=0)
    hop_length: int = Field(default=200, gt=0)
    mel_floor: float = Field(default=1e-5, gt=0)
    mel_mean: float = -2.0
    mel_std: float = Field(default=1.5, gt=0)
    silence_level: float = -2.0
    flow_width: int = Field(gt=0)
    flow_layers: int = Field(gt=0, le=MOST_LAYERS)
    flow_steps: int = Field(default=4, gt=0, le=MOST_LAYERS)
    flow_times: int = Field(default=32, gt=0)
    vocoder_width: int = Field(gt=0)
    vocoder_layers: int = Field(gt=0, le=MOST_LAYERS)
    vocoder_kernel: int = Field(default=7, gt=1)
    vocoder_window: int = Field(default=800, gt=0)

    @model_validator(mode="after")
    def _grids_fit(self) -> SpeechConfig:
        if self.flow_times % self.flow_steps:
            raise ValueError("flow_times must be a multiple of flow_steps")
        if self.vocoder_window % self.hop_length or self.vocoder_window < 2 * self.hop_length:
            raise ValueError("vocoder_window must be a multiple of hop_length and at least twice as long")
        return self

    @property
    def samples_per_position(self) -> int:
        return self.frames_per_position * self.hop_length


class TickConfig(Section):
    """What happens in one tick: positions in and out, and the tokens that mean silence and end of tick."""

    duration_ms: int = Field(default=200, gt=0)
    audio_in: int = Field(default=4, gt=0)
    video_every: int = Field(default=5, gt=0)
    text_in: int = Field(default=2, ge=0)
    text_out: int = Field(default=2, gt=0)
    audio_out: int = Field(default=4, gt=0)
    silence_token_id: int = Field(ge=0)
    end_of_tick_token_id: int = Field(ge=0)


class RuntimeConfig(Section):
    """Defaults of the engine for long conversations: how many positions are kept, and what happens at the bound."""

    context: int = Field(default=1024, gt=0)
    context_policy: Literal["ring_with_sinks", "end"] = "ring_with_sinks"
    sinks: int = Field(default=16, ge=0)
    max_append: int = Field(default=64, gt=0)

    @model_validator(mode="after")
    def _sinks_fit(self) -> RuntimeConfig:
        if self.sinks >= self.context:
            raise ValueError("sinks must be fewer than context")
        return self


class InteractionConfig(Section):
    """The whole `config.json`."""

    model_type: Literal["tmlc_interaction"] = "tmlc_interaction"
    name: str = "interaction"
    text_config: TextConfig
    audio_config: AudioConfig
    vision_config: VisionConfig
    speech_config: SpeechConfig
    tick_config: TickConfig
    runtime_config: RuntimeConfig

    @model_validator(mode="after")
    def _sections_fit(self) -> InteractionConfig:
        audio, speech, tick = self.audio_config, self.speech_config, self.tick_config
        samples = tick.duration_ms * audio.sample_rate
        if samples != 1000 * tick.audio_in * audio.hop_length:
            raise ValueError("tick_config.audio_in positions of audio_config.hop_length samples must fill duration_ms")
        if samples != 1000 * tick.audio_out * speech.samples_per_position:
            raise ValueError("tick_config.audio_out positions of speech must fill duration_ms")
        if speech.samples_per_position != audio.hop_length:
            raise ValueError("a position of speech must be as long as one of audio: the model hears itself")
        for name in ("silence_token_id", "end_of_tick_token_id"):
            if getattr(tick, name) >= self.text_config.logits_size:
                raise ValueError(f"tick_config.{name} is outside the vocabulary")
        if tick.silence_token_id == tick.end_of_tick_token_id:
            raise ValueError("silence and end of tick must be two different tokens")
        return self

    @property
    def tick_samples(self) -> int:
        """Samples of input (and of output) audio in one tick."""
        return self.tick_config.audio_in * self.audio_config.hop_length

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> InteractionConfig:
        """Checks and builds the configuration.

        Raises:
            CheckpointError: unknown, missing or ill-typed fields, or sections that do not fit each other.
        """
        return _validate(cls, raw, where)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_preset(cls, name: str) -> InteractionConfig:
        """The configuration of a preset (`PRESETS` lists them)."""
        return cls.from_dict(read_preset(name)["config"], f"preset {name}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> InteractionConfig:
        """The configuration of a checkpoint folder."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError("config.json cannot be read", where=str(path),
                                  fix="name a checkpoint folder; `tmlc zoo create` writes one") from error
        except ValueError as error:
            raise CheckpointError(f"config.json is not JSON: {error}", where=str(path),
                                  fix="restore the file from where the checkpoint came from") from error
        if not isinstance(raw, dict):
            raise CheckpointError("config.json is not an object", where=str(path), fix="restore the file")
        return cls.from_dict(raw, str(path))


def read_preset(name: str) -> dict[str, Any]:
    """A preset file as it is written: `description` and `config`.

    Raises:
        UsageError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}", fix=f"choose one of: {', '.join(PRESETS)}")
    file = resources.files("tmlc.model_zoo.interaction").joinpath("presets", f"{name}.yaml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _validate(cls: type[S], raw: dict[str, Any], where: str) -> S:
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in item['loc']) or cls.__name__}: {item['msg']}" for item in error.errors()
        ]
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError("; ".join(problems[:3]) + more, where=where,
                              fix="correct these fields; docs/ir.md and the presets show what each means") from error

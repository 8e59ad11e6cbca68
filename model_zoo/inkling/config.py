"""The configuration of an Inkling checkpoint that hears and sees: `config.json` and the processor's files.

Field names, aliases and defaults are those of transformers 5.24 (`InklingConfig`, `InklingFeatureExtractor`,
`InklingImageProcessor`, `InklingProcessor`). What the engine cannot do is refused here, before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from tmlc.errors import CheckpointError
from tmlc.model_zoo.interaction.config import CLIP_MEAN, CLIP_STD, AudioConfig, Section, TextConfig, VisionConfig

#: Patches (rows, columns) of a frame, when the processor's files name no `frame_size`.
DEFAULT_PATCHES = (6, 6)

S = TypeVar("S", bound=Section)
Number = int | float


@dataclass(frozen=True)
class InklingConfig:
    """What is needed to build the model of an `inkling_mm_model` checkpoint.

    Attributes:
        text: the backbone.
        audio: the dMel stem; `mel_vocab_size` is the stride of its table, `window_length` the length of the transform.
        vision: the hMLP stem, with the frame size of the package.
        levels: dMel levels that the processor makes, at most `audio.mel_vocab_size`.
        analysis: samples of the Hann window, which lies in the middle of the transform.
    """

    text: TextConfig
    audio: AudioConfig
    vision: VisionConfig
    levels: int
    analysis: int

    @classmethod
    def read(cls, config: Mapping[str, Any], processor: Mapping[str, Any], where: str) -> InklingConfig:
        """From the content of `config.json` and of the processor's files (see `flat_processor`).

        Args:
            config: all of `config.json`.
            processor: fields of feature extractor, image processor and processor in one mapping.
            where: path of `config.json`, for messages.

        Raises:
            CheckpointError: a section or field is missing, wrong, or describes what the engine cannot do.
        """
        sections = {name: config.get(name) or {} for name in ("text_config", "audio_config", "vision_config")}
        for name, section in sections.items():
            kind = {"text_config": "inkling_text"}.get(name, f"inkling_{name.removesuffix('_config')}")
            if not isinstance(section, dict) or section.get("model_type", kind) != kind:
                given = section.get("model_type") if isinstance(section, dict) else section
                raise CheckpointError(f"{name} is of type {given!r}, not {kind!r}", where=where,
                                      fix="tmlc knows the text, audio and vision parts of Inkling only")  # fmt: skip
        text = text_config(sections["text_config"], f"{where}: text_config")
        for name in ("audio_config", "vision_config"):
            size = sections[name].get("text_hidden_size", text.hidden_size)
            if size != text.hidden_size:
                raise CheckpointError(f"text_hidden_size is {size}, text_config.hidden_size {text.hidden_size}",
                                      where=f"{where}: {name}", fix=_SAME_EXPORT)  # fmt: skip
        audio, levels, analysis = _audio(sections["audio_config"], processor, where)
        return cls(text, audio, _vision(sections["vision_config"], processor, where), levels, analysis)


_SAME_EXPORT = "take config.json and the processor's files from the same export as the weights"


def check_layer_types(raw: Mapping[str, Any], where: str) -> None:
    """Refuses kinds of layers that the family has not, by the number of the layer."""
    known = {"layer_types": ("hybrid", "hybrid_sliding"), "mlp_layer_types": ("dense", "sparse")}
    for name, kinds in known.items():
        for layer, kind in enumerate(raw.get(name) or ()):
            if kind not in kinds:
                raise CheckpointError(f"{name} of layer {layer} is {kind!r}", where=f"{where}: {name}[{layer}]",
                                      fix=f"tmlc compiles layers of type {' and '.join(kinds)}")  # fmt: skip


def text_config(raw: dict[str, Any], where: str) -> TextConfig:
    """`TextConfig.from_inkling`, after what the backbone does not have is refused by name.

    Raises:
        CheckpointError: an unknown kind of layer, activation or routing, or a field that is missing or wrong.
    """
    check_layer_types(raw, where)
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act is {raw['hidden_act']!r}", where=f"{where}: hidden_act",
                              fix="tmlc compiles Inkling experts with silu only")  # fmt: skip
    if not raw.get("shared_expert_sink", True):
        raise CheckpointError(
            "shared_expert_sink is false: shared experts outside the router's softmax", where=f"{where}: "
            "shared_expert_sink", fix="tmlc compiles Inkling with shared_expert_sink true only",
        )  # fmt: skip
    if raw.get("n_shared_experts", 2) == 0:
        raise CheckpointError("n_shared_experts is 0", where=f"{where}: n_shared_experts",
                              fix="tmlc compiles Inkling with at least one shared expert")  # fmt: skip
    return TextConfig.from_inkling(raw)


def flat_processor(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of `processor_config.json` (with its sections) and `preprocessor_config.json`, in one mapping.

    The sections of `processor_config.json` win over its own fields, which win over `preprocessor_config.json`.
    """
    merged: dict[str, Any] = dict(files.get("preprocessor_config.json", {}))
    processor = files.get("processor_config.json", {})
    merged.update(processor)
    for section in ("feature_extractor", "image_processor"):
        if isinstance(processor.get(section), dict):
            merged.update(processor[section])
    return merged


def _audio(raw: dict[str, Any], processor: Mapping[str, Any], where: str) -> tuple[AudioConfig, int, int]:
    bins = raw.get("n_mel_bins", raw.get("num_codebooks", 80))
    stride = raw.get("mel_vocab_size", raw.get("codebook_size", 256))
    files = "processor_config.json"
    if (size := processor.get("feature_size", bins)) != bins:
        raise CheckpointError(f"the feature extractor makes {size} mel bins, the model has {bins}", where=files,
                              fix=_SAME_EXPORT)  # fmt: skip
    rate = _number(processor, "sampling_rate", 16000)
    hop = _samples(_number(processor, "audio_token_duration_s", 0.05) * rate, "audio_token_duration_s", files)
    multiplier = _number(processor, "window_size_multiplier", 2.0)
    analysis = _samples(_number(processor, "audio_token_duration_s", 0.05) * multiplier * rate,
                        "window_size_multiplier", files)  # fmt: skip
    transform = int(_number(processor, "n_fft", 0)) or analysis
    if transform < analysis or transform <= hop or transform % 2:
        raise CheckpointError(
            f"a transform of {transform} samples for a window of {analysis} and a hop of {hop}",
            where=f"{files}: n_fft",
            fix="tmlc streams audio whose n_fft is even, longer than the hop and no shorter than the window",
        )  # fmt: skip
    levels = int(_number(processor, "num_dmel_bins", 16))
    if not 2 <= levels <= stride:
        raise CheckpointError(
            f"the processor makes {levels} dMel levels, the model's table has {stride} for each mel bin",
            where=f"{where}: audio_config.mel_vocab_size", fix="correct num_dmel_bins in processor_config.json",
        )  # fmt: skip
    values = {
        "sample_rate": int(rate), "hop_length": hop, "window_length": transform, "n_mel_bins": bins,
        "mel_vocab_size": stride, "dmel_min": float(_number(processor, "dmel_min_value", -7.0)),
        "dmel_max": float(_number(processor, "dmel_max_value", 2.0)),
    }  # fmt: skip
    return build_section(AudioConfig, values, f"{where}: audio_config"), levels, analysis


def _vision(raw: dict[str, Any], processor: Mapping[str, Any], where: str) -> VisionConfig:
    patch = raw.get("patch_size", 40)
    size = processor.get("size", {})
    sides = {size[side] for side in ("height", "width") if side in size} if isinstance(size, dict) else {size}
    if sides - {patch}:
        raise CheckpointError(f"the image processor makes patches of {sorted(sides)} pixels, the model takes {patch}",
                              where="processor_config.json: size", fix=_SAME_EXPORT)  # fmt: skip
    if (channels := raw.get("num_channels", 3)) != 3:
        raise CheckpointError(f"images of {channels} channels", where=f"{where}: vision_config.num_channels",
                              fix="tmlc takes RGB frames: num_channels must be 3")  # fmt: skip
    frame = processor.get("frame_size")
    rows, columns = DEFAULT_PATCHES
    try:
        height, width = (rows * patch, columns * patch) if frame is None else (frame["height"], frame["width"])
    except (TypeError, KeyError):
        raise CheckpointError(f"frame_size is {frame!r}", where="preprocessor_config.json: frame_size",
                              fix='write it as {"height": 240, "width": 240}') from None  # fmt: skip
    mean, std = _normalisation(processor)
    values = {
        "patch_size": patch, "temporal_patch_size": raw.get("temporal_patch_size", 2), "num_channels": 3,
        "num_hidden_layers": raw.get("n_layers", raw.get("num_hidden_layers", 24)), "height": height, "width": width,
        "image_mean": mean, "image_std": std,
    }  # fmt: skip
    return build_section(VisionConfig, values, f"{where}: vision_config")


def _normalisation(processor: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and deviation of pixels in 0..1, whatever the processor rescales by."""
    factor = _number(processor, "rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    made = []
    for name, usual, nothing in (("image_mean", CLIP_MEAN, 0.0), ("image_std", CLIP_STD, 1.0)):
        given = processor.get(name, usual) if processor.get("do_normalize", True) else nothing
        values = list(given) if isinstance(given, list | tuple) else [given] * 3
        if len(values) != 3 or not all(_is_number(v) for v in values):
            raise CheckpointError(f"{name} is {given!r}", where=f"processor_config.json: {name}",
                                  fix="give one number, or one for each of red, green and blue")  # fmt: skip
        made.append(values)
    if factor == 1 / 255:
        return [float(v) for v in made[0]], [float(v) for v in made[1]]
    if factor <= 0:
        raise CheckpointError(f"rescale_factor is {factor}", where="processor_config.json: rescale_factor",
                              fix="give a positive number")  # fmt: skip
    return [v / (255 * factor) for v in made[0]], [v / (255 * factor) for v in made[1]]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(processor: Mapping[str, Any], name: str, default: Number) -> Number:
    value = processor.get(name)
    if value is None:
        return default
    if not _is_number(value):
        raise CheckpointError(f"{name} is {value!r}", where=f"processor_config.json: {name}", fix="give a number")
    return value


def _samples(value: float, name: str, where: str) -> int:
    if abs(value - round(value)) > 1e-6 or round(value) < 1:
        raise CheckpointError(f"{name} is {value} samples", where=f"{where}: {name}",
                              fix="it must be a whole number of samples")  # fmt: skip
    return round(value)


def build_section(cls: type[S], values: dict[str, Any], where: str) -> S:
    """The section of these values. CheckpointError names at most three fields that do not fit."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or cls.__name__}: {e['msg']}" for e in error.errors()]
        raise CheckpointError("; ".join(problems[:3]), where=where, fix=_SAME_EXPORT) from None

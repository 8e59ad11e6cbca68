"""Configurations: strict about every field, and about what must fit together."""

import copy
from typing import Any

import pytest

from tmlc.errors import CheckpointError, UsageError
from tmlc.model_zoo.interaction import InteractionConfig
from tmlc.model_zoo.interaction.config import PRESETS


@pytest.fixture
def raw() -> dict[str, Any]:
    return copy.deepcopy(InteractionConfig.from_preset("nano").to_dict())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name: str) -> None:
    config = InteractionConfig.from_preset(name)
    assert InteractionConfig.from_dict(config.to_dict()) == config
    assert config.name == name
    assert config.tick_samples == 3200


def test_an_unknown_preset_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="unknown preset 'huge'"):
        InteractionConfig.from_preset("huge")


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("text_config", "hiden_size", 4, "hiden_size"),
        ("text_config", "hidden_size", "192", "hidden_size"),
        ("text_config", "hidden_size", -1, "hidden_size"),
        ("text_config", "num_hidden_layers", 5000, "num_hidden_layers"),
        ("audio_config", "mel_vocab_size", 10**30, "mel_vocab_size: .*2\\^31"),
        ("vision_config", "num_hidden_layers", 10**9, "num_hidden_layers"),
        ("speech_config", "flow_layers", 10**9, "flow_layers"),
        ("text_config", "layer_types", ["hybrid"], "must name 4 layers"),
        ("text_config", "num_key_value_heads", 4, "multiple of num_key_value_heads"),
        ("text_config", "num_experts_per_tok", 17, "larger than n_routed_experts"),
        ("text_config", "unpadded_vocab_size", 321, "larger than vocab_size"),
        ("text_config", "shared_expert_sink", False, "shared_expert_sink"),
        ("audio_config", "window_length", 800, "longer than hop_length"),
        ("audio_config", "dmel_max", -8.0, "below dmel_max"),
        ("vision_config", "height", 65, "multiples of patch_size"),
        ("vision_config", "image_std", [1.0, 0.0, 1.0], "positive"),
        ("speech_config", "flow_steps", 5, "multiple of flow_steps"),
        ("speech_config", "vocoder_window", 300, "multiple of hop_length"),
        ("tick_config", "audio_in", 5, "fill duration_ms"),
        ("tick_config", "audio_out", 2, "fill duration_ms"),
        ("tick_config", "silence_token_id", 272, "outside the vocabulary"),
        ("tick_config", "silence_token_id", 260, "two different tokens"),
        ("runtime_config", "context_policy", "forget", "context_policy"),
        ("runtime_config", "sinks", 1024, "fewer than context"),
    ],
)
def test_a_wrong_field_is_named(raw: dict[str, Any], section: str, field: str, value: Any, message: str) -> None:
    raw[section][field] = value
    with pytest.raises(CheckpointError, match=message):
        InteractionConfig.from_dict(raw)


def test_speech_must_be_as_long_as_audio_a_position(raw: dict[str, Any]) -> None:
    raw["speech_config"]["frames_per_position"] = 2
    raw["tick_config"]["audio_out"] = 8
    with pytest.raises(CheckpointError, match="hears itself"):
        InteractionConfig.from_dict(raw)


def test_many_problems_are_cut_short(raw: dict[str, Any]) -> None:
    for field in ("a", "b", "c", "d", "e"):
        raw["tick_config"][field] = 1
    with pytest.raises(CheckpointError, match="and 2 more"):
        InteractionConfig.from_dict(raw)

"""What an Inkling checkpoint may say, and what is refused before any tensor is looked at."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tmlc.errors import CheckpointError
from tmlc.frontend import load_program, open_checkpoint
from tmlc.frontend.inkling import inkling_mm
from tmlc.model_zoo.inkling.config import InklingConfig, flat_processor
from tmlc.model_zoo.inkling.multimodal import audio_constants


@pytest.fixture
def config(inkling_config):
    return {
        "model_type": "inkling_mm_model",
        "text_config": inkling_config,
        "audio_config": {"model_type": "inkling_audio", "n_mel_bins": 20, "mel_vocab_size": 16},
        "vision_config": {"model_type": "inkling_vision", "patch_size": 8, "n_layers": 3},
    }


@pytest.fixture
def processor():
    return {
        "feature_extractor": {"feature_size": 20},
        "image_processor": {"size": {"height": 8, "width": 8}, "image_mean": 0.5, "image_std": [0.5, 0.25, 0.125]},
        "num_dmel_bins": 12,
    }


def write(folder, config, processor=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "processor_config.json").write_text(json.dumps(processor))
    save_file({"model.llm.norm.weight": torch.ones(16)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("section", "change", "what", "where"),
    [
        ("text_config", {"layer_types": ["hybrid", "linear", "hybrid"]}, "layer 1 is 'linear'", "layer_types[1]"),
        ("text_config", {"mlp_layer_types": ["dense", "sparse", "mixed"]}, "layer 2 is 'mixed'", "mlp_layer_types[2]"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'", "text_config: hidden_act"),
        ("text_config", {"shared_expert_sink": False}, "shared_expert_sink is false", "shared_expert_sink"),
        ("text_config", {"n_shared_experts": 0}, "n_shared_experts is 0", "n_shared_experts"),
        ("text_config", {"layer_types": ["hybrid"]}, "layer_types must name 3 layers", "text_config"),
        ("text_config", {"model_type": "qwen3"}, "text_config is of type 'qwen3'", "config.json"),
        ("audio_config", {"model_type": "whisper"}, "audio_config is of type 'whisper'", "config.json"),
        ("audio_config", {"text_hidden_size": 17}, "text_hidden_size is 17", "audio_config"),
        ("audio_config", {"n_mel_bins": 21}, "makes 20 mel bins, the model has 21", "processor_config.json"),
        ("audio_config", {"mel_vocab_size": 11}, "makes 12 dMel levels", "audio_config.mel_vocab_size"),
        ("vision_config", {"num_channels": 1}, "images of 1 channels", "vision_config.num_channels"),
        ("vision_config", {"patch_size": 10}, "patches of [8] pixels, the model takes 10", "processor_config.json"),
        ("vision_config", {"temporal_patch_size": 1}, "temporal_patch_size", "vision_config"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_with_its_place(
    section, change, what, where, config, processor, tmp_path
):
    config[section] = {**config[section], **change}
    with pytest.raises(CheckpointError) as caught:
        load_program(write(tmp_path / "bad", config, processor))
    assert what in caught.value.what and where in caught.value.where and caught.value.fix


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"feature_extractor": {"n_fft": 700}}, "a transform of 700 samples"),
        ({"feature_extractor": {"n_fft": 1601}}, "a transform of 1601 samples"),
        ({"feature_extractor": {"window_size_multiplier": 1.0}}, "a transform of 800 samples"),
        ({"feature_extractor": {"audio_token_duration_s": 0.05003}}, "800.48 samples"),
        ({"feature_extractor": {"sampling_rate": "fast"}}, "sampling_rate is 'fast'"),
        ({"num_dmel_bins": 1}, "makes 1 dMel levels"),
        ({"image_processor": {"image_mean": [0.5, 0.5]}}, "image_mean is [0.5, 0.5]"),
        ({"image_processor": {"rescale_factor": -1}}, "rescale_factor is -1"),
        ({"frame_size": [24, 24]}, "frame_size is [24, 24]"),
        ({"frame_size": {"height": 25, "width": 24}}, "multiples of patch_size"),
    ],
)
def test_processors_that_the_stems_cannot_follow_are_refused(change, what, config, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_program(write(tmp_path / "bad", config, change))
    assert what in caught.value.what and caught.value.where and caught.value.fix


@pytest.mark.parametrize("kind", ["inkling3", "inkling_vision"])
def test_other_architectures_of_the_family_are_refused_by_name(kind, config, tmp_path):
    with pytest.raises(CheckpointError, match=f"unknown architecture: model_type is '{kind}'") as caught:
        load_program(write(tmp_path / "bad", {**config, "model_type": kind}))
    assert "inkling_mm_model" in caught.value.fix


def test_a_text_checkpoint_is_refused_with_the_same_words(inkling_config, tmp_path):
    config = {**inkling_config, "hidden_act": "relu"}
    with pytest.raises(CheckpointError, match="hidden_act is 'relu'"):
        load_program(write(tmp_path / "bad", config))


def test_a_processor_file_that_is_not_json_is_named(config, tmp_path):
    folder = write(tmp_path / "bad", config)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json cannot be read"):
        load_program(folder)


def test_missing_tensors_are_named_as_the_release_names_them(config, processor, tmp_path):
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.llm\.embed\.weight"):
        load_program(write(tmp_path / "few", config, processor))


def test_the_tick_and_the_processor_are_honoured(config, processor, tmp_path):
    frontend = inkling_mm(open_checkpoint(write(tmp_path / "c", config, processor)))
    tick = frontend.tick
    assert (tick["audio_in"], tick["hop"], tick["sample_rate"]) == (4, 800, 16000)
    assert (tick["frame_height"], tick["frame_width"], tick["video_frames"], tick["video_positions"]) == (48, 48, 2, 36)
    seen = frontend.model.config.vision
    assert seen.image_mean == [0.5, 0.5, 0.5] and seen.image_std == [0.5, 0.25, 0.125]
    assert frontend.model.config.levels == 12 and frontend.model.config.audio.mel_vocab_size == 16
    assert list(frontend.methods)[:3] == ["embed_text", "embed_audio", "embed_video"]


def test_without_processor_files_the_defaults_of_transformers_hold(config):
    read = InklingConfig.read(config, flat_processor({}), "config.json")
    assert (read.levels, read.audio.hop_length, read.audio.window_length, read.analysis) == (16, 800, 1600, 1600)
    assert (read.audio.dmel_min, read.audio.dmel_max) == (-7.0, 2.0)


def test_a_window_shorter_than_the_transform_lies_in_its_middle(config):
    files = {"processor_config.json": {"feature_extractor": {"n_fft": 2000, "window_size_multiplier": 1.5}}}
    made = audio_constants(InklingConfig.read(config, flat_processor(files), "config.json"))
    (window,) = made["audio_tower.window"]
    torch.testing.assert_close(window[400:1600], torch.hann_window(1200), rtol=0, atol=1e-6)
    assert not window[:400].any() and not window[1600:].any()
    assert made["audio_tower.mel_filters"].shape == (20, 1001)


@pytest.mark.parametrize(
    ("settings", "pixel", "value"),
    [
        ({"do_rescale": False, "do_normalize": False}, 200, 200.0),
        ({"do_normalize": False}, 51, 0.2),
        ({"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 2.0}, 255, 0.5),
    ],
)
def test_any_rescaling_becomes_a_mean_and_a_deviation_of_pixels(settings, pixel, value, config):
    seen = InklingConfig.read(config, flat_processor({"preprocessor_config.json": settings}), "config.json").vision
    assert (pixel / 255 - seen.image_mean[1]) / seen.image_std[1] == pytest.approx(value)

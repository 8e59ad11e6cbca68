"""The audio and video stems equal Inkling's in transformers: constants, levels, embeddings, plans and towers."""

import itertools

import numpy as np
import pytest
import torch
from transformers import InklingFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.models.inkling.configuration_inkling import InklingAudioConfig, InklingVisionConfig
from transformers.models.inkling.modeling_inkling import InklingAudioModel, InklingVisionModel, plan_out_scales

from tmlc.errors import CheckpointError
from tmlc.model_zoo.interaction.config import AudioConfig, VisionConfig
from tmlc.model_zoo.interaction.features import hann_window, mel_filters
from tmlc.model_zoo.interaction.stems import AudioTower, VisionTower, plan_folds, plan_scales


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.copy_(noise + (1.0 if "norm" in name else 0.0))


def test_window_and_filters_equal_the_feature_extractors() -> None:
    theirs = InklingFeatureExtractor()
    np.testing.assert_allclose(hann_window(1600), theirs.window.numpy(), rtol=0, atol=5e-7)  # theirs rounds its angles
    np.testing.assert_allclose(mel_filters(80, 1600, 16000), theirs.mel_filters.numpy(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("mels", "n_fft", "rate"), [(8, 64, 1600), (40, 512, 8000), (128, 2048, 24000)])
def test_filters_of_other_sizes_equal_transformers(mels: int, n_fft: int, rate: int) -> None:
    theirs = mel_filter_bank(n_fft // 2 + 1, mels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney").T
    np.testing.assert_allclose(mel_filters(mels, n_fft, rate), theirs, rtol=1e-5, atol=1e-9)


def test_levels_equal_the_feature_extractor_and_processor() -> None:
    rng = np.random.default_rng(0)
    envelope = np.repeat(rng.uniform(0.01, 0.3, 40), 800)
    pcm = (envelope * rng.standard_normal(32000)).astype(np.float32)
    extractor = InklingFeatureExtractor()
    features = extractor(pcm, sampling_rate=16000, return_tensors="pt")["input_features"][0]
    centres = torch.linspace(-7.0, 2.0, 16, dtype=torch.float64).float()
    expected = (features.clamp(-7.0, 2.0)[..., None] - centres).abs().argmin(-1)
    levels = AudioTower(AudioConfig(), 8).levels(torch.from_numpy(pcm).reshape(-1, 800))
    assert torch.equal(levels, expected)


@torch.no_grad()
def test_audio_tower_equals_transformers() -> None:
    config = AudioConfig(n_mel_bins=10, mel_vocab_size=7)
    ours = AudioTower(config, 24)
    randomise(ours)
    theirs = InklingAudioModel(InklingAudioConfig(n_mel_bins=10, mel_vocab_size=7, text_hidden_size=24)).eval()
    constants = {"window", "mel_filters"}
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k not in constants})
    levels = torch.randint(7, (13, 10), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.embed(levels), theirs(levels).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("temporal", "patch", "layers"), [(2, 40, 4), (2, 16, 2), (2, 8, 3), (2, 6, 1), (4, 4, 3), (2, 4, 5), (3, 10, 2)]
)
@torch.no_grad()
def test_vision_tower_equals_transformers(temporal: int, patch: int, layers: int) -> None:
    height, width, clips = 2 * patch, 3 * patch, 2
    config = VisionConfig(patch_size=patch, temporal_patch_size=temporal, num_hidden_layers=layers,
                          height=height, width=width)  # fmt: skip
    ours = VisionTower(config, 24)
    randomise(ours)
    theirs = InklingVisionModel(
        InklingVisionConfig(patch_size=patch, temporal_patch_size=temporal, num_hidden_layers=layers,
                            text_hidden_size=24)
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(256, (clips, temporal, height, width, 3), generator=generator).to(torch.uint8)
    pixels = (video.float() / 255 - torch.tensor(config.image_mean)) / torch.tensor(config.image_std)
    patches = pixels.reshape(clips, temporal, 2, patch, 3, patch, 3).permute(0, 2, 4, 1, 3, 5, 6)
    expected = theirs(patches.reshape(-1, temporal, patch, patch, 3)).last_hidden_state[:, 0]
    found = ours(video.reshape(clips * temporal * height, width * 3))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_plans_equal_transformers_for_every_small_stem() -> None:
    for temporal, patch, layers in itertools.product((2, 3, 4, 6), (2, 3, 8, 12, 16, 27, 30, 36, 40, 64), range(1, 14)):
        theirs = [(t, s, c) for t, s, _, c in plan_out_scales(temporal, patch, layers, 3).tolist()]
        assert plan_scales(temporal, patch, layers, 3) == theirs, (temporal, patch, layers)


def test_the_stem_of_inkling_small_is_the_published_one() -> None:
    folds = plan_folds(VisionConfig(height=240, width=240), 4096)
    assert [(f.t, f.s, f.inputs, f.outputs) for f in folds] == [
        (1, 5, 75, 128), (1, 2, 512, 320), (1, 4, 5120, 4800), (2, 1, 9600, 4096)]  # fmt: skip


def test_a_plan_that_cannot_fold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backwards = [(1, 1, 3), (1, 4, 64), (1, 2, 64), (2, 4, 64)]
    monkeypatch.setattr("tmlc.model_zoo.interaction.stems.plan_scales", lambda *sizes: backwards)
    with pytest.raises(CheckpointError, match="no video stem"):
        plan_folds(VisionConfig(patch_size=4, height=8, width=8), 16)

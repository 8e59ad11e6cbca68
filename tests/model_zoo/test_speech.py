"""The flow head and the vocoder: causal, seeded, quiet at random, and able to learn."""

import numpy as np
import pytest
import torch

from tmlc.model_zoo.interaction import InteractionConfig, InteractionModel
from tmlc.model_zoo.interaction.config import SpeechConfig
from tmlc.model_zoo.interaction.features import speech_mel, synthesis_window
from tmlc.model_zoo.interaction.init import initialise

SPEECH = SpeechConfig(flow_width=32, flow_layers=1, vocoder_width=32, vocoder_layers=1)


@pytest.fixture(scope="module")
def nano() -> InteractionModel:
    return InteractionModel.random(InteractionConfig.from_preset("nano"), seed=0)


def keys(n: int, tick: int = 0) -> torch.Tensor:
    return torch.tensor([[7, tick, position] for position in range(n)])


def test_speech_depends_on_the_key_and_the_hidden_state_of_its_position_only(nano: InteractionModel) -> None:
    hidden = torch.randn(6, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mel = nano.speech(hidden, keys(6))
        assert mel.shape == (24, 80)
        torch.testing.assert_close(nano.speech(hidden[2:3], keys(6)[2:3]), mel[8:12])
        other_key = nano.speech(hidden, keys(6, tick=1))
        other_hidden = nano.speech(hidden.roll(1, 0), keys(6))
    assert (other_key - mel).abs().mean() > 0.1
    assert (other_hidden - mel).abs().mean() > 0.1


def test_the_vocoder_never_looks_ahead(nano: InteractionModel) -> None:
    mel = torch.randn(40, 80, generator=torch.Generator().manual_seed(0))
    changed = mel.clone()
    changed[20:] += 1.0
    with torch.no_grad():
        before, after = nano.vocoder(mel), nano.vocoder(changed)
    assert before.shape == (10, 800)
    torch.testing.assert_close(after[:5], before[:5])
    assert not torch.allclose(after[5:], before[5:], atol=1e-3)


def test_a_random_model_speaks_at_a_modest_level_without_clipping(nano: InteractionModel) -> None:
    hidden = torch.randn(60, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pcm = nano.vocoder(nano.speech(hidden, keys(60)))
    assert 0.01 < pcm.std() < 0.15
    assert pcm.abs().max() < 0.7


def test_there_is_no_seam_where_one_tick_meets_the_next(nano: InteractionModel) -> None:
    hidden = torch.randn(400, 192, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pcm = nano.vocoder(nano.speech(hidden, keys(400))).reshape(-1)
    jumps = pcm.diff().abs()
    edges = jumps[3199::3200]
    assert edges.max() <= jumps.max()
    assert edges.mean() < 1.5 * jumps.mean()


@pytest.mark.parametrize(("hop", "window"), [(200, 800), (200, 400), (80, 400)])
def test_copies_of_the_synthesis_window_sum_to_one(hop: int, window: int) -> None:
    config = SPEECH.model_copy(update={"hop_length": hop, "vocoder_window": window})
    total = synthesis_window(config).reshape(-1, hop).sum(0)
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


def test_mel_of_digital_silence_is_the_silence_level() -> None:
    mel = speech_mel(np.zeros(1600), SPEECH, 16000)
    assert mel.shape == (8, 80)
    np.testing.assert_allclose(mel, SPEECH.silence_level, atol=1e-6)


def test_mel_peaks_where_the_tone_is_and_looks_no_further_than_the_window() -> None:
    time = np.arange(8000) / 16000
    tone = 0.3 * np.sin(2 * np.pi * 1000 * time)
    mel = speech_mel(tone, SPEECH, 16000)
    assert np.all(mel[2:-4].argmax(1) == 26)  # 1 kHz is 15 of 45.25 mels, in 81 steps
    later = tone.copy()
    later[4000:] = 0.0
    np.testing.assert_array_equal(speech_mel(later, SPEECH, 16000)[: (4000 - 800) // 200 + 1], mel[:17])
    with pytest.raises(ValueError, match="multiple of 200"):
        speech_mel(np.zeros(1601), SPEECH, 16000)


def test_the_flow_head_learns_the_frames_of_two_sounds() -> None:
    torch.manual_seed(0)
    config = InteractionConfig.from_preset("nano")
    head = InteractionModel(config).speech
    model = torch.nn.Module()
    model.speech = head
    initialise(model, config, seed=0)
    hidden = torch.randn(2, 192)
    target = torch.randn(2, 320)
    optimiser = torch.optim.Adam(head.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        optimiser.zero_grad()
        loss = head.loss(hidden.repeat(16, 1), target.repeat(16, 1).reshape(-1, 80), generator)
        loss.backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    with torch.no_grad():
        spoken = head(hidden, keys(2)).reshape(2, 320)
    right, wrong = (spoken - target).square().mean(), (spoken - target.roll(1, 0)).square().mean()
    assert right < 0.15 * wrong, (right, wrong)


def test_the_vocoder_learns_a_tone() -> None:
    torch.manual_seed(0)
    config = InteractionConfig.from_preset("nano")
    model = torch.nn.Module()
    model.vocoder = InteractionModel(config).vocoder
    initialise(model, config, seed=0)
    tone = 0.3 * np.sin(2 * np.pi * 400 * np.arange(8000) / 16000)  # whole periods in a hop: the mel fixes the phase
    mel = torch.from_numpy(speech_mel(tone, config.speech_config, 16000))
    target = torch.from_numpy(tone).float().reshape(-1, 800)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (model.vocoder(mel) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert losses[-1] < 0.05 * losses[0], (losses[0], losses[-1])

"""Windows, mel filters and log-mel targets, in numpy: what the stems and the speech modules hold as constants.

Sources of the formulas: the Slaney mel scale (linear to 1 kHz with 15 mels, then 27 mels a factor of 6.4) with area
normalisation, as in the Auditory Toolbox and librosa; Hann windows are periodic.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .config import AudioConfig, SpeechConfig

Floats = npt.NDArray[np.float32]

_LINEAR_HZ, _LINEAR_MELS = 1000.0, 15.0
_LOG_STEP = np.log(6.4) / 27.0


def hann_window(length: int) -> Floats:
    """A periodic Hann window, float32[length]."""
    return (0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(length) / length)).astype(np.float32)


def mel_to_hertz(mels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Slaney's mel scale, inverted."""
    above = np.maximum(mels - _LINEAR_MELS, 0.0)
    return np.where(mels < _LINEAR_MELS, mels * 200.0 / 3.0, _LINEAR_HZ * np.exp(_LOG_STEP * above))


def mel_filters(n_mels: int, n_fft: int, sample_rate: int) -> Floats:
    """Triangular filters from 0 Hz to half the sample rate, each of unit area: float32[n_mels, n_fft/2 + 1]."""
    top = sample_rate / 2.0
    top_mel = top * 3.0 / 200.0 if top < _LINEAR_HZ else _LINEAR_MELS + np.log(top / _LINEAR_HZ) / _LOG_STEP
    edges = mel_to_hertz(np.linspace(0.0, top_mel, n_mels + 2))
    bins = np.linspace(0.0, top, n_fft // 2 + 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return (np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))).astype(np.float32)


def audio_constants(config: AudioConfig) -> tuple[Floats, Floats]:
    """The analysis window [1, W] and filters [n_mel_bins, W/2 + 1] of the dMel stem."""
    filters = mel_filters(config.n_mel_bins, config.window_length, config.sample_rate)
    return hann_window(config.window_length)[None, :], filters


def synthesis_window(config: SpeechConfig) -> Floats:
    """The vocoder's window [1, W]: Hann, scaled so that its copies at every hop sum to one."""
    return (hann_window(config.vocoder_window) * (2.0 * config.hop_length / config.vocoder_window))[None, :]


def speech_mel(pcm: npt.ArrayLike, speech: SpeechConfig, sample_rate: int) -> Floats:
    """The mel frames that the flow head is trained to produce and the vocoder to turn back into `pcm`.

    Frame r looks at samples r·hop … r·hop + vocoder_window - 1, the span that the vocoder's frame r writes to, so
    analysis and synthesis agree without any look-ahead beyond the overlap.

    Args:
        pcm: mono samples; the length must be a multiple of `speech.hop_length`. Samples past the end count as zero.

    Returns:
        Normalised log-mel, float32[len(pcm)/hop, n_mel_bins]; digital silence gives `(log10(mel_floor) - mean)/std`.

    Raises:
        ValueError: `pcm` is not one-dimensional or not whole hops.
    """
    samples = np.asarray(pcm, dtype=np.float64)
    hop, window = speech.hop_length, speech.vocoder_window
    if samples.ndim != 1 or samples.size % hop:
        raise ValueError(f"pcm must be one-dimensional with a multiple of {hop} samples, not {samples.shape}")
    padded = np.concatenate([samples, np.zeros(window - hop)])
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    magnitudes = np.abs(np.fft.rfft(frames * hann_window(window), axis=1))
    mel = magnitudes @ mel_filters(speech.n_mel_bins, window, sample_rate).T.astype(np.float64)
    return ((np.log10(np.maximum(mel, speech.mel_floor)) - speech.mel_mean) / speech.mel_std).astype(np.float32)

"""Audio of the wire to float32 samples of the model and back: PCM16 and G.711, resampled as one stream.

G.711 is the ITU-T recommendation of that name (A-law and µ-law of 8 bits at 8 kHz); its two tables are made from the
formulas there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr

from tmlc.errors import InputError

QUALITY = "LQ"  # the least delay of those that filter: at most 20 ms between 24 and 16 kHz, 62 ms to and from 8 kHz
PCM_RATES = (16000, 24000)


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """How samples are coded on the wire.

    Attributes:
        kind: "audio/pcm" (16 bits, little-endian), "audio/pcmu" or "audio/pcma"; mono.
        rate: samples a second.
    """

    kind: str = "audio/pcm"
    rate: int = 24000

    def __post_init__(self) -> None:
        rates = PCM_RATES if self.kind == "audio/pcm" else (8000,)
        if self.kind not in ("audio/pcm", "audio/pcmu", "audio/pcma"):
            raise InputError(f"no audio format {self.kind!r}", fix="use audio/pcm, audio/pcmu or audio/pcma")
        if self.rate not in rates:
            raise InputError(f"{self.kind} at {self.rate} Hz", fix=f"use {' or '.join(map(str, rates))} Hz")

    @property
    def sample_bytes(self) -> int:
        return 2 if self.kind == "audio/pcm" else 1


def _mulaw() -> np.ndarray:
    """Values of the 256 codes of µ-law, in -1..1."""
    code = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (code >> 4) & 7, code & 15
    magnitude = ((mantissa.astype(np.int32) << 3) + 0x84 << exponent) - 0x84
    return (np.where(code & 0x80, -magnitude, magnitude) / 32768).astype(np.float32)


def _alaw() -> np.ndarray:
    """Values of the 256 codes of A-law, in -1..1."""
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    exponent, mantissa = (code >> 4) & 7, (code & 15).astype(np.int32)
    first = (mantissa << 4) + 8
    magnitude = np.where(exponent == 0, first, first + 0x100 << np.maximum(exponent, 1) - 1)
    return (np.where(code & 0x80, magnitude, -magnitude) / 32768).astype(np.float32)


VALUES = {"audio/pcmu": _mulaw(), "audio/pcma": _alaw()}


def decode(data: bytes, format: AudioFormat) -> np.ndarray:
    """Samples of the wire as float32 in -1..1. Raises InputError for half a sample."""
    if len(data) % format.sample_bytes:
        raise InputError("the audio ends inside a sample", fix="send whole 16-bit samples")
    if format.kind == "audio/pcm":
        return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
    return VALUES[format.kind][np.frombuffer(data, np.uint8)]


def encode(samples: np.ndarray, format: AudioFormat) -> bytes:
    """float32 in -1..1 (held to it) as bytes of the wire; G.711 takes the nearest of its values."""
    held = np.clip(samples, -1.0, 1.0)
    if format.kind == "audio/pcm":
        return np.minimum(np.round(held * 32768), 32767).astype("<i2").tobytes()
    values = VALUES[format.kind]
    order = np.argsort(values, kind="stable")
    ladder = values[order]
    above = np.clip(np.searchsorted(ladder, held), 1, ladder.size - 1)
    nearer = above - (held - ladder[above - 1] < ladder[above] - held)
    return order[nearer].astype(np.uint8).tobytes()


class Resampler:
    """A stream of float32 samples from one rate to another; pieces join without a seam."""

    def __init__(self, source: int, target: int) -> None:
        self._stream = None if source == target else soxr.ResampleStream(source, target, 1, "float32", QUALITY)

    def push(self, samples: np.ndarray, last: bool = False) -> np.ndarray:
        """What is certain of the output once `samples` are known."""
        return samples if self._stream is None else self._stream.resample_chunk(samples, last)

"""Audio files: any rate and any number of channels in, mono float32 at the model's rate out; PCM16 WAV
written.
"""

from __future__ import annotations

import os
import wave
from pathlib import Path

import numpy as np

from tmlc.errors import MediaError
from tmlc.runtimes.media import require

BLOCK_FRAMES = 1 << 16
RATES = range(4000, 384001)
FIX = "give a WAV (or FLAC, OGG) file that a player can open; `tmlc run --help` lists the inputs"


def read_audio(path: str | os.PathLike[str], rate: int = 16000) -> np.ndarray:
    """Decode a WAV (or FLAC, OGG, AIFF) file.

    The file is read, mixed down and resampled (soxr, high quality) block by block, so memory is what the
    result takes.

    Returns:
        float32 [samples], mono, at `rate` Hz, nominally in [-1, 1].
    Raises:
        MediaError: no such file, not audio, no samples, or samples that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError("no such audio file", where=str(path), fix="check the path")
    soundfile = require("soundfile", "reading audio")
    parts: list[np.ndarray] = []
    try:
        with soundfile.SoundFile(str(path)) as source:
            if source.samplerate not in RATES:
                raise MediaError(f"a sample rate of {source.samplerate} Hz", where=str(path), fix=FIX)
            stream = None
            if source.samplerate != rate:
                stream = require("soxr", "resampling audio").ResampleStream(
                    source.samplerate, rate, 1, dtype="float32", quality="HQ"
                )
            for block in source.blocks(BLOCK_FRAMES, dtype="float32", always_2d=True):
                mono = block.mean(axis=1, dtype=np.float32)
                if not np.isfinite(mono).all():
                    raise MediaError(
                        "the audio holds samples that are not finite numbers",
                        where=str(path),
                        fix="write the file again from a clean source",
                    )
                parts.append(mono if stream is None else stream.resample_chunk(mono))
            if stream is not None:
                parts.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise MediaError(f"the audio cannot be decoded: {_reason(error)}", where=str(path), fix=FIX) from error
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if samples.size == 0:
        raise MediaError("the audio file holds no samples", where=str(path), fix=FIX)
    return samples


class WavWriter:
    """Mono PCM16 WAV written as the samples come; a context manager.

    `write` takes float32 samples in [-1, 1]; louder ones are clipped.
    """

    def __init__(self, path: str | os.PathLike[str], rate: int) -> None:
        self._sink = wave.open(os.fspath(path), "wb")  # noqa: SIM115 - `close` closes it
        self._sink.setnchannels(1)
        self._sink.setsampwidth(2)
        self._sink.setframerate(rate)

    def write(self, samples: np.ndarray) -> None:
        pcm = np.clip(np.round(np.asarray(samples, np.float64) * 32767.0), -32768, 32767).astype("<i2")
        self._sink.writeframes(pcm.tobytes())

    def close(self) -> None:
        """Completes the header. Nothing can be written afterwards."""
        self._sink.close()

    def __enter__(self) -> WavWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_wav(path: str | os.PathLike[str], samples: np.ndarray, rate: int) -> None:
    """Write all samples of a mono PCM16 WAV at once."""
    with WavWriter(path, rate) as sink:
        sink.write(samples)


def _reason(error: Exception) -> str:
    """The decoder's own words on one line, without the path that it repeats."""
    text = getattr(error, "error_string", None) or str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__

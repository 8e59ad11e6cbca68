"""Makes the recording of the demo: half a minute of speech-like audio, a moving shape on video, and typed
text.

Run `python examples/demo/make_demo.py` (needs numpy, pyyaml and PyAV) to make the three files beside this
script again. Nobody speaks in it: the voice is a sum of harmonics under moving formants, cut into syllables,
with breath noise between them, so that the recording has the rhythm, the pauses and the spectrum of a
conversation and belongs to no one.
"""

from __future__ import annotations

import argparse
import wave
from pathlib import Path

import numpy as np

RATE = 16000
SECONDS = 30.0
FPS, SIDE = 10, 96

# Formants in Hz (F1, F2, F3) of some vowels, after the usual charts of adult voices.
VOWELS = {
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (270, 2290, 3010),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
    "@": (500, 1500, 2500),
}
# Consonants: centre and width in Hz, length in seconds, and level of a burst of shaped noise ("" is none).
CONSONANTS = {
    "s": (5500, 1500, 0.09, 0.10),
    "t": (3800, 1500, 0.03, 0.16),
    "k": (1900, 700, 0.04, 0.14),
    "f": (4500, 3000, 0.08, 0.05),
    "p": (900, 700, 0.03, 0.12),
    "": (1000, 500, 0.0, 0.0),
}
# (start in seconds, base pitch in Hz, syllables); the pitch falls over a statement and rises at the end of a
# question.
PHRASES = [
    (0.6, 125, "ha lo @", "."),
    (2.6, 128, "ka nu si mi", "?"),
    (5.4, 122, "te lo mi a bo ti fu lo", "."),
    (9.8, 126, "a nu so ka", "?"),
    (12.2, 118, "ki po a ta sa ma i to", "."),
    (16.4, 124, "so ti", "."),
    (18.0, 130, "fu ta ke lo si ma po", "?"),
    (22.6, 121, "no ka te", "."),
    (24.4, 119, "pa su to le ki na fo ta @", "."),
]
TYPED = [
    (4.2, "hello there"),
    (8.8, "what do you see?"),
    (15.2, "count to three"),
    (21.4, "and now?"),
    (28.6, "bye"),
]


def voice(seed: int = 0) -> np.ndarray:
    """The spoken part: float64 [SECONDS x RATE] in (-1, 1), with a noise floor near -55 dB."""
    random = np.random.default_rng(seed)
    out = random.standard_normal(int(SECONDS * RATE)) * 0.0018
    for start, pitch, words, end in PHRASES:
        at = int(start * RATE)
        syllables = words.split()
        for index, syllable in enumerate(syllables):
            progress = index / max(1, len(syllables) - 1)
            rise = 1.25 if end == "?" and progress > 0.7 else 1.0
            sound = speak_syllable(syllable, pitch * (1.08 - 0.22 * progress) * rise, random)
            room = min(sound.size, out.size - at)
            out[at : at + room] += sound[:room]
            at += int(sound.size * 0.94)
    return out * (0.7 / np.abs(out).max())


def speak_syllable(syllable: str, pitch: float, random: np.random.Generator) -> np.ndarray:
    """One syllable: an optional consonant burst, then a voiced vowel with gliding formants."""
    onset, vowel = (syllable[0], syllable[1:]) if syllable[0] not in VOWELS else ("", syllable)
    centre, width, length, level = CONSONANTS.get(onset, CONSONANTS[""])
    burst = noise_band(int(length * RATE), centre, width, random) * level
    size = int((0.17 + 0.05 * random.random()) * RATE)
    t = np.arange(size) / RATE
    f0 = pitch * (1.0 + 0.02 * np.sin(2 * np.pi * 5.0 * t) - 0.05 * t / t[-1])
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    glide = np.clip(t / 0.05, 0, 1)[None, :]
    formants = np.array(VOWELS["@"])[:, None] * (1 - glide) + np.array(VOWELS[vowel])[:, None] * glide
    sound = np.zeros(size)
    for harmonic in range(1, int(4000 / pitch) + 1):
        frequency = harmonic * f0
        gain = sum(
            weight / (1 + ((frequency - formant) / bandwidth) ** 2)
            for formant, bandwidth, weight in zip(formants, (70, 100, 140), (1.0, 0.5, 0.25), strict=True)
        )
        sound += gain / harmonic**0.5 * np.sin(harmonic * phase)
    envelope = np.minimum(np.clip(t / 0.025, 0, 1), np.clip((t[-1] - t) / 0.05, 0, 1))
    return np.concatenate([burst, sound * envelope * 0.35])


def noise_band(size: int, centre: float, width: float, random: np.random.Generator) -> np.ndarray:
    """Noise around `centre` Hz with a raised-cosine envelope, peak 1."""
    if size == 0:
        return np.zeros(0)
    spectrum = np.fft.rfft(random.standard_normal(size))
    frequency = np.fft.rfftfreq(size, 1 / RATE)
    shaped = np.fft.irfft(spectrum * np.exp(-(((frequency - centre) / width) ** 2)), size)
    shaped *= np.sin(np.pi * (np.arange(size) + 0.5) / size)
    return shaped / np.abs(shaped).max()


def frames() -> np.ndarray:
    """The seen part, uint8 [frames, SIDE, SIDE, 3]: a disc on a figure of eight that changes colour every six
    seconds.
    """
    colours = [(220, 70, 60), (70, 180, 90), (70, 110, 220), (220, 190, 70), (170, 90, 200)]
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    backdrop = np.stack([40 + x // 3, 46 + y // 3, np.full_like(x, 70)], axis=-1).astype(np.uint8)
    shown = np.empty((int(SECONDS * FPS), SIDE, SIDE, 3), np.uint8)
    for index in range(shown.shape[0]):
        angle = 2 * np.pi * index / (FPS * 10)
        centre_x = SIDE * (0.5 + 0.32 * np.sin(angle))
        centre_y = SIDE * (0.5 + 0.22 * np.sin(2 * angle))
        inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 <= (SIDE * 0.13) ** 2
        shown[index] = np.where(inside[..., None], np.array(colours[index // (FPS * 6) % 5], np.uint8), backdrop)
    return shown


def write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as sink:
        sink.setnchannels(1)
        sink.setsampwidth(2)
        sink.setframerate(RATE)
        sink.writeframes(np.round(samples * 32767).astype("<i2").tobytes())


def write_video(path: Path, shown: np.ndarray) -> None:
    import av

    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.bit_rate = 120_000
        for picture in shown:
            sink.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        sink.mux(stream.encode())


def write_text(path: Path) -> None:
    lines = ["# What a person types during the recording, and when (seconds from the start)."]
    lines += [f'- {{at: {at}, text: "{text}"}}' for at, text in TYPED]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent, help="folder for the three files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_wav(out / "speech.wav", voice())
    write_video(out / "camera.mp4", frames())
    write_text(out / "typed.yaml")


if __name__ == "__main__":
    main()

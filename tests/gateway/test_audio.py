"""Audio of the wire: the values of G.711, and streams whose pieces join."""

import numpy as np
import pytest

from tmlc.errors import InputError
from tmlc.runtimes.gateway.audio import AudioFormat, Resampler, decode, encode


@pytest.mark.parametrize(
    ("kind", "code", "value"),
    [
        ("audio/pcmu", 0xFF, 0), ("audio/pcmu", 0x80, 32124), ("audio/pcmu", 0x00, -32124), ("audio/pcmu", 0xFE, 8),
        ("audio/pcma", 0xD5, 8), ("audio/pcma", 0x55, -8), ("audio/pcma", 0xAA, 32256), ("audio/pcma", 0x2A, -32256),
    ],
)  # fmt: skip
def test_codes_of_g711_have_the_values_of_the_standard(kind, code, value):
    (found,) = decode(bytes([code]), AudioFormat(kind, 8000))
    assert round(found * 32768) == value
    if value:
        assert encode(np.array([found]), AudioFormat(kind, 8000)) == bytes([code])


@pytest.mark.parametrize("kind", ["audio/pcmu", "audio/pcma"])
def test_every_code_comes_back_as_its_value(kind):
    values = decode(bytes(range(256)), AudioFormat(kind, 8000))
    assert np.array_equal(decode(encode(values, AudioFormat(kind, 8000)), AudioFormat(kind, 8000)), values)


def test_samples_beyond_full_scale_are_held_and_half_samples_refused():
    pcm = AudioFormat()
    assert decode(encode(np.array([2.0, -2.0, 1.0]), pcm), pcm).tolist() == [32767 / 32768, -1.0, 32767 / 32768]
    with pytest.raises(InputError, match="inside a sample"):
        decode(b"abc", pcm)


@pytest.mark.parametrize(("source", "target"), [(24000, 16000), (8000, 16000), (16000, 24000), (16000, 8000)])
def test_a_stream_in_pieces_is_the_stream_in_one(source, target):
    samples = np.sin(np.arange(source) * 0.1).astype(np.float32)
    pieces, whole = Resampler(source, target), Resampler(source, target)
    cut = [pieces.push(samples[at : at + 480]) for at in range(0, source, 480)] + [pieces.push(samples[:0], True)]
    assert np.allclose(np.concatenate(cut), whole.push(samples, True), atol=1e-6)


@pytest.mark.parametrize(
    ("source", "target", "behind"), [(24000, 16000, 20), (16000, 24000, 20), (8000, 16000, 62), (16000, 8000, 62)]
)
@pytest.mark.parametrize("piece", [0.02, 0.2])
def test_a_stream_is_not_further_behind_than_is_said(source, target, behind, piece):
    stream, came, gone, samples = Resampler(source, target), 0.0, 0.0, np.zeros(round(piece * source), np.float32)
    for _ in range(200):
        came += 1000 * samples.size / source
        gone += 1000 * stream.push(samples).size / target
        assert came - gone <= behind + 1e-6

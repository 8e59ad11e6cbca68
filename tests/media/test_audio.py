"""Reading and writing audio files."""

import contextlib

import numpy as np
import pytest
import soundfile

from tmlc.errors import MediaError
from tmlc.runtimes.media.audio import WavWriter, read_audio, write_wav


def tone(rate, seconds=1.0, hertz=440.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_channels_become_mono_at_the_model_rate(tmp_path, rate, channels):
    path = tmp_path / "in.wav"
    soundfile.write(path, np.stack([tone(rate)] * channels, axis=1), rate, subtype="PCM_16")
    heard = read_audio(path)
    assert heard.dtype == np.float32
    assert abs(heard.size - 16000) <= 1
    middle = slice(2000, 14000)
    assert np.abs(heard[middle] - tone(16000)[: heard.size][middle]).max() < 2e-3


def test_channels_are_averaged(tmp_path):
    left, right = tone(16000), np.zeros(16000)
    soundfile.write(tmp_path / "in.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    assert np.allclose(read_audio(tmp_path / "in.wav"), left / 2, atol=1e-6)


def test_a_file_longer_than_one_block_has_no_seam(tmp_path):
    signal = tone(44100, seconds=4.0)
    soundfile.write(tmp_path / "in.wav", signal, 44100, subtype="FLOAT")
    heard = read_audio(tmp_path / "in.wav")
    assert np.abs(heard[2000:-2000] - tone(16000, 4.0)[: heard.size][2000:-2000]).max() < 2e-3


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
def test_every_wav_coding_is_read(tmp_path, subtype):
    soundfile.write(tmp_path / "in.wav", tone(16000), 16000, subtype=subtype)
    assert np.abs(read_audio(tmp_path / "in.wav") - tone(16000)).max() < 0.05


def test_written_wav_reads_back_and_clips(tmp_path):
    write_wav(tmp_path / "out.wav", np.array([0.0, 0.5, -0.5, 1.5, -1.5], np.float32), 16000)
    assert np.allclose(read_audio(tmp_path / "out.wav"), [0, 0.5, -0.5, 1, -1], atol=1e-4)


def test_writing_in_pieces_is_writing_at_once(tmp_path):
    signal = tone(16000).astype(np.float32)
    write_wav(tmp_path / "whole.wav", signal, 16000)
    with WavWriter(tmp_path / "pieces.wav", 16000) as sink:
        for start in range(0, signal.size, 777):
            sink.write(signal[start : start + 777])
    assert (tmp_path / "whole.wav").read_bytes() == (tmp_path / "pieces.wav").read_bytes()


def bad_files(tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is not audio\n" * 50)
    (tmp_path / "header.wav").write_bytes(b"RIFF\x24\x00\x00\x00WAVEfmt ")
    soundfile.write(tmp_path / "silent.wav", np.zeros(0), 16000)
    nan = tone(16000)
    nan[7] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, 16000, subtype="FLOAT")
    return ["empty.wav", "text.wav", "header.wav", "silent.wav", "nan.wav", "missing.wav"]


def test_what_does_not_decode_is_one_clear_error(tmp_path):
    for name in bad_files(tmp_path):
        with pytest.raises(MediaError) as caught:
            read_audio(tmp_path / name)
        assert name in caught.value.where
        assert caught.value.fix and "\n" not in caught.value.what


def test_a_wav_cut_short_gives_what_it_holds_or_an_error(tmp_path):
    soundfile.write(tmp_path / "in.wav", tone(16000), 16000, subtype="PCM_16")
    data = (tmp_path / "in.wav").read_bytes()
    for size in range(0, len(data), 1511):
        (tmp_path / "cut.wav").write_bytes(data[:size])
        with contextlib.suppress(MediaError):
            assert read_audio(tmp_path / "cut.wav").size <= (size - 44) // 2

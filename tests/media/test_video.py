"""Video files and folders of pictures, asked by time."""

import av
import numpy as np
import pytest
from PIL import Image

from tmlc.errors import MediaError
from tmlc.runtimes.media.video import VideoSource


def colour(index):
    return (20 * index % 256, 255 - 20 * index % 256, 128)


def write_pictures(folder, count, size=(64, 64), suffix="png"):
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", size, colour(index)).save(folder / f"{index:04d}.{suffix}")


def write_video(path, count, rate=10, size=(64, 64)):
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(count):
            picture = np.full((size[1], size[0], 3), colour(index), np.uint8)
            sink.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        sink.mux(stream.encode())


def test_a_folder_shows_its_pictures_in_the_order_of_names_at_fps(tmp_path):
    write_pictures(tmp_path / "frames", 5)
    source = VideoSource(tmp_path / "frames", 64, 64, fps=10)
    for seconds, index in [(0.0, 0), (0.05, 0), (0.1, 1), (0.35, 3), (0.49, 4)]:
        frame = source.at(seconds)
        assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
        assert tuple(frame[0, 0]) == colour(index)
    assert source.at(0.5) is None


def test_a_video_file_shows_the_frame_of_the_time(tmp_path):
    write_video(tmp_path / "clip.mp4", 12)
    source = VideoSource(tmp_path / "clip.mp4", 32, 32)
    for seconds, index in [(0.0, 0), (0.31, 3), (0.75, 7), (1.15, 11)]:
        assert np.abs(source.at(seconds)[16, 16].astype(int) - colour(index)).max() < 25
    assert source.at(1.3) is None


def test_frames_are_cropped_at_the_centre_to_the_aspect_and_scaled(tmp_path):
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 20:60] = 200
    (tmp_path / "frames").mkdir()
    Image.fromarray(picture).save(tmp_path / "frames" / "a.png")
    frame = VideoSource(tmp_path / "frames", 20, 20).at(0.0)
    assert frame.shape == (20, 20, 3)
    assert (frame[:, 1:-1] == 200).all() and (frame > 150).all()  # the filter blends at the cut


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    (tmp_path / "frames").mkdir()
    Image.new("L", (8, 8), 90).save(tmp_path / "frames" / "0.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 128)).save(tmp_path / "frames" / "1.png")
    source = VideoSource(tmp_path / "frames", 8, 8, fps=1)
    assert tuple(source.at(0.0)[0, 0]) == (90, 90, 90)
    assert tuple(source.at(1.0)[0, 0]) == (1, 2, 3)


def test_time_only_moves_forward(tmp_path):
    write_pictures(tmp_path / "frames", 3)
    source = VideoSource(tmp_path / "frames", 8, 8, fps=1)
    source.at(1.0)
    with pytest.raises(ValueError, match="forward"):
        source.at(0.5)


def test_what_is_no_video_is_one_clear_error(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx")
    for name in ("text.mp4", "empty.mp4", "nothing", "broken", "missing"):
        with pytest.raises(MediaError) as caught:
            VideoSource(tmp_path / name, 8, 8)
        assert name in caught.value.where
        assert caught.value.fix and "\n" not in caught.value.what


def test_audio_alone_is_not_a_video(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "sound.wav", np.zeros(800), 16000)
    with pytest.raises(MediaError, match="no video stream"):
        VideoSource(tmp_path / "sound.wav", 8, 8)


def test_a_video_cut_short_gives_its_frames_or_an_error(tmp_path):
    write_video(tmp_path / "clip.mp4", 12)
    data = (tmp_path / "clip.mp4").read_bytes()
    for size in range(0, len(data), max(1, len(data) // 12)):
        (tmp_path / "cut.mp4").write_bytes(data[:size])
        try:
            source = VideoSource(tmp_path / "cut.mp4", 8, 8)
            for tenth in range(13):
                source.at(tenth / 10)
        except MediaError:
            pass

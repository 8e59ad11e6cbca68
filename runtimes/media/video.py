"""Video as a camera would deliver it: a file or a folder of pictures, asked for the frame shown at a time.

Frames are cropped at the centre to the model's aspect ratio and scaled to its size. Decoding runs forward
only, one frame ahead of what was asked for, so a long file needs the memory of two frames.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from tmlc.errors import MediaError
from tmlc.runtimes.media import require

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
FIX = "give a video file that a player can open, or a folder of PNG or JPEG frames"


class VideoSource:
    """The frames of a video file or of a folder of pictures, by time.

    Args:
        path: a video file (anything PyAV decodes) or a folder; pictures of a folder are taken in the order of
            their names. height, width: size of the frames handed out.
        fps: frames a second of a folder (a file says so itself).
    Raises:
        MediaError: nothing there, or it does not decode.
    """

    def __init__(self, path: str | os.PathLike[str], height: int, width: int, fps: float = 25.0) -> None:
        self.path = Path(path)
        self.height, self.width = height, width
        self._ops = require("PIL.ImageOps", "reading video")
        if self.path.is_dir():
            self._frames = self._pictures(fps)
        elif self.path.is_file():
            self._frames = self._file()
        else:
            raise MediaError("no such video file or folder", where=str(self.path), fix="check the path")
        self._current: tuple[float, float, Any] | None = None  # start, end, picture
        self._ahead = next(self._frames, None)
        if self._ahead is None:
            raise MediaError("the video holds no frames", where=str(self.path), fix=FIX)
        self._asked = float("-inf")
        self._scaled: np.ndarray | None = None

    def at(self, seconds: float) -> np.ndarray | None:
        """The frame on show at `seconds` (uint8 [height, width, 3]), or None before the first and after the
        last.

        Times must not decrease from call to call (ValueError): the source only reads forward.
        """
        if seconds < self._asked:
            raise ValueError(f"video is read forward only: {seconds} s after {self._asked} s")
        self._asked = seconds
        while self._ahead is not None and self._ahead[0] <= seconds:
            self._current, self._scaled = self._ahead, None
            self._ahead = next(self._frames, None)
        if self._current is None or (self._ahead is None and seconds >= self._current[1]):
            return None
        if self._scaled is None:
            self._scaled = self._fit(self._current[2])
        return self._scaled

    def close(self) -> None:
        """Close the file. The source hands out nothing afterwards."""
        self._frames.close()
        self._ahead = self._current = None

    def _fit(self, picture: Any) -> np.ndarray:
        image = picture.to_image() if hasattr(picture, "to_image") else picture
        image = self._ops.fit(image.convert("RGB"), (self.width, self.height), method=2)  # 2: bilinear
        return np.ascontiguousarray(np.asarray(image, np.uint8))

    def _pictures(self, fps: float) -> Generator[tuple[float, float, Any], None, None]:
        image = require("PIL.Image", "reading video")
        names = sorted(p for p in self.path.iterdir() if p.suffix.lower() in PICTURES)
        for index, name in enumerate(names):
            try:
                with image.open(name) as picture:
                    picture.load()
                    yield index / fps, (index + 1) / fps, picture.copy()
            except (OSError, ValueError, SyntaxError) as error:
                raise MediaError("the picture cannot be decoded", where=str(name), fix=FIX) from error

    def _file(self) -> Generator[tuple[float, float, Any], None, None]:
        av = require("av", "reading video")
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise MediaError("the file has no video stream", where=str(self.path), fix=FIX)
                stream = container.streams.video[0]
                rate = stream.average_rate or stream.guessed_rate or 25
                shown, origin = 0.0, None
                for frame in container.decode(stream):
                    time = frame.time if frame.time is not None else shown
                    origin = time if origin is None else origin
                    start = time - origin
                    shown = start + 1.0 / float(rate)
                    yield start, shown, frame
        except (av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(f"the video cannot be decoded: {_reason(error)}", where=str(self.path), fix=FIX) from error


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", "") or error).split())

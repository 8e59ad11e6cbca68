"""Videos of repeated moves in the layout of RepCount (TransRAC, CVPR 2022) on a person's own disk.

    [annotation/]test.csv, valid.csv, train.csv    a row a video: type, name, count, L1, L2, …
    [video/]test/NAME, valid/NAME, train/NAME      the videos

Only `name` and `count` are read; L1, L2, … are the first and last frame of each cycle, which no published score needs.
All rows are checked before the first video is played; a video is decoded when its turn comes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from tmlc.errors import InputError
from tmlc.model_zoo.interaction.tasks import Episode
from tmlc.model_zoo.interaction.tasks.episode import CLIP_FRAMES, FRAME_SIZE, TEXT_IN, TICK_SAMPLES, VIDEO_EVERY
from tmlc.runtimes.media.video import VideoSource

SPLITS = {f"repcount_{split}": split for split in ("test", "valid", "train")}
"""Name of a set → its file and folder."""
PROMPT = "count jumps"
"""What is typed; the model was taught no other words for it."""
BEGIN = 2 * VIDEO_EVERY
"""The tick in which the video begins; until then its first frame stands still and the prompt is typed."""
WAIT = 2 * VIDEO_EVERY
"""Ticks after its end, in which the last frame stands still and the last number can be said."""
TICK_SECONDS = 0.2
MOST_SECONDS = 600
MOST_LABEL_BYTES = 1 << 24
FIX = "compare it with the data set's own loaders, or leave this set out with --tasks"


class Counted(Sequence[Episode]):
    """The videos of one split, in the order of its file.

    An item is an `Episode` of silence in which `PROMPT` is typed and then the video is shown; it has no target, and its
    label `count` is the true one. Reading one raises MediaError for a video that cannot be decoded, and InputError for
    one that is longer than `MOST_SECONDS`.

    Args:
        data: the folder of the set.
        name: one of `SPLITS`.
        most: as many are read; None: all.

    Raises:
        InputError: a row or a video is missing or not as it should be; names the file, and the row or the video.
    """

    def __init__(self, data: Path, name: str, most: int | None = None) -> None:
        self.name = name
        path = _labels(data, name)
        assert path is not None, "asked for where there is one"
        rows = _rows(path)[:most]
        self.counts = [count for _, count in rows]
        self.videos = [_video(data, SPLITS[name], video) for video, _ in rows]

    def __len__(self) -> int:
        return len(self.videos)

    @overload
    def __getitem__(self, index: int) -> Episode: ...
    @overload
    def __getitem__(self, index: slice) -> list[Episode]: ...
    def __getitem__(self, index: int | slice) -> Episode | list[Episode]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        shown = _clips(self.videos[index])
        ticks = BEGIN + len(shown) * VIDEO_EVERY + WAIT
        video = {BEGIN + n * VIDEO_EVERY: clip for n, clip in enumerate(shown)}
        for tick in range(0, BEGIN, VIDEO_EVERY):
            video[tick] = np.stack([shown[0][0]] * CLIP_FRAMES)
        for tick in range(ticks - WAIT, ticks, VIDEO_EVERY):
            video[tick] = np.stack([shown[-1][-1]] * CLIP_FRAMES)
        text = [PROMPT[at : at + TEXT_IN] for at in range(0, len(PROMPT), TEXT_IN)]
        silence = np.zeros(ticks * TICK_SAMPLES, np.float32)
        return Episode(
            task=self.name, seed=index, split="test", ticks=ticks, audio=silence, video=video,
            text=text + [""] * (ticks - len(text)), inject={}, say=[], target_audio=silence,
            target_text=[b""] * ticks, speaks=np.zeros(ticks, bool), labels={"count": self.counts[index]},
        )  # fmt: skip


def counted_sets(data: Path) -> list[str]:
    """Which of `SPLITS` have a file of labels in a folder."""
    return [name for name in SPLITS if _labels(data, name) is not None]


def _labels(data: Path, name: str) -> Path | None:
    file = f"{SPLITS[name]}.csv"
    return next((path for path in (data / "annotation" / file, data / file) if path.is_file()), None)


def _rows(path: Path) -> list[tuple[str, int]]:
    """(name, count) of each row."""
    if path.stat().st_size > MOST_LABEL_BYTES:
        raise InputError(f"the labels are more than {MOST_LABEL_BYTES >> 20} MiB", where=str(path), fix=FIX)
    found = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            missing = [column for column in ("name", "count") if column not in (table.fieldnames or ())]
            if missing:
                raise InputError(f"no column {missing[0]}", where=str(path), fix=FIX)
            for row in table:
                found.append((_name(row["name"], path, table.line_num), _count(row["count"], path, table.line_num)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"this is no table in CSV: {error}", where=str(path), fix=FIX) from None
    if not found:
        raise InputError("the table has no row", where=str(path), fix=FIX)
    return found


def _name(value: str | None, path: Path, line: int) -> str:
    # Beside the file systems' separators, a name from a file of others must not leave its folder.
    if not value or value in (".", "..") or any(sign in value for sign in "/\\\0"):
        raise InputError(f"line {line}: {value!r} is no name of a video", where=str(path), fix=FIX)
    return value


def _count(value: str | None, path: Path, line: int) -> int:
    """Whole numbers are written as 3 or, by some tables, as 3.0."""
    try:
        number = float(value or "")
    except ValueError:
        number = math.nan
    if not 0 <= number <= 10000 or number != int(number):
        raise InputError(f"line {line}: {value!r} is no count", where=str(path), fix=f"{FIX}, or take the row out")
    return int(number)


def _video(data: Path, split: str, name: str) -> Path:
    places = (data / "video" / split / name, data / split / name)
    for path in places:
        if path.is_file():
            return path
    raise InputError(f"no video {name}", where=str(places[0].parent), fix=f"{FIX}, or take its row out")


def _clips(path: Path) -> list[np.ndarray]:
    """Two frames, uint8 [2, 64, 64, 3], of each second's first tick, as a camera would hand them out."""
    source = VideoSource(path, FRAME_SIZE, FRAME_SIZE)
    clips: list[np.ndarray] = []
    try:
        while True:
            begin = len(clips) * VIDEO_EVERY
            times = [(begin + (n + 0.5) / CLIP_FRAMES) * TICK_SECONDS for n in range(CLIP_FRAMES)]
            frames = [frame for frame in map(source.at, times) if frame is not None]
            if not frames and clips:
                return clips
            if not frames:  # shorter than what a clip waits for
                raise InputError("the video is over before its first clip", where=str(path), fix="take its row out")
            if times[0] > MOST_SECONDS:
                raise InputError(f"the video is longer than {MOST_SECONDS} s", where=str(path), fix="take its row out")
            clips.append(np.stack(frames + [frames[-1]] * (CLIP_FRAMES - len(frames))))
    finally:
        source.close()

"""Recordings of Full-Duplex-Bench v1 and v1.5 on a person's own disk: the folders, their labels, their audio; and which
sets a folder holds, those of RepCount (`repcount.py`) among them.

    v1    SET/ID/input.wav, and turn_taking.json or interrupt.json where the rule needs a time
    v1.5  SET/ID/input.wav and metadata.json

All labels are read and checked before the first recording is played; audio is read when its turn comes, and only then
is a time after its end found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from tmlc.errors import InputError, UsageError
from tmlc.eval.repcount import SPLITS, Counted, counted_sets
from tmlc.eval.voice import RATE
from tmlc.model_zoo.interaction.tasks import Episode
from tmlc.model_zoo.interaction.tasks.episode import TICK_SAMPLES
from tmlc.runtimes.media.audio import read_audio

MOST_LABEL_BYTES = 1 << 20
FIX = "compare it with the data set's own README, or leave this set out with --tasks"


@dataclass(frozen=True)
class Layout:
    """Where the times of a set stand.

    Attributes:
        file: the label file beside input.wav; "" when the rule needs no time.
        field: the entry with the times: of the first object of a list (v1), or of the object itself (v1.5).
        listed: is the file a list of objects?
        times: how many of the entry's numbers are used, in seconds, in rising order.
    """

    file: str = ""
    field: str = ""
    listed: bool = False
    times: int = 0

    @property
    def path(self) -> str:
        """Of the entry within the file, for errors."""
        return f"[0].{self.field}" if self.listed else self.field


_OVERLAP = Layout("metadata.json", "timestamps", times=2)
SETS = {
    "candor_pause_handling": Layout(),
    "synthetic_pause_handling": Layout(),
    "candor_turn_taking": Layout("turn_taking.json", "timestamp", listed=True, times=1),
    "icc_backchannel": Layout(),
    "synthetic_user_interruption": Layout("interrupt.json", "timestamp", listed=True, times=2),
    "user_interruption": _OVERLAP,
    "user_backchannel": _OVERLAP,
    "talking_to_other": _OVERLAP,
    "background_speech": _OVERLAP,
}
"""Folder → its labels: v1 first, then the four overlaps of v1.5."""


class Recordings(Sequence[Episode]):
    """The recordings of one set, in the order of their names (numbers by value).

    An item is an `Episode` with the user's audio and no target; its label `times` holds samples. Reading one raises
    MediaError for audio that cannot be decoded, and InputError for a time after its end.

    Args:
        folder: of the set; its name is in `SETS`.
        most: as many are read; None: all.

    Raises:
        InputError: no recordings, no input.wav, or labels that are not as `SETS` has them; names file and field.
    """

    def __init__(self, folder: Path, most: int | None = None) -> None:
        self.name = folder.name
        found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        self.folders = sorted(found, key=_order)[:most]
        if not self.folders:
            raise InputError("the set holds no recording", where=str(folder), fix="each is a folder with an input.wav")
        for path in self.folders:
            if not (path / "input.wav").is_file():
                raise InputError("no input.wav", where=str(path), fix=FIX)
        self.times = [_times(path, SETS[self.name]) for path in self.folders]

    def __len__(self) -> int:
        return len(self.folders)

    @overload
    def __getitem__(self, index: int) -> Episode: ...
    @overload
    def __getitem__(self, index: slice) -> list[Episode]: ...
    def __getitem__(self, index: int | slice) -> Episode | list[Episode]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        folder, times = self.folders[index], [round(seconds * RATE) for seconds in self.times[index]]
        heard = read_audio(folder / "input.wav", RATE)
        if times and times[-1] > len(heard):
            layout = SETS[self.name]
            raise InputError(
                f"{layout.path} is {times[-1] / RATE:g} s, and input.wav ends at {len(heard) / RATE:g} s",
                where=str(folder / layout.file), fix=FIX,
            )  # fmt: skip
        ticks = -(-len(heard) // TICK_SAMPLES)
        audio = np.zeros(ticks * TICK_SAMPLES, np.float32)
        audio[: len(heard)] = heard
        return Episode(
            task=self.name, seed=index, split="test", ticks=ticks, audio=audio, video={}, text=[""] * ticks, inject={},
            say=[], target_audio=np.zeros_like(audio), target_text=[b""] * ticks, speaks=np.zeros(ticks, bool),
            labels={"times": times},
        )  # fmt: skip


def find_sets(data: Path, names: str | None = None, most: int | None = None) -> list[Recordings | Counted]:
    """The sets in a folder, in the order of `SETS`, then of `SPLITS`; with `names` ("a,b") only these, and all of them.

    Raises:
        UsageError: no such folder, none of the sets in it, or one of `names` that is not.
        InputError: as `Recordings` and `Counted` have it.
    """
    if not data.is_dir():
        raise UsageError("no such folder", where=str(data), fix="name the folder that holds the sets")
    found = [name for name in SETS if (data / name).is_dir()] + counted_sets(data)
    if not found:
        tables = ", ".join(f"{split}.csv" for split in SPLITS.values())
        raise UsageError("no set of Full-Duplex-Bench or RepCount is here", where=str(data),
                         fix=f"the folders are named {', '.join(SETS)}; RepCount has {tables}")  # fmt: skip
    wanted = found if names is None else [name.strip() for name in names.split(",") if name.strip()]
    missing = [name for name in wanted if name not in found]
    if missing or not wanted:
        what = f"no set {', '.join(missing)} in {data}" if missing else "no set is named"
        raise UsageError(what, where="--tasks", fix=f"choose from: {', '.join(found)}")
    chosen = [name for name in found if name in wanted]
    return [Recordings(data / name, most) if name in SETS else Counted(data, name, most) for name in chosen]


def _order(path: Path) -> tuple[int, int, str]:
    name = path.name
    return (0, int(name), name) if name.isascii() and name.isdigit() and len(name) < 19 else (1, 0, name)


def _times(folder: Path, layout: Layout) -> list[float]:
    """The first `layout.times` seconds of the label; [] where none is needed."""
    if not layout.file:
        return []
    path = folder / layout.file
    value: Any = _read(path)
    where = layout.path
    if layout.listed:
        if not isinstance(value, list) or not value:
            raise InputError("not a list with an object in it", where=str(path), fix=FIX)
        value = value[0]
    given = value.get(layout.field) if isinstance(value, dict) else None
    if not isinstance(given, list) or len(given) < layout.times:
        raise InputError(f"{where} is not a list of {layout.times} or more seconds", where=str(path), fix=FIX)
    used = given[: layout.times]
    for number, seconds in enumerate(used):
        good = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not good or not 0 <= seconds < 1e6:
            raise InputError(f"{where}[{number}] is no time in seconds", where=str(path), fix=FIX)
    if used != sorted(used):
        raise InputError(f"{where} ends before it begins", where=str(path), fix=FIX)
    return [float(seconds) for seconds in used]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError("no such label file", where=str(path), fix=FIX)
    if path.stat().st_size > MOST_LABEL_BYTES:
        raise InputError(f"the labels are more than {MOST_LABEL_BYTES >> 20} MiB", where=str(path), fix=FIX)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise InputError("this is not JSON", where=str(path), fix=FIX) from None

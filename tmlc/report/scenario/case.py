"""The case file of `tmlc profile --case FILE.yaml`: what is played into how many sessions, and beside what.

Strict: an unknown key, a value of the wrong type or a combination that means nothing is refused with its place. All of
it is described in docs/latency.md, "Cases"; `perf/cases/` holds the ones that `make perf` plays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tmlc.errors import UsageError, reason
from tmlc.yaml_text import YamlFault, parse_yaml

MAX_SESSIONS = 1024
MAX_BYTES = 1 << 20
Name = Annotated[str, Field(min_length=1, max_length=200)]


class _Part(BaseModel):
    """Unknown keys are errors, and numbers are not taken from texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def _needs_path(self, kinds: tuple[str, ...], may: tuple[str, ...] = ()) -> None:
        kind, path = getattr(self, "kind", ""), getattr(self, "path", None)
        if kind in kinds and path is None:
            raise ValueError(f"kind {kind} needs a path")
        if path is not None and kind not in (*kinds, *may):
            raise ValueError(f"kind {kind} takes no path")


class Audio(_Part):
    """What a session hears. `dialogue`: made-up speech whose ends are labelled, or a folder (`path`) of WAV files with
    their labels; `made-up`: noise with the loudness of speech; `file`: one recording, silence after its end.
    """

    kind: Literal["silence", "made-up", "dialogue", "file"] = "silence"
    path: str | None = None

    @model_validator(mode="after")
    def whole(self) -> Audio:
        self._needs_path(("file",), may=("dialogue",))
        return self


class Video(_Part):
    """What a session sees. `every`: ticks from one clip to the next; as often as the model looks where it is left
    out. `fps`: of a folder of pictures.
    """

    kind: Literal["none", "made-up", "file"] = "none"
    path: str | None = None
    every: Annotated[int, Field(ge=1, le=10_000)] | None = None
    fps: Annotated[float, Field(gt=0, le=1000, strict=False)] = 25.0

    @model_validator(mode="after")
    def whole(self) -> Video:
        self._needs_path(("file",))
        if self.kind == "none" and self.every is not None:
            raise ValueError("`every` without a video means nothing")
        return self


class Text(_Part):
    """What is typed: `words` every so many seconds, or a file of timed text."""

    kind: Literal["none", "made-up", "file"] = "none"
    path: str | None = None
    words: Name = "hello"
    every_seconds: Annotated[float, Field(gt=0, le=86_400, strict=False)] = 2.0

    @model_validator(mode="after")
    def whole(self) -> Text:
        self._needs_path(("file",))
        return self


class Load(_Part):
    """What else runs meanwhile, in processes of its own. `busy`: arithmetic; `memory`: reads 256 MiB over and over;
    `model`: an engine that ticks without a pause (`path`: its package; the profiled one where it is left out), with
    `threads` kernel threads.
    """

    kind: Literal["busy", "memory", "model"]
    count: Annotated[int, Field(ge=1, le=64)] = 1
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    path: str | None = None
    threads: Annotated[int, Field(ge=1, le=64)] = 1

    @model_validator(mode="after")
    def whole(self) -> Load:
        self._needs_path((), may=("model",))
        return self


class Case(_Part):
    """One scenario.

    Attributes:
        name, about: what it is called, and one sentence on what it stands for.
        sessions: conversations that are ticked together.
        seconds: length of each.
        loop: `closed`: a tick begins when the one before it is done; `open`: ticks begin on the grid of real time,
            whether or not the last one is done, so that lateness counts.
        warm_up: ticks at the start of each conversation that no figure counts.
        repetitions: how often all of it is played, with new sessions each time.
        audio, video, text: what goes in.
        speak: `free`: the model chooses; `always`: each tick is given words to say, so that a model that likes silence
            is not taken for a fast one.
        context: positions that each session has behind it at the start; `full`: as many as it keeps.
        load: what else runs on the machine.
    """

    name: Name
    about: Annotated[str, Field(max_length=1000)] = ""
    sessions: Annotated[int, Field(ge=1, le=MAX_SESSIONS)] = 1
    seconds: Annotated[float, Field(ge=0.4, le=86_400, strict=False)] = 60.0
    loop: Literal["closed", "open"] = "closed"
    warm_up: Annotated[int, Field(ge=1, le=10_000)] = 1
    repetitions: Annotated[int, Field(ge=1, le=1000)] = 1
    audio: Audio = Audio()
    video: Video = Video()
    text: Text = Text()
    speak: Literal["free", "always"] = "free"
    context: Annotated[int, Field(ge=0, le=1 << 40)] | Literal["full"] = 0
    load: list[Load] = Field(default_factory=list, max_length=16)

    def to_json(self) -> dict[str, Any]:
        """The case with all its defaults, as the profile records it."""
        return self.model_dump(mode="json")

    @property
    def clock(self) -> str:
        """The clock of `make_clock`."""
        return "wall" if self.loop == "open" else "input"

    def what(self) -> str:
        """What is played, in words."""
        parts = [f"audio {self.audio.kind}"]
        parts += [f"{name} {part.kind}" for name, part in (("video", self.video), ("text", self.text))
                  if part.kind != "none"]  # fmt: skip
        return f"{self.name}: {', '.join(parts)}"


def read_case(path: Path) -> Case:
    """The case in a YAML file; paths in it are taken from the file's folder.

    Raises:
        UsageError: it cannot be read, is no mapping, or something in it is unknown, missing or out of range.
    """
    fix = "docs/latency.md, “Cases”, lists what a case may say"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError("a case file of more than 1 MiB", where=str(path), fix=fix)
        value = parse_yaml(path.read_bytes())
    except (OSError, YamlFault) as error:
        what = f"the case cannot be read: {reason(error)}"
        raise UsageError(what, where=str(path), fix=fix) from error
    if not isinstance(value, dict):
        raise UsageError("a case is a mapping of settings", where=str(path), fix=fix)
    try:
        case = Case.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the case"
        told = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{place}: {told[:1].lower()}{told[1:]}", where=str(path), fix=fix) from error
    return _placed(case, path.absolute().parent)


def _placed(case: Case, folder: Path) -> Case:
    """The case with its paths made absolute: from the folder of its file."""

    def placed(part: Any) -> Any:
        return part if part.path is None else part.model_copy(update={"path": str(folder / part.path)})

    media = {name: placed(getattr(case, name)) for name in ("audio", "video", "text")}
    return case.model_copy(update={**media, "load": [placed(load) for load in case.load]})

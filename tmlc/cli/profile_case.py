"""What `tmlc profile` plays: a case file, a recording, or made-up input that keeps the model busy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from tmlc.cli.inputs import open_recording
from tmlc.errors import UsageError

if TYPE_CHECKING:
    from tmlc.report.scenario.case import Case
    from tmlc.runtimes.core.engine import Engine
    from tmlc.runtimes.media.recording import Recording, TickShape

SECONDS = 130.0
FIXED_BY_CASE = ("audio", "video", "fps", "text", "seconds", "clock")


@dataclass(frozen=True)
class Chosen:
    """What is played, in words too; `recording` takes the place of the case's inputs."""

    case: Case
    what: str
    recording: Recording | None = None


def refuse_beside(context: click.Context, option: str, names: tuple[str, ...], why: str) -> None:
    """UsageError for any of these options that was given."""
    for parameter in context.command.params:
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            hint = parameter.get_error_hint(context)
            raise UsageError(f"{hint} and {option}", where=option, fix=f"leave one of them out: {why}")


def choose(
    engine: Engine,
    shape: TickShape,
    case: Case | None,
    audio: Path | None,
    video: Path | None,
    fps: float,
    text: Path | None,
    seconds: float | None,
    clock: str,
) -> Chosen:
    """The case that was read, or one of the options.

    Raises:
        UsageError: the model takes no such input, or there are fewer than two ticks.
        MediaError: a file is missing or does not decode.
    """
    from tmlc.report.scenario.case import Case
    from tmlc.report.scenario.inputs import busy_case

    recording, loop = None, "open" if clock == "wall" else "closed"
    files = [path for path in (audio, video, text) if path is not None]
    if case is not None:
        length, what = case.seconds, case.what()
    elif files:
        recording = open_recording(engine.manifest, audio, video, fps, text)
        length, what = recording.duration() if seconds is None else seconds, ", ".join(map(str, files))
    else:
        length, what = SECONDS if seconds is None else seconds, "made-up audio, video and text"
    if round(length / shape.seconds, 6) <= 1:
        raise UsageError(
            "a profile needs at least two ticks", where="--seconds", fix="give a longer recording, or --seconds"
        )
    if case is None:
        if recording is None:
            case = busy_case(engine, shape, length, loop)
        else:
            given = {"audio": audio, "video": video, "text": text}
            parts: dict[str, dict[str, Any]] = {
                name: {"kind": "file", "path": str(path)} for name, path in given.items() if path is not None
            }
            if video is not None:
                parts["video"]["fps"] = fps
            case = Case.model_validate({"name": "recording", "seconds": length, "loop": loop, **parts})
    if round(case.seconds / shape.seconds, 6) <= case.warm_up:
        raise UsageError(
            f"{case.seconds:g} s leave no tick behind a warm-up of {case.warm_up}",
            where=f"case {case.name}: warm_up",
            fix="play a longer case, or warm up for less",
        )
    return Chosen(case, what, recording)

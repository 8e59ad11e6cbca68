"""The recording of `run` and `profile`: their shared options, checked against what the model takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmlc.errors import UsageError

if TYPE_CHECKING:
    from tmlc.package.manifest import Manifest
    from tmlc.runtimes.media.recording import Recording, TickShape

_FILE = click.Path(path_type=Path)
SEED = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Random stream of the session.",
)


def recording_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --audio, --video, --fps and --text."""
    for option in (
        click.option("--text", type=_FILE, metavar="YAML", help="Timed text: a list of {at: seconds, text: ...}."),
        click.option(
            "--fps",
            type=click.FloatRange(0.1, 1000),
            default=25.0,
            show_default=True,
            help="Frames a second of a folder of pictures (a video file knows its own).",
        ),
        click.option("--video", type=_FILE, metavar="PATH", help="Video file, or folder of PNG or JPEG frames."),
        click.option("--audio", type=_FILE, metavar="WAV", help="WAV of any rate and channels (FLAC and OGG too)."),
    ):
        function = option(function)
    return function


def tick_shape(manifest: Manifest) -> TickShape:
    """What one tick of the model takes."""
    from tmlc.runtimes.media.recording import TickShape

    tick = manifest.tick
    return TickShape(
        tick.duration_ms,
        tick.sample_rate or 16000,
        tick.clip_frames if tick.video_positions else 0,
        tick.frame_height,
        tick.frame_width,
        max(1, tick.video_every),
    )


def open_recording(
    manifest: Manifest, audio: Path | None, video: Path | None, fps: float, text: Path | None
) -> Recording:
    """Read and check the inputs.

    Raises:
        MediaError: a file is missing or does not decode.
        UsageError: the model takes no such input.
    """
    from tmlc.runtimes.media.audio import read_audio
    from tmlc.runtimes.media.recording import Recording
    from tmlc.runtimes.media.timed_text import read_timed_text
    from tmlc.runtimes.media.video import VideoSource

    shape = tick_shape(manifest)
    takes = {"--audio": manifest.tick.audio_in > 0, "--video": shape.frames > 0, "--text": True}
    for option, given in (("--audio", audio), ("--video", video), ("--text", text)):
        if given is not None and not takes[option]:
            raise UsageError(
                f"the model {manifest.model.name} takes no {option[2:]}",
                where=option,
                fix="leave the option out; `tmlc inspect` shows what a model takes",
            )
    return Recording(
        shape,
        audio=None if audio is None else read_audio(audio, shape.sample_rate),
        video=None if video is None else VideoSource(video, shape.height, shape.width, fps),
        text=None if text is None else read_timed_text(text),
    )

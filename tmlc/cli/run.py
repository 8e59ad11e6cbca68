"""`tmlc run`: plays recorded audio, video and typed text into a model and writes what it said and wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tmlc.cli.common import (
    FORCE,
    HUGE_PAGES,
    KERNEL_CACHE,
    PIN,
    PORTABLE_BITS,
    THREADS,
    print_json,
    progress,
    show,
    verb,
)
from tmlc.cli.inputs import SEED, open_recording, recording_options
from tmlc.cli.outputs import Outputs
from tmlc.errors import UsageError


@verb(
    "run",
    example="""
tmlc run nano.tmlc --audio speech.wav -o out/
tmlc run nano.tmlc --audio speech.wav --video camera.mp4 --text typed.yaml -o out/ --seed 7
tmlc run nano.tmlc --text typed.yaml --seconds 20 --clock wall -o out/
""",
)
@click.argument("package", type=click.Path(path_type=Path))
@recording_options
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder for output.wav, transcript.txt and timeline.jsonl.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.0, 86400.0, min_open=True),
    help="Length of the run.  [default: the recording's length]",
)
@click.option("--tail", type=click.FloatRange(0.0, 3600.0), default=0.0, help="Seconds of silence after the recording.")
@click.option(
    "--clock",
    type=click.Choice(["input", "wall"]),
    default="input",
    show_default=True,
    help="input: as fast as it goes. wall: in real time.",
)
@SEED
@click.option(
    "--temperature",
    type=click.FloatRange(0.0, 100.0),
    default=0.0,
    show_default=True,
    help="Of the text; 0 takes the likeliest token.",
)
@THREADS
@PIN
@HUGE_PAGES
@KERNEL_CACHE
@PORTABLE_BITS
@FORCE
def command(
    package: Path,
    audio: Path | None,
    video: Path | None,
    fps: float,
    text: Path | None,
    out: Path,
    seconds: float | None,
    tail: float,
    clock: str,
    seed: int,
    temperature: float,
    threads: int | None,
    pin: bool,
    huge_pages: bool,
    kernel_cache: Path | None,
    portable_bits: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Play a recorded conversation into PACKAGE, tick by tick.

    The same package, seed and inputs give the same bytes, whatever the clock and the threads; with --portable-bits, on
    every machine.
    """
    import tmlc
    from tmlc.report.latency import as_dict, spread
    from tmlc.report.tables import grid, milliseconds
    from tmlc.report.transcript import Transcript
    from tmlc.runtimes.core.clock import make_clock
    from tmlc.runtimes.media.audio import WavWriter
    from tmlc.runtimes.media.player import play

    names = ["output.wav", "transcript.txt", "timeline.jsonl"]
    outputs = Outputs(out, names, force)
    engine = tmlc.load(
        package, threads=threads, sessions=1, pin=pin, portable_bits=portable_bits, huge_pages=huge_pages,
        kernel_cache=kernel_cache,
    )  # fmt: skip
    try:
        recording = open_recording(engine.manifest, audio, video, fps, text)
        length = recording.duration() if seconds is None else seconds
        count = recording.count(length + tail)
        if count == 0:
            raise UsageError(
                "there is nothing to play",
                where="run",
                fix="give --audio or --text, or --seconds for a length",
            )
        period = recording.shape.seconds
        transcript, steps, tokens = Transcript(period), [], 0
        session = engine.session(seed=seed, temperature=temperature)
        with (
            outputs,
            progress(as_json) as report,
            open(outputs.path("timeline.jsonl"), "w", encoding="utf-8") as timeline,
        ):
            rate = engine.manifest.tick.out_sample_rate
            sink = WavWriter(outputs.path("output.wav"), rate) if rate else None
            try:
                for played in play(session, recording, count, make_clock(clock, period)):
                    timeline.write(json.dumps(played.record(period)) + "\n")
                    transcript.add(played.index, played.given.text, played.output.text)
                    if sink is not None and played.output.audio is not None:
                        sink.write(played.output.audio)
                    steps.append(played.step_ms)
                    tokens += len(played.output.tokens)
                    report("playing", played.index + 1, count)
            finally:
                if sink is not None:
                    sink.close()
            outputs.path("transcript.txt").write_text(transcript.text(), encoding="utf-8")
        session.close()
    finally:
        engine.close()
    measured, shown = spread(steps), ("p50", "p99", "max")
    result: dict[str, Any] = {
        "package": str(package),
        "ticks": count,
        "seconds": count * period,
        "tokens": tokens,
        "seed": seed,
        "clock": clock,
        "step_ms": as_dict(measured),
        "files": [str(out / name) for name in names if (out / name).exists()],
    }
    if as_json:
        print_json(result)
        return
    show(
        grid(
            [
                ("played", f"{count} ticks ({count * period:.1f} s), {tokens} tokens written"),
                ("step", ", ".join(f"{k} {milliseconds(getattr(measured, k))}" for k in shown)),
                *(("wrote", name) for name in result["files"]),
            ]
        )
    )

"""`tmlc profile`: latency of ticks and turns against the budget, memory, start-up."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from tmlc.cli.common import (
    FORCE,
    HUGE_PAGES,
    KERNEL_CACHE,
    PIN,
    PORTABLE_BITS,
    THREADS,
    note,
    print_json,
    progress,
    show,
    verb,
)
from tmlc.cli.inputs import SEED, open_recording, recording_options, tick_shape
from tmlc.cli.outputs import Outputs
from tmlc.cli.profile_compare import compare_files
from tmlc.errors import UsageError

SECONDS = 130.0
KERNELS_EVERY = 3  # shares no factor with what a tick does every second or fifth time


@verb(
    "profile",
    example="""
tmlc profile nano.tmlc
tmlc profile nano.tmlc --audio speech.wav --video camera.mp4 --text typed.yaml -o out/report
tmlc profile nano.tmlc --budget 300ms --threads 1 --json
tmlc profile --compare before.json after.json --fail-over 3%
""",
)
@click.argument("package", type=click.Path(path_type=Path), required=False)
@click.option(
    "--compare",
    type=(click.Path(path_type=Path), click.Path(path_type=Path)),
    metavar="A.json B.json",
    help="Measure nothing: say in which figures profile B differs from A.",
)
@click.option(
    "--fail-over",
    metavar="PERCENT",
    help="With --compare: exit code 1 when B is slower than A by more than this, beyond the interval.",
)
@recording_options
@click.option(
    "--seconds",
    type=click.FloatRange(0.4, 86400.0),
    help=f"Length of the session.  [default: the recording's, or {SECONDS:g} of made-up input]",
)
@click.option(
    "--clock",
    type=click.Choice(["input", "wall"]),
    default="input",
    show_default=True,
    help="input: tick after tick. wall: in real time, so that lateness counts.",
)
@click.option(
    "--budget",
    default="400ms",
    show_default=True,
    metavar="TIME",
    help="Turn latency allowed; the step gets what waiting, decoding and sending leave of it.",
)
@click.option(
    "--startup-runs",
    type=click.IntRange(0, 100),
    default=3,
    show_default=True,
    help="Fresh processes to measure start-up with.",
)
@click.option("--no-kernels", is_flag=True, help="Time no single kernel calls, and measure no ceilings.")
@click.option(
    "--kernels-every",
    type=click.IntRange(1, 1000),
    default=KERNELS_EVERY,
    show_default=True,
    metavar="N",
    help="Time kernel calls in every N-th tick.",
)
@SEED
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="STEM", help="Also write STEM.json and STEM.txt.")
@THREADS
@PIN
@HUGE_PAGES
@KERNEL_CACHE
@PORTABLE_BITS
@FORCE
@click.pass_context
def command(
    context: click.Context,
    package: Path | None,
    compare: tuple[Path, Path] | None,
    fail_over: str | None,
    audio: Path | None,
    video: Path | None,
    fps: float,
    text: Path | None,
    seconds: float | None,
    clock: str,
    budget: str,
    startup_runs: int,
    no_kernels: bool,
    kernels_every: int,
    seed: int,
    out: Path | None,
    threads: int | None,
    pin: bool,
    huge_pages: bool,
    kernel_cache: Path | None,
    portable_bits: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Measure PACKAGE on this machine. Exit code 1 when a step's p99 is over what the budget leaves for it.

    Without a recording it plays made-up input that keeps every part of the model busy. With --compare it measures
    nothing and holds two reports against each other.
    """
    if compare is not None:
        _refuse_beside_compare(context)
        compare_files(context, *compare, fail_over, as_json)
        return
    if package is None or fail_over is not None:
        raise UsageError(
            "there is no package to profile" if package is None else "there is nothing to hold --fail-over against",
            where="PACKAGE" if package is None else "--fail-over",
            fix="name a package, or two reports with --compare",
        )
    import tmlc
    from tmlc.report.latency import Budget, parse_milliseconds
    from tmlc.report.profile.file import profile_text
    from tmlc.report.profile.inputs import synthetic_recording
    from tmlc.report.profile.measure import profile_engine
    from tmlc.report.profile.view import profile_tables
    from tmlc.report.tables import plain_text
    from tmlc.runtimes.core.clock import make_clock

    total = parse_milliseconds(budget)
    outputs = (
        Outputs(out.absolute().parent, [f"{out.name}.json", f"{out.name}.txt"], force) if out is not None else None
    )
    engine = tmlc.load(
        package, threads=threads, sessions=1, pin=pin, portable_bits=portable_bits, huge_pages=huge_pages,
        kernel_cache=kernel_cache,
    )  # fmt: skip
    try:
        shape = tick_shape(engine.manifest)
        allowed = Budget(total, shape.duration_ms)
        if allowed.step_ms <= 0:
            raise UsageError(
                f"a budget of {total:g} ms leaves no time for a step",
                where="--budget",
                fix=f"a tick alone takes {shape.duration_ms} ms to fill: allow more",
            )
        made_up = audio is None and video is None and text is None
        if made_up:
            length = SECONDS if seconds is None else seconds
            recording = synthetic_recording(shape, length, engine.model.hears, engine.tokenizer is not None)
        else:
            recording = open_recording(engine.manifest, audio, video, fps, text)
            length = recording.duration() if seconds is None else seconds
        count = recording.count(length)
        if count < 2:
            raise UsageError(
                "a profile needs at least two ticks",
                where="--seconds",
                fix="give a longer recording, or --seconds",
            )
        inputs = {
            "what": "made-up audio, video and text"
            if made_up
            else ", ".join(str(p) for p in (audio, video, text) if p is not None),
            "clock": clock,
            "seed": seed,
        }
        settings = {"threads": threads, "pin": pin, "huge_pages": huge_pages, "portable_bits": portable_bits}
        with progress(as_json) as report:
            view = profile_engine(
                engine,
                recording,
                count,
                make_clock(clock, shape.seconds),
                allowed,
                package=package,
                inputs=inputs,
                settings=settings,
                startup_runs=startup_runs,
                kernels_every=None if no_kernels else kernels_every,
                report=report,
            )
    finally:
        engine.close()
    tables = profile_tables(view)
    if outputs is not None and out is not None:
        with outputs:
            outputs.path(f"{out.name}.json").write_text(profile_text(view), encoding="utf-8")
            outputs.path(f"{out.name}.txt").write_text(plain_text(tables), encoding="utf-8")
    if as_json:
        print_json(view)
    else:
        show(*tables)
    if not view["turn_latency"]["within_budget"]:
        worst = view["step_ms"]["p99"]
        note(f"over budget: the step's p99 is {worst:.1f} ms, the budget leaves {allowed.step_ms:g} ms")
        context.exit(1)


def _refuse_beside_compare(context: click.Context) -> None:
    """UsageError for anything that was given and that only a measurement needs."""
    allowed = {"compare", "fail_over", "as_json"}
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in allowed and source is not None and source is not ParameterSource.DEFAULT:
            raise UsageError(
                f"{parameter.get_error_hint(context)} is for measuring",
                where="--compare",
                fix="leave it out: a comparison reads two reports, and takes --fail-over and --json",
            )

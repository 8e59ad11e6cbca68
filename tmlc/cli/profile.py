"""`tmlc profile`: latency of ticks and turns against the budget, memory, start-up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    require_compiler,
    show,
    verb,
)
from tmlc.cli.inputs import SEED, recording_options, tick_shape
from tmlc.cli.outputs import Outputs
from tmlc.cli.profile_against import ALONE, against_package
from tmlc.cli.profile_case import FIXED_BY_CASE, SECONDS, choose, refuse_beside
from tmlc.cli.profile_compare import compare_files
from tmlc.cli.profile_files import check_files, file_options, names, texts, write_for_ci
from tmlc.cli.profile_options import comparison_options, experiment_options
from tmlc.errors import UsageError

if TYPE_CHECKING:
    from tmlc.runtimes.core.engine import Engine

SITTINGS, MOST_SITTINGS = 10, 100
KERNELS_EVERY = 3  # shares no factor with what a tick does every second or fifth time


@verb(
    "profile",
    example="""
tmlc profile nano.tmlc
tmlc profile nano.tmlc --audio speech.wav --video camera.mp4 --text typed.yaml -o out/report
tmlc profile nano.tmlc --budget 300ms --fail-over p99,growth:5% --threads 1 --json
tmlc profile nano.tmlc --case perf/cases/busy_talker.yaml --find-sessions
tmlc profile nano.tmlc --ablate --checkpoint nano/ --seconds 40
tmlc profile before.tmlc --against after.tmlc --fail-over 3%
tmlc profile --compare before.json after.json --fail-over 3%
""",
)
@click.argument("package", type=click.Path(path_type=Path), required=False)
@comparison_options
@recording_options
@experiment_options
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
@click.option(
    "--sittings",
    type=click.IntRange(0, MOST_SITTINGS),
    default=SITTINGS,
    show_default=True,
    help="Fresh processes that play the session's beginning: what --compare reads.",
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
@file_options
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
    against: Path | None,
    fail_over: str | None,
    audio: Path | None,
    video: Path | None,
    fps: float,
    text: Path | None,
    case_file: Path | None,
    find_sessions: bool,
    ablate: str | None,
    checkpoint: Path | None,
    quality: Path | None,
    seconds: float | None,
    clock: str,
    budget: str,
    startup_runs: int,
    sittings: int,
    no_kernels: bool,
    kernels_every: int,
    seed: int,
    out: Path | None,
    junit: Path | None,
    summary: Path | None,
    threads: int | None,
    pin: bool,
    huge_pages: bool,
    kernel_cache: Path | None,
    portable_bits: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Measure PACKAGE on this machine. Exit code 1 when a figure of --fail-over is over what is allowed: without it,
    when a step's p99 is over what the budget leaves for it.

    Without a case or a recording it plays made-up input that keeps every part of the model busy. With --compare it
    measures nothing and holds two reports against each other.
    """
    if compare is not None:
        _refuse_beside_compare(context)
        compare_files(context, *compare, fail_over, as_json, junit, summary)
        return
    if package is None:
        raise UsageError("there is no package to profile", where="PACKAGE",
                         fix="name a package, or two reports with --compare")  # fmt: skip
    if case_file is not None:
        refuse_beside(context, "--case", FIXED_BY_CASE, "the case says what is played")
    import tmlc
    from tmlc.report.ablate import check_ablation
    from tmlc.report.advice import add_advice, advice_tables
    from tmlc.report.gate import check_gates, gate_records, parse_gates
    from tmlc.report.latency import Budget, parse_milliseconds
    from tmlc.report.profile.experiments import add_ablation, add_sessions_held
    from tmlc.report.profile.measure import profile_engine
    from tmlc.report.profile.quality import read_scores
    from tmlc.report.profile.sittings import Sittings
    from tmlc.report.profile.view import profile_tables
    from tmlc.report.scenario.case import read_case
    from tmlc.report.scenario.load import background_load
    from tmlc.report.scenario.show import Show

    settings: dict[str, Any] = {
        "threads": threads, "pin": pin, "huge_pages": huge_pages, "portable_bits": portable_bits,
    }  # fmt: skip
    loaded = {**settings, "kernel_cache": None if kernel_cache is None else str(kernel_cache.absolute())}

    def load(path: Path, sessions: int) -> Engine:
        return tmlc.load(path, sessions=sessions, **loaded)

    case = read_case(case_file) if case_file is not None else None
    if against is not None:
        refuse_beside(context, "--against", ALONE, "two packages are held against each other, nothing else is measured")
        against_package(context, load, package, against, case, seconds, seed, fail_over, out, force, as_json)
        return
    if (ablate is None) != (checkpoint is None):
        raise UsageError("--ablate and --checkpoint belong together", where="--ablate",
                         fix="give the checkpoint that PACKAGE was compiled from")  # fmt: skip
    if ablate is not None:
        require_compiler("--ablate")
    gates = parse_gates(fail_over or "p99")
    evaluated = read_scores(quality) if quality is not None else None
    total = parse_milliseconds(budget)
    check_files(junit, summary)
    outputs = Outputs(out.absolute().parent, names(out), force) if out is not None else None
    engine = load(package, 1 if case is None else case.sessions)
    try:
        shape = tick_shape(engine.manifest)
        allowed = Budget(total, shape.duration_ms)
        if allowed.step_ms <= 0:
            raise UsageError(
                f"a budget of {total:g} ms leaves no time for a step",
                where="--budget",
                fix=f"a tick alone takes {shape.duration_ms} ms to fill: allow more",
            )
        left_out = [] if ablate is None or checkpoint is None else check_ablation(engine.manifest, checkpoint, ablate)
        chosen = choose(engine, shape, case, audio, video, fps, text, seconds, clock)
        case = chosen.case
        inputs = {"what": chosen.what, "clock": case.clock, "seed": seed}
        every = None if no_kernels else kernels_every
        sat = Sittings(package, loaded, case, shape, seed, every, sittings) if sittings else None
        with progress(as_json) as report, background_load(case.load, package):
            view = profile_engine(
                engine,
                Show(engine, case, shape, seed, chosen.recording),
                allowed,
                package=package,
                inputs=inputs,
                settings=settings,
                startup_runs=startup_runs,
                kernels_every=every,
                sittings=sat,
                report=report,
                evaluated=evaluated,
            )
            if ablate is not None and checkpoint is not None:
                add_ablation(view, engine, checkpoint, left_out, load, case, shape, report)
            if find_sessions:
                engine.close()
                add_sessions_held(view, package, load, case, shape, allowed.step_ms, report)
    finally:
        engine.close()
    verdicts = check_gates(view, gates)
    view["gate"] = gate_records(verdicts)
    add_advice(view)
    tables = [*profile_tables(view), *advice_tables(view)]
    if outputs is not None and out is not None:
        with outputs:
            for name, content in texts(out, view, tables).items():
                outputs.write(name, content)
    write_for_ci(view, junit, summary)
    if as_json:
        print_json(view)
    else:
        show(*tables)
    if failed := [str(verdict) for verdict in verdicts if not verdict.passed]:
        note(f"over budget: {'; '.join(failed)}")
        context.exit(1)


def _refuse_beside_compare(context: click.Context) -> None:
    """UsageError for anything that was given and that only a measurement needs."""
    allowed = {"compare", "fail_over", "junit", "summary", "as_json"}
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in allowed and source is not None and source is not ParameterSource.DEFAULT:
            raise UsageError(
                f"{parameter.get_error_hint(context)} is for measuring",
                where="--compare",
                fix="leave it out: a comparison takes two reports, --fail-over, --junit, --summary and --json",
            )

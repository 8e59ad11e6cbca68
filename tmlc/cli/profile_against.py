"""`tmlc profile A.tmlc --against B.tmlc`: two packages in one process, tick by tick in turns, and a gate for CI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tmlc.cli.common import note, print_json, progress, show
from tmlc.cli.inputs import tick_shape
from tmlc.cli.outputs import Outputs
from tmlc.cli.profile_compare import parse_percent

if TYPE_CHECKING:
    from tmlc.report.scenario.case import Case
    from tmlc.runtimes.core.engine import Engine

SECONDS = 80.0
ALONE = (
    *("audio", "video", "fps", "text", "clock", "budget", "startup_runs", "sittings", "no_kernels", "kernels_every"),
    *("find_sessions", "ablate", "checkpoint", "quality", "junit", "summary"),
)
"""Options of a profile that mean nothing here."""


def against_package(
    context: click.Context,
    load: Callable[[Path, int], Engine],
    a: Path,
    b: Path,
    case: Case | None,
    seconds: float | None,
    seed: int,
    fail_over: str | None,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Play both, print how B differs. Exit code 1 when B is slower by more than `fail_over` beyond the interval."""
    from tmlc.report.compare import compare_tables, slower
    from tmlc.report.interleave import against, interleave
    from tmlc.report.profile.file import profile_text
    from tmlc.report.scenario.inputs import busy_case
    from tmlc.report.scenario.load import background_load
    from tmlc.report.tables import grid, plain_text

    share = parse_percent(fail_over) if fail_over is not None else None
    files = [] if out is None else [f"{out.name}.json", f"{out.name}.txt"]
    outputs = None if out is None else Outputs(out.absolute().parent, files, force)
    sessions = 1 if case is None else case.sessions
    with load(a, sessions) as one, load(b, sessions) as two:
        shape = tick_shape(one.manifest)
        played = busy_case(one, shape, SECONDS) if case is None else case
        if seconds is not None:
            played = played.model_copy(update={"seconds": seconds})
        with progress(as_json) as report, background_load(played.load, a):
            found = interleave(
                one, two, played, shape, seed, lambda done, of: report("playing both in turns", done, of)
            )
        names = [{"package": str(path), "digest": engine.digest} for path, engine in ((a, one), (b, two))]
    view = against(names[0], names[1], found)
    failed = slower(view, share) if share is not None else []
    view["fail_over"] = None if share is None else {"share": share, "failed": failed}
    tables = [*compare_tables(view), grid([("outputs", view["outputs"]["says"])])]
    if outputs is not None and out is not None:
        with outputs:
            outputs.write(files[0], profile_text(view))
            outputs.write(files[1], plain_text(tables))
    if as_json:
        print_json(view)
    else:
        show(*tables)
    if failed:
        note(f"slower by more than {fail_over}: {', '.join(failed)}")
        context.exit(1)

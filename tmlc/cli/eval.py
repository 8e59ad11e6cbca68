"""`tmlc eval`: what a compiled interaction model does in conversation, scored."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from tmlc.cli.common import THREADS, note, print_json, progress, require_compiler, show, verb
from tmlc.errors import UsageError

_PATH = click.Path(path_type=Path)
PRECISIONS = ("fp32", "bf16", "int8", "int4")
"""What --all-targets compiles a checkpoint to on this machine's CPU; the first is what the others are held against."""


@verb(
    "eval",
    example="""
tmlc eval nano.tmlc
tmlc eval nano.tmlc --tasks turn_taking,barge_in --episodes 100 -o failures/
tmlc eval nano.tmlc --min-score 90% --json
tmlc eval fp32.tmlc int8.tmlc int4.tmlc
tmlc eval nano/ --all-targets
""",
)
@click.argument("models", metavar="PACKAGE...", nargs=-1, required=True, type=_PATH)
@click.option("--tasks", metavar="A,B,…", help="Only these tasks.  [default: all ten]")
@click.option("--episodes", type=click.IntRange(1, 10000), default=40, show_default=True, help="Of each task.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of the first episode.")
@click.option("--sessions", type=click.IntRange(1, 256), default=16, show_default=True, help="Ticked together.")
@click.option("--all-targets", is_flag=True, help="PACKAGE is a checkpoint: compile it to each precision and compare.")
@click.option("--min-score", metavar="PART", help="Exit code 1 when a score is below it, as 90%.")
@click.option("-o", "--out", type=_PATH, metavar="DIR", help="Write audio and transcripts of failures here.")
@THREADS
def command(
    models: tuple[Path, ...], tasks: str | None, episodes: int, seed: int, sessions: int, all_targets: bool,
    min_score: str | None, out: Path | None, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Play made-up conversations with exact labels to the model in PACKAGE, and score what it does.

    With several packages, scores are compared with the first one's. Exit code 1 when --min-score is not kept, or
    when a precision costs more than it may (1 point, int4 3).
    """
    from tmlc.cli.bench import parse_part
    from tmlc.eval.suite import SCHEMA, chosen_tasks
    from tmlc.eval.view import below, comparison, fallen, tables

    names = chosen_tasks(tasks)
    least = None if min_score is None else parse_part(min_score, "--min-score")
    settings = {"tasks": names, "episodes": episodes, "seed": seed}
    with progress(as_json) as report, tempfile.TemporaryDirectory(prefix="tmlc-eval-") as scratch:
        packages = _compiled(models, Path(scratch)) if all_targets else list(models)
        views = []
        for number, package in enumerate(packages):
            folder = out if out is None or len(packages) == 1 else out / f"{number}-{package.stem}"
            views.append(_evaluate(package, sessions, threads, folder, report, settings))
    broken = ([] if least is None else below(views, least)) + fallen(views)
    if as_json:
        print_json(views[0] if len(views) == 1 else {"schema": SCHEMA, "models": views, "broken": broken})
    else:
        for view in views:
            show(*tables(view))
        if len(views) > 1:
            show(*comparison(views))
    for line in broken:
        note(line)
    if broken:
        click.get_current_context().exit(1)


def _evaluate(
    package: Path, sessions: int, threads: int | None, folder: Path | None, report: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    import tmlc
    from tmlc.eval.failures import Failures
    from tmlc.eval.suite import evaluate

    failures = None if folder is None else Failures(folder)
    with tmlc.load(package, threads=threads, sessions=sessions) as engine:
        return evaluate(engine, report=report, failures=failures, model=package, **settings)


def _compiled(models: tuple[Path, ...], scratch: Path) -> list[Path]:
    """Packages of one checkpoint, in each of `PRECISIONS`."""
    if len(models) != 1 or not (models[0] / "config.json").is_file():
        raise UsageError(
            "--all-targets compiles one checkpoint", where=", ".join(map(str, models)),
            fix="name one checkpoint folder, or leave --all-targets out and name the packages to compare",
        )  # fmt: skip
    require_compiler("--all-targets")
    from tmlc.compiler import compile

    packages = []
    for precision in PRECISIONS:
        note(f"  compiling {precision}")
        packages.append(scratch / f"{precision}.tmlc")
        compile(models[0], packages[-1], precision=precision)
    return packages

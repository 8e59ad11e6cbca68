"""`tmlc eval`: what a compiled interaction model does in conversation, scored."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from tmlc.cli.common import THREADS, note, print_json, progress, require_compiler, show, verb
from tmlc.errors import UsageError

_PATH = click.Path(path_type=Path)
EPISODES = 40
TARGETS = (
    ("cpu", "fp32"), ("cpu", "bf16"), ("cpu", "int8"), ("cpu", "int4"),
    ("onnx", "fp32"), ("onnx:contrib", "int8"), ("onnx:contrib", "int4"),
)  # fmt: skip
"""What --all-targets compiles a checkpoint to: all that runs without a GPU. The first is what the others are held
against."""


@verb(
    "eval",
    example="""
tmlc eval nano.tmlc
tmlc eval nano.tmlc --tasks turn_taking,barge_in --episodes 100 -o failures/
tmlc eval nano.tmlc --min-score 90% --json
tmlc eval fp32.tmlc int8.tmlc int4.tmlc
tmlc eval nano/ nano.tmlc
tmlc eval nano/ --all-targets
tmlc eval nano.tmlc --data full-duplex-bench/
""",
)
@click.argument("models", metavar="PACKAGE...", nargs=-1, required=True, type=_PATH)
@click.option("--tasks", metavar="A,B,…", help="Only these tasks, or these sets of --data.  [default: all]")
@click.option("--episodes", type=click.IntRange(1, 10000), help="Of each task.  [default: 40, and all of --data]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of the first episode.")
@click.option("--sessions", type=click.IntRange(1, 256), default=16, show_default=True, help="Ticked together.")
@click.option("--all-targets", is_flag=True, help="PACKAGE is a checkpoint: compile it and compare.")
@click.option("--data", type=_PATH, metavar="DIR", help="Play data of Full-Duplex-Bench or RepCount instead.")
@click.option("--min-score", metavar="PART", help="Exit code 1 when a score is below it, as 90%.")
@click.option(
    "-o",
    "--out",
    type=_PATH,
    metavar="DIR",
    help="Write audio and transcripts of failures here, over those of the same name.",
)
@THREADS
def command(
    models: tuple[Path, ...], tasks: str | None, episodes: int | None, seed: int, sessions: int, all_targets: bool,
    data: Path | None, min_score: str | None, out: Path | None, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Play made-up conversations with exact labels to the model in PACKAGE, and score what it does. A checkpoint's
    folder is played in PyTorch, as it is.

    With --data, recordings of others are played, and what the model says is counted and timed; there is no score.
    With several packages, scores are compared with the first one's. Exit code 1 when --min-score is not kept, or
    when a precision costs more than it may (1 point, int4 3).
    """
    from tmlc.cli.bench import parse_part
    from tmlc.eval.suite import SCHEMA
    from tmlc.eval.view import below, comparison, data_tables, fallen, tables

    if data is not None and (min_score is not None or out is not None):
        raise UsageError(
            "recordings of others have rates and times and no score", where="--data",
            fix="leave --min-score and -o out; --json has every figure",
        )  # fmt: skip
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError("the output is not a folder", where=str(out), fix="give a folder with -o")
    if len(models) > 1:
        _check(models)
    play = _tasks(tasks, episodes, seed) if data is None else _recordings(data, tasks, episodes, seed)
    least = None if min_score is None else parse_part(min_score, "--min-score")
    with progress(as_json) as report, tempfile.TemporaryDirectory(prefix="tmlc-eval-") as scratch:
        packages = _compiled(models, Path(scratch)) if all_targets else list(models)
        views = []
        for number, package in enumerate(packages):
            folder = out if out is None or len(packages) == 1 else out / f"{number}-{package.stem}"
            views.append(_evaluate(package, sessions, threads, folder, report, play))
    scored = views if data is None else []
    broken = ([] if least is None else below(scored, least)) + fallen(scored)
    if as_json:
        print_json(views[0] if len(views) == 1 else {"schema": SCHEMA, "models": views, "broken": broken})
    else:
        for view in views:
            show(*(tables(view) if data is None else data_tables(view)))
        if len(scored) > 1:
            show(*comparison(scored))
    for line in broken:
        note(line)
    if broken:
        click.get_current_context().exit(1)


def _check(models: tuple[Path, ...]) -> None:
    """Opens every package once: a wrong path is said before the first of them is played for minutes."""
    from tmlc.package.reader import open_package

    for model in models:
        if not (model / "config.json").is_file():
            with open_package(model):
                pass


def _evaluate(
    package: Path, sessions: int, threads: int | None, folder: Path | None, report: Any,
    play: Callable[..., dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    import tmlc
    from tmlc.eval.failures import Failures

    extra = {} if folder is None else {"failures": Failures(folder)}
    if not (package / "config.json").is_file():
        with tmlc.load(package, threads=threads, sessions=sessions) as engine:
            return play(engine, report=report, model=package, **extra)
    require_compiler("a checkpoint that is not compiled")
    from tmlc.eval.eager import open_model
    from tmlc.ir.run import one_thread

    with one_thread(), open_model(package, sessions) as engine:
        return play(engine, report=report, model=package, **extra)


def _tasks(tasks: str | None, episodes: int | None, seed: int) -> Callable[..., dict[str, Any]]:
    """Plays the made-up conversations; UsageError for a task that does not exist."""
    from tmlc.eval.suite import chosen_tasks, evaluate

    return partial(evaluate, tasks=chosen_tasks(tasks), episodes=episodes or EPISODES, seed=seed)


def _recordings(data: Path, sets: str | None, most: int | None, seed: int) -> Callable[..., dict[str, Any]]:
    """Plays the recordings in a folder; an error where they, or their labels, are not as they should be."""
    from tmlc.eval.data import find_sets
    from tmlc.eval.data_rules import evaluate_data

    return partial(evaluate_data, sets=find_sets(data, sets, most), seed=seed)


def _compiled(models: tuple[Path, ...], scratch: Path) -> list[Path]:
    """Packages of one checkpoint, for each of `TARGETS`; TargetError where what a target needs is not
    installed."""
    if len(models) != 1 or not (models[0] / "config.json").is_file():
        raise UsageError(
            "--all-targets compiles one checkpoint", where=", ".join(map(str, models)),
            fix="name one checkpoint folder, or leave --all-targets out and name the packages to compare",
        )  # fmt: skip
    require_compiler("--all-targets")
    from tmlc.compiler import compile

    packages = []
    for target, precision in TARGETS:
        note(f"  compiling {target} {precision}")
        packages.append(scratch / f"{target.replace(':', '-')}-{precision}.tmlc")
        compile(models[0], packages[-1], target=target, precision=precision)
    return packages

"""What verbs share: the options `--json` and `--debug`, JSON on stdout, progress and notes on stderr, safe
outputs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmlc import json_text
from tmlc.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
FORCE = click.option("--force", is_flag=True, help="Replace what is already at the output path.")
THREADS = click.option(
    "--threads",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Kernel threads. Outputs do not depend on it.  [default: the machine's cores]",
)
PIN = click.option("--pin", is_flag=True, help="Tie each kernel thread but the caller's to a core of its own.")
HUGE_PAGES = click.option(
    "--huge-pages", is_flag=True, help="Copy the weights into large pages: slower load, faster ticks."
)
KERNEL_CACHE = click.option(
    "--kernel-cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of yours that keeps the kernels a TensorRT package compiles while it is loaded.",
)
PORTABLE_BITS = click.option(
    "--portable-bits",
    is_flag=True,
    help="Outputs with the same bits on every machine; without it, last bits depend on the instruction set.",
)


def verb(name: str | None = None, *, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A click command with --json and --debug, and `example` lines at the end of its help."""
    lines = "\n".join(f"  {line}" for line in example.strip().splitlines())

    def wrap(function: Callable[..., Any]) -> click.Command:
        command = click.command(name, epilog=f"\b\nExamples:\n{lines}")(JSON(DEBUG(function)))
        command.params = command.params[2:] + command.params[:2]  # the two common options last in the help
        return command

    return wrap


def print_json(value: Any) -> None:
    """One JSON document on stdout, stable in the order of its keys."""
    click.echo(json_text.dumps(value, indent=2, allow_nan=False))


def stdout_console() -> Console:
    """Where tables go: coloured on a terminal, plain and 110 columns wide in a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110, highlight=False, markup=False)


def show(*parts: RenderableType) -> None:
    """Print tables and lines on stdout."""
    console = stdout_console()
    for part in parts:
        console.print(part)


def note(text: str) -> None:
    """A line for a person, on stderr."""
    click.echo(text, err=True)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Progress on stderr: yields `report(stage, done, total)`; a bar on a terminal, a line a stage
    elsewhere.
    """
    if quiet:
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        seen: set[str] = set()

        def line(stage: str, done: int, total: int) -> None:
            if stage not in seen:
                seen.add(stage)
                note(f"  {stage}")

        yield line
        return
    bar = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=max(total, 1))
        bar.update(tasks[stage], completed=done, total=max(total, 1))

    with bar:
        yield report


def help_without_verb(context: click.Context) -> None:
    """The help of a group on stderr, and exit code 2, when no verb of it was named."""
    if context.invoked_subcommand is None:
        note(context.get_help())
        context.exit(2)


def check_output(path: Path, force: bool, *, folder: bool = False) -> None:
    """Refuse, before any work, a place that the output cannot have.

    Something stands there (a link that leads nowhere is something, too) and --force was not given; what stands there is
    not what --force replaces, a file by a file and a folder by a folder; or nothing can be written into the folder
    around it.
    """
    if os.path.lexists(path):
        if not force:
            raise UsageError(
                "the output already exists",
                where=str(path),
                fix="choose another path, or add --force to replace it",
            )
        if path.exists() and not (path.is_dir() if folder else path.is_file()):
            stands = "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"
            raise UsageError(
                f"the output is {stands}, and --force replaces only a {'folder' if folder else 'file'} here",
                where=str(path),
                fix="choose another path, or remove it yourself",
            )
    check_around(path)


def check_around(path: Path) -> None:
    """Refuse, before any work, a place around which there is no folder to write into, nor one to make it in."""
    around = next(parent for parent in path.absolute().parents if parent.exists())
    if not around.is_dir():
        raise UsageError("the output's parent is not a folder", where=str(around), fix="choose another path")
    if not os.access(around, os.W_OK | os.X_OK):
        raise UsageError("nothing can be written there", where=str(around), fix="choose another path")


def require(purpose: str, extra: str, **modules: str) -> None:
    """UsageError with the command that installs it when one of `modules` (name to import → its name for people), which
    the extra brings, is missing.
    """
    for module, name in modules.items():
        if find_spec(module) is None:
            raise UsageError(
                f"{purpose} needs {name}, which is not installed",
                fix=f"install it with: pip install 'tmlc[{extra}]'",
            )


def require_compiler(purpose: str) -> None:
    """The same for PyTorch, which the compiler needs."""
    require(purpose, "compile", torch="PyTorch")

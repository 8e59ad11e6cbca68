"""`tmlc inspect`: what is in a package or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from tmlc.cli.common import print_json, require_compiler, show, verb
from tmlc.errors import IRError, UsageError


@verb(
    "inspect",
    example="""
tmlc inspect nano.tmlc
tmlc inspect nano.tmlc --ir decode
tmlc inspect nano.tmlc --json | jq .manifest.memory
tmlc inspect nano/ --tensors
tmlc inspect nano/ --why-miss
tmlc inspect --diff passes/02_canonicalize.fold_constants.ir passes/03_route.fuse_router.ir
tmlc inspect --diff old.tmlc new.tmlc
""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--ir", "method", metavar="METHOD", help="Print the program of one method (or: all) instead.")
@click.option("--tensors", is_flag=True, help="List every tensor of a checkpoint.")
@click.option("--why-miss", is_flag=True, help="Say why the last compilation of a checkpoint was not in the cache.")
@click.option(
    "--diff", "other", type=click.Path(path_type=Path), metavar="A", help="What changed in the program from A to PATH."
)
def command(
    path: Path, method: str | None, tensors: bool, why_miss: bool, other: Path | None, as_json: bool
) -> None:
    """Show a package (methods, states, passes, memory, kernel calls) or a checkpoint folder (config,
    tensors).
    """
    if why_miss:
        _why_miss(path, as_json)
        return
    if not path.exists():
        raise UsageError("no such file or folder", where=str(path), fix="give a .tmlc package or a checkpoint folder")
    if other is not None:
        _diff(other, path, as_json)
        return
    if (path / "config.json").is_file():
        _checkpoint(path, method, tensors, as_json)
    else:
        _package(path, method, tensors, as_json)


def _why_miss(path: Path, as_json: bool) -> None:
    """PATH: a checkpoint, or a package by the place where it was last written."""
    from tmlc.cache import CompileCache, cache_folder
    from tmlc.report.compile_view import lookup_tables

    folder = cache_folder()
    if folder is None:
        raise UsageError("the cache is off", where="TMLC_CACHE=off", fix="unset TMLC_CACHE and compile again")
    lookup = CompileCache(folder).why_miss(path)
    if lookup is None:
        raise UsageError(
            f"the cache in {folder} knows no compilation of it",
            where=str(path),
            fix="compile it first; --no-cache, --dump and --stop-after leave no trace in the cache",
        )
    if as_json:
        print_json(lookup.to_json())
    else:
        show(*lookup_tables(lookup.to_json()))


def _diff(before: Path, after: Path, as_json: bool) -> None:
    """Two packages, two files that --dump wrote, or one of each."""
    from tmlc.ir.diff import diff_programs
    from tmlc.report.package_view import diff_lines, program_text

    texts = program_text(before), program_text(after)
    try:
        view = diff_programs(*texts)
    except IRError as error:
        error.where = f"{error.where}, {before} or {after}".removeprefix(", ")
        raise
    if as_json:
        print_json(view)
    else:
        click.echo("\n".join(diff_lines(view)))


def _package(path: Path, method: str | None, tensors: bool, as_json: bool) -> None:
    from tmlc.package.reader import open_package
    from tmlc.report.package_view import describe_package, method_ir, package_tables

    if tensors:
        raise UsageError("--tensors is for checkpoints", where=str(path), fix="leave it out")
    with open_package(path) as package:
        if method is not None:
            text = method_ir(package, method)
            if as_json:
                print_json({"method": method, "ir": text})
            else:
                click.echo(text, nl=not text.endswith("\n"))
            return
        view = describe_package(package)
    if as_json:
        print_json(view)
    else:
        show(*package_tables(view, path))


def _checkpoint(path: Path, method: str | None, tensors: bool, as_json: bool) -> None:
    require_compiler("inspecting a checkpoint")
    from tmlc.report.package_view import checkpoint_tables, describe_checkpoint

    if method is not None:
        raise UsageError("--ir is for packages", where=str(path), fix="compile the checkpoint first, or leave it out")
    view = describe_checkpoint(path)
    if as_json:
        print_json(view)
    else:
        show(*checkpoint_tables(view, path, tensors))

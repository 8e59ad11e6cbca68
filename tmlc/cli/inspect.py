"""`tmlc inspect`: what is in a package or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from tmlc.cli.common import print_json, require_compiler, show, verb
from tmlc.errors import UsageError


@verb(
    "inspect",
    example="""
tmlc inspect nano.tmlc
tmlc inspect nano.tmlc --ir decode
tmlc inspect nano.tmlc --json | jq .manifest.memory
tmlc inspect nano/ --tensors
""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--ir", "method", metavar="METHOD", help="Print the program of one method (or: all) instead.")
@click.option("--tensors", is_flag=True, help="List every tensor of a checkpoint.")
def command(path: Path, method: str | None, tensors: bool, as_json: bool) -> None:
    """Show a package (methods, states, passes, memory, kernel calls) or a checkpoint folder (config,
    tensors).
    """
    if not path.exists():
        raise UsageError("no such file or folder", where=str(path), fix="give a .tmlc package or a checkpoint folder")
    if (path / "config.json").is_file():
        _checkpoint(path, method, tensors, as_json)
    else:
        _package(path, method, tensors, as_json)


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

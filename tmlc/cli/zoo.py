"""`tmlc zoo`: the reference models; lists them and writes a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from tmlc.cli.common import DEBUG, FORCE, JSON, check_output, print_json, progress, require_compiler, show


@click.group("zoo", epilog="\b\nExamples:\n  tmlc zoo list\n  tmlc zoo create nano --seed 0 -o nano/")
def command() -> None:
    """Reference models: list the presets, or create a checkpoint of one with random weights."""


@command.command("list", epilog="\b\nExamples:\n  tmlc zoo list\n  tmlc zoo list --json")
@JSON
@DEBUG
def list_presets(as_json: bool) -> None:
    """List the presets with their sizes."""
    from tmlc.report.tables import megabytes, table
    from tmlc.report.zoo_view import presets

    rows = presets()
    if as_json:
        print_json(rows)
        return
    found = table("presets", "preset", "parameters", "active", "float32", "layers", "experts", "context", "what for")
    for row in rows:
        found.add_row(
            row["name"],
            _count(row["parameters"]),
            _count(row["active_parameters"]),
            megabytes(row["parameters"] * 4),
            str(row["layers"]),
            row["experts"],
            str(row["context"]),
            row["purpose"],
        )
    show(found)


@command.command(
    "create",
    epilog="\b\nExamples:\n  tmlc zoo create nano -o nano/\n  tmlc zoo create small --dtype bfloat16 -o small/",
)
@click.argument("preset")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder of the checkpoint.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Random weights; same seed, same bytes.",
)
@click.option(
    "--shard-mb",
    type=click.IntRange(1, 100_000),
    default=2000,
    show_default=True,
    help="Largest shard, in MB.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of matrices and embeddings.",
)
@FORCE
@JSON
@DEBUG
def create(
    preset: str,
    out: Path,
    seed: int,
    shard_mb: int,
    dtype: Literal["float32", "bfloat16"],
    force: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint of PRESET with random weights, in the Hugging Face folder form."""
    require_compiler("creating a checkpoint")
    from tmlc.report.zoo_view import create_preset

    check_output(out, force)
    with progress(as_json) as report:
        result: dict[str, Any] = create_preset(preset, seed, out, shard_mb * 1_000_000, dtype, force, report)
    if as_json:
        print_json(result)
    else:
        size = f"{_count(result['parameters'])} parameters in {result['shards']} shard(s)"
        click.echo(f"{out}: {preset}, seed {seed}, {size}")


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)

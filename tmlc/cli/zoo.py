"""`tmlc zoo`: the reference models; lists them and writes a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from tmlc.cli.common import (
    DEBUG,
    FORCE,
    JSON,
    check_output,
    help_without_verb,
    print_json,
    progress,
    require_compiler,
    show,
)
from tmlc.errors import UsageError


@click.group(
    "zoo",
    invoke_without_command=True,
    subcommand_metavar="VERB [ARGS]...",
    epilog="\b\nExamples:\n  tmlc zoo list\n  tmlc zoo create nano --seed 0 -o nano/",
)
@click.pass_context
def command(context: click.Context) -> None:
    """Reference models: list them, or create a checkpoint of one, with random weights or with trained ones."""
    help_without_verb(context)


@command.command("list", epilog="\b\nExamples:\n  tmlc zoo list\n  tmlc zoo list --json")
@JSON
@DEBUG
def list_presets(as_json: bool) -> None:
    """List the models with their sizes."""
    require_compiler("counting parameters")
    from tmlc.report.tables import table
    from tmlc.report.zoo_view import models

    rows = models()
    if as_json:
        print_json(rows)
        return
    titles = ("model", "weights", "parameters", "active", "float32", "layers", "experts", "context", "what for")
    found = table("models", *titles)
    for row in rows:
        found.add_row(row["name"], row["weights"], *_sizes(row), row["purpose"])
    show(found)


def _sizes(row: dict[str, Any]) -> list[str]:
    from tmlc.report.tables import megabytes

    if row["parameters"] is None:
        return ["–"] * 6
    counts = [_count(row["parameters"]), _count(row["active_parameters"]), megabytes(row["parameters"] * 4)]
    return [*counts, str(row["layers"]), row["experts"], str(row["context"])]


@command.command(
    "create",
    short_help="Write a checkpoint of a model.",
    epilog="\b\nExamples:\n  tmlc zoo create nano -o nano/\n  tmlc zoo create small --dtype bfloat16 -o small/"
    "\n  tmlc zoo create interaction-nano -o interaction-nano/",
)
@click.argument("model")
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
@click.pass_context
def create(
    context: click.Context,
    model: str,
    out: Path,
    seed: int,
    shard_mb: int,
    dtype: Literal["float32", "bfloat16"],
    force: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint of MODEL in the Hugging Face folder form: a preset with random weights, or the trained weights
    that come with tmlc."""
    require_compiler("creating a checkpoint")
    from tmlc.model_zoo.interaction.shipped import SHIPPED
    from tmlc.report.zoo_view import create_preset, create_trained

    check_output(out, force, folder=True)
    if model in SHIPPED:
        given = [name for name in ("seed", "shard_mb", "dtype") if context.get_parameter_source(name) is not _DEFAULT]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise UsageError(f"the weights of {model} are trained and copied as they are", where=option,
                             fix=f"leave {option} out, or create a preset with random weights")  # fmt: skip
        result = create_trained(model, out, force)
    else:
        with progress(as_json) as report:
            result = create_preset(model, seed, out, shard_mb * 1_000_000, dtype, force, report)
    if as_json:
        print_json(result)
    else:
        origin = "trained weights" if result["seed"] is None else f"seed {seed}"
        size = f"{_count(result['parameters'])} parameters in {result['shards']} shard(s)"
        click.echo(f"{out}: {model}, {origin}, {size}")


_DEFAULT = ParameterSource.DEFAULT


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
